"""Whether all ranks start from the same parameters, without which they never meet again."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfilter._types import Params
from gradfilter.distributed._meeting import check_leaves_alike
from gradfilter.distributed._ranks import Ranks

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_start(params: Params, ranks: Ranks) -> None:
    """Refuse, on every rank, parameters that differ between ranks.

    Compared are the sums of their bits, as integers: equal parameters always pass.

    Args:
        params: This rank's.
        ranks: Who starts together.

    Raises:
        ValueError: Leaves or values differ; it names two ranks and a leaf.
    """
    check_leaves_alike(params, ranks)
    sums = torch.stack([_bits(p) for p in params.values()]).cpu()
    found = ranks.gather_on_host(sums)
    for rank, other in enumerate(found):
        for name, same in zip(params, (other == found[0]).tolist(), strict=True):
            if not same:
                raise ValueError(
                    f"across_ranks: expected the same parameters on every rank, found other values "
                    f"of {name!r} on rank {ranks.name(0)} than on rank {ranks.name(rank)}. Wrap "
                    "the model in DistributedDataParallel, which copies those of the first rank "
                    "to all, or seed all ranks alike before the model is made."
                )


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as integers, which no rounding touches. ()."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64)
