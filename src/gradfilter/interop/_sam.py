"""Run SAM and ASAM around an optimizer of torch.optim."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import Parameter, signature
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from typing_extensions import override

from gradfilter import _products, _tree
from gradfilter._shards import any_sharded, reshard
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._call_context import (
    HostRandom,
    random_state,
    random_state_restored,
    set_random_state,
)
from gradfilter.grads._module_attributes import Attributes
from gradfilter.grads._state_owners import owners_in
from gradfilter.interop._host_loss import ModuleView, module_of
from gradfilter.transforms._sharpness_aware import DELTA, sam_perturb
from gradfilter.transforms._transform import transform_in_context

# --- One ordinary pass of a model, in place ---


def forward_backward(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    scaler: torch.amp.GradScaler | None,
) -> tuple[Any, Tensor]:
    """Run ``loss_fn(model(inputs), targets)`` and its backward pass; return predictions, loss."""
    predictions = model(inputs)
    loss = loss_fn(predictions, targets)
    scaled = loss if scaler is None else scaler.scale(loss)
    with _tree.no_autocast(loss):  # autocast is meant for forward passes only
        torch.autograd.backward(scaled)
    return predictions, loss


def tensors_of(params: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in parameters of any form that torch.optim takes: groups, named pairs."""
    found = []
    for item in params:
        if isinstance(item, dict):
            own = item["params"]
            found += [own] if isinstance(own, Tensor) else tensors_of(own)
        else:
            found.append(item[1] if isinstance(item, tuple) else item)
    return found


def all_finite(params: list[Tensor]) -> bool:
    """Return whether no gradient has Inf or NaN; waits for the device."""
    grads = [p.grad for p in params if p.grad is not None]
    return all(bool(g.isfinite().all()) for g in grads)


# --- Two passes of a closure, the second at perturbed parameters, which are restored ---


Buffers = dict[tuple[nn.Module, str], tuple[Tensor | None, Tensor | None]]  # object, its values


class SameSurroundings:
    """The random state, buffers and attributes of a first pass, used to run a second pass.

    The second pass draws the same numbers as the first (dropout masks) and starts from the same
    buffers, counters and other attributes. Its changes of all these are discarded.

    Args:
        device: The device whose generator is recorded in addition to the CPU's.
        model: The module whose state is recorded; None for all modules that the first pass calls.
        closure: The function that both passes run. The state of the modules and objects that it
            refers to is recorded as well.
    """

    def __init__(
        self, device: torch.device, model: nn.Module | None, closure: Callable[[], Any]
    ) -> None:
        self._device, self._model = device, model
        owners = list(owners_in(closure, names=True))
        roots = [owner for owner in owners if isinstance(owner, nn.Module)]
        self._known = dict.fromkeys(
            part for root in (*roots, model) if root is not None for part in root.modules()
        )
        modules = {f"module {i}": part for i, part in enumerate(self._known)}
        objects = (("closure", owner) for owner in owners if not isinstance(owner, nn.Module))
        self._random = random_state(device)
        # The states of other modules are recorded when the first pass finds them.
        self._states = [_HostState(Attributes(modules, (), objects), everywhere=True)]
        self._buffers: Buffers = {}
        self._found: set[nn.Module] = set()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Record the state during the first pass."""
        for part in self._known:
            self._buffers |= _buffers(part)
        if self._model is not None:
            yield
            return
        hook = register_module_forward_pre_hook(lambda module, arguments: self._note(module))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def second(self) -> Iterator[None]:
        """Run the second pass from the recorded state."""
        # Parameters that FSDP2 gathered for the first pass are not the perturbed ones.
        reshard((*self._known, *self._found))
        modules = dict.fromkeys(module for module, _ in self._buffers)
        after: Buffers = {}
        for module in modules:
            after |= _buffers(module)
        for state in self._states:
            state.check_large()
        present = [state.present() for state in self._states]
        with random_state_restored(self._device):
            try:
                # If several modules hold a generator, the earliest record is from before its first
                # draw.
                for state in reversed(self._states):
                    state.restore()
                set_random_state(self._random, self._device)
                _restore(self._buffers)
                yield
            finally:
                reshard((*self._known, *self._found))
                for state in present:
                    state.restore()
                _restore(after)

    def _note(self, module: nn.Module) -> None:
        # A module that runs twice has changed its buffers by then, so the first record counts.
        for part in module.modules():
            if part not in self._known and part not in self._found:
                self._found.add(part)
                self._buffers = _buffers(part) | self._buffers
                self._states.append(_HostState(Attributes({"": part}), everywhere=False))


class _HostState:
    """Attributes of modules and objects, and the generators on the host, at one moment."""

    def __init__(self, attributes: Attributes, *, everywhere: bool) -> None:
        self._attributes = attributes
        self._random = HostRandom(attributes.generators, everywhere=everywhere)
        self._values = _values_of(attributes)
        self._large = [(n, t, t._version) for n, t in attributes.tensors if _is_large(t)]

    def check_large(self) -> None:
        """Refuse a second pass if the first one has written into a large tensor."""
        for name, tensor, version in self._large:
            if tensor._version != version:
                raise RuntimeError(
                    f"Expected a first pass of SAM that leaves {name!r} as it is, found it written "
                    "in place: the second pass would see other values. Make it a buffer "
                    "(register_buffer), which is restored, or write it after optimizer.step()."
                )

    def present(self) -> _HostState:
        """Return the state of the same modules, objects and generators now."""
        found = object.__new__(_HostState)
        found._attributes, found._random = self._attributes.present(), self._random.present()
        found._values, found._large = _values_of(found._attributes), []
        return found

    def restore(self) -> None:
        """Set everything back to that moment; lists keep what a pass has logged in them."""
        self._attributes.restore(keep_added=True)
        self._random.restore()
        with torch.no_grad():
            for tensor, version, value in self._values:
                # Writes through .data do not raise the version; comparing waits for a GPU.
                written = tensor._version != version
                if written or (tensor.is_cpu and not torch.equal(tensor, value)):
                    tensor.copy_(value)


FEW = 2**16
"""The size up to which a tensor in an attribute is copied: a state, not the data."""


def _values_of(attributes: Attributes) -> list[tuple[Tensor, int, Tensor]]:
    """Copy the small tensors in attributes, which a pass may write into; not the parameters."""
    return [
        (tensor, tensor._version, tensor.detach().clone())
        for _, tensor in attributes.tensors
        if tensor.numel() <= FEW and _is_state(tensor)
    ]


def _is_large(tensor: Tensor) -> bool:
    return tensor.numel() > FEW and _is_state(tensor)


def _is_state(tensor: Tensor) -> bool:
    return not tensor.requires_grad and not tensor.is_inference()


def _buffers(module: nn.Module) -> Buffers:
    own = module._buffers.items()  # named_buffers omits None and shared buffers
    return {(module, name): (b, None if b is None else b.detach().clone()) for name, b in own}


def _restore(buffers: Buffers) -> None:
    with torch.no_grad():
        for (module, name), (buffer, values) in buffers.items():
            if buffer is not None and values is not None:
                buffer.copy_(values)
            # A module may have replaced the tensor.
            if module._buffers.get(name) is not buffer:
                setattr(module, name, buffer)


def transform_gradients(
    transform: Transform, params: list[Tensor], second_pass: Callable[[], None]
) -> None:
    """Replace every ``p.grad`` by the result of a chain with `sam_perturb`.

    Parameters without a gradient are neither perturbed nor given one. The others have
    their old values, bit for bit, when this returns or raises: they are copied, not recomputed.

    Args:
        transform: A transform or chain of kind ``tree -> tree`` that needs ``grad_fn``.
        params: The parameters, with the gradients of the first pass or None.
        second_pass: Writes the gradients at the present parameters into ``p.grad``.
    """
    used = {str(i): p for i, p in enumerate(params) if p.grad is not None}
    if not used:
        return
    old = {name: p.detach().clone() for name, p in used.items()}
    # Copy, because p.grad may be a view of a bucket that the second pass writes into.
    grads = {name: p.grad.clone() for name, p in used.items() if p.grad is not None}
    if any(g.layout != torch.strided for g in grads.values()):
        raise ValueError("Expected dense gradients, found a sparse one. Use sparse=False.")

    grad_fn = partial(_gradients_at, params=used, old=old, second_pass=second_pass)
    with torch.no_grad():
        found, _, _ = transform.update(grads, transform.init(old), old, grad_fn=grad_fn)
    for i, p in enumerate(params):
        p.grad = found.get(str(i))


def _gradients_at(
    near: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    second_pass: Callable[[], None],
) -> dict[str, Tensor]:
    """Run the second pass at the values ``near``; put the old values back."""
    try:
        _write_values(params, near)
        second_pass()
    finally:
        _write_values(params, old)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in params.items()}


def _write_values(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(values[name])
    # An autocast around both passes would reuse half-precision copies of the old values.
    torch.clear_autocast_cache()


# --- The base of SAM and GSAM: an optimizer around another one, whose step runs a closure twice ---


PUBLISHED = {"old_p", "old_g", "e_w"}
"""The state entries that the published classes store per parameter between their passes."""


class TwoPassOptimizer(Optimizer):
    """Run a closure twice, transform the gradients, and let the base optimizer apply them.

    Its ``param_groups`` and ``state`` are the base optimizer's own, so schedulers can take either
    of the two.
    """

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    base_optimizer: Optimizer
    model: nn.Module | None
    scaler: torch.amp.GradScaler | None

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
        if no_sync is not None and any_sharded(listed):
            raise ValueError(
                f"{type(self).__name__}: expected no_sync=None with parameters that are sharded "
                "over ranks (FSDP2), found one: a pass that sums nothing leaves no p.grad. Leave "
                "it out: all ranks then perturb along the mean of their gradients."
            )
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base_optimizer, self.model, self.scaler = base_optimizer, model, scaler
        self.no_sync: Callable[[], AbstractContextManager[Any]] = (
            nullcontext if no_sync is None else no_sync
        )
        self._closure: Callable[[], Any] | None = None
        self._called = model  # called by that closure
        self._share()
        self._left = _gradient_versions(self._params())
        alone = len({id(p) for p in self._params()} - {id(p) for p in listed})
        if alone:
            raise ValueError(
                f"Expected params to hold every parameter of base_optimizer, found {alone} that "
                "are missing. Give both the same ones, for example model.parameters()."
            )

    @abstractmethod
    def _transform(self) -> Transform:
        """Return the transform of the gradients in this step."""

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
        if criterion is not None:  # its buffers also change only once
            self._called = ModuleView(self.model, self.model, criterion)
        else:
            self._called = self.model
        self._closure = partial(
            forward_backward, self.model, partial(loss_fn, **kwargs), inputs, targets, self.scaler
        )

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure here and at the perturbed point, then step the base optimizer.

        Args:
            closure: Runs any number of forward and backward passes (gradients accumulate; they are
                set to None before), and returns ``(predictions, loss)`` or a loss. With a
                GradScaler it scales the loss itself. None for the closure of `set_closure`.

        Returns:
            The predictions and loss of the first pass, detached; predictions are None if the
            closure returned only a loss.

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
            return self._step(closure, params, SameSurroundings(params[0].device, called, closure))
        finally:
            self._left = _gradient_versions(params)

    def _step(
        self, closure: Callable[[], Any], params: list[Tensor], same: SameSurroundings
    ) -> tuple[Any, Any]:
        with same.first(), self.no_sync():
            result = self._run(closure)
        result = _tree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result)
        predictions, loss = result if isinstance(result, tuple) else (None, result)
        if self.scaler is not None:
            # The scaler unscales an optimizer once: first this one, then the base after the second
            # pass.
            self.scaler.unscale_(self)
            if self.scaler.is_enabled() and not all_finite(params):
                return predictions, loss

        second_pass = partial(self._second_pass, closure, same)
        transform_gradients(self._transform(), params, second_pass)
        self._prepare_gradients(params)
        if self.scaler is None:
            self.base_optimizer.step()
        else:
            self.scaler.step(self.base_optimizer)
        return predictions, loss

    def _second_pass(self, closure: Callable[[], Any], same: SameSurroundings) -> None:
        """Run the closure again with the random numbers and buffers of the first pass."""
        with same.second(), self._second_sync():
            self._run(closure)
        if self.scaler is not None:
            self.scaler.unscale_(self.base_optimizer)

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the base optimizer."""
        self.base_optimizer.zero_grad(set_to_none)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimizer."""
        return self.base_optimizer.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this object, of the base optimizer or of a published class.

        The published classes save temporary values of their two passes, but not the state of their
        base optimizer. The temporary values are discarded, and a warning says that the state is
        missing.
        """
        state_dict = state_dict.get("base_optimizer", state_dict)  # pytorch_optimizer saves it
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

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Refuse copies and pickles, which would lack the base optimizer and the model."""
        name = type(self).__name__
        raise TypeError(
            f"Expected a state_dict() of {name}, found an attempt to copy or pickle the object. "
            f"Make another {name} around the other parameters and load it there."
        )

    def _second_sync(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def _prepare_gradients(self, params: list[Tensor]) -> None:
        """Prepare the gradients before they are applied."""

    def _refuse_accumulated(self, params: list[Tensor]) -> None:
        """Refuse gradients of other passes, which the closure cannot compute at the second point.

        Gradients that the last step left, gradients from before this object, and zeros are
        discarded as usual.
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
        # Loading a state creates new lists in the base optimizer.
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _gradient_versions(params: list[Tensor]) -> dict[int, tuple[ref[Tensor], int]]:
    """Return weak references to the gradients and their versions, by parameter."""
    return {id(p): (ref(p.grad), p.grad._version) for p in params if p.grad is not None}


def check_steps_alone(name: str, optimizer: Any, fix: str) -> None:
    """Refuse an object that is not an optimizer, or an optimizer that computes gradients.

    Args:
        name: The beginning of the error.
        optimizer: The optimizer, which will be called without a closure.
        fix: The advice in the error if the optimizer needs a closure.
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


# --- SAM and ASAM ---


class SAM(TwoPassOptimizer):
    r"""Sharpness-aware minimisation in place: the base optimizer at w, with gradients from w + e.

        SAM:            e = ρ g / (‖g‖ + δ)
        adaptive=True:  e = ρ w² g / (‖|w| g‖ + δ), ASAM with η = 0

    as in `sam_perturb`. ``step`` runs the closure twice with the same dropout masks. Buffer updates
    of the second pass (BatchNorm) are discarded, and the old parameters are copied back, also if
    the closure raises. ``p.grad`` then holds the gradient that was applied.

    Accumulation: a closure may call backward several times; ``step`` sets gradients to None before
    each of its two runs. AMP: give the GradScaler, and call ``scaler.update()`` after ``step`` as
    usual; a gradient with Inf or NaN skips the step. `torch.autocast` may be inside the closure or
    around ``step``. DDP works without changes; with ``no_sync=ddp_model.no_sync`` each rank
    perturbs along its own gradient (m-sharpness) and saves the first synchronisation. FSDP2 works
    without changes, also with a GradScaler, but without ``no_sync``.

    ``rho`` and ``adaptive`` are entries of the parameter groups, as ``lr`` is: set them per group
    (the values of a group stay), change them between steps, save and load them. There is one norm
    over all groups. For an optimizer with its own rho (Adadelta) the entry is ``sam_rho``.

    Args:
        params: The parameters of the base optimizer.
        base_optimizer: Any `torch.optim.Optimizer`; or its class, made with ``**kwargs``.
        rho: The radius ρ >= 0; 0.05 is usual for SAM, 0.5 to 2 for ASAM.
        adaptive: True for ASAM.
        model: The module that `set_closure` calls. Its buffers, counters and generators are
            restored, and those of the modules and objects that the closure refers to; without it,
            also those of the modules that the closure calls (for a compiled module, torch warns
            about the hook that finds them).
        scaler: The GradScaler; a closure of your own scales the loss itself.
        no_sync: A function that makes the context of the first pass.
        **kwargs: Arguments of the base optimizer's class.

    Raises:
        ValueError: rho < 0; parameters of the base optimizer are not in ``params``; both scaler
            and no_sync; no_sync with sharded parameters.
        TypeError: ``**kwargs`` for an optimizer that exists already, or one whose step needs a
            closure.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import SAM
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> base = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> optimizer = SAM(model.parameters(), base, rho=0.5, model=model)
        >>> square = lambda predictions, targets: (predictions - targets).square().sum()
        >>> optimizer.set_closure(square, torch.ones(1, 1), torch.zeros(1, 1))
        >>> predictions, loss = optimizer.step()
        >>> loss.item(), model.weight.item()  # 3 - 2 (3 + 0.5)
        (9.0, -4.0)

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", 2021, https://arxiv.org/abs/2010.01412
        Kwon, Kim, Park, Choi, "ASAM", 2021, https://arxiv.org/abs/2102.11600
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Optimizer | type[Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        params = list(params)
        if isinstance(base_optimizer, type):
            base_optimizer = base_optimizer(params, **kwargs)
        elif kwargs:
            raise TypeError(
                f"Expected no arguments for a base optimizer that is made already, found "
                f"{sorted(kwargs)}. Give them to {type(base_optimizer).__name__} itself."
            )
        sharpness(rho, adaptive)  # refuses an impossible radius here rather than at the first step
        super().__init__(params, base_optimizer, model, scaler, no_sync)
        own = signature(type(base_optimizer)).parameters
        self._entries = {
            f"sam_{name}" if name in own else name: value
            for name, value in (("rho", rho), ("adaptive", adaptive))
        }
        # The values of an earlier SAM around the same optimizer are not the user's.
        earlier = {name: self.defaults[name] for name in self._entries if name in self.defaults}
        self.defaults.update(self._entries)
        for group in self.param_groups:
            for name, value in self._entries.items():
                if name not in group or (name in earlier and group[name] == earlier[name]):
                    group[name] = value
        self._transform()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this object or of the base optimizer; a group keeps missing values."""
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before, strict=True):
            for name in self._entries.keys() & own.keys():
                group.setdefault(name, own[name])

    @override
    def _transform(self) -> Transform:
        rho, adaptive = self._entries.items()
        values = [(group.get(*rho), group.get(*adaptive)) for group in self.param_groups]
        if len(set(values)) == 1:
            return sharpness(*values[0])
        sizes = [len(group["params"]) for group in self.param_groups]
        leaves = [own for own, size in zip(values, sizes, strict=True) for _ in range(size)]
        return _sharpness_by_leaf({str(i): own for i, own in enumerate(leaves)})


def sharpness(rho: float, adaptive: bool) -> Transform:
    """Return the perturbation in the published meaning of ``adaptive``."""
    return sam_perturb(rho, adaptive="asam" if adaptive else None, eta=0.0)


def _sharpness_by_leaf(forms: dict[str, tuple[float, bool]]) -> Transform:
    """Return SAM with a radius and form per leaf: e_i = ρ_i T_i² g_i / (‖T g‖ + δ), T_i 1 or |w_i|.

    Args:
        forms: The pair (ρ, adaptive) of every leaf.
    """
    for rho, adaptive in set(forms.values()):
        sharpness(rho, adaptive)  # refuses impossible values

    def update(
        grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        def scaled(name: str, g: Tensor) -> Tensor:
            g = _tree.at_least_float32(g)
            return params[name].abs() * g if forms[name][1] else g

        along = {name: scaled(name, g) for name, g in grads.items()}
        size = _products.norm(along) + DELTA
        near = {}
        for name, g in along.items():
            w = _tree.at_least_float32(params[name])
            step = (forms[name][0] / size).to(g.dtype)
            near[name] = torch.addcmul(w, scaled(name, g), step).to(params[name].dtype)
        with torch.enable_grad():
            assert context.grad_fn is not None  # `transform_gradients` gives it
            return context.grad_fn(near), state, {"clean_grads": grads}

    return transform_in_context("sam_perturb", "tree -> tree", update, publishes=("clean_grads",))
