"""Update rules as one kernel of torch's, in which every number is read and written once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter._readable import followed
from gradfilter._types import Tree
from gradfilter.transforms._blocks import blocks

Leaves = list[Tensor]

# kernel(params, grads, buffers by name, t, lr, skip) works in place, and where skip is 1 it does
# not: no bit changes, whatever the gradients are.
Kernel = Callable[[Leaves, Leaves, dict[str, Leaves], Tensor, Tensor, Tensor | None], None]

BLOCK = 1 << 19
WIDE = (torch.float32, torch.float64)
DTYPES = (*WIDE, torch.bfloat16, torch.float16)


def fits(params: Tree, trees: Iterable[Any], cpu_dtypes: Collection[torch.dtype]) -> bool:
    """Whether the kernels take them: plain contiguous tensors, and the trees like the params."""
    # A compiler makes more of formulas, and vmap has no rule for the kernels.
    if followed():
        return False
    dtypes = {"cpu": cpu_dtypes, "cuda": DTYPES}
    return all(
        p.dtype in dtypes.get(p.device.type, ()) and _is_plain(p) for p in params.values()
    ) and all(
        isinstance(tree, dict)
        and tree.keys() == params.keys()
        and all(_is_plain(leaf) and _alike(leaf, params[name]) for name, leaf in tree.items())
        for tree in trees
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def run(
    kernel: Kernel,
    params: Tree,
    grads: Tree,
    buffers: dict[str, Tree],
    t: Tensor,
    lr: Tensor,
    keep: Tensor | None,
    donate: bool,
) -> tuple[Tree, dict[str, Tree]]:
    """New parameters and buffers: the old tensors where those are donated, else copies."""
    # On a GPU the kernels read their scalars as float32; on a CPU they read an lr of any width.
    t = t.to(torch.float32)
    lr = lr if lr.device.type == "cpu" else lr.to(torch.float32)
    skip = None if keep is None else keep.logical_not().to(torch.float32)
    old = [params, *buffers.values()]
    new: list[Tree] = [{} for _ in old]
    for names in blocks(params, BLOCK):
        lists = [[tree[n] if donate else tree[n].clone() for n in names] for tree in old]
        own = dict(zip(buffers, lists[1:], strict=True))
        kernel(lists[0], [grads[n] for n in names], own, t, lr, skip)
        if donate:  # the kernels do not tell autograd, which may have saved these tensors
            changed = [leaf for leaves in lists for leaf in leaves if not leaf.is_inference()]
            torch.autograd.graph.increment_version(changed)
        for tree, leaves in zip(new, lists, strict=True):
            tree.update(zip(names, leaves, strict=True))
    new = [{n: tree[n] for n in params} for tree in new]
    return new[0], dict(zip(buffers, new[1:], strict=True))
