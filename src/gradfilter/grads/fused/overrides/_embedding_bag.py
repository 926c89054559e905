"""Override of bags of embeddings: one kernel over the bags of all rows.

vmap would run the kernel row by row, and its gradients would be tables (M, units, width), one set
of them for every row. Here they stay what they are: one output gradient per looked-up unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from gradfilter._readable import readable
from gradfilter.grads.fused._factors import EmbeddingFactor
from gradfilter.grads.fused._host import Host, Override
from gradfilter.grads.fused._tape import Weight
from gradfilter.grads.fused.overrides._embedding import (
    by_frequency,
    note_lookup,
    refuse_options,
)
from gradfilter.grads.fused.overrides._row_by_row import row_by_row
from gradfilter.grads.fused.overrides._row_operation import (
    Gradients,
    NeedsGrad,
    RowOperation,
    Saved,
)

MODES = ("sum", "mean", "max")
"""The modes in the order of their numbers in `torch.ops.aten`."""


def embedding_bag(
    host: Host,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Replace `torch.nn.functional.embedding_bag`."""
    if not host.batched(input, weight, offsets, per_sample_weights):
        return NotImplemented
    if host.batched(weight):
        refuse_options("embedding_bag", sparse, max_norm)
    weights = host.weights(weight)
    usual = (
        weight.is_floating_point()
        and input.ndim == (2 if offsets is None else 1)
        and input.numel() > 0
        and mode in MODES
        and not (scale_grad_by_freq and mode == "max")
        and max_norm is None
    )
    if per_sample_weights is not None:
        usual = usual and mode == "sum" and per_sample_weights.shape == input.shape
        usual = usual and per_sample_weights.dtype == weight.dtype
    if offsets is not None:
        usual = usual and offsets.ndim == 1 and len(offsets) > include_last_offset
    if weights is None or not usual:
        # Every row has its own table, or torch raises the error.
        given = {
            "max_norm": max_norm,
            "norm_type": norm_type,
            "scale_grad_by_freq": scale_grad_by_freq,
            "mode": mode,
            "sparse": sparse,
            "per_sample_weights": per_sample_weights,
            "include_last_offset": include_last_offset,
            "padding_idx": padding_idx,
        }
        return row_by_row(F.embedding_bag)(host, input, weight, offsets, **given)
    lower = host.level.lower
    index = lower(input).flatten(1)
    if offsets is None:
        starts = torch.arange(len(input), device=index.device) * input.shape[1]
        starts = starts.expand(len(index), -1)
    else:
        starts = lower(offsets)
    factors = None if per_sample_weights is None else lower(per_sample_weights).flatten(1)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    options = (mode, padding, scale_grad_by_freq, include_last_offset)
    return host.run("embedding_bag", _apply, host, index, starts, factors, *weights, options)


def embedding_bag_of(alone: Override) -> Override:
    """Return the override of `torch.embedding_bag`, which returns four tensors."""

    def override(
        host: Host,
        weight: Tensor,
        indices: Tensor,
        offsets: Tensor,
        scale_grad_by_freq: bool = False,
        mode: int = 0,
        sparse: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if host.batched(weight):
            refuse_options("embedding_bag", sparse, None)
        options = (scale_grad_by_freq, mode, sparse, *args)
        return alone(host, weight, indices, offsets, *options, **kwargs)

    return override


def _apply(
    host: Host,
    index: Tensor,
    starts: Tensor,
    given: Tensor | None,
    weight: Weight,
    options: tuple[str, int, bool, bool],
) -> Tensor:
    mode, padding, scaled, last = options
    note_lookup(host, "embedding_bag", index, weight)
    _check_starts(starts, index.shape[1])
    # Every row begins with a bag of its own, which stays empty: without it, positions before the
    # first offset would be in the last bag of the row before.
    starts = torch.cat([starts.new_zeros(len(starts), 1), starts], 1)
    bags = _Bags(index, starts, last, mode, padding, scaled, given is not None)
    return bags.apply(host.tape, index if given is None else given, weight, None)


def _check_starts(starts: Tensor, length: int) -> None:
    """Raise torch's own errors where values can be read, as its kernel on a CPU does."""
    if not readable(starts):
        return
    if bool((starts[:, 0] != 0).any()) or bool((starts[:, -1] > length).any()):
        raise RuntimeError(
            "Expected offsets of embedding_bag that begin with 0 and do not exceed the length "
            f"{length} of the input, found others."
        )


@dataclass(eq=False)
class _Bags(RowOperation[Tensor]):
    """The input is the weight of every position, or its index if there are no such weights.

    Attributes:
        index: The unit at every position. (M, n).
        starts: The first position of every bag, sorted. (M, k).
        last: True if the last bag is not a bag, but begins where the one before it ends.
        mode: One of `MODES`.
        padding: The unit that is omitted; negative for none.
        scaled: True if gradients are divided by how often the row contains the unit. (The kernel
            of torch 2.11 on a CPU takes the frequencies of other units; later ones agree.)
        weighted: True if the input is the weights.
    """

    index: Tensor
    starts: Tensor
    last: bool
    mode: str
    padding: int
    scaled: bool
    weighted: bool

    def _bags(self) -> slice:
        return slice(1, -1 if self.last else None)

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        count, n = self.index.shape
        first = torch.arange(count, device=x.device, dtype=self.starts.dtype)[:, None] * n
        found, _, _, largest = torch.ops.aten.embedding_bag.padding_idx(
            weight,
            self.index.flatten(),
            (self.starts + first).flatten().to(self.index.dtype),
            False,
            MODES.index(self.mode),
            False,
            x.flatten() if self.weighted else None,
            False,
            self.padding if self.padding >= 0 else None,
        )
        bags = found.view(count, -1, weight.shape[1])[:, self._bags()]
        saved = (x if self.weighted else None, largest if self.mode == "max" else None)
        return bags.contiguous(), saved

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        given, largest = saved
        kept = self.index != self.padding
        places = torch.arange(self.index.shape[1], device=grad.device, dtype=self.starts.dtype)
        bag = torch.searchsorted(self.starts, places.repeat(len(grad), 1), right=True) - 1
        grads = F.pad(grad, (0, 0, 1, int(self.last)))
        if self.mode == "mean":
            sizes = grads.new_zeros(self.starts.shape).scatter_add_(1, bag, kept.to(grad.dtype))
            grads = grads / sizes.clamp(min=1)[..., None]
        each = _at(grads, bag)
        inputs = None
        if self.weighted and needs_grad.input:
            found = (F.embedding(self.index, weight) * each).sum(-1)
            inputs = torch.where(kept, found, 0.0)
        if not needs_grad.weight:
            return Gradients(inputs)
        if largest is not None:
            each = self._of_largest(each, largest.view(*self.starts.shape, -1), bag, kept)
        if self.weighted:
            each = each * given[..., None]
        if self.padding >= 0:
            each = torch.where(kept[..., None], each, 0.0)
        if self.scaled:
            each = by_frequency(self.index, each, len(weight))
        return Gradients(inputs, EmbeddingFactor(self.index, each, weight.shape))

    def _of_largest(self, each: Tensor, largest: Tensor, bag: Tensor, kept: Tensor) -> Tensor:
        """Give the gradient of every entry to the unit with the largest one.

        A bag may contain that unit several times. Each place gets an equal part, as their sum is
        the gradient of the unit.
        """
        chosen = (self.index[..., None] == _at(largest, bag)) & kept[..., None]
        ones = chosen.to(each.dtype)
        counts = torch.zeros_like(largest, dtype=each.dtype)
        counts.scatter_add_(1, bag[..., None].expand_as(ones), ones)
        return torch.where(chosen, each / _at(counts, bag).clamp(min=1), 0.0)


def _at(bags: Tensor, bag: Tensor) -> Tensor:
    """Return the entry (M, n, width) of the bag (M, k, width) that every position is in."""
    return bags.gather(1, bag[..., None].expand(*bag.shape, bags.shape[-1]))
