"""SGD, Adam, AdamW and RMSprop of PyTorch with adaptive gradient clipping built in."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from gradfilter.interop._agc import AGC
from gradfilter.interop._agc_step import Clipping, Exclude


def _signature(base: type) -> inspect.Signature:
    """The optimizer's own signature, and after it what `AGC` takes, by keyword."""
    _, *own = inspect.signature(AGC).parameters.values()
    theirs = inspect.signature(base)
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    return theirs.replace(parameters=[*theirs.parameters.values(), *keywords])


class _Clips(torch.optim.Optimizer):
    """Made with `AGC` already around it; stands in front of the optimizer that it makes."""

    def __init__(
        self,
        *args: Any,
        clipping: Clipping = 0.01,
        agc_eps: float = 1e-3,
        exclude: Exclude | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        AGC(self, clipping, agc_eps, exclude)


class SGD_AGC(_Clips, torch.optim.SGD):
    """`torch.optim.SGD` that clips the gradients, unit by unit, before each step.

    Per unit i:  G_i ← G_i · min(1, clipping · max(‖W_i‖, agc_eps) / ‖G_i‖), written into
    ``p.grad``; then b ← μ b + G and p ← p − lr · b, with all options of `torch.optim.SGD`.

    Args:
        *args: As `torch.optim.SGD`. Groups may have their own ``clipping`` and ``agc_eps``.
        clipping: λ >= 0; None or 0 switches clipping off, and the rest is the same bit for bit.
        agc_eps: Above 0, floors the norm of the weight.
        exclude: Predicate on names, given ``named_parameters()``; true means not clipped. See
            `AGC`.
        **kwargs: As `torch.optim.SGD`.

    Raises:
        ValueError: As `torch.optim.SGD`; clipping < 0 or agc_eps <= 0.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import SGD_AGC
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        >>> head = lambda name: name == "1.weight"
        >>> optimizer = SGD_AGC(model.named_parameters(), lr=0.1, clipping=0.02, exclude=head)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()

    References:
        Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
        Normalization", 2021, https://arxiv.org/abs/2102.06171
    """

    __signature__ = _signature(torch.optim.SGD)


class Adam_AGC(_Clips, torch.optim.Adam):
    """`torch.optim.Adam` that clips the gradients, unit by unit, before each step.

    G ← the clipped gradient;  p ← p − lr · m̂ / (√v̂ + eps), m̂ and v̂ of G.
    Arguments, errors and references are those of `SGD_AGC`, with `torch.optim.Adam`'s for SGD's.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import Adam_AGC
        >>> optimizer = Adam_AGC(torch.nn.Linear(3, 2).parameters(), lr=1e-3, clipping=0.02)
        >>> optimizer.param_groups[0]["clipping"]
        0.02
    """

    __signature__ = _signature(torch.optim.Adam)


class AdamW_AGC(_Clips, torch.optim.AdamW):
    """`torch.optim.AdamW` that clips the gradients, unit by unit, before each step.

    G ← the clipped gradient;  p ← (1 − lr λ) p − lr · m̂ / (√v̂ + eps), m̂ and v̂ of G.
    Arguments, errors and references are those of `SGD_AGC`, with `torch.optim.AdamW`'s for SGD's.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import AdamW_AGC
        >>> optimizer = AdamW_AGC(torch.nn.Linear(3, 2).parameters(), lr=1e-3, clipping=0.02)
        >>> optimizer.param_groups[0]["clipping"]
        0.02
    """

    __signature__ = _signature(torch.optim.AdamW)


class RMSprop_AGC(_Clips, torch.optim.RMSprop):
    """`torch.optim.RMSprop` that clips the gradients, unit by unit, before each step.

    G ← the clipped gradient;  p ← p − lr · G / (√v + eps), v the running mean of G².
    Arguments, errors and references are those of `SGD_AGC`, with `torch.optim.RMSprop`'s for SGD's.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import RMSprop_AGC
        >>> optimizer = RMSprop_AGC(torch.nn.Linear(3, 2).parameters(), lr=1e-3, clipping=0.02)
        >>> optimizer.param_groups[0]["clipping"]
        0.02
    """

    __signature__ = _signature(torch.optim.RMSprop)
