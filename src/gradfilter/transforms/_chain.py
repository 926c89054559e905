"""Chain transforms: check the order when the chain is built, then run one after another."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.optim import Optimizer

from gradfilter._factory import factory
from gradfilter._overlap import copied_where_shared
from gradfilter._readable import followed
from gradfilter._row_rules import RowRules, joined_rules
from gradfilter._scaled_tree import ScaledTree
from gradfilter._state_rules import PartRules, settled
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
    all_keep,
)
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._fingerprint import initialising
from gradfilter.transforms._streaming import ReducedRows, RowPart
from gradfilter.transforms._transform import REDUCERS, convert_grads

# --- Order: check that transforms fit behind each other, and propose a better place ---


Parts = tuple[Transform, ...]
BEHIND = "Put it after sgd, adam, adamw or rmsprop."


def not_a_transform(found: Any, caller: str = "chain") -> TypeError:
    """Return the error for an argument of `chain`, or of another function, that is no transform."""
    kind = found if isinstance(found, type) else type(found)
    if isinstance(found, (list, tuple)):
        fix = "Unpack it: chain(*transforms)."
    elif issubclass(kind, Optimizer):
        fix = "Use sgd(lr) and so on, from_torch(SGD, lr=...), or interop.Filtered to keep it."
    elif inspect.isroutine(found):
        fix = "Call the factory: agree_filter(0.97), not agree_filter."
    else:
        fix = "Factories such as agree_filter(0.97) make them, or transform() for one of your own."
    return TypeError(f"{caller}: expected transforms, found {kind.__name__}. {fix}")


def ways_through(parts: Parts) -> tuple[Kind, ...]:
    """Return the kinds of the chain: every way from an input of the first transform to the end."""
    ways, fitting = _kind_paths(parts)
    if fitting < len(parts):
        raise TypeError(_explain_misfit({here for _, here in ways}, parts, fitting))
    return tuple(sorted(KINDS[f"{start} -> {end}"] for start, end in ways))


def _kind_paths(parts: Parts) -> tuple[set[tuple[str, str]], int]:
    """Return every (input, output) of the first transforms that fit, and their number."""
    ways = {(kind.takes, kind.takes) for kind in parts[0].kinds}
    for position, part in enumerate(parts):
        onward = {
            (start, kind.gives) for start, here in ways for kind in part.kinds if kind.takes == here
        }
        if not onward:
            return ways, position
        ways = onward
    return ways, len(parts)


def _fits(parts: Parts) -> bool:
    return _kind_paths(parts)[1] == len(parts)


def _explain_misfit(here: set[str], parts: Parts, position: int) -> str:
    part, before = parts[position], parts[position - 1]
    where = f"chain: transform {position + 1}, {part.name!r},"
    rule = next((part for part in parts[:position] if part.is_update_rule), None)
    if "update" in here and rule is None:
        name = parts[0].name
        return f"chain: transform 1, {name!r}, takes an update, found none before it. {BEHIND}"
    if rule is not None and part.is_update_rule:
        return f"{where} is a second update rule after {rule.name!r}. Keep one of the two."
    if rule is not None:
        return (
            f"{where} stands after the update rule {rule.name!r}, and only transforms from update "
            f"to update may, such as ema_params. {_move(parts, position, rule)}"
        )
    if part.kinds[0].takes == "update":
        found = "a tree" if here == {"tree"} else "rows"
        return f"{where} takes an update, found {found}. {BEHIND}"
    if here == {"rows"}:
        later = _reducer(parts[position:])
        fix = (
            f"Insert a reducer before it: {REDUCERS}."
            if later is None
            else f"Put {later.name!r} before it."
        )
        return f"{where} takes one gradient tree, but rows reach it from {before.name!r}. {fix}"
    reducer = _reducer(parts[:position])
    cause = (
        f"{_first_of_trees(parts).name!r} works on one gradient."
        if reducer is None
        else f"{reducer.name!r} has already reduced the rows."
    )
    return f"{where} takes rows, but a tree reaches it: {cause} {_move(parts, position, part)}"


def _move(parts: Parts, position: int, rule: Transform) -> str:
    """Return advice to move a transform, found by trial; ``rule`` is the update rule before it."""
    part, before, reducer = parts[position], parts[:position], _reducer(parts[:position])
    for place in reversed(range(position)):
        if _fits((*before[:place], part, *before[place:])):
            subject = repr(part.name) if rule is part else "it"  # behind a rule it is the subject
            return f"Move {subject} before {before[place].name!r}."
    if reducer is not None and Kind.ROWS_TO_TREE in part.kinds:
        if reducer.name == "mean_rows" != part.name:
            return f"Put {part.name!r} in the place of 'mean_rows': a chain has one reducer."
        return f"Remove {part.name!r}: a chain has one reducer."
    if part.is_update_rule:
        rest = [part for part in before if part is not reducer]
        if reducer is not None and _fits((*rest, part)):
            return f"Remove {reducer.name!r}: {part.name!r} has reducers of its own."
        return f"Put what stands before it inside {part.name!r}."
    if not _takes_rows(part) or all(map(_takes_rows, before)):
        return f"Put it inside {rule.name!r}, or leave it out."
    later = _reducer(parts[position + 1 :])
    between = f"a reducer ({REDUCERS})" if later is None else repr(later.name)
    return f"Put {part.name!r}, and {between} behind it, before {_first_of_trees(parts).name!r}."


def _reducer(parts: Parts) -> Transform | None:
    return next((part for part in parts if Kind.ROWS_TO_TREE in part.kinds), None)


def _first_of_trees(parts: Parts) -> Transform:
    return next(part for part in parts if not _takes_rows(part))


def _takes_rows(part: Transform) -> bool:
    return any(kind.takes == "rows" for kind in part.kinds)


# --- State: check that parameters and state are those of `init` ---


SHOWN = 6
"""The number of names of each kind that an error shows."""


def check_tree(caller: str, params: Any, *, expected: str = "the parameters") -> None:
    """Refuse a module or an iterator of parameters in place of a dict of parameters."""
    if not isinstance(params, dict):
        raise TypeError(
            f"{caller}: expected {expected} as a dict[str, Tensor], found {type(params).__name__}. "
            "extract(model) gives one: params, buffers = extract(model)."
        )


def check_state(caller: str, owner: str, state: Any, names: Collection[str], remedy: str) -> None:
    """Refuse an object that is not a state, or that another ``init`` made.

    Args:
        caller: The beginning of the error.
        owner: "chain" or "step".
        state: The given state; only its keys are checked.
        names: The keys that it must have.
        remedy: Advice on how to get the right state.
    """
    if not isinstance(state, dict):
        found = type(state).__name__
        raise TypeError(f"{caller}: expected the state of this {owner}, found {found}. {remedy}")
    if set(state) != set(names):
        missing = [name for name in names if name not in state]
        extra = [str(name) for name in state if name not in names]
        raise ValueError(
            f"{caller}: expected the state of this {owner}, missing {_shown(missing)}, extra "
            f"{_shown(extra)}. {remedy}"
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{names[:SHOWN]}{more}"


# --- The chain ---


PUBLISHER = {
    "clean_grads": "sam_perturb(rho)",
    "weights": f"a reducer ({REDUCERS})",
    "rows": "a transform that gives rows",
    "keep": "agree_filter(), consensus_filter() or finite_filter()",
}

BEGIN = (
    "Begin with state = update.init(params), and continue with params, state, info = "
    "update(params, state, grads)."
)


@factory
def chain(*transforms: Transform) -> Transform:
    """Compose transforms: each gets the result of the one before, and all values published so far.

    Equivalent code, without checks, names and metrics:

        for t in transforms:
            grads, state[t], out = t.update(grads, state[t], params, **published)
            published |= out                        # `keep` is ANDed

    Args:
        *transforms: At least one. A chain among them is replaced by its transforms, so that
            ``chain(chain(a, b), c)`` is ``chain(a, b, c)``. Repeated names are numbered
            (``agc_clip``, ``agc_clip_2``); `named` gives a name outright.

    Raises:
        TypeError: An argument is not a Transform, or a transform cannot take what the one before it
            gives: rows reaching sgd, a tree reaching agree_filter, anything after an update rule.
            At the call: the parameters are not a dict, or the state is not a state.
        ValueError: A transform needs a name that none before it publishes, or two transforms were
            given one name. At the call: the state is that of another chain.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.agree_filter(0.97), gf.agc_clip(0.01), gf.sgd(0.1))
        >>> params = {"w": torch.ones(2)}
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [1.0, 0.1]])}
        >>> params, state, info = update(params, update.init(params), rows)
        >>> sorted(info)[:3]
        ['agc_clip/clipped_fraction', 'agree_filter/accepted', 'agree_filter/cosine']
    """
    flat = _flattened(transforms)
    names = names_of(flat)
    kinds = ways_through(flat)
    _check_needs(flat)
    label = "chain " + " -> ".join(part.name for part in flat)
    composed = _Composition(label, kinds, dict(zip(names, flat, strict=True)))
    publishes = frozenset(
        key if key in GLOBAL_NAMES else f"{name}/{key}"
        for name, part in composed.parts.items()
        for key in part.publishes
    )
    rules = PartRules.of({name: part.rules for name, part in composed.parts.items()})
    row_rules = joined_rules(
        {name: part.row_rules for name, part in composed.parts.items()},
        sum("keep" in part.publishes for part in flat),
    )
    built = Transform(
        *("", kinds, composed.init, composed.compute, frozenset[str](), publishes),
        rules=rules,
        row_rules=row_rules,
        recombines=any(part.recombines for part in flat),
    )
    built = built.with_parts(flat)
    return built if flat[-1].apply is None else built.with_apply(composed.apply)


@dataclass(frozen=True, eq=False)
class _Composition:
    """The functions of a chain, which run its transforms one after another.

    Attributes:
        label: The beginning of errors.
        kinds: The kinds of the chain.
        parts: The transforms by name, in their order.
    """

    label: str
    kinds: tuple[Kind, ...]
    parts: Mapping[str, Transform]

    def init(self, params: Params) -> State:
        check_tree(self.label, params)
        with initialising(tuple(self.parts.values())):
            return {name: part.init(params) for name, part in self.parts.items()}

    def compute(
        self, grads: Any, state: State, params: Params, context: Context
    ) -> tuple[Any, State, Out]:
        computes = {name: part.compute for name, part in self.parts.items()}
        return self._run(computes, grads, state, params, context)

    def apply(
        self, grads: Any, state: State, params: Params, context: Context, *, donate: bool
    ) -> tuple[Params, State, Out]:
        computes = {name: part.compute for name, part in self.parts.items()}
        *before, last = self.parts
        apply_last = self.parts[last].apply
        assert apply_last is not None
        read_later: list[ScaledTree] = []
        if before and self.parts[last].takes_scaled and not followed():
            scaling = self.parts[before[-1]].scaling
            if scaling is not None:
                computes[before[-1]] = partial(_noted, scaling, read_later)
        # The last part gives new parameters in place of an update: no part follows it.
        computes[last] = partial(apply_last, donate=donate)
        donated = last if donate else None
        new_params, new_state, out = self._run(computes, grads, state, params, context, donated)
        for tree in read_later:
            of_last = {key: out.pop(key) for key in list(out) if key.startswith(f"{last}/")}
            out |= _found(before[-1], tree.published(), params, context) | of_last
        keep = all_keep(params, context.keep, out.get("keep"))
        if keep is not None:
            for name in before:
                rules = self.parts[name].rules
                new_state[name] = settled(rules, keep, new_state[name], state[name])
        return new_params, new_state, out

    def _run(
        self,
        computes: Mapping[str, Compute],
        grads: Any,
        state: State,
        params: Params,
        context: Context,
        donated: str | None = None,
    ) -> tuple[Any, State, Out]:
        """Run the parts one after another; each sees what those before it have published.

        The part ``donated`` may write into the parameters and into its own state.
        """
        check_state(self.label, "chain", state, computes, BEGIN)
        published: Out = {}
        new_state: dict[str, State] = {}

        if isinstance(grads, ReducedRows):
            reduced, grads = grads, self._begin(grads, context)
            for name, new_state[name], out in reduced.published():
                found = _found(name, out, params, context)
                context, published = context.with_values(found), published | found
            if (rows := reduced.rows()) is not None:
                context = context.with_values({"rows": rows})
        else:
            grads = convert_grads(self.label, self.kinds, grads, params)
        for name, compute in computes.items():
            if name in new_state:  # it has run on each part of the rows
                continue
            if isinstance(grads, GradStack):
                context = context.with_values({"rows": grads})
            if name == donated:
                kept = new_state, published
                new_state, published = copied_where_shared(kept, (params, state[name]))
            grads, new_state[name], out = compute(grads, state[name], params, context)
            found = _found(name, out, params, context)
            context, published = context.with_values(found), published | found
        return grads, new_state, published

    def _begin(self, reduced: ReducedRows, context: Context) -> Tree:
        """Return the gradient that the parts up to the reducer have given."""
        if any(self.parts.get(name) is not part for name, part in reduced.row_part.parts.items()):
            raise TypeError(
                f"{self.label}: expected rows reduced by this chain, found those of another one. "
                "Reduce them with the row_part of this chain."
            )
        reduced.check_keywords(context.values)
        return reduced.grads()


def _noted(
    scaling: Compute,
    trees: list[ScaledTree],
    grads: Any,
    state: State,
    params: Params,
    context: Context,
) -> tuple[Any, State, Out]:
    """Run a scaling, and note its tree, which publishes more after it has been read."""
    found, new_state, out = scaling(grads, state, params, context)
    if isinstance(found, ScaledTree):
        trees.append(found)
    return found, new_state, out


def _found(name: str, out: Out, params: Params, context: Context) -> Out:
    """Return the published values of a part under the names that they have in the chain."""
    found = {k: v for k, v in out.items() if k in GLOBAL_NAMES}
    if "keep" in found:
        found["keep"] = all_keep(params, context.keep, found["keep"])
    return found | {f"{name}/{k}": v for k, v in out.items() if k not in GLOBAL_NAMES}


def row_part(update: Transform, more_rules: Mapping[str, RowRules] | None = None) -> RowPart | None:
    """Return the transforms up to the reducer, if rows may come in parts; None if they may not.

    Args:
        update: A chain.
        more_rules: The rules of transforms that have none of their own, by name.
    """
    more_rules = more_rules or {}
    named_parts = dict(zip(names_of(update.parts), update.parts, strict=True))
    found: dict[str, Transform] = {}
    for position, (name, part) in enumerate(named_parts.items()):
        if part.row_rules is None and name not in more_rules:
            return None
        found[name] = part
        if Kind.ROWS_TO_TREE in part.kinds:
            behind = update.parts[position + 1 :]
            return RowPart(found, any(later.row_rules is None for later in behind), more_rules)
        if Kind.ROWS_TO_ROWS not in part.kinds:
            return None
    return None


@factory
def named(name: str, transform: Transform) -> Transform:
    """Give a transform (or a chain, which then stays one transform) a name for metrics and state.

    Args:
        name: The name, without ``/`` and ``.``, which join names in metrics and state dicts.
        transform: Any transform.

    Examples:
        >>> import gradfilter as gf
        >>> gf.named("head", gf.agc_clip(0.01)).metric("clipped_fraction")
        'head/clipped_fraction'
    """
    if not name or "/" in name or "." in name:
        raise ValueError(f"Expected a name without '/' and '.', found {name!r}.")
    renamed = replace(transform, name=name).with_scaling(transform.scaling)
    # A chain that has become one transform gives an update, as every transform inside another does.
    if transform.apply is None or transform.parts:
        return renamed
    return renamed.with_apply(transform.apply, takes_scaled=transform.takes_scaled)


def _flattened(parts: Parts) -> tuple[Transform, ...]:
    flat: list[Transform] = []
    for part in parts:
        if not isinstance(part, Transform):
            raise not_a_transform(part)
        flat.extend(part.parts or (part,))
    if not flat:
        raise ValueError("chain: expected at least one transform, found none.")
    return tuple(flat)


def names_of(parts: Parts) -> tuple[str, ...]:
    """Return every transform's name, numbered from its second appearance on."""
    seen: Counter[str] = Counter()
    names = []
    for part in parts:
        seen[part.name] += 1
        names.append(part.name if seen[part.name] == 1 else f"{part.name}_{seen[part.name]}")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(
            f"chain: two transforms are called {twice!r}. Choose another with named()."
        )
    return tuple(names)


def _check_needs(parts: Parts) -> None:
    published: set[str] = set()
    reducer: Transform | None = None
    before: set[str] = set()  # what is published where the rows are still there
    for position, part in enumerate(parts):
        if any("rows" in (kind.takes, kind.gives) for kind in part.kinds):
            published.add("rows")
        missing = sorted(part.needs - published)
        if missing:
            raise ValueError(
                f"chain: transform {position + 1}, {part.name!r}, needs {missing[0]!r}, which no "
                f"earlier transform publishes. Put {PUBLISHER[missing[0]]} before it."
            )
        # gsam_decompose combines clean rows; a clean tree, made behind the reducer, stays as it is.
        known = "weights" in published or not part.needs <= before
        if reducer is not None and part.recombines and not known:
            raise ValueError(_explain_no_weights(parts, position, reducer))
        if reducer is None and Kind.ROWS_TO_TREE in part.kinds:
            reducer, before = part, set(published)
        published |= part.publishes


def _explain_no_weights(parts: Parts, position: int, reducer: Transform) -> str:
    part = parts[position]
    if Kind.ROWS_TO_ROWS in part.kinds:
        fix = f"Put {part.name!r} before {reducer.name!r}, where it takes the rows themselves."
    else:
        fix = f"Put a reducer that publishes them in the place of {reducer.name!r}: {REDUCERS}."
    return (
        f"chain: transform {position + 1}, {part.name!r}, combines rows by the 'weights' of the "
        f"reducer before it, but no single weight per row describes what {reducer.name!r} gives. "
        f"{fix}"
    )
