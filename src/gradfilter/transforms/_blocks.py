"""Group leaves into blocks for computations that make several passes over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from gradfilter._types import Tree


def blocks(tree: Tree, size: int) -> Iterable[list[str]]:
    """Yield names of leaves with one device and dtype, on a CPU about ``size`` numbers at a time.

    The second pass then finds the block in the cache. On a GPU all leaves form one block, because
    an extra call costs more than it saves. Under a compiler every leaf is a block, because the
    compiler fuses the passes.
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
