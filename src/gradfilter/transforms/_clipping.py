"""Clip the whole gradient, or every unit of it (AGC)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial, reduce

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._readable import transformed
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._scaled_tree import ScaledTree, scaled
from gradfilter._shards import cuts, is_sharded, local, parts, resharded
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.transforms._blocks import blocks
from gradfilter.transforms._transform import (
    check_number,
    check_predicate,
    is_off,
    transform_in_context,
)

# --- Units: the output rows and filters of a weight, which adaptive clipping treats separately ---


UnitDims = Callable[[str], "int | tuple[int, ...] | None"]
Within = dict[str, list[int]]
"""The dims inside a unit, over which norms are taken, for every leaf."""


def within_units(tree: Tree, unit_dims: UnitDims | None) -> Within:
    """Return the dims inside the units of every leaf; leaves with a single unit come last."""
    several: Within = {}
    single: Within = {}
    for name, leaf in tree.items():
        dims = _unit_axes(name, leaf.ndim, unit_dims)
        (single if len(dims) == leaf.ndim else several)[name] = dims
    return several | single


def _unit_axes(name: str, ndim: int, unit_dims: UnitDims | None) -> list[int]:
    dims = None if unit_dims is None else unit_dims(name)
    if dims is None:
        return list(range(1 if ndim >= 2 else 0, ndim))
    dims = (dims,) if isinstance(dims, int) else dims
    if any(not -ndim <= d < ndim for d in dims):
        raise ValueError(
            f"agc_clip: expected unit_dims within the {ndim} dims of {name!r}, found {dims}."
        )
    return [d for d in range(ndim) if d not in {d % ndim for d in dims}]


def unit_norms(
    tree: Tree, within: Within, summed: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Compute the 2-norms of all units of all leaves, in float32 or wider. (units,).

    Args:
        tree: The tree with the leaves of ``within``.
        within: The dims to take norms over.
        summed: Adds the sums of squares of the parts of a unit that other ranks hold.
    """
    dtypes = (tree[name].dtype for name in within)
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    norms = [
        _norms(tree[name], dims, dtype)
        for name, dims in within.items()
        if len(dims) < tree[name].ndim
    ]
    whole = [tree[name] for name in list(within)[len(norms) :]]
    if whole and transformed():  # vmap does not support one call for all
        norms += [torch.linalg.vector_norm(leaf, dtype=dtype).reshape(1) for leaf in whole]
    elif whole:  # networks have many of them, and small: one call for all
        found = torch._foreach_norm(whole, 2, dtype)  # pyright: ignore[reportPrivateImportUsage]  # as torch's clipping
        norms.append(torch.stack(found))
    own = torch.cat(norms)
    return own if summed is None else summed(own.square()).sqrt()


def _norms(tensor: Tensor, within: list[int], dtype: torch.dtype) -> Tensor:
    if not within:  # over nothing
        return tensor.to(dtype).abs().reshape(-1)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=within, dtype=dtype)
    return norms.reshape(-1)


def per_leaf(units: Tensor, tree: Tree, within: Within) -> list[Tensor]:
    """Split one number per unit into tensors that broadcast to the leaves of ``within``."""
    shapes = [
        [1 if d in dims else n for d, n in enumerate(tree[name].shape)]
        for name, dims in within.items()
    ]
    parts = torch.split(units, [math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


# --- Units of parameters that are sharded over ranks ---


def clip_shards(
    clip: Callable[..., tuple[Tree, Tensor]],
    grads: Tree,
    params: Params,
    unit_dims: UnitDims | None,
) -> tuple[Tree, Tensor]:
    """Clip the local shards; a unit on several ranks is clipped by its norm over all of them.

    Args:
        clip: ``clip(grads, params, summed=...)`` returns clipped leaves of one dtype, and a mask of
            the units that it scaled down.
        grads: The gradients, with at least some DTensors.
        params: The parameters, sharded like the gradients.
        unit_dims: See `agc_clip`.

    Returns:
        The clipped gradients, sharded as before, and the fraction of units that was scaled down.
    """
    # The dims of the mesh along which the units of a leaf are split over ranks.
    apart = {
        name: tuple(where for where, dim in cuts(grads[name]).items() if dim in dims)
        for name, dims in within_units(grads, unit_dims).items()
    }
    clipped: Tree = {}
    counts = []
    for part in parts(grads):
        kinds = {(apart[name], leaf.dtype) for name, leaf in part.leaves.items()}
        for over, dtype in sorted(kinds, key=str):
            some = {
                name: leaf
                for name, leaf in part.leaves.items()
                if (apart[name], leaf.dtype) == (over, dtype)
            }
            weights = {name: local(params[name]) for name in some}
            summed = partial(part.summed, over=over) if over else None
            scaled, fewer = clip(some, weights, summed=summed)
            clipped |= {name: resharded(leaf, grads[name]) for name, leaf in scaled.items()}
            count = torch.stack([fewer.sum(), torch.ones_like(fewer).sum()])
            # Each rank has counted a unit that is split over ranks.
            counts.append(part.summed(count, over=set(cuts(part.like)) - set(over)))
    shrunk, units = torch.stack(counts).sum(0).to(torch.float32).unbind()
    return clipped, shrunk / units


# --- Clipping of the whole gradient, and of units ---


BLOCK = 1 << 20


def shrinking(norms: Tensor, limit: Tensor | float) -> Tensor:
    """Compute min(1, limit/norm), or 1 for a norm that is not finite: Inf and NaN stay visible."""
    over = (norms > limit) & norms.isfinite()
    return torch.where(over, limit / torch.where(over, norms, 1.0), 1.0)


@factory
def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale the whole gradient to a norm of at most ``max_norm``.

    g ← g · min(1, max_norm / ‖g‖). A gradient that is not finite is not changed.

    Args:
        max_norm: The largest norm of the gradient, above 0.

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

    def scaling(
        grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[ScaledTree, State, Out]:
        norm = _products.norm(grads)
        factor = shrinking(norm, max_norm)
        out = {"norm": norm, "clipped_fraction": (factor < 1).to(norm.dtype)}

        def factors(names: Collection[str]) -> Tree:
            return {n: factor.to(_tree.at_least_float32(grads[n]).dtype) for n in names}

        return ScaledTree(grads, factors), state, out

    def update(
        grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        clipped, state, out = scaling(grads, state, params, context)
        return clipped.wide(grads), state, out

    return transform_in_context(
        "clip_by_global_norm",
        "tree -> tree",
        update,
        publishes=("norm", "clipped_fraction"),
        row_rules=IGNORES_ROWS,
    ).with_scaling(scaling)


@factory
def agc_clip(
    clipping: float | Tensor | None = 0.01,
    *,
    eps: float = 1e-3,
    exclude: Callable[[str], bool] | None = None,
    unit_dims: UnitDims | None = None,
) -> Transform:
    r"""Limit the gradient of every unit to a fraction of the unit's weight (adaptive clipping).

    Per unit i:  G_i ← G_i · min(1, clipping · max(‖W_i‖, eps) / ‖G_i‖). It never scales up, and
    clipping twice is clipping once. (The published code also floors ‖G_i‖ at 1e-6, which matters
    only for limits below that, and there shrinks a clipped unit again every time.)

    A unit is one output row or filter: dim 0 of a tensor with two or more dims (Linear, Conv1d to
    Conv3d, rows of an Embedding), the whole of a smaller one. Norms are taken in float32 or wider.

    Args:
        clipping: λ >= 0; 0.01 for batches of 1024 to 4096, up to 0.16 for smaller ones. None or 0
            switches clipping off.
        eps: The smallest norm used for a weight, above 0, so that weights at zero can move.
        exclude: Predicate on names; true means not clipped. The paper excludes the weight of the
            final linear layer. It may be true for no leaf: in a branch of `partition`, or
            inside `masked`, the transform sees some leaves only.
        unit_dims: name -> the dim, or dims, that index the units, () for one unit, None for the
            default above. ConvTranspose weights are (in, out, ...): their units lie along dim 1.

    Publishes: ``clipped_fraction`` (), the fraction of the units that was scaled down.

    A unit that contains Inf or NaN is not changed: scaling would silently turn its finite entries
    into 0 or NaN. Use finite_filter to handle it.

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

    clip = _UnitClip(0.0 if clipping is None else clipping, eps, exclude, unit_dims)
    return transform_in_context(
        "agc_clip",
        "tree -> tree",
        clip,
        publishes=("clipped_fraction",),
        row_rules=IGNORES_ROWS,
    ).with_scaling(clip.scaling)


@dataclass(frozen=True, eq=False)
class _UnitClip:
    """The computation of `agc_clip`, with its arguments."""

    clipping: float | Tensor
    eps: float | Tensor
    exclude: Callable[[str], bool] | None
    unit_dims: UnitDims | None

    def __call__(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        chosen = self._chosen(grads)
        if not chosen:
            nothing = torch.zeros((), dtype=torch.float32, device=_tree.device_of(grads))
            return grads, state, {"clipped_fraction": nothing}
        if any(map(is_sharded, chosen.values())):
            some, fraction = clip_shards(self.clip, chosen, params, self.unit_dims)
            return grads | some, state, {"clipped_fraction": fraction}
        clipped, blockwise = dict(grads), _BlockFactors(self, chosen, params)
        for names in blocks(chosen, BLOCK):
            clipped |= scaled({n: grads[n] for n in names}, blockwise(names))
        return clipped, state, blockwise.published()

    def scaling(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree | ScaledTree, State, Out]:
        """Do the same as a call, and leave norms and products to the reader of the result."""
        chosen = self._chosen(grads)
        if not chosen or any(map(is_sharded, chosen.values())):
            return self(grads, state, params, context)
        blockwise = _BlockFactors(self, chosen, params)
        return ScaledTree(grads, blockwise, blockwise.published), state, {}

    def _chosen(self, grads: Tree) -> Tree:
        """Return the leaves that are clipped."""
        if is_off(self.clipping):
            return {}
        exclude = self.exclude
        return {n: g for n, g in grads.items() if exclude is None or not exclude(n)}

    def clip(
        self,
        grads: Tree,
        params: Params,
        summed: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tree, Tensor]:
        """Return clipped leaves of one dtype, and a mask of the units that were scaled down."""
        factors, fewer = self.factors(grads, params, summed)
        return scaled(grads, factors), fewer

    def factors(
        self,
        grads: Tree,
        params: Params,
        summed: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tree, Tensor]:
        """Return the factors of leaves of one dtype, and a mask of the units to scale down."""
        within = within_units(grads, self.unit_dims)
        limits = self.clipping * unit_norms(params, within, summed).clamp(min=self.eps)
        if isinstance(self.clipping, Tensor):  # a schedule that ends at 0 switches clipping off
            limits = torch.where(self.clipping == 0, torch.inf, limits)
        factors = shrinking(unit_norms(grads, within, summed), limits)
        dtype = _tree.at_least_float32(next(iter(grads.values()))).dtype
        by = per_leaf(factors.to(dtype), grads, within)
        return dict(zip(within, by, strict=True)), factors < 1


@dataclass(frozen=True, eq=False)
class _BlockFactors:
    """The factors of some leaves at a time, and the units that were scaled down so far.

    Attributes:
        clip: The clip.
        chosen: The gradients of the leaves that are clipped.
        params: The parameters.
        shrunk: The masks of the units of the leaves so far.
    """

    clip: _UnitClip
    chosen: Tree
    params: Params
    shrunk: list[Tensor] = field(default_factory=list)

    def __call__(self, names: Collection[str]) -> Tree:
        """Return the factors of those of some leaves that are clipped."""
        found: Tree = {}
        for block in blocks({n: self.chosen[n] for n in names if n in self.chosen}, BLOCK):
            some, fewer = self.clip.factors(
                {n: self.chosen[n] for n in block}, {n: self.params[n] for n in block}
            )
            found |= some
            self.shrunk.append(fewer)
        return found

    def published(self) -> Out:
        """Return what the clip publishes, after all leaves."""
        return _fraction(self.shrunk)


def _fraction(shrunk: list[Tensor]) -> Out:
    """Return the fraction of the units that were scaled down, to be published."""
    return {"clipped_fraction": torch.cat(shrunk).to(torch.float32).mean()}
