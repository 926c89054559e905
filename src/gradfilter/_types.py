"""The vocabulary: what a gradient tree is, and what a link of a chain is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfilter._made import Made, Remade
from gradfilter._overlap import refuse_shared_memory
from gradfilter._readable import differentiated
from gradfilter._tree import as_bool_tensor, device_of, donate_into, select, tree_map

Tree = dict[str, Tensor]
"""One tensor per leaf, keyed by the dotted names of ``nn.Module.named_parameters``."""

Params = Tree
"""The trainable parameters. Frozen ones are absent."""

State = Any
"""What a link remembers between steps: nested dicts whose leaves are tensors."""

Out = dict[str, Any]
"""What a link publishes: some of the global names, and metrics."""

GLOBAL_NAMES = frozenset({"keep", "weights", "rows", "clean_grads"})
"""Published names that later links may use. Every other published name is a metric."""


@dataclass(frozen=True, eq=False)
class Offer:
    """The extra keyword ``offer``: the link with this ``update`` may apply its updates itself.

    It is made to the last link, whose updates nobody else sees. A rule that accepts heeds ``keep``
    and returns new parameters and its new state, both as `Applied`; if they are donated, in the old
    tensors. All others ignore it, and so does a rule inside another link, which has another
    ``update`` than that link.
    """

    update: Callable[..., Any]
    donate: bool


@dataclass(frozen=True, eq=False)
class Applied:
    """New values, where updates or a state that still has to be gated are expected."""

    tree: Any


@dataclass(frozen=True, eq=False)
class Transform(Remade):
    """One link: two pure functions and what is known of them before they run.

    ``init(params) -> state`` and ``update(grads, state, params, **extra) -> (grads, state, out)``.

    The contract. The caller passes gradients of the kind the link takes, the state of the step
    before, and the parameters at which the gradients were taken. The link returns new objects and
    mutates nothing; it ignores every extra keyword it does not know; it never asks the host for
    the value of a tensor. It does not look at ``keep``: whoever applies the update does, once, for
    the parameters and for every state together. (The exception is a rule that takes an `Offer`.)

    Attributes:
        name: How metrics, state dictionaries and errors call this link. Empty for a chain.
        kinds: The signatures the link has, ``"in -> out"`` with in and out among ``rows``,
            ``tree`` and ``update``. Most links have one; some take whatever their place offers.
        init: Makes the first state from the parameters.
        update: The link itself.
        needs: Global names some earlier link has to publish.
        publishes: Every name in ``out``: global names and metrics.
        links: The parts, when this is a chain.
        made: The call of the factory that made it, by which it is pickled.

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
    def core(self) -> Any:
        """What it is called and what it does."""
        return self.name, self.update, self.init

    def __repr__(self) -> str:
        """A chain by its links, a link by its kinds."""
        if self.links:
            return f"chain({', '.join(link.name for link in self.links)})"
        return f"<{self.name}: {self.kind}>"

    @property
    def kind(self) -> str:
        """The signature as text, for example ``rows -> tree``."""
        return " or ".join(self.kinds)

    def metric(self, name: str) -> str:
        """The key under which ``info`` shows a metric of this link."""
        return f"{self.name}/{name}" if self.name else name

    def __call__(
        self, params: Params, state: State, grads: Any, *, donate: bool = False, **extra: Any
    ) -> tuple[Params, State, Out]:
        """Apply one step; a step whose ``keep`` is false changes nothing, bit for bit.

        Args:
            params: The parameters, ``dict[str, Tensor]``.
            state: What ``init`` or the last call returned.
            grads: A GradStack or a stacked dict where the first link takes rows, else a tree.
            donate: Write the results into the tensors of ``params`` and ``state``, which keep
                their storage. The only case in which an input is mutated. No two of them may share
                memory.
            **extra: ``keep`` (a bool tensor to AND with what the links publish), ``count``,
                ``value``, ``grad_fn``, and whatever own links ask for.

        Returns:
            The new parameters, the new state and ``info``: ``keep`` and every metric, tensors all.
            They are part of no autograd graph, unless ``torch.func.grad`` (or another derivative of
            torch.func) runs around the call: it differentiates the step with respect to
            parameters, state, gradients and hyperparameters given as tensors. Rows that a function
            of `microbatch_grads` computes inside are refused: they would count as constants.
        """
        if not all(kind.endswith("-> update") for kind in self.kinds):
            raise TypeError(
                f"Expected a chain that ends in an update rule, found one of kind {self.kind!r}. "
                "End it with sgd(lr), adam(lr), adamw(lr) or rmsprop(lr)."
            )
        offer = Offer((self.links or (self,))[-1].update, donate)
        if donate:
            refuse_shared_memory(params, state)
        # Parameters may come with requires_grad; a step is not part of an ordinary graph. Whoever
        # differentiates with torch.func asks for the derivative by name.
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
        # Whoever keeps a stack should not keep the activations it was computed from.
        release = getattr(grads, "release", None)
        if release is not None:
            release()
        metrics = {self.metric(k): v for k, v in out.items() if k not in GLOBAL_NAMES}
        return new_params, new_state, {"keep": keep, **metrics}
