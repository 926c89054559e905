"""VGG, of which the convolutions are kept and the linear layers are one."""

from __future__ import annotations

from torch import nn

from gradfilter.lab.models._images import Shape, check_side
from gradfilter.lab.models._layers import conv, with_head

STAGES = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions of each of the five stages of a VGG; its name counts three linear layers more."""


def vgg(
    depth: int, *, classes: int, shape: Shape, batchnorm: bool = False, width: int = 64
) -> nn.Module:
    """Five stages of convolutions, each ended by a max-pool of 2, global average pool, Linear.

    Args:
        depth: 8, 11, 13, 16 or 19.
        classes: C.
        shape: Of one image, at least 32 x 32.
        batchnorm: After every convolution, which has no bias then.
        width: k; the stages have k, 2k, 4k, 8k and 8k channels.

    Raises:
        UsageError: The image is too small.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(vgg(8, classes=10, shape=(3, 32, 32), width=1))
        1094

    References:
        Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        2014, https://arxiv.org/abs/1409.1556
    """
    check_side(f"vgg{depth}", shape, 32)
    layers: list[nn.Module] = []
    inside = shape[0]
    for stage, count in enumerate(STAGES[depth]):
        for _ in range(count):
            layers += conv(inside, width * min(2**stage, 8), batchnorm)
            inside = width * min(2**stage, 8)
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return with_head(layers, nn.Linear(inside, classes))
