"""Which leaves to go through together, when several passes are made over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from gradfilter._types import Tree


def blocks(tree: Tree, size: int) -> Iterable[list[str]]:
    """Names of leaves of one device and dtype; on a CPU about ``size`` numbers at a time.

    What the first pass has read is then in the cache when the next one comes. A GPU takes all
    leaves at once: there every further call costs more than it saves. A compiler takes them one
    by one, and makes one pass of all.
    """
    if torch.compiler.is_compiling():
        return [[name] for name in tree]
    groups: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    seen = 0
    for name, leaf in tree.items():
        number = seen // size if leaf.device.type == "cpu" else 0
        groups[leaf.device, leaf.dtype, number].append(name)
        seen += leaf.numel()
    return groups.values()
