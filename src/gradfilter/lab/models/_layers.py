"""What plain networks are made of."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def conv(inside: int, out: int, batchnorm: bool) -> list[nn.Module]:
    """A 3 x 3 convolution, without bias if batch norm follows, and ReLU."""
    layer = nn.Conv2d(inside, out, 3, 1, 1, bias=not batchnorm)
    norm = [nn.BatchNorm2d(out)] if batchnorm else []
    return [layer, *norm, nn.ReLU()]


def with_head(features: list[nn.Module], head: nn.Linear) -> nn.Module:
    """The layers one after the other, the last one by the name that all models give it."""
    return nn.Sequential(OrderedDict(features=nn.Sequential(*features), head=head))
