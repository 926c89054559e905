"""Make a transform from its two functions, and check its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._row_rules import Join, RowRules, check_joins
from gradfilter._state_rules import Observing
from gradfilter._types import (
    GLOBAL_NAMES,
    KINDS,
    Compute,
    Context,
    Kind,
    Out,
    Params,
    State,
    Transform,
    Tree,
)
from gradfilter.grads._stack import GradStack, as_stack
from gradfilter.schedules._schedules import Schedule

REDUCERS = "mean_rows(), agree_filter() or consensus_filter()"


def no_state(params: Params) -> State:
    """Return the state of a transform without memory."""
    return {}


@factory
def transform(
    name: str,
    kinds: str | Iterable[str],
    update: Callable[..., tuple[Any, State, Out]],
    *,
    init: Callable[[Params], State] = no_state,
    needs: Iterable[str] = (),
    publishes: Iterable[str] = (),
    observes: bool = False,
    joins: Mapping[str, Join] | None = None,
    reads: Iterable[str] = (),
    divisor: Callable[[GradStack], Tensor] | None = None,
) -> Transform:
    """Make a `Transform` whose update first checks kind, names and shapes of its gradients.

    Args:
        name: The name in metrics and errors.
        kinds: One signature such as ``"rows -> tree"``, or several.
        update: ``update(grads, state, params, /, **extra) -> (grads, state, out)``, pure. It gets a
            GradStack when the transform takes rows, also if the caller gave a plain stacked dict.
        init: Makes the first state.
        needs: The global names that an earlier transform must publish.
        publishes: Every key of ``out``.
        observes: True to keep the new state in skipped steps as well: a memory of what was seen,
            such as norms, without which a rule may reject for ever what it no longer remembers.
        joins: For a transform that acts row by row, so that rows may come in
            [parts](../ideas/chains.md#rows-in-parts): for every published value how those of the
            parts are joined. ``"rows"``: one number per row. ``"mean"``: a mean over all rows.
            ``"sum"``: a sum over them. ``"any"``: true if true in some part. ``"same"``: equal in
            every part. ``"shares"``: the weights of a reducer with a divisor. On one gradient, a
            dict says that the transform ignores ``rows``. None: it compares rows.
        reads: The keywords that such a transform of rows reads; it gets no others.
        divisor: For such a reducer, Σ w_m g_m / d: the number d () of a stack, a sum over its rows,
            0 if none takes part. None for a plain sum.

    Raises:
        ValueError: An unknown kind or need; a published value without a join.
        TypeError: update names one of its first three parameters as a keyword that chains pass.

    Examples:
        >>> import torch, gradfilter as gf
        >>> def flip(grads, state, params, /, **extra):
        ...     return {name: -g for name, g in grads.items()}, state, {}
        >>> ascent = gf.chain(gf.transform("flip", "tree -> tree", flip), gf.sgd(0.5))
        >>> params = {"w": torch.zeros(1)}
        >>> ascent(params, ascent.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.5000])}
    """
    _check_names(name, update)
    made = transform_in_context(
        name,
        kinds,
        lambda grads, state, params, context: update(grads, state, params, **context.values),
        init=init,
        needs=needs,
        publishes=publishes,
        row_rules=None if joins is None else RowRules(dict(joins), frozenset(reads), divisor),
    )
    return replace(made, rules=Observing()) if observes else made


def transform_in_context(
    name: str,
    kinds: str | Iterable[str],
    compute: Compute,
    *,
    init: Callable[[Params], State] = no_state,
    needs: Iterable[str] = (),
    publishes: Iterable[str] = (),
    row_rules: RowRules | None = None,
    recombines: bool = False,
) -> Transform:
    """Make a `Transform` as `transform` does, from a function that takes a `Context`."""
    given = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in given:
        if kind not in KINDS:
            raise ValueError(f"{name}: expected kinds among {sorted(KINDS)}, found {kind!r}.")
    parsed = tuple(KINDS[kind] for kind in given)
    unknown = sorted(set(needs) - GLOBAL_NAMES)
    if unknown:
        raise ValueError(
            f"{name}: expected needs among {sorted(GLOBAL_NAMES)}, found {unknown}. A metric is "
            "an extra keyword; say so in an error of your own when it is not there."
        )

    if row_rules is not None and any(kind.takes == "rows" for kind in parsed):
        check_joins(name, row_rules.joins, frozenset(publishes))
    checked = _Checked(name, parsed, compute)
    return Transform(
        *(name, parsed, init, checked, frozenset(needs), frozenset(publishes)),
        row_rules=row_rules,
        recombines=recombines,
    )


@dataclass(frozen=True, eq=False)
class _Checked:
    """A `Compute` that checks its gradients, its result and its state, and keeps their dtypes."""

    name: str
    kinds: tuple[Kind, ...]
    compute: Compute

    def __call__(
        self, grads: Any, state: State, params: Params, context: Context
    ) -> tuple[Any, State, Out]:
        admitted = convert_grads(self.name, self.kinds, grads, params)
        grads, new_state, out = self.compute(admitted, state, params, context)
        check_leaves(f"{self.name}: result", grads, params)
        if not isinstance(grads, GradStack):
            grads = _tree.in_dtypes_of(params, grads)
        try:
            new_state = _tree.in_dtypes_of(state, new_state)
        except (AttributeError, TypeError, ValueError):
            check_states(self.name, state, new_state)
            raise
        return grads, new_state, out


link = transform
"""Another name of `transform`."""


def _check_names(name: str, update: Callable[..., Any]) -> None:
    """Refuse `def update(rows, state, params, **extra)`, to which chains also give ``rows=``."""
    # A scheduled transform is made in every step; under a compiler it has been checked before.
    if torch.compiler.is_compiling():
        return
    try:
        parameters = list(inspect.signature(update).parameters.values())[:3]
    except ValueError:  # a function of C without a signature
        return
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name in GLOBAL_NAMES:
            raise TypeError(
                f"{name}: expected update(grads, state, params, /, **extra), found a parameter "
                f"{parameter.name!r}, which chains also pass as a keyword. Put `, /` behind params."
            )


def convert_grads(
    name: str, kinds: tuple[Kind, ...], grads: Any, params: Params
) -> GradStack | Tree:
    """Convert gradients to the form that these kinds take, or raise an error with the name."""
    takes = {kind.takes for kind in kinds}
    if isinstance(grads, GradStack):
        if "rows" not in takes:
            raise TypeError(
                f"{name}: rows reach a transform that takes one gradient tree, found a GradStack "
                f"of {len(grads)} rows. Put a reducer before it: {REDUCERS}."
            )
    elif not isinstance(grads, dict):
        raise TypeError(
            f"{name}: expected a GradStack or a dict[str, Tensor], found {type(grads).__name__}."
        )
    elif takes == {"rows"}:
        grads = as_stack(grads)
    admitted: GradStack | Tree = grads
    check_leaves(name, admitted, params)
    return admitted


def check_leaves(name: str, grads: GradStack | Tree, params: Params) -> None:
    """Refuse gradients whose leaves are not those of the parameters."""
    shapes = (
        grads.shapes
        if isinstance(grads, GradStack)
        else {leaf: g.shape for leaf, g in grads.items()}
    )
    missing, extra = sorted(set(params) - set(shapes)), sorted(set(shapes) - set(params))
    if missing or extra:
        raise ValueError(
            f"{name}: expected one gradient leaf per parameter, missing {missing}, extra {extra}. "
            "Give the parameters the gradients were taken at; an unused one has gradient zero."
        )
    for leaf, shape in shapes.items():
        if shape != params[leaf].shape:
            raise ValueError(
                f"{name}: expected gradient {leaf!r} of shape {tuple(params[leaf].shape)}, found "
                f"{tuple(shape)}. For stacked rows, put a reducer first ({REDUCERS}), or "
                "wrap them in DenseStack where the transform takes rows as well as a tree."
            )


def check_states(name: str, before: State, after: State) -> None:
    """Refuse states that hold other objects than tensors, or other entries than before."""
    for leaf in (*_tree.leaves(before), *_tree.leaves(after)):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}: expected a state of tensors, found {type(leaf).__name__}. Keep numbers "
                "as tensors of shape (), for example torch.zeros((), dtype=torch.int64), return "
                "new ones, and write {} for no state."
            )
    old, new = (list(_tree.flatten_with_names(state)[0]) for state in (before, after))
    if old != new:
        raise ValueError(
            f"{name}: expected the state that update returns to have the entries {old} of the one "
            f"it got, found {new}. Return every entry in every step."
        )


def check_number(
    transform_name: str,
    argument: str,
    value: Any,
    *,
    low: float,
    high: float = float("inf"),
    open_low: bool = False,
    open_high: bool = False,
    fix: str,
) -> None:
    """Refuse a number out of range; tensors (scheduled values) are not checked.

    Reading a tensor's value would make every step wait for the device.
    """
    if isinstance(value, Tensor):
        return
    if isinstance(value, Schedule):
        raise TypeError(
            f"{transform_name}: expected {argument} as a number, found a Schedule. Write "
            f"scheduled({transform_name}, {argument}=...): it takes a schedule for every argument."
        )
    bad_type = isinstance(value, bool) or not isinstance(value, (int, float))
    outside = bad_type or not low <= value <= high
    if outside or (open_low and value == low) or (open_high and value == high):
        sign = "<" if open_low else "<="
        top = f" {'<' if open_high else '<='} {high:g}" if high != float("inf") else ""
        raise ValueError(
            f"{transform_name}: expected {low:g} {sign} {argument}{top}, found "
            f"{argument}={value!r}. {fix}"
        )


COUNTED = "It counts calls, and the host compares it."
"""The fix of a number of calls that is not whole."""


def check_whole(transform_name: str, argument: str, value: Any, *, low: int, fix: str) -> None:
    """Refuse what is not a whole number, or below the lowest one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(
            f"{transform_name}: expected {argument} as a whole number >= {low}, found {value!r}. "
            f"{fix}"
        )


def check_distance(transform_name: str, value: Any, fix: str) -> None:
    """Refuse a threshold that is not a cosine distance; infinity accepts all rows."""
    if not (isinstance(value, float) and value == float("inf")):
        fix = f"It is a cosine distance, 1 - cos, and no percentage; {fix}"
        check_number(transform_name, "threshold", value, low=0, high=2, fix=fix)


def check_predicate(transform_name: str, argument: str, value: Any) -> None:
    """Refuse a list of names in place of a function of a name."""
    if not callable(value):
        raise TypeError(
            f"{transform_name}: expected {argument} as a function of a leaf's name, found "
            f"{type(value).__name__}. Use lambda name: name in {{...}}."
        )


def is_off(value: Any) -> bool:
    """Return whether a hyperparameter is a plain zero; a scheduled one never is."""
    return not isinstance(value, Tensor) and value == 0
