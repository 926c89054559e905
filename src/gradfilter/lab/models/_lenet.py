"""LeNet."""

from __future__ import annotations

from torch import nn

from gradfilter.lab.models._images import Shape, check_side
from gradfilter.lab.models._layers import with_head


def lenet(*, classes: int, shape: Shape) -> nn.Module:
    """LeNet-5 with ReLU and max-pools: two convolutions of 5 x 5, linear layers of 120 and 84.

    Args:
        classes: C.
        shape: Of one image, at least 16 x 16.

    Raises:
        UsageError: The image is too small.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(lenet(classes=10, shape=(3, 32, 32)))
        62006

    References:
        LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition",
        1998, https://doi.org/10.1109/5.726791
    """
    check_side("lenet", shape, 16)
    height, width = (((side - 4) // 2 - 4) // 2 for side in shape[1:])
    layers = [
        *(nn.Conv2d(shape[0], 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(16 * height * width, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
    ]
    return with_head(layers, nn.Linear(84, classes))
