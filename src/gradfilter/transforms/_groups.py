"""Links for some of the leaves: masked and freeze."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gradfilter import _tree
from gradfilter._made import remembered
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.grads._views import join
from gradfilter.transforms._link import admit, check_predicate, link
from gradfilter.transforms._reduce import mean_weights

Grads = GradStack | Tree


def restrict(grads: Any, names: list[str]) -> Any:
    """The given leaves of a stack or tree."""
    if isinstance(grads, GradStack):
        return grads.columns(names)
    return {name: grads[name] for name in names}


def restrict_extra(extra: Mapping[str, Any], names: list[str], params: Params) -> dict[str, Any]:
    """What is visible to links that see only some leaves."""
    narrowed = dict(extra)
    if "grad_fn" in extra:
        # The caller's function knows the whole model: the other leaves stay where they are.
        narrowed["grad_fn"] = lambda near: restrict(extra["grad_fn"]({**params, **near}), names)
    for key in ("rows", "clean_grads"):
        if extra.get(key) is not None:
            narrowed[key] = restrict(extra[key], names)
    return narrowed


@remembered
def masked(link: Transform, names: Callable[[str], bool]) -> Transform:
    """Let a link see only some leaves; the others pass through.

    Where the link reduces rows, the other leaves pass as their mean; no single weight vector
    describes the result then, so ``weights`` is not published and sam_perturb cannot follow.

    Args:
        link: Any link or chain but an update rule.
        names: Predicate on names; true means the link sees the leaf.

    Raises:
        TypeError: The link is an update rule (leaves without an update have no meaning).
        ValueError: The predicate is true for no leaf.

    Examples:
        >>> import torch, gradfilter as gf
        >>> matrices_only = gf.masked(gf.agc_clip(0.01), lambda name: name.endswith("weight"))
        >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        >>> matrices_only.update(params, matrices_only.init(params), params)[0]
        {'weight': tensor([[0.0100]]), 'bias': tensor([1.])}
    """
    check_predicate("masked", "names", names)
    if any(kind in ("tree -> update", "rows -> update") for kind in link.kinds):
        raise TypeError(
            f"masked: expected a link that gives gradients, found the update rule {link.name!r}. "
            "Use partition({...}, label), with freeze() for leaves that stay as they are."
        )

    def chosen(tree: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        seen = [name for name in tree if names(name)]
        if not seen:
            raise ValueError(
                f"masked: expected the predicate to choose a leaf for {link.name!r}, found none "
                f"among {sorted(tree)}."
            )
        return seen, [name for name in tree if name not in set(seen)]

    def init(params: Params) -> State:
        return link.init(restrict(params, chosen(params)[0]))

    def update(grads: Any, state: State, params: Params, /, **extra: Any) -> tuple[Any, State, Out]:
        grads = admit(f"masked {link.name}", link.kinds, grads, params)
        seen, others = chosen(params)
        new, state, out = link.update(
            restrict(grads, seen),
            state,
            restrict(params, seen),
            **restrict_extra(extra, seen, params),
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

    reduces = "rows -> tree" in link.kinds
    publishes = link.publishes - {"weights"} if reduces else link.publishes
    return replace(
        link, name=link.name or "masked", init=init, update=update, publishes=publishes, links=()
    )


def _join(seen: Grads, others: Grads, reduced: Tree) -> Grads:
    """What a link gave for its leaves, with the others in the same form."""
    if isinstance(seen, GradStack) and isinstance(others, GradStack):
        return join(seen, others)
    assert isinstance(seen, dict)
    return {**seen, **reduced}


@remembered
def freeze(names: Callable[[str], bool] | None = None) -> Transform:
    """An update that changes nothing, bit for bit.

    Alone (a branch of `partition`) it takes rows or a tree and freezes every leaf. After an update
    rule it freezes the leaves chosen by ``names``; the rule's own state still moves.

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
    alone = ("rows -> update", "tree -> update")

    def init(params: Params) -> State:
        if names is not None and not any(names(name) for name in params):
            raise ValueError(
                f"freeze: expected the predicate to choose a leaf, found none among "
                f"{sorted(params)}."
            )
        return {}

    def update(
        grads: Any, state: State, params: Params, /, **extra: Any
    ) -> tuple[Tree, State, Out]:
        still = _tree.no_update(params)
        if every or isinstance(grads, GradStack):
            return still, state, {}
        assert names is not None
        return {n: still[n] if names(n) else g for n, g in grads.items()}, state, {}

    # With a predicate the others need an update to keep, so only the place after a rule is left.
    return link(
        "freeze", (*alone, "update -> update") if every else "update -> update", update, init=init
    )
