"""Convolutions of one to three dimensions, plain and transposed, with every option."""

import torch
import torch.nn.functional as F
from torch import nn

from _zoo_case import Case, Net, buffered, frozen, inputs, parameter, wavy


def chained(*layers):
    """Chain layers (kind, *args) with in-place ReLUs between them."""

    def build():
        made = [kind(*args) for kind, *args in layers]
        return nn.Sequential(*(x for layer in made for x in (layer, nn.ReLU(inplace=True))))[:-1]

    return build


def padded(mode):
    return chained(
        (C2, 3, 4, 3, 1, (1, 2), 1, 1, True, mode),
        (C2, 4, 4, 3, 2, 1, 1, 2, True, mode),
    )


def hypernetwork():
    """Build a convolution with a computed weight."""

    def run(net, x):
        weight = net.make(net.code).unflatten(1, (3, 3, 3)).tanh()
        return F.conv2d(x, weight, net.bias, padding=1)

    return Net(run, make=nn.Linear(5, 27), code=parameter(4, 5), bias=parameter(4))


def of_a_constant():
    """Build a convolution of a constant map without a batch axis, independent of the samples."""
    run = lambda net, x: net.out(x + net.conv(net.map))
    net = Net(run, conv=nn.Conv2d(2, 3, 3, padding=1), out=nn.Conv2d(3, 4, 3))
    return buffered(net, map=torch.randn(2, 6, 6))


def twice():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return Net(lambda net, x: net.conv(net.conv(x).tanh()), conv=conv)


def pools():
    run = lambda net, x: torch.cat(
        [
            F.adaptive_avg_pool2d(F.max_pool2d(net.a(x), 2), 2).flatten(1),
            F.adaptive_max_pool2d(F.avg_pool2d(net.a(x), 3, stride=2), 2).flatten(1),
        ],
        1,
    )
    return Net(run, a=nn.Conv2d(3, 4, 3))


def shuffled():
    """Build a network of PixelShuffle, interpolation, unfold and fold."""

    def run(net, x):
        h = F.interpolate(net.shuffle(net.up(x)), scale_factor=0.5, mode="bilinear")
        patches = F.unfold(h, 2, stride=2)
        return F.fold(net.mix(patches.transpose(1, 2)).transpose(1, 2), h.shape[2:], 2, stride=2)

    up, mix = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
    return Net(run, up=up, shuffle=nn.PixelShuffle(2), mix=mix)


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5)),
    )


def channels_last(n):
    x, y = inputs(3, 8, 8)(n)
    return x.contiguous(memory_format=torch.channels_last), y


C1, C2, C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
OPTIONS = {
    "conv1d": [(C1, 3, 4, 3), (C1, 4, 5, 2, 2)],
    "conv1d-groups": [(C1, 4, 6, 3, 1, 2, 2, 2), (C1, 6, 6, 3, 2, "valid", 1, 6)],
    "conv2d": [(C2, 3, 4, 3), (C2, 4, 4, (3, 1), (2, 1), (1, 2))],
    "conv2d-no-bias": [(C2, 3, 4, 3, 1, 0, 1, 1, False), (C2, 4, 4, 1, 1, 0, 1, 1, False)],
    "conv2d-groups": [(C2, 4, 6, 3, 1, 1, 1, 2), (C2, 6, 4, 3, 2, 1, 1, 2)],
    "conv2d-depthwise": [(C2, 4, 4, 3, 1, 1, 1, 4), (C2, 4, 8, 3, 2, 0, 1, 4)],
    "conv2d-dilation": [(C2, 3, 4, 3, 1, 2, 2), (C2, 4, 4, 2, (2, 1), 1, (1, 3))],
    "conv2d-stride-skips-input": [(C2, 3, 4, 2, 3), (C2, 4, 4, 1, 2)],
    "conv2d-same": [(C2, 3, 4, 3, 1, "same"), (C2, 4, 4, 4, 1, "same", 2)],
    "conv2d-valid": [(C2, 3, 4, 3, 1, "valid"), (C2, 4, 4, 2, 2, "valid")],
    "conv3d": [(C3, 2, 3, 2), (C3, 3, 4, (1, 2, 3), 2, 1)],
    "conv3d-groups": [(C3, 2, 4, 3, 1, "same", 1, 2), (C3, 4, 4, 2, 2, 1, 1, 4)],
    "transposed1d": [(T1, 3, 4, 3, 2, 1, 1), (T1, 4, 5, 2)],
    "transposed2d": [(T2, 3, 4, 3, 2, 1, 1), (T2, 4, 3, (2, 3), (1, 2), 0, (0, 1))],
    "transposed2d-groups": [(T2, 4, 6, 3, 2, 0, 0, 2), (T2, 6, 6, 2, 1, 1, 0, 6, False, 2)],
    "transposed3d": [(T3, 2, 3, 2, 2, 1, 1), (T3, 3, 2, (1, 2, 2))],
}


def batch_for(layers):
    kind, channels = layers[0][:2]
    side = {1: (9,), 2: (8, 7), 3: (4, 5, 4)}[int(kind.__name__[-2])]
    return inputs(channels, *side)


CASES = [
    *(
        Case(name, chained(*layers), batch_for(layers), rules="conv")
        for name, layers in OPTIONS.items()
    ),
    *(
        Case(f"conv2d-{mode}", padded(mode), inputs(3, 8, 7), rules="conv")
        for mode in ("zeros", "circular", "reflect", "replicate")
    ),
    Case("conv-computed-weight", hypernetwork, inputs(3, 5, 5), rules="linear"),
    Case("conv-of-a-constant", of_a_constant, inputs(3, 6, 6), rules="conv"),
    Case("conv-used-twice", twice, inputs(3, 6, 6), rules="conv"),
    Case("conv-pools", pools, inputs(3, 9, 9), rules="conv"),
    Case("conv-shuffle-fold", shuffled, inputs(3, 4, 4), rules="conv linear"),
    Case("lenet", lenet, inputs(3, 8, 8), F.cross_entropy, rules="conv linear"),
    Case("channels-last-input", lenet, channels_last, rules="conv linear"),
    Case(
        "channels-last-model",
        lambda: lenet().to(memory_format=torch.channels_last),
        channels_last,
        wavy,
        rules="conv linear",
    ),
    Case("conv-weight-frozen", lambda: frozen(lenet(), "0.weight", "3.weight"), inputs(3, 8, 8)),
    Case(
        "conv-bias-frozen",
        lambda: frozen(lenet(), "0.bias", "3.bias"),
        inputs(3, 8, 8),
        rules="conv linear",
    ),
]
