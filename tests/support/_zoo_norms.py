"""Normalisations: over features, groups, samples, and over weights."""

import torch
import torch.nn.functional as F
from torch import nn

from _zoo_case import Case, Net, buffered, frozen, inputs, parameter

SEVERAL = ((2, 4), (3, 3))  # BatchNorm's derivative is all rounding where it sees two numbers


def around(norm, dims=2):
    """Build a normalisation between two linear or convolutional layers."""

    def build():
        layer = {1: nn.Linear, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        size = () if dims == 1 else (2,)
        return nn.Sequential(layer(4, 6, *size), norm(), nn.ReLU(inplace=True), layer(6, 3, *size))

    return build


def sequence_norm(norm):
    """Build a BatchNorm or InstanceNorm over (n, C, L)."""
    return lambda: nn.Sequential(nn.Conv1d(4, 6, 2), norm(), nn.Tanh(), nn.Conv1d(6, 3, 2))


def bn_twice():
    run = lambda net, x: net.b(net.bn(net.bn(net.a(x)).tanh() * 2))
    return Net(run, a=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), b=nn.Linear(6, 3))


def bn_mixed():
    """Build one BatchNorm in training and one in evaluation mode, as in fine-tuning."""
    run = lambda net, x: net.frozen(net.b(net.bn(net.a(x)).relu()))
    parts = {"a": nn.Conv2d(4, 6, 2), "bn": nn.BatchNorm2d(6), "b": nn.Conv2d(6, 3, 2)}
    net = Net(run, **parts, frozen=nn.BatchNorm2d(3))
    net.frozen.eval()
    return frozen(net, "frozen", "bn.bias")


def weight_standardised():
    """Build convolutions whose weights pass through batch_norm, like timm's StdConv."""

    def run(net, x):
        for weight in (net.a, net.b):
            flat = weight.reshape(1, len(weight), -1)
            flat = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
            x = F.conv2d(x, flat.reshape_as(weight)).relu()
        return x

    return Net(run, a=parameter(6, 4, 2, 2), b=parameter(3, 6, 2, 2))


def own_statistics():
    """Build a call of batch_norm with running statistics that are the module's own buffers."""

    def run(net, x):
        return net.out(F.batch_norm(x, net.mean, net.var, net.weight, training=False))

    net = Net(run, weight=parameter(4), out=nn.Linear(4, 3))
    return buffered(net, mean=torch.randn(4), var=torch.rand(4) + 0.5)


def rows_and_columns():
    """Build LayerNorm over two axes, then over one, without weights in between."""

    def run(net, x):
        h = F.layer_norm(net.a(net.both(x)), (6,))
        return net.b(h) * F.normalize(h, dim=-1)[..., :1]

    return Net(run, both=nn.LayerNorm((3, 4)), a=nn.Linear(4, 6), b=nn.Linear(6, 3))


def batch_norm(*args, eval=False, **kwargs):
    def build():
        norm = args[0](6, *args[1:], **kwargs)
        return norm.eval() if eval else norm

    return build


BN1, BN2, BN3 = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
MAPS, ROWS, VOLUMES, SIGNALS = inputs(4, 5, 5), inputs(4), inputs(4, 4, 3, 3), inputs(4, 7)

BATCH_NORMS = [
    ("rows", around(batch_norm(BN1), 1), ROWS),
    ("signals", sequence_norm(batch_norm(BN1)), SIGNALS),
    ("maps", around(batch_norm(BN2)), MAPS),
    ("volumes", around(batch_norm(BN3), 3), VOLUMES),
    ("eval", around(batch_norm(BN2, eval=True)), MAPS),
    ("cumulative", around(batch_norm(BN2, momentum=None)), MAPS),
    ("no-affine", around(batch_norm(BN2, affine=False)), MAPS),
    ("untracked", around(batch_norm(BN2, track_running_stats=False)), MAPS),
    ("twice", bn_twice, ROWS),
    ("mixed", bn_mixed, MAPS),
]

NORMS = [
    ("layer", around(lambda: nn.LayerNorm(6), 1), ROWS),
    ("layer", around(lambda: nn.LayerNorm(6, bias=False), 1), inputs(3, 4)),
    ("layer", around(lambda: nn.LayerNorm(6, elementwise_affine=False), 1), ROWS),
    ("layer", around(lambda: nn.LayerNorm((6, 4, 4))), MAPS),
    ("layer", rows_and_columns, inputs(3, 4)),
    ("group", around(lambda: nn.GroupNorm(3, 6)), MAPS),
    ("group", around(lambda: nn.GroupNorm(2, 6), 1), ROWS),
    ("group", around(lambda: nn.GroupNorm(1, 6, affine=False)), MAPS),
    ("instance", around(lambda: nn.InstanceNorm2d(6)), MAPS),
    ("instance", around(lambda: nn.InstanceNorm2d(6, affine=True)), MAPS),
    ("instance", sequence_norm(lambda: nn.InstanceNorm1d(6, affine=True)), SIGNALS),
    ("instance", around(lambda: nn.InstanceNorm2d(6, track_running_stats=True).eval()), MAPS),
    ("instance", around(lambda: nn.InstanceNorm3d(6, affine=True), 3), VOLUMES),
    ("rms", around(lambda: nn.RMSNorm(6), 1), ROWS),
    ("rms", around(lambda: nn.RMSNorm((3, 6), elementwise_affine=False), 1), inputs(3, 4)),
]

# Numbers in NORMS of those without weights, which vmap runs well enough as they are.
BARE = {2, 7, 11, 14}

CASES = [
    *(
        Case(f"batch-norm-{name}", build, batch, rules="batch_norm", sizes=SEVERAL)
        for name, build, batch in BATCH_NORMS
    ),
    *(
        Case(f"{kind}-norm-{i}", build, batch, rules="" if i in BARE else f"{kind}_norm")
        for i, (kind, build, batch) in enumerate(NORMS)
    ),
    Case("batch-norm-eval-per-sample", around(batch_norm(BN1, eval=True), 1), ROWS),
    Case("batch-norm-own-buffers", own_statistics, ROWS, rules="linear"),
    Case("weight-standardised", weight_standardised, MAPS),
    Case(
        "instance-norm-tracked",
        around(lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        MAPS,
        may_refuse="instance_norm|running_mean",
    ),
    Case("local-response-norm", around(lambda: nn.LocalResponseNorm(3)), MAPS, rules="conv"),
]
