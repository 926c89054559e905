"""The residual networks of torchvision."""

from __future__ import annotations

import importlib

from torch import nn

from gradfilter.lab.models._images import Shape


def torchvision_resnet(depth: int, *, classes: int, shape: Shape) -> nn.Module:
    """The ResNet of torchvision, without weights: made for images of 224 pixels, with batch norm.

    Its weight initialisation "pytorch" is torchvision's. Images that do not have three channels
    get a first convolution of theirs.

    Args:
        depth: 18 or 34.
        classes: C.
        shape: Of one image; of any size.
    """
    # Imported where it is asked for: it takes a second, and is of no use to other models.
    models = importlib.import_module("torchvision.models")
    model: nn.Module = getattr(models, f"resnet{depth}")(weights=None, num_classes=classes)
    if shape[0] != 3:
        conv = nn.Conv2d(shape[0], 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = conv
    return model
