"""A network of linear layers."""

from __future__ import annotations

import math

from torch import nn

from gradfilter.lab.models._images import Shape
from gradfilter.lab.models._layers import with_head


def mlp(
    hidden: int, *, classes: int, shape: Shape, dropout: float = 0.0, depth: int = 2
) -> nn.Module:
    """The image as one row of numbers, hidden layers of h with ReLU, Linear.

    Args:
        hidden: h, units of each hidden layer.
        classes: C.
        shape: Of one image.
        dropout: After every hidden layer.
        depth: Hidden layers.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(mlp(64, classes=10, shape=(1, 8, 8)))
        8970
    """
    layers: list[nn.Module] = [nn.Flatten()]
    inside = math.prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(inside, hidden), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        inside = hidden
    return with_head(layers, nn.Linear(inside, classes))
