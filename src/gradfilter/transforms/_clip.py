"""Clipping: of every row, of the whole gradient, and of every unit (AGC)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._made import remembered
from gradfilter._readable import transformed
from gradfilter._shards import is_sharded
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._blocks import blocks
from gradfilter.transforms._link import check_number, check_predicate, is_off, link
from gradfilter.transforms._sharded_units import clip_shards
from gradfilter.transforms._units import UnitDims, per_leaf, unit_norms, within_units

BLOCK = 1 << 20


def _shrink(norms: Tensor, limit: Tensor | float) -> Tensor:
    """min(1, limit/norm), and 1 where the norm is not finite: clipping hides no Inf or NaN."""
    over = (norms > limit) & norms.isfinite()
    return torch.where(over, limit / torch.where(over, norms, 1.0), 1.0)


@remembered
def clip_per_row(max_norm: float) -> Transform:
    """Scale every row to a norm of at most ``max_norm``.

    g_i ← g_i · min(1, max_norm / ‖g_i‖), the norm over all leaves. A row that is not finite stays
    as it is; finite_filter takes it out.

    Args:
        max_norm: Above 0, in units of the per-row gradient norm.

    Needs: rows. Publishes: ``norm`` (M,) before clipping, ``clipped_fraction`` ().

    Raises:
        ValueError: max_norm <= 0.

    Examples:
        >>> import torch, gradfilter as gf
        >>> rows, params = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]])}, {"w": torch.zeros(2)}
        >>> gf.clip_per_row(1.0).update(rows, {}, params)[0].sq_norms()
        tensor([1.0000, 0.2500], dtype=torch.float64)

    References:
        Abadi et al., "Deep Learning with Differential Privacy", 2016,
        https://arxiv.org/abs/1607.00133
    """
    check_number(
        "clip_per_row", "max_norm", max_norm, low=0, open_low=True, fix="1.0 is a good start."
    )

    def update(
        rows: GradStack, state: State, params: Params, /, **extra: Any
    ) -> tuple[GradStack, State, Out]:
        norms = rows.sq_norms().sqrt()
        factors = _shrink(norms, max_norm)
        out = {"norm": norms, "clipped_fraction": (factors < 1).to(norms.dtype).mean()}
        return rows.scaled(factors), state, out

    return link("clip_per_row", "rows -> rows", update, publishes=("norm", "clipped_fraction"))


@remembered
def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale the whole gradient to a norm of at most ``max_norm``.

    g ← g · min(1, max_norm / ‖g‖). A gradient that is not finite stays as it is.

    Args:
        max_norm: Above 0.

    Publishes: ``norm`` () before clipping, ``clipped_fraction`` (), which is 0 or 1.

    Raises:
        ValueError: max_norm <= 0.

    Examples:
        >>> import torch, gradfilter as gf
        >>> gf.clip_by_global_norm(1.0).update({"w": torch.tensor([3.0, 4.0])}, {},
        ...                                    {"w": torch.zeros(2)})[0]
        {'w': tensor([0.6000, 0.8000])}

    References:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013,
        https://arxiv.org/abs/1211.5063
    """
    check_number(
        "clip_by_global_norm", "max_norm", max_norm, low=0, open_low=True, fix="1.0 is usual."
    )

    def update(
        grads: Tree, state: State, params: Params, /, **extra: Any
    ) -> tuple[Tree, State, Out]:
        norm = _products.norm(grads)
        factor = _shrink(norm, max_norm)
        out = {"norm": norm, "clipped_fraction": (factor < 1).to(norm.dtype)}
        # The factor may be too small for the gradients' own precision.
        clipped = {
            name: (_tree.at_least_float32(g) * factor.to(_tree.at_least_float32(g).dtype))
            for name, g in grads.items()
        }
        return clipped, state, out

    return link(
        "clip_by_global_norm", "tree -> tree", update, publishes=("norm", "clipped_fraction")
    )


@remembered
def agc_clip(
    clipping: float | Tensor | None = 0.01,
    *,
    eps: float = 1e-3,
    exclude: Callable[[str], bool] | None = None,
    unit_dims: UnitDims | None = None,
) -> Transform:
    r"""Adaptive gradient clipping: no unit's gradient exceeds a fraction of the unit's weight.

    Per unit i:  G_i ← G_i · min(1, clipping · max(‖W_i‖, eps) / ‖G_i‖). It never scales up, and
    clipping twice is clipping once. (The published code also floors ‖G_i‖ at 1e-6, which matters
    only for limits below that, and there shrinks a clipped unit again every time.)

    A unit is one output row or filter: dim 0 of a tensor with two or more dims (Linear, Conv1d to
    Conv3d, rows of an Embedding), the whole of a smaller one. Norms are taken in float32 or wider.

    Args:
        clipping: λ >= 0; 0.01 for batches of 1024 to 4096, up to 0.16 for smaller ones. None or 0
            switches clipping off.
        eps: Above 0, floors the weight's norm only, so that weights that start at zero can move.
        exclude: Predicate on names; true means not clipped. The paper leaves out the weight of the
            final linear layer. True for no leaf is no error: in a branch of `partition`, or
            inside `masked`, the link sees some leaves only.
        unit_dims: name -> the dim, or dims, that index the units, () for one unit, None for the
            rule above. ConvTranspose weights are (in, out, ...): their units lie along dim 1.

    Publishes: ``clipped_fraction`` (), the part of the units that was scaled down.

    A unit with Inf or NaN in it is left alone, finite entries too: scaling would turn them into 0
    or NaN in silence. finite_filter is the tool for that.

    Raises:
        ValueError: clipping < 0 or eps <= 0.

    Examples:
        >>> import torch, gradfilter as gf
        >>> params = {"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}  # unit norms 5 and 0.5
        >>> grads = {"w": torch.tensor([[0.0, 1.0], [0.0, 1.0]])}
        >>> gf.agc_clip(0.1).update(grads, {}, params)[0]
        {'w': tensor([[0.0000, 0.5000],
                [0.0000, 0.0500]])}

    References:
        Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
        Normalization", 2021, https://arxiv.org/abs/2102.06171
    """
    if clipping is not None:
        check_number(
            "agc_clip",
            "clipping",
            clipping,
            low=0,
            fix="Use None (or 0) to switch clipping off.",
        )
    check_number("agc_clip", "eps", eps, low=0, open_low=True, fix="The paper has 1e-3.")
    for argument, predicate in (("exclude", exclude), ("unit_dims", unit_dims)):
        if predicate is not None:
            check_predicate("agc_clip", argument, predicate)

    def clip(
        grads: Tree,
        params: Params,
        clipping: float | Tensor,
        summed: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tree, Tensor]:
        """Clipped leaves of one dtype, and which units were scaled down."""
        within = within_units(grads, unit_dims)
        limits = clipping * unit_norms(params, within, summed).clamp(min=eps)
        if isinstance(clipping, Tensor):  # a schedule that ends at 0 ends the clipping
            limits = torch.where(clipping == 0, torch.inf, limits)
        factors = _shrink(unit_norms(grads, within, summed), limits)
        # In half precision a small factor would round to 0 before it meets a large gradient.
        leaves = [_tree.at_least_float32(grads[name]) for name in within]
        by = per_leaf(factors.to(leaves[0].dtype), grads, within)
        # A factor of 1 changes no bit, and costs less than a choice per entry.
        scaled: Sequence[Tensor]
        if transformed():  # vmap knows no call for all
            scaled = [leaf * factor for leaf, factor in zip(leaves, by, strict=True)]
        else:
            scaled = torch._foreach_mul(leaves, by)
        return dict(zip(within, scaled, strict=True)), factors < 1

    def update(
        grads: Tree, state: State, params: Params, /, **extra: Any
    ) -> tuple[Tree, State, Out]:
        chosen = {n: g for n, g in grads.items() if exclude is None or not exclude(n)}
        if clipping is None or is_off(clipping) or not chosen:
            nothing = torch.zeros((), dtype=torch.float32, device=_tree.device_of(grads))
            return grads, state, {"clipped_fraction": nothing}
        clipped, shrunk = dict(grads), []
        if any(map(is_sharded, chosen.values())):
            some, fraction = clip_shards(
                partial(clip, clipping=clipping), chosen, params, unit_dims
            )
            return clipped | some, state, {"clipped_fraction": fraction}
        for names in blocks(chosen, BLOCK):
            some, fewer = clip(
                {n: grads[n] for n in names}, {n: params[n] for n in names}, clipping
            )
            clipped |= some
            shrunk.append(fewer)
        return clipped, state, {"clipped_fraction": torch.cat(shrunk).to(torch.float32).mean()}

    return link("agc_clip", "tree -> tree", update, publishes=("clipped_fraction",))
