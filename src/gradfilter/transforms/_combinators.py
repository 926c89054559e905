"""Apply transforms to some leaves (`masked`, `freeze`, `partition`) or in some steps (`gate`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._row_rules import IGNORES_ROWS, RowRules
from gradfilter._state_rules import PartRules, settled
from gradfilter._types import (
    GLOBAL_NAMES,
    Context,
    Kind,
    Out,
    Params,
    State,
    Transform,
    Tree,
    all_keep,
)
from gradfilter.grads._joined_stacks import choose, join
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._reducers import mean_weights
from gradfilter.transforms._transform import check_predicate, convert_grads, transform_in_context

# --- Transforms for some of the leaves: masked and freeze ---


Grads = GradStack | Tree


def restrict(grads: Any, names: list[str]) -> Any:
    """Return the given leaves of a stack or tree."""
    if isinstance(grads, GradStack):
        return grads.columns(names)
    return {name: grads[name] for name in names}


def restrict_context(context: Context, names: list[str], params: Params) -> Context:
    """Restrict the context for transforms that see only some leaves."""
    grad_fn = context.grad_fn
    narrowed: dict[str, Any] = {}
    if grad_fn is not None:
        narrowed["grad_fn"] = partial(_grads_of_some, grad_fn, params, names)
    if context.rows is not None:
        narrowed["rows"] = restrict(context.rows, names)
    if context.clean_grads is not None:
        narrowed["clean_grads"] = restrict(context.clean_grads, names)
    if context.reference is not None:
        narrowed["reference"] = restrict(context.reference, names)
    return context.with_values(narrowed)


def _grads_of_some(
    grad_fn: Callable[[Params], Any], params: Params, names: list[str], near: Params
) -> Any:
    """Return the gradients of some leaves where these leaves have the values ``near``."""
    # The caller's function needs the whole model: the other leaves keep their values.
    return restrict(grad_fn({**params, **near}), names)


@factory
def masked(transform: Transform, names: Callable[[str], bool]) -> Transform:
    """Apply a transform to some leaves only; the others pass unchanged.

    Where the transform reduces rows, the other leaves pass as their mean. No single weight vector
    then describes the result, so ``weights`` is not published, and `chain` refuses sam_perturb
    behind it: put it before.

    Args:
        transform: Any transform or chain but an update rule.
        names: Predicate on names; true means the transform sees the leaf.

    Raises:
        TypeError: The transform is an update rule (leaves without an update have no meaning).
        ValueError: The predicate is true for no leaf.

    Examples:
        >>> import torch, gradfilter as gf
        >>> matrices_only = gf.masked(gf.agc_clip(0.01), lambda name: name.endswith("weight"))
        >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        >>> matrices_only.update(params, matrices_only.init(params), params)[0]
        {'weight': tensor([[0.0100]]), 'bias': tensor([1.])}
    """
    check_predicate("masked", "names", names)
    if transform.is_update_rule:
        raise TypeError(
            "masked: expected a transform that gives gradients, found the update rule "
            f"{transform.name!r}. "
            "Use partition({...}, label), with freeze() for leaves that stay as they are."
        )

    def chosen(tree: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        seen = [name for name in tree if names(name)]
        if not seen:
            raise ValueError(
                "masked: expected the predicate to choose a leaf for "
                f"{transform.name!r}, found none among {sorted(tree)}."
            )
        return seen, [name for name in tree if name not in set(seen)]

    def init(params: Params) -> State:
        return transform.init(restrict(params, chosen(params)[0]))

    def compute(
        grads: Any, state: State, params: Params, context: Context
    ) -> tuple[Any, State, Out]:
        grads = convert_grads(f"masked {transform.name}", transform.kinds, grads, params)
        seen, others = chosen(params)
        new, state, out = transform.compute(
            restrict(grads, seen),
            state,
            restrict(params, seen),
            restrict_context(context, seen, params),
        )
        if not others:
            return new, state, out
        rest = restrict(grads, others)
        reduced = rest.combine(mean_weights(rest)) if isinstance(rest, GradStack) else rest
        clean = out.get("clean_grads")
        if clean is not None:
            out = out | {"clean_grads": _join(clean, rest, reduced)}
        if isinstance(grads, GradStack) and not isinstance(new, GradStack):
            out = {name: value for name, value in out.items() if name != "weights"}
        return _join(new, rest, reduced), state, out

    reduces = Kind.ROWS_TO_TREE in transform.kinds
    publishes = transform.publishes - {"weights"} if reduces else transform.publishes
    return replace(
        transform,
        name=transform.name or "masked",
        init=init,
        compute=compute,
        publishes=publishes,
        # As a reducer it has several weights.
        row_rules=None if reduces else transform.row_rules,
    )


def _join(seen: Grads, others: Grads, reduced: Tree) -> Grads:
    """Join the result of a transform for its leaves with the other leaves in the same form."""
    if isinstance(seen, GradStack) and isinstance(others, GradStack):
        return join(seen, others)
    assert isinstance(seen, dict)
    return {**seen, **reduced}


@factory
def freeze(names: Callable[[str], bool] | None = None) -> Transform:
    """Return an update that changes nothing, bit for bit.

    Alone (a branch of `partition`) it takes rows or a tree and freezes every leaf. After an update
    rule it freezes the leaves chosen by ``names``; the state of the update rule still changes.

    Args:
        names: Predicate on names; None for all leaves.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.sgd(1.0), gf.freeze(lambda name: name == "b"))
        >>> params = {"a": torch.zeros(1), "b": torch.zeros(1)}
        >>> update(params, update.init(params), {"a": torch.ones(1), "b": torch.ones(1)})[0]
        {'a': tensor([-1.]), 'b': tensor([0.])}
    """
    every = names is None
    if names is not None:
        check_predicate("freeze", "names", names)

    def init(params: Params) -> State:
        if names is not None and not any(names(name) for name in params):
            raise ValueError(
                f"freeze: expected the predicate to choose a leaf, found none among "
                f"{sorted(params)}."
            )
        return {}

    def update(
        grads: Any, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        still = _tree.no_update(params)
        if every or isinstance(grads, GradStack):
            return still, state, {}
        assert names is not None
        return {n: still[n] if names(n) else g for n, g in grads.items()}, state, {}

    # With a predicate the other leaves need an update, so only the place after an update rule fits.
    alone = (Kind.ROWS_TO_UPDATE, Kind.TREE_TO_UPDATE) if every else ()
    kinds = (*alone, Kind.UPDATE_TO_UPDATE)
    return transform_in_context("freeze", kinds, update, init=init, row_rules=IGNORES_ROWS)


# --- Different chains for different leaves ---


@factory
def partition(branches: Mapping[str, Transform], label: Callable[[str], str]) -> Transform:
    """Apply one complete chain to each group of leaves, with its own filter and its own skips.

    Args:
        branches: A chain that ends in an update for every label. All take rows, or all a tree.
        label: A function from the name of a leaf to its label.

    Publishes: ``keep`` () (true if some branch applied its update), and per branch ``LABEL/keep``
    and its metrics under ``LABEL/transform/metric``.

    Raises:
        TypeError: A branch does not end in an update, or does not take the same as the others.
        ValueError: A label without a branch, or a branch without a leaf.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.partition(
        ...     {"body": gf.sgd(1.0), "head": gf.freeze()},
        ...     lambda name: "head" if name.startswith("head") else "body",
        ... )
        >>> params = {"w": torch.zeros(1), "head.w": torch.zeros(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1), "head.w": torch.ones(1)})[0]
        {'w': tensor([-1.]), 'head.w': tensor([0.])}
    """
    check_predicate("partition", "label", label)
    kinds = _common_kinds(branches)

    def groups(params: Params) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {key: [] for key in branches}
        for name in params:
            if label(name) not in found:
                raise ValueError(
                    f"partition: expected a label among {sorted(branches)}, found {label(name)!r} "
                    f"for leaf {name!r}. Add a branch, for example freeze()."
                )
            found[label(name)].append(name)
        empty = sorted(key for key, own in found.items() if not own)
        if empty:
            raise ValueError(
                f"partition: expected at least one leaf in every branch, found none in {empty}. "
                "Remove the branch, or look at the label function."
            )
        return found

    def init(params: Params) -> State:
        return {
            key: branches[key].init(restrict(params, own)) for key, own in groups(params).items()
        }

    def update(
        grads: Any, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        updates: Tree = {}
        new_state: dict[str, State] = {}
        keeps: list[Tensor] = []
        out: Out = {}
        for key, own in groups(params).items():
            branch_updates, branch_state, branch_out = branches[key].compute(
                restrict(grads, own),
                state[key],
                restrict(params, own),
                restrict_context(context, own, params),
            )
            keep = all_keep(params, context.keep, branch_out.get("keep"))
            keep = _tree.as_bool_tensor(True if keep is None else keep, _tree.device_of(params))
            branch_updates = _tree.select(keep, branch_updates, _tree.no_update(branch_updates))
            new_state[key] = settled(branches[key].rules, keep, branch_state, state[key])
            updates.update(branch_updates)
            keeps.append(keep)
            metrics = {branches[key].metric(k): v for k, v in branch_out.items()}
            out |= {f"{key}/{k}": v for k, v in metrics.items() if k not in GLOBAL_NAMES}
            out[f"{key}/keep"] = keep
        out["keep"] = torch.stack(keeps).any()
        return {name: updates[name] for name in params}, new_state, out

    publishes = {"keep"} | {f"{key}/keep" for key in branches}
    for key, branch in branches.items():
        publishes |= {f"{key}/{branch.metric(name)}" for name in branch.publishes - GLOBAL_NAMES}
    ignored = Kind.ROWS_TO_UPDATE not in kinds and all(b.row_rules for b in branches.values())
    made = transform_in_context("partition", kinds, update, init=init, publishes=publishes)
    rules = PartRules.of({key: b.rules for key, b in branches.items()})
    return replace(
        made,
        rules=rules,
        row_rules=IGNORES_ROWS if ignored else None,
        recombines=any(branch.recombines for branch in branches.values()),
    )


def _common_kinds(branches: Mapping[str, Transform]) -> tuple[Kind, ...]:
    if not branches:
        raise ValueError("partition: expected at least one branch, found none.")
    common = {Kind.ROWS_TO_UPDATE, Kind.TREE_TO_UPDATE}
    for key, branch in branches.items():
        if not branch.is_update_rule:
            raise TypeError(
                f"partition: expected every branch to end in an update, found branch {key!r} of "
                f"kind {branch.kind!r}. End it with sgd(lr), adamw(lr) or freeze()."
            )
        common &= set(branch.kinds)
    if not common:
        kinds = {key: branch.kind for key, branch in branches.items()}
        raise TypeError(
            f"partition: expected all branches to take rows or all a tree, found {kinds}. Start "
            "a branch that takes a tree with mean_rows()."
        )
    return tuple(sorted(common))


# --- Run a transform only in the steps in which a bool allows it ---


@factory
def gate(transform: Transform, when: str) -> Transform:
    """Run a transform if a published or given bool is true, and bypass it otherwise.

    Chosen with `select`: the transform is computed in every step, and its result and state are used
    or discarded. If it is bypassed, gradients pass unchanged; a reducer gives the plain mean and
    keeps the step; an update rule changes nothing. Metrics are those of the transform as computed.

    Args:
        transform: Any transform.
        when: Name of a bool of shape (): an extra keyword of the update, ``keep``, or a metric of
            an earlier transform such as ``"finite_filter/finite"``.

    Raises:
        ValueError: At the call, ``when`` was neither published nor given.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.gate(gf.agc_clip(0.01), "late"), gf.sgd(1.0))
        >>> params, grads = {"w": torch.ones(1)}, {"w": torch.ones(1)}
        >>> update(params, update.init(params), grads, late=torch.tensor(False))[0]
        {'w': tensor([0.])}
    """
    name = transform.name or "gate"
    rules = {kind.is_update_rule for kind in transform.kinds}
    if len(rules) > 1:
        raise TypeError(
            f"gate: {name!r} may be an update rule or follow one, and stepping around it would "
            "mean different things. Gate the update rule, or use freeze(names) after it."
        )
    gated = _Gated(name, transform, when)
    return replace(transform, name=name, compute=gated, row_rules=_gated_rules(transform, when))


def _gated_rules(transform: Transform, when: str) -> RowRules | None:
    """Return the rules of a gated transform, if the bool is the same for every part of the rows."""
    rules = transform.row_rules
    on_rows = any(kind.takes == "rows" for kind in transform.kinds)
    if rules is None or not on_rows:
        return rules
    # Metrics and ``keep`` are those of a part; a reducer that is bypassed has another divisor.
    if when == "keep" or "/" in when or Kind.ROWS_TO_TREE in transform.kinds or rules.observe:
        return None
    reads = None if rules.reads is None else rules.reads | {when}
    return RowRules(rules.joins, reads)


@dataclass(frozen=True, eq=False)
class _Gated:
    """A transform, and the name of the bool that it needs to run."""

    name: str
    transform: Transform
    when: str

    def __call__(
        self, grads: Any, state: State, params: Params, context: Context
    ) -> tuple[Any, State, Out]:
        name, transform, when = self.name, self.transform, self.when
        if when not in context.values:
            raise ValueError(
                f"gate: {name!r} runs when {when!r} is true, but that name was not given. Pass "
                f"update(..., {when}=torch.tensor(True)), or name a metric of an earlier transform."
            )
        on = _tree.as_bool_tensor(context.values[when], _tree.device_of(params))
        grads = convert_grads(name, transform.kinds, grads, params)
        new, new_state, out = transform.compute(grads, state, params, context)
        if "keep" in out:
            out = out | {"keep": out["keep"] | ~on}
        if transform.is_update_rule:
            result: Any = _tree.select(on, new, _tree.no_update(new))
        elif isinstance(new, GradStack):
            result = choose(on, new, grads)
        elif isinstance(grads, GradStack):
            weights = mean_weights(grads)
            result = _tree.select(on, new, grads.combine(weights))
            if "weights" in out:
                out = out | {"weights": torch.where(on, out["weights"], weights)}
        else:
            result = _tree.select(on, new, grads)
        clean = out.get("clean_grads")
        if isinstance(clean, GradStack):
            out = out | {"clean_grads": choose(on, clean, grads)}
        elif clean is not None:  # if bypassed, the result is the clean gradient
            out = out | {"clean_grads": _tree.select(on, clean, result)}
        return result, settled(transform.rules, on, new_state, state), out
