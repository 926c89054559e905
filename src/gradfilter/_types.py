"""Define the basic types: gradient trees, states, and the transforms of a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter._factory import FactoryCall, MadeByFactory
from gradfilter._overlap import copied_before_writing, refuse_shared_memory
from gradfilter._readable import differentiated
from gradfilter._row_rules import RowRules
from gradfilter._state_rules import StateRules, settled
from gradfilter._tree import as_bool_tensor, device_of, donate_into, select

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


class Kind(StrEnum):
    """The signature of a transform: the form of the gradients that it takes and gives.

    A kind is its text, for example ``rows -> tree``. ``rows`` are a GradStack, ``tree`` is one
    gradient, ``update`` is a change that is added to the parameters.
    """

    takes: str
    gives: str

    def __new__(cls, takes: str, gives: str) -> Kind:
        """Make a member from the two forms."""
        kind = str.__new__(cls, f"{takes} -> {gives}")
        kind._value_ = str(kind)
        kind.takes, kind.gives = takes, gives
        return kind

    ROWS_TO_ROWS = "rows", "rows"
    ROWS_TO_TREE = "rows", "tree"
    ROWS_TO_UPDATE = "rows", "update"
    TREE_TO_TREE = "tree", "tree"
    TREE_TO_UPDATE = "tree", "update"
    UPDATE_TO_UPDATE = "update", "update"

    @property
    def is_update_rule(self) -> bool:
        """Whether gradients become an update."""
        return self.gives == "update" != self.takes


KINDS: dict[str, Kind] = {str(kind): kind for kind in Kind}
"""The kinds by their text. (A compiler does not follow an iteration over the enum.)"""


@dataclass(frozen=True, eq=False)
class Context:
    """The values that a transform may use in addition to gradients, state and parameters.

    Attributes:
        values: By name: the extra keywords of the caller, and all that earlier transforms of the
            chain published, metrics as ``name/metric``. A missing value is None as an attribute.
    """

    values: Mapping[str, Any]

    @property
    def keep(self) -> Tensor | bool | None:
        """Whether the step is applied, a bool (), as far as the earlier transforms know."""
        return self.values.get("keep")

    @property
    def rows(self) -> Any:
        """The latest GradStack of the chain, the one that a reducer has reduced."""
        return self.values.get("rows")

    @property
    def weights(self) -> Tensor | None:
        """The weights (M,) by which the rows were combined."""
        return self.values.get("weights")

    @property
    def clean_grads(self) -> Any:
        """The gradients before `sam_perturb`: a GradStack or a tree."""
        return self.values.get("clean_grads")

    @property
    def reference(self) -> Any:
        """The caller's reference gradient, a tree: for `reference_filter`."""
        return self.values.get("reference")

    @property
    def grad_fn(self) -> Callable[[Params], Any] | None:
        """The caller's function from parameters to gradients."""
        return self.values.get("grad_fn")

    @property
    def count(self) -> Tensor | int | None:
        """The caller's number of the step, for schedules."""
        return self.values.get("count")

    def with_values(self, values: Mapping[str, Any]) -> Context:
        """Return this context with more values, or newer ones."""
        return Context({**self.values, **values})


Compute = Callable[[Any, State, Params, Context], tuple[Any, State, Out]]
"""``compute(grads, state, params, context) -> (grads, state, out)``, pure."""


def all_keep(params: Params, *keeps: Tensor | bool | None) -> Tensor | None:
    """Return whether all of these bools () are true; None if none of them is given."""
    given = [as_bool_tensor(keep, device_of(params)) for keep in keeps if keep is not None]
    return reduce(torch.logical_and, given) if given else None


def apply_updates(
    params: Params,
    state: State,
    updates: Tree,
    new_state: State,
    keep: Tensor | None,
    rules: StateRules | None = None,
) -> tuple[Params, State]:
    """Add updates to the parameters, unless ``keep`` is false: then nothing changes, bit for bit.

    Only states that observe change in a skipped step.

    Args:
        params: The parameters before the step.
        state: The state before the step.
        updates: The update of every parameter.
        new_state: The state after the step.
        keep: A bool (); None to apply the updates without asking.
        rules: The rules for a state that observes.
    """
    new_params = {name: p + updates[name] for name, p in params.items()}
    if keep is None:
        return new_params, new_state
    return select(keep, new_params, params), settled(rules, keep, new_state, state)


@dataclass(frozen=True, eq=False)
class Transform(MadeByFactory):
    """One transform: two pure functions and their description.

    ``init(params) -> state`` and ``update(grads, state, params, **extra) -> (grads, state, out)``.

    The contract. The caller passes gradients of the kind the transform takes, the state of the step
    before, and the parameters at which the gradients were taken. The transform returns new objects
    and mutates nothing; it ignores every unknown extra keyword; it never reads the value of a
    tensor on the host. It does not use ``keep``: the caller that applies the update does, once, for
    the parameters and all states together.

    Attributes:
        name: The name in metrics, state dictionaries and errors. Empty for a chain.
        kinds: The signatures the transform has. Most transforms have one; some take several inputs.
        init: Makes the first state from the parameters.
        compute: The transform itself, ``compute(grads, state, params, context)``. `update` is the
            same with keywords in place of the `Context`.
        needs: The global names that an earlier transform must publish.
        publishes: All names in ``out``: global names and metrics.
        parts: The transforms of a chain; empty for all others.
        made_by: The call of the factory that made it.
        rules: The rules for a state that changes in skipped steps as well; None for others.
        row_rules: The rules of a transform that acts row by row; None if it compares rows.
        recombines: True if, behind a reducer, it combines rows by the ``weights`` of that reducer.
        apply: Computes and applies the updates in one pass, if there is such a way: `with_apply`.
        takes_scaled: True if ``apply`` takes a `ScaledTree` as well.
        scaling: Gives a `ScaledTree` in place of a tree, if there is such a way: `with_scaling`.

    Calling a transform that ends in an update applies it:
    ``transform(params, state, grads, **extra) -> (params, state, info)``.
    """

    name: str
    kinds: tuple[Kind, ...]
    init: Callable[[Params], State]
    compute: Compute
    needs: frozenset[str] = frozenset()
    publishes: frozenset[str] = frozenset()
    made_by: FactoryCall | None = None
    rules: StateRules | None = None
    row_rules: RowRules | None = None
    recombines: bool = False
    # Not arguments: `replace(transform, compute=...)` must not keep what belonged to the old one.
    parts: tuple[Transform, ...] = field(default=(), init=False)
    apply: Callable[..., tuple[Params, State, Out]] | None = field(default=None, init=False)
    takes_scaled: bool = field(default=False, init=False)
    scaling: Compute | None = field(default=None, init=False)

    @property
    @override
    def core(self) -> Any:
        """Everything that the call of a factory determines."""
        return (
            *(self.name, self.compute, self.init, self.kinds),
            *(self.needs, self.publishes, self.rules, self.row_rules, self.recombines),
        )

    @override
    def __repr__(self) -> str:
        """Return the call that made it, or name and kinds if there is none."""
        return f"<{self.name}: {self.kind}>" if self.call is None else str(self.call)

    @property
    def kind(self) -> str:
        """The signature as text, for example ``rows -> tree``."""
        return " or ".join(self.kinds)

    @property
    def is_update_rule(self) -> bool:
        """Whether gradients become an update in some of the kinds."""
        return any(kind.is_update_rule for kind in self.kinds)

    def update(
        self, grads: Any, state: State, params: Params, /, **extra: Any
    ) -> tuple[Any, State, Out]:
        """Transform gradients.

        Args:
            grads: A GradStack or a stacked dict if the transform takes rows, else a tree.
            state: The result of ``init`` or of the last call.
            params: The parameters at which the gradients were taken.
            **extra: ``keep``, ``weights``, ``rows``, ``clean_grads``, ``count``, ``value``,
                ``grad_fn``, ``reference``, and keywords for your own transforms.

        Returns:
            The new gradients (or an update), the new state, and the published values.
        """
        return self.compute(grads, state, params, Context(extra))

    def with_apply(
        self, apply: Callable[..., tuple[Params, State, Out]], *, takes_scaled: bool = False
    ) -> Transform:
        """Return this transform with a function that computes and applies its updates in one pass.

        Args:
            apply: ``apply(grads, state, params, context, *, donate) -> (params, state, out)``. Its
                results are those of `compute` and `apply_updates`, up to rounding. It follows
                ``context.keep`` and every ``keep`` that it publishes. With ``donate`` it may write
                into ``params`` and ``state``. A chain that ends in this transform uses it.
            takes_scaled: True if ``grads`` may be a `ScaledTree`, which a transform before it in a
                chain gives.
        """
        return self._replaced(apply=apply, takes_scaled=takes_scaled)

    def with_scaling(self, scaling: Compute | None) -> Transform:
        """Return this transform with a function that leaves the products of its result to others.

        Args:
            scaling: As `compute`, for a transform that multiplies leaves by factors. It may give a
                `ScaledTree` in place of a tree. A chain uses it before an ``apply`` that takes one.
        """
        return self._replaced(scaling=scaling)

    def with_parts(self, parts: tuple[Transform, ...]) -> Transform:
        """Return this transform as the chain of its parts."""
        return self._replaced(parts=parts)

    @override
    def with_call(self, made_by: FactoryCall) -> Transform:
        """Return the same transform with the call that made it."""
        return self._replaced(made_by=made_by)

    def _replaced(self, **changed: Any) -> Transform:
        new = replace(self)
        kept = {name: getattr(self, name) for name in ("apply", "parts", "takes_scaled", "scaling")}
        for name, value in {**kept, **changed}.items():
            object.__setattr__(new, name, value)
        return new

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
                ``value``, ``grad_fn``, ``reference``, and keywords for your own transforms.

        Returns:
            The new parameters, the new state and ``info``: ``keep`` and every metric, all of them
            tensors. They are not part of an autograd graph, unless ``torch.func.grad`` (or another
            derivative of torch.func) runs around the call: it differentiates the step with respect
            to parameters, state, gradients and hyperparameters given as tensors. Rows that a
            function of `microbatch_grads` computes inside are refused: they would count as
            constants.
        """
        if not all(kind.gives == "update" for kind in self.kinds):
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
        if donate:
            refuse_shared_memory(params, state)
        # Parameters may have requires_grad, but a step is not part of an ordinary graph. With
        # torch.func the derivative is requested explicitly.
        with nullcontext() if differentiated() else torch.no_grad():
            context = Context(extra)
            if self.apply is None:
                updates, new_state, out = self.compute(grads, state, params, context)
                keep = all_keep(params, context.keep, out.get("keep"))
                new_params, new_state = apply_updates(
                    params, state, updates, new_state, keep, self.rules
                )
            else:
                new_params, new_state, out = self.apply(
                    grads, state, params, context, donate=donate
                )
                keep = all_keep(params, context.keep, out.get("keep"))
            if donate:
                old, new = (params, state), (new_params, new_state)
                new, out = copied_before_writing(new, old, out)
                new_params, new_state = donate_into(old, new)
        # A stack that is kept should not hold the activations it was computed from.
        release = getattr(grads, "release", None)
        if release is not None:
            release()
        metrics = {self.metric(k): v for k, v in out.items() if k not in GLOBAL_NAMES}
        kept = as_bool_tensor(True, device_of(params)) if keep is None else keep
        return new_params, new_state, {"keep": kept, **metrics}
