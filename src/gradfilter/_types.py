"""Define the basic types: gradient trees, states, and the transforms of a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter._made import Made, Remade
from gradfilter._overlap import refuse_shared_memory
from gradfilter._readable import differentiated
from gradfilter._tree import as_bool_tensor, device_of, donate_into, select, tree_map

Tree = dict[str, Tensor]
"""One tensor per leaf, keyed by the dotted names of ``nn.Module.named_parameters``."""

Params = Tree
"""The trainable parameters. Frozen ones are absent."""

State = Any
"""The memory of a transform between steps: nested dicts whose leaves are tensors."""

Out = dict[str, Any]
"""The published values of a transform: some of the global names, and metrics."""

GLOBAL_NAMES = frozenset({"keep", "weights", "rows", "clean_grads"})
"""Published names that later transforms may use. Every other published name is a metric."""


@dataclass(frozen=True, eq=False)
class Offer:
    """The extra keyword ``offer``: the transform with this ``update`` may apply its updates itself.

    It is made to the last transform, whose updates no other transform sees. An update rule that
    accepts follows ``keep`` and returns new parameters and its new state, both as `Applied`; if
    they are donated, in the old tensors. All others ignore it. An update rule inside another
    transform also ignores it, because its ``update`` is not the offered one.
    """

    update: Callable[..., Any]
    donate: bool


@dataclass(frozen=True, eq=False)
class Applied:
    """New values in place of updates or of a state that must still be gated."""

    tree: Any


@dataclass(frozen=True, eq=False)
class Transform(Remade):
    """One transform: two pure functions and their description.

    ``init(params) -> state`` and ``update(grads, state, params, **extra) -> (grads, state, out)``.

    The contract. The caller passes gradients of the kind the transform takes, the state of the step
    before, and the parameters at which the gradients were taken. The transform returns new objects
    and mutates nothing; it ignores every unknown extra keyword; it never reads the value of a
    tensor on the host. It does not use ``keep``: the caller that applies the update does, once, for
    the parameters and all states together. (The exception is an update rule that takes an `Offer`.)

    Attributes:
        name: The name in metrics, state dictionaries and errors. Empty for a chain.
        kinds: The signatures the transform has, ``"in -> out"`` with in and out among ``rows``,
            ``tree`` and ``update``. Most transforms have one; some take several inputs.
        init: Makes the first state from the parameters.
        update: The transform itself.
        needs: The global names that an earlier transform must publish.
        publishes: All names in ``out``: global names and metrics.
        links: The transforms of a chain; empty for all others.
        made: The call of the factory that made it, used for pickling.

    Calling a transform that ends in an update applies it:
    ``transform(params, state, grads, **extra) -> (params, state, info)``.
    """

    name: str
    kinds: tuple[str, ...]
    init: Callable[[Params], State]
    update: Callable[..., tuple[Any, State, Out]]
    needs: frozenset[str] = frozenset()
    publishes: frozenset[str] = frozenset()
    links: tuple[Transform, ...] = ()
    made: Made | None = None

    @property
    @override
    def core(self) -> Any:
        """The name and the functions."""
        return self.name, self.update, self.init

    @override
    def __repr__(self) -> str:
        """Return a chain by its transforms, a transform by its kinds."""
        if self.links:
            return f"chain({', '.join(link.name for link in self.links)})"
        return f"<{self.name}: {self.kind}>"

    @property
    def kind(self) -> str:
        """The signature as text, for example ``rows -> tree``."""
        return " or ".join(self.kinds)

    def metric(self, name: str) -> str:
        """Return the key under which ``info`` shows a metric of this transform."""
        return f"{self.name}/{name}" if self.name else name

    def __call__(
        self, params: Params, state: State, grads: Any, *, donate: bool = False, **extra: Any
    ) -> tuple[Params, State, dict[str, Tensor]]:
        """Apply one step; if ``keep`` is false, the step changes no bit.

        Args:
            params: The parameters, ``dict[str, Tensor]``.
            state: The result of ``init`` or of the last call.
            grads: A GradStack or a stacked dict if the first transform takes rows, else a tree.
            donate: True to write the results into the tensors of ``params`` and ``state``, which
                keep their storage. Only then are inputs mutated. No two of them may share memory.
            **extra: ``keep`` (a bool tensor to AND with what the transforms publish), ``count``,
                ``value``, ``grad_fn``, and keywords for your own transforms.

        Returns:
            The new parameters, the new state and ``info``: ``keep`` and every metric, all of them
            tensors. They are not part of an autograd graph, unless ``torch.func.grad`` (or another
            derivative of torch.func) runs around the call: it differentiates the step with respect
            to parameters, state, gradients and hyperparameters given as tensors. Rows that a
            function of `microbatch_grads` computes inside are refused: they would count as
            constants.
        """
        if not all(kind.endswith("-> update") for kind in self.kinds):
            raise TypeError(
                f"Expected a chain that ends in an update rule, found one of kind {self.kind!r}. "
                "End it with sgd(lr), adam(lr), adamw(lr) or rmsprop(lr)."
            )
        if not isinstance(params, Mapping):
            raise TypeError(
                f"Expected update(params, state, rows), found {type(params).__name__} as the first "
                "argument. The order is not that of optax (gradients, state, params): the "
                "parameters come first."
            )
        offer = Offer((self.links or (self,))[-1].update, donate)
        if donate:
            refuse_shared_memory(params, state)
        # Parameters may have requires_grad, but a step is not part of an ordinary graph. With
        # torch.func the derivative is requested explicitly.
        with nullcontext() if differentiated() else torch.no_grad():
            updates, new_state, out = self.update(grads, state, params, offer=offer, **extra)
            gated = "keep" in out or "keep" in extra
            keep = as_bool_tensor(out.get("keep", True), device_of(params))
            keep = keep & as_bool_tensor(extra.get("keep", True), device_of(params))

            def settled(new: Any, old: Any) -> Any:
                if isinstance(new, Applied):
                    return new.tree
                return select(keep, new, old) if gated else new

            if not isinstance(updates, Applied):
                updates = {name: p + updates[name] for name, p in params.items()}
            new_params = settled(updates, params)
            new_state = tree_map(settled, new_state, state)
            if donate:
                new_params = donate_into(params, new_params)
                new_state = donate_into(state, new_state)
        # A stack that is kept should not hold the activations it was computed from.
        release = getattr(grads, "release", None)
        if release is not None:
            release()
        metrics = {self.metric(k): v for k, v in out.items() if k not in GLOBAL_NAMES}
        return new_params, new_state, {"keep": keep, **metrics}
