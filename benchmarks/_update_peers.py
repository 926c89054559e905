"""Clipping with several libraries, each before the same optimizer of torch.optim.

Each function takes leaves with gradients and their optimizer, and returns a function to call before
the step of the optimizer. All clip unit by unit (AGC), in place.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

Clip = Callable[[list[nn.Parameter], Optimizer, float], Callable[[], None]]


def timm(leaves: list[nn.Parameter], optimizer: Optimizer, clipping: float) -> Callable[[], None]:
    from timm.utils.agc import adaptive_clip_grad

    return lambda: adaptive_clip_grad(leaves, clipping)


def pytorch_optimizer(
    leaves: list[nn.Parameter], optimizer: Optimizer, clipping: float
) -> Callable[[], None]:
    """Clip every parameter separately, as the optimizer Ranger21 of the library does."""
    from pytorch_optimizer import agc

    @torch.no_grad()
    def clip() -> None:
        for leaf in leaves:
            leaf.grad.copy_(agc(leaf, leaf.grad, agc_clip_val=clipping))

    return clip


def interop(
    leaves: list[nn.Parameter], optimizer: Optimizer, clipping: float
) -> Callable[[], None]:
    """Clip with AGC of gradfilter, which is called by the step of the optimizer."""
    from gradfilter.interop import AGC

    AGC(optimizer, clipping)
    return lambda: None


TIMM = "timm + torch"
CLIPS: dict[str, Clip] = {
    TIMM: timm,
    "pytorch_optimizer + torch": pytorch_optimizer,
    "gradfilter.interop.AGC + torch": interop,
}
