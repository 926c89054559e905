"""Filter the rows of all processes of a trainer as one stack."""

from __future__ import annotations

from gradfilter._types import Transform
from gradfilter.distributed._rank_stack import across_ranks
from gradfilter.transforms._chain import chain


def over_all_ranks(transforms: Transform, size: int) -> Transform:
    """Put `across_ranks` in front of a chain that has none, if there are several processes.

    In a trainer each process would otherwise filter its own rows, and the parameters of the
    processes would diverge.

    Args:
        transforms: A chain that takes rows.
        size: The number of processes of the trainer.
    """
    parts = chain(transforms).parts
    if size == 1 or any(part.name == "across_ranks" for part in parts):
        return transforms
    return chain(across_ranks(), *parts)
