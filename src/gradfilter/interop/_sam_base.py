"""What SAM and GSAM share: an optimizer around another one, whose step runs a closure twice."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import Parameter, signature
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradfilter import _tree
from gradfilter._types import Transform
from gradfilter.interop._module_view import ModuleView, module_of
from gradfilter.interop._passes import all_finite, forward_backward, tensors_of
from gradfilter.interop._perturbed_pass import SameSurroundings, transform_gradients

PUBLISHED = {"old_p", "old_g", "e_w"}
"""What the published classes keep per parameter from one of their passes to the other."""


class TwoPassOptimizer(Optimizer):
    """Runs a closure twice, transforms the gradients, and lets the base optimizer apply them.

    Its ``param_groups`` and ``state`` are the base optimizer's own, so that schedulers may be
    given either of the two.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Optimizer,
        model: nn.Module | None,
        scaler: torch.amp.GradScaler | None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None,
    ) -> None:
        if scaler is not None and no_sync is not None:
            raise ValueError(
                "Expected scaler or no_sync, found both: ranks would not agree which steps to "
                "skip. Use bfloat16 autocast, which needs no scaler."
            )
        check_steps_alone(type(self).__name__, base_optimizer, "Use one that needs no closure.")
        listed = tensors_of(params)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base_optimizer, self.model, self.scaler = base_optimizer, model, scaler
        self.no_sync = nullcontext if no_sync is None else no_sync
        self._closure: Callable[[], Any] | None = None
        self._called = model  # by that closure
        self._share()
        self._left = _present(self._params())
        alone = len({id(p) for p in self._params()} - {id(p) for p in listed})
        if alone:
            raise ValueError(
                f"Expected params to hold every parameter of base_optimizer, found {alone} that "
                "are missing. Give both the same ones, for example model.parameters()."
            )

    @abstractmethod
    def _transform(self) -> Transform:
        """What this step makes of the gradients."""

    def set_closure(
        self, loss_fn: Callable[..., Tensor], inputs: Any, targets: Any, **kwargs: Any
    ) -> None:
        """Let the next steps minimise ``loss_fn(model(inputs), targets, **kwargs)``."""
        if self.model is None:
            raise ValueError(
                "Expected a model to call on the inputs, found none. Write "
                "SAM(params, base_optimizer, model=model), or step(closure)."
            )

        criterion = module_of(loss_fn, self.model)
        if criterion is not None:  # its buffers also change once
            self._called = ModuleView(self.model, self.model, criterion)
        else:
            self._called = self.model
        self._closure = forward_backward(
            self.model, partial(loss_fn, **kwargs), inputs, targets, self.scaler
        )

    def step(self, closure: Callable[[], Any] | None = None) -> tuple[Any, Any]:  # type: ignore[override]  # the published result
        """Run the closure here and at the perturbed point, then step the base optimizer.

        Args:
            closure: Runs forward and backward passes, as many as it likes (gradients accumulate;
                they are set to None before), and returns ``(predictions, loss)`` or a loss. With
                a GradScaler it scales the loss itself. None for what `set_closure` was given.

        Returns:
            Predictions and loss of the first pass, detached; predictions None if it gave a loss.

        Raises:
            RuntimeError: No closure was given or set, or gradients were accumulated before.
        """
        called = self._called if closure is None else self.model
        closure = self._closure if closure is None else closure
        if closure is None:
            raise RuntimeError("Expected a closure, found none. Call set_closure or step(closure).")
        self._share()
        params = self._params()
        self._refuse_accumulated(params)
        try:
            return self._step(closure, params, SameSurroundings(params[0].device, called))
        finally:
            self._left = _present(params)

    def _step(
        self, closure: Callable[[], Any], params: list[Tensor], same: SameSurroundings
    ) -> tuple[Any, Any]:
        with same.first(), self.no_sync():
            result = self._run(closure)
        result = _tree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result)
        predictions, loss = result if isinstance(result, tuple) else (None, result)
        if self.scaler is not None:
            # The scaler unscales an optimizer once: this one first, the base after the second pass.
            self.scaler.unscale_(self)
            if self.scaler.is_enabled() and not all_finite(params):
                return predictions, loss

        def second_pass() -> None:
            with same.second(), self._second_sync():
                self._run(closure)
            if self.scaler is not None:
                self.scaler.unscale_(self.base_optimizer)

        transform_gradients(self._transform(), params, second_pass)
        self._settle(params)
        if self.scaler is None:
            self.base_optimizer.step()
        else:
            self.scaler.step(self.base_optimizer)
        return predictions, loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base optimizer's."""
        self.base_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict`, the base optimizer's or a published class's gave.

        The published classes save what their two passes leave behind, and not the state of their
        base optimizer: the former is dropped, and a warning says that the latter is missing.
        """
        state_dict = state_dict.get("base_optimizer", state_dict)  # pytorch_optimizer has it
        states = state_dict["state"]
        own = {key: {k: v for k, v in s.items() if k not in PUBLISHED} for key, s in states.items()}
        if any(states.values()) and not any(own.values()):
            warnings.warn(
                f"{type(self).__name__}: expected the state of "
                f"{type(self.base_optimizer).__name__}, found that of a published SAM or GSAM, "
                "which does not save it: momentum starts afresh. Save base_optimizer.state_dict() "
                "there, and load it into the base optimizer here.",
                stacklevel=3,
            )
        kept = {key: state for key, state in own.items() if state}
        self.base_optimizer.load_state_dict({**state_dict, "state": kept})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copies and pickles, which would lack the base optimizer and the model."""
        name = type(self).__name__
        raise TypeError(
            f"Expected a state_dict() of {name}, found an attempt to copy or pickle the object. "
            f"Make another {name} around the other parameters and load it there."
        )

    def _second_sync(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _settle(self, params: list[Tensor]) -> None:
        """What is left to do with the gradients before they are applied."""

    def _refuse_accumulated(self, params: list[Tensor]) -> None:
        """Refuse gradients of other passes, which the closure cannot repeat where it is run again.

        What the last step left or this object found, and zeros, are dropped as ever.
        """
        found = []
        for p in params:
            old, version = self._left.get(id(p), (None, 0))
            own = old is not None and old() is p.grad
            if p.grad is not None and not (own and p.grad._version == version):
                found.append(p.grad)
        if any(bool(g.any()) for g in found):
            raise RuntimeError(
                f"{type(self).__name__}: expected no gradients before step(closure), whose closure "
                "is run at two points, found some: those of batches outside of it would be lost. "
                "Call zero_grad() first, leave out a backward() before step, and let the closure "
                "run all batches of the step. In Lightning use accumulate_grad_batches=1, or "
                "FilteredModule with sam_perturb in its chain."
            )

    def _run(self, closure: Callable[[], Any]) -> Any:
        self.zero_grad()
        with torch.enable_grad():
            return closure()

    def _share(self) -> None:
        # Loading a state makes new lists in the base optimizer.
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _present(params: list[Tensor]) -> dict[int, tuple[ref[Tensor], int]]:
    """The gradients there are, by parameter: each tensor and its version, kept alive by nobody."""
    return {id(p): (ref(p.grad), p.grad._version) for p in params if p.grad is not None}


def check_steps_alone(name: str, optimizer: Any, fix: str) -> None:
    """Refuse what is no optimizer, and one that computes gradients of its own.

    Args:
        name: Who asks.
        optimizer: To be called without a closure.
        fix: The end of the message to who gave one that needs it.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{name}: expected a torch.optim.Optimizer, found {kind}. Make it first, for example "
            "torch.optim.SGD(model.parameters(), lr=0.1)."
        )
    closure = signature(optimizer.step).parameters.get("closure")
    required = closure is not None and closure.default is Parameter.empty
    if required or isinstance(optimizer, TwoPassOptimizer):
        raise TypeError(
            f"{name}: expected an optimizer that steps on the gradients it finds, found {kind}, "
            f"whose step needs a closure. {fix}"
        )
