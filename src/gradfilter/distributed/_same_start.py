"""Whether all ranks start alike, without which they never meet again: parameters and chain."""

from __future__ import annotations

import json
from itertools import zip_longest

import torch
from torch import Tensor

from gradfilter._types import Params, Transform
from gradfilter.distributed._meeting import check_leaves_alike
from gradfilter.distributed._ranks import Ranks
from gradfilter.transforms._fingerprint import described, shortened

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


def check_same_chain(chain: Transform | None, ranks: Ranks) -> None:
    """Refuse, on every rank, chains or hyperparameters that differ between ranks.

    Compared is what stands from `across_ranks` on, which has to do the same everywhere. What
    stands before it works on the rows of one rank.

    Args:
        chain: The outermost one, or None where `across_ranks` was not made part of one.
        ranks: Who starts together.

    Raises:
        ValueError: They differ; it names two ranks and what is different.
    """
    links = () if chain is None else chain.links
    names = [part.name for part in links]
    links = links[names.index("across_ranks") :] if "across_ranks" in names else links
    own = [described(part) for part in links]
    others = ranks.gather_texts(json.dumps(own))
    for rank, text in enumerate(others):
        if text != others[0]:
            raise ValueError(
                f"across_ranks: expected the same chain on every rank, found "
                f"{_difference(json.loads(others[0]), json.loads(text), ranks, rank)}. Build it "
                "from the same numbers on all ranks; what differs on purpose belongs before "
                "across_ranks()."
            )


def _difference(ours: list[str], theirs: list[str], ranks: Ranks, rank: int) -> str:
    """The first transform in which two ranks differ, in words."""
    one, other = f"on rank {ranks.name(0)}", f"on rank {ranks.name(rank)}"
    pairs = zip_longest(ours, theirs, fillvalue="nothing")
    a, b = next((shortened(a), shortened(b)) for a, b in pairs if a != b)
    if a == b:
        return f"{a} {one} with other functions than {other}"
    return f"{a} {one} and {b} {other}"


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as integers, which no rounding touches. ()."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().view(INTEGERS[real.element_size()]).sum(dtype=torch.int64)
