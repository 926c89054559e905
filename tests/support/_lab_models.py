"""Every model of the lab at a small size, and images for it."""

import torch

from gradfilter.lab.models._build import build_model

DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)

# Every name of the specification at a small size: (name, shape, keyword arguments).
SMALL = [
    ("resnet18_2", DIGITS, {}),
    ("resnet18", DIGITS, {}),
    ("resnet34", DIGITS, {}),
    ("tv_resnet18", DIGITS, {}),
    ("tv_resnet34", (3, 8, 8), {}),
    ("cnn_2", CIFAR, {}),
    ("cnn3_2", DIGITS, {}),
    ("cnn5_2", DIGITS, {}),
    *((f"vgg{depth}", (1, 32, 32), {"width": 2}) for depth in (8, 11, 13, 16, 19)),
    ("vit_8", DIGITS, {}),
    ("mlp_16", DIGITS, {}),
    ("wrn_10_1", DIGITS, {}),
    ("lenet", (1, 16, 16), {}),
]
NAMES = [name for name, _, _ in SMALL]
RESIDUAL = ("resnet", "tv_resnet", "wrn")


def made(name, shape=CIFAR, classes=10, **kwargs):
    return build_model(name, classes=classes, shape=shape, **kwargs)


def images(shape, n=4, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
