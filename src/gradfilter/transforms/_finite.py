"""Guard against gradients that are not finite."""

from __future__ import annotations

from typing import Any

import torch

from gradfilter._made import remembered
from gradfilter._shards import whole
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._link import link


@remembered
def finite_filter() -> Transform:
    """Take rows that are not finite out; skip the step if none is left.

    On rows: such a row gets the factor 0, and every later link treats it as absent. On a tree:
    gradients pass unchanged, and the step is skipped unless all are finite.

    Publishes: ``keep`` () (some row is finite; on a tree: every entry), ``finite`` (M,) bool, or
    () on a tree. A row counts as finite if its squared norm is.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.finite_filter(), gf.mean_rows(), gf.sgd(1.0))
        >>> params = {"w": torch.zeros(1)}
        >>> rows = {"w": torch.tensor([[float("nan")], [2.0]])}
        >>> update(params, update.init(params), rows)[0]
        {'w': tensor([-2.])}
    """

    def update(
        grads: GradStack | Tree, state: State, params: Params, /, **extra: Any
    ) -> tuple[GradStack | Tree, State, Out]:
        if isinstance(grads, GradStack):
            norms = grads.sq_norms()
            finite = norms.isfinite()
            out = {"keep": (finite & grads.live).any(), "finite": finite}
            return grads.scaled(finite.to(norms.dtype)), state, out
        finite = torch.stack([whole(g.isfinite().all()) for g in grads.values()]).all()
        return grads, state, {"keep": finite, "finite": finite}

    return link(
        "finite_filter",
        ("rows -> rows", "tree -> tree"),
        update,
        publishes=("keep", "finite"),
    )
