"""Two small convolutional networks."""

from __future__ import annotations

from torch import nn

from gradfilter.lab.models._images import Shape, check_side
from gradfilter.lab.models._layers import conv, with_head


def cnn(width: int, *, classes: int, shape: Shape, batchnorm: bool = False) -> nn.Module:
    """Convolutions of k, 2k, 4k and 8k channels, max-pools of 2 after all but the first, then of 4.

    Args:
        width: k.
        classes: C.
        shape: Of one image, at least 32 x 32. The Linear takes what the pools leave of it: 8k
            numbers for 32 x 32.
        batchnorm: After every convolution, which has no bias then.

    Raises:
        UsageError: The image is too small.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(cnn(1, classes=10, shape=(3, 32, 32)))
        510

    References:
        Nakkiran et al., "Deep Double Descent", 2019, https://arxiv.org/abs/1912.02292
    """
    check_side("cnn_K", shape, 32)
    layers = conv(shape[0], width, batchnorm)
    for stage in range(3):
        layers += conv(width * 2**stage, width * 2 ** (stage + 1), batchnorm)
        layers.append(nn.MaxPool2d(2))
    layers += [nn.MaxPool2d(4), nn.Flatten()]
    left = (shape[1] // 32) * (shape[2] // 32)
    return with_head(layers, nn.Linear(8 * width * left, classes))


def cnn5(width: int, *, classes: int, shape: Shape, batchnorm: bool = False) -> nn.Module:
    """The channels of `cnn`; average pools of 2 after the 2nd and 3rd convolution, then global.

    Args:
        width: k.
        classes: C.
        shape: Of one image, at least 4 x 4.
        batchnorm: After every convolution, which has no bias then.

    Raises:
        UsageError: The image is too small.
    """
    check_side("cnn5_K", shape, 4)
    layers = [
        *conv(shape[0], width, batchnorm),
        *conv(width, 2 * width, batchnorm),
        nn.AvgPool2d(2),
        *conv(2 * width, 4 * width, batchnorm),
        nn.AvgPool2d(2),
        *conv(4 * width, 8 * width, batchnorm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return with_head(layers, nn.Linear(8 * width, classes))
