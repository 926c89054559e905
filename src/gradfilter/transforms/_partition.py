"""Different chains for different leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._made import remembered
from gradfilter._types import GLOBAL_NAMES, Out, Params, State, Transform, Tree
from gradfilter.transforms._groups import restrict, restrict_extra
from gradfilter.transforms._link import check_predicate, link


@remembered
def partition(branches: Mapping[str, Transform], label: Callable[[str], str]) -> Transform:
    """Complete chains on groups of leaves; each group is filtered, and skipped, on its own.

    Args:
        branches: A chain that ends in an update for every label. All take rows, or all a tree.
        label: name of a leaf -> label.

    Publishes: ``keep`` () (some branch applied its update), and per branch ``LABEL/keep`` and its
    metrics under ``LABEL/link/metric``.

    Raises:
        TypeError: A branch does not end in an update, or takes something else than the others.
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
        grads: Any, state: State, params: Params, /, **extra: Any
    ) -> tuple[Tree, State, Out]:
        updates: Tree = {}
        new_state: dict[str, State] = {}
        keeps: list[Tensor] = []
        out: Out = {}
        for key, own in groups(params).items():
            branch_updates, branch_state, branch_out = branches[key].update(
                restrict(grads, own),
                state[key],
                restrict(params, own),
                **restrict_extra(extra, own, params),
            )
            keep = branch_out.get("keep", extra.get("keep", True))
            keep = _tree.flag(keep, _tree.device_of(params))
            branch_updates = _tree.select(keep, branch_updates, _tree.no_update(branch_updates))
            new_state[key] = _tree.select(keep, branch_state, state[key])
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
    return link("partition", kinds, update, init=init, publishes=publishes)


def _common_kinds(branches: Mapping[str, Transform]) -> tuple[str, ...]:
    if not branches:
        raise ValueError("partition: expected at least one branch, found none.")
    common = {"rows -> update", "tree -> update"}
    for key, branch in branches.items():
        if not any(kind in ("rows -> update", "tree -> update") for kind in branch.kinds):
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
