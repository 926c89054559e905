"""What adaptive gradient clipping does before a step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradfilter import _tree
from gradfilter._types import Tree
from gradfilter.transforms._clip import agc_clip
from gradfilter.transforms._link import check_number, is_off

Clipping = float | Tensor | None
Exclude = Callable[[str], bool]


def check_values(values: dict[str, Any]) -> None:
    """Refuse an impossible ``clipping`` or ``agc_eps``."""
    clipping, eps = values["clipping"], values["agc_eps"]
    if clipping is not None:
        check_number("AGC", "clipping", clipping, low=0, fix="Use None (or 0) to switch it off.")
    check_number("AGC", "agc_eps", eps, low=0, open_low=True, fix="The paper has 1e-3.")


def clip_gradients(optimizer: Optimizer, exclude: Exclude | None) -> None:
    """Clip the gradients that the optimizer is about to use, in place."""
    for index, group in enumerate(optimizer.param_groups):
        check_values(group)
        clipping = group["clipping"]
        off = clipping is None or is_off(clipping)
        params, grads = ({}, {}) if off else _clippable(index, group, exclude)
        if not params:
            continue
        # A fused optimizer under GradScaler unscales in its kernel: the limit is scaled instead.
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            clipping = clipping * _tree.scalar(scale, next(iter(params.values())))
        link = agc_clip(clipping, eps=group["agc_eps"])
        with torch.set_grad_enabled(group.get("differentiable", False)):
            if torch.is_grad_enabled():  # the step writes into the parameters: clones for autograd
                clones = {place: p.clone() for place, p in params.items()}
                for place, g in link.update(grads, {}, clones)[0].items():
                    params[place].grad = g
            else:  # in place: DistributedDataParallel's gradients are views of its buckets
                clipped, _, _ = link.update(grads, {}, params)
                torch._foreach_copy_(list(grads.values()), [clipped[place] for place in grads])


def _clippable(index: int, group: dict[str, Any], exclude: Exclude | None) -> tuple[Tree, Tree]:
    """The parameters of a group to clip, and their gradients, by place: names may repeat."""
    params, grads = {}, {}
    for i, p in enumerate(group["params"]):
        place = f"{index}.{i}"
        name = group["param_names"][i] if "param_names" in group else place
        if p.grad is None or (exclude is not None and exclude(name)):
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(
                f"AGC: expected dense gradients, found a sparse one for {name!r}. Use sparse=False "
                "in the layer, or leave it unclipped with exclude=lambda name: ..."
            )
        params[place], grads[place] = p, p.grad
    return params, grads
