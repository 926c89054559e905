"""Clipping by several libraries, each in front of the same optimizer of torch.optim.

Each takes leaves with gradients and the optimizer of them, and returns what is to be called before
the optimizer's step. All clip unit by unit (AGC), in place.
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
    """Parameter by parameter, which is how the library's own Ranger21 calls its function."""
    from pytorch_optimizer import agc

    @torch.no_grad()
    def clip() -> None:
        for leaf in leaves:
            leaf.grad.copy_(agc(leaf, leaf.grad, agc_clip_val=clipping))

    return clip


def interop(
    leaves: list[nn.Parameter], optimizer: Optimizer, clipping: float
) -> Callable[[], None]:
    """Ours, which the optimizer's step calls itself."""
    from gradfilter.interop import AGC

    AGC(optimizer, clipping)
    return lambda: None


TIMM = "timm + torch"
CLIPS: dict[str, Clip] = {
    TIMM: timm,
    "pytorch_optimizer + torch": pytorch_optimizer,
    "gradfilter.interop.AGC + torch": interop,
}
