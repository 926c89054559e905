"""Rows that are groups of samples, given by an index: one row per user, task or domain.

Row m is the weighted mean of the gradients of its samples, so J = A G with the gradients of all
samples G (N, P) and A (M, N), which has one entry per column. Every question about J is a question
about G; A itself is never formed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradfilter import _tree
from gradfilter._types import Tree
from gradfilter.grads._loss import RefusedByAll
from gradfilter.grads._stack import (
    ComputedStack,
    DenseStack,
    GradStack,
    StackOrigin,
    check_per_row,
    check_same_leaves,
    copied,
    first_rows,
    scale_rows,
)

MOST_SAMPLES = 2048
"""The number of samples above which the rows are computed instead of an N x N Gram."""


# --- The map from samples to rows ---


@dataclass(frozen=True, eq=False)
class SampleGroups:
    """The map from samples to rows, A.

    Attributes:
        index: The row of each sample. (N,) int64.
        shares: The share of each sample in its row; 0 removes it. (N,)
        count: M.
    """

    index: Tensor
    shares: Tensor
    count: int

    @classmethod
    def of(
        cls, samples: GradStack, index: Tensor, weights: Tensor | None, count: int
    ) -> SampleGroups:
        """Divide the weights of the samples that take part by their sum in each row.

        Args:
            samples: One row per sample.
            index: The row of each sample.
            weights: One weight >= 0 per sample, or None.
            count: M.
        """
        live = samples.live
        own = torch.ones_like(live, dtype=_tree.sum_dtype(live)) if weights is None else weights
        own = torch.where(live, own.to(_tree.sum_dtype(live)), 0.0)
        index = index.to(live.device)
        total = own.new_zeros(count).index_add(0, index, own)
        return cls(index, own / torch.where(total == 0, 1.0, total)[index], count)

    @property
    def empty(self) -> Tensor:
        """A mask of the rows without a sample that takes part. (M,) bool."""
        return self.sum(torch.ones_like(self.shares)) == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return A v for values (N, ...): the sums of each group's shares. (M, ...)."""
        wide = torch.promote_types(values.dtype, torch.float32)
        shared = scale_rows(values.to(wide), self.shares.to(wide))
        found: Tensor = shared.new_zeros(self.count, *values.shape[1:])
        return found.index_add(0, self.index, shared).to(values.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """Return Aᵀ v for values (M,): the weight of each sample. (N,)."""
        return scale_rows(values[self.index], self.shares)

    def only(self, row: int) -> Tensor:
        """Return the shares of one row's samples, 0 for the others. (N,)."""
        return torch.where(self.index == row, self.shares, 0.0)

    def losses(self, losses: Tensor) -> Tensor:
        """Return the weighted means of the losses (N,); NaN for a row without samples. (M,)."""
        return torch.where(self.empty, torch.nan, self.sum(losses))


# --- The stack ---


@copied("losses", "scale")
@dataclass(frozen=True, eq=False, repr=False)
class GroupedStack(ComputedStack):
    """Rows that are weighted means of groups of samples; made by `group_samples`.

    The Gram is A K Aᵀ, with the Gram K (N, N) of the samples, from which the norms also come. With
    more than 2,048 samples the M rows are computed instead. ``combine`` and ``dot`` cost what they
    cost for the samples. ``aux`` is that of the samples, with a leading axis N.

    Attributes:
        samples: One row per sample, without factors.
        groups: The map from samples to rows.
        count: The number of rows: the first ones of ``groups``.
    """

    samples: ComputedStack
    groups: SampleGroups
    count: int
    losses: Tensor
    buffers: Tree
    aux: Any
    origin: StackOrigin
    scale: Tensor | None = None

    @override
    def __len__(self) -> int:
        return self.count

    @property
    @override
    def shapes(self) -> dict[str, torch.Size]:
        return self.samples.shapes

    @property
    @override
    def device(self) -> torch.device:
        return self.samples.device

    @override
    def _empty(self) -> Tensor:
        return self.groups.empty[: self.count]

    @override
    def release(self) -> None:
        """Free what the gradients of the samples can be computed from again."""
        self.samples.release()
        vars(self).pop("_rows_of_groups", None)

    @override
    def explain(self) -> str:
        """Return the numbers of rows and samples, and how those of the samples are computed."""
        rows, samples = self.groups.count, len(self.samples)
        return f"{rows} rows of {samples} samples\n{self.samples.explain()}"

    @override
    def gram_is_cheap(self) -> bool:
        """Return True if the Gram of the samples is computed, which the norms also need."""
        return self._compares_samples

    @property
    def _compares_samples(self) -> bool:
        return len(self.samples) <= MOST_SAMPLES

    @cached_property
    def _rows_of_groups(self) -> DenseStack:
        """The rows of all groups, not scaled, for questions about many samples."""
        return DenseStack(self._stacked())

    def _stacked(self) -> Tree:
        """Compute the rows of all groups. (M, *shape)."""
        if isinstance(self.samples, DenseStack):
            return {name: self.groups.sum(g) for name, g in self.samples.stacked().items()}
        # A stack that has answered norms holds what all combinations need.
        self.samples.sq_norms()
        found = [self.samples.combine(self.groups.only(m)) for m in range(self.groups.count)]
        return {name: torch.stack([tree[name] for tree in found]) for name in self.shapes}

    @override
    def gram(self) -> Tensor:
        if self._compares_samples:
            gram = self.groups.sum(self.groups.sum(self.samples.gram()).T)
            # Signed terms that cancel can leave a small negative number for a row that is zero.
            gram.diagonal().clamp_(min=0)
        else:
            gram = self._rows_of_groups.gram()
        gram, scale = gram[: self.count, : self.count], self.scale
        return gram.clone() if scale is None else scale_rows(scale_rows(gram, scale).T, scale).T

    @override
    def sq_norms(self) -> Tensor:
        if self._compares_samples:
            return self.gram().diagonal().clone()
        norms, scale = self._rows_of_groups.sq_norms()[: self.count], self.scale
        return norms if scale is None else scale_rows(scale_rows(norms, scale), scale)

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        check_same_leaves(self.shapes, tree, "dot")
        return scale_rows(self.groups.sum(self.samples.dot(tree))[: self.count], self.scale)

    @override
    def combine(self, weights: Tensor) -> Tree:
        check_per_row("weight", weights, self.count)
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)
        weights = torch.cat([weights, weights.new_zeros(self.groups.count - self.count)])
        return self.samples.combine(self.groups.spread(weights.to(self.groups.shares.dtype)))

    @override
    def stacked(self) -> Tree:
        rows = self._stacked()
        return {name: scale_rows(leaf[: self.count], self.scale) for name, leaf in rows.items()}

    @override
    def _scaled(self, scale: Tensor) -> GroupedStack:
        return replace(self, scale=scale)

    @override
    def _columns(self, names: Collection[str]) -> GroupedStack:
        return replace(self, samples=self.samples.columns(names))

    @override
    def _first(self, count: int) -> GroupedStack:
        losses, scale = first_rows((self.losses, self.scale), count)
        return replace(self, count=count, losses=losses, scale=scale)

    def of(self, samples: ComputedStack) -> GroupedStack:
        """Return the same groups of other gradients of the same samples."""
        return _stack_of(samples, self.groups)


def group_samples(
    samples: ComputedStack, index: Tensor, weights: Tensor | None, count: int
) -> GroupedStack:
    """Return the rows of groups of samples.

    Args:
        samples: One row per sample.
        index: The row of each sample. (N,) int64.
        weights: One weight >= 0 per sample, or None.
        count: M, the number of rows.
    """
    return _stack_of(samples, SampleGroups.of(samples, index, weights, count))


def _stack_of(samples: ComputedStack, groups: SampleGroups) -> GroupedStack:
    losses, aux, origin = groups.losses(samples.losses), samples.aux, samples.origin
    params = origin.params
    if origin.per_row:  # those of the last sample of each group, which are those of all
        last = _first_samples(groups)
        params = {name: p[last] for name, p in params.items()}
    again = _Again(origin, groups)
    own = StackOrigin(groups.count, params, again.evaluate, origin.per_row, origin.check)
    return GroupedStack(samples, groups, groups.count, losses, samples.buffers, aux, own)


def _first_samples(groups: SampleGroups) -> Tensor:
    """Return a sample of each row; any sample for a row without one. (M,) int64."""
    places = torch.arange(len(groups.index), device=groups.index.device)
    found = places.new_zeros(groups.count)
    return found.scatter_reduce(0, groups.index, places, "amax")


@dataclass(frozen=True, eq=False)
class _Again:
    """The evaluation of grouped rows at other parameters.

    Attributes:
        origin: That of the samples.
        groups: The map from samples to rows.
    """

    origin: StackOrigin
    groups: SampleGroups

    def evaluate(
        self, params: Mapping[str, Tensor], per_row: bool, kept: Collection[str]
    ) -> GradStack:
        """Compute the rows; with ``per_row`` every sample takes the parameters of its row."""
        given = {n: p[self.groups.index] for n, p in params.items()} if per_row else params
        samples = self.origin.evaluate(given, per_row, kept)
        assert isinstance(samples, ComputedStack)  # as the samples of the first pass
        return _stack_of(samples, self.groups)


# --- Modules whose output for a sample depends on the others ---


def refuse_batch_statistics(modules: Mapping[str, nn.Module]) -> None:
    """Refuse groups of samples with BatchNorm in training mode: samples run one by one.

    Raises:
        RefusedByAll: There is such a module.
    """
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise RefusedByAll(
                f"Expected samples that do not affect each other with groups=, found {name!r} "
                f"({type(module).__name__}) that normalises with statistics of the batch. Put it "
                "in evaluation mode (module.eval()), use GroupNorm or LayerNorm, or sort the batch "
                "into microbatches of equal sizes."
            )
