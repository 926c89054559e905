"""One small model per operation override, in which the operation takes most of the time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks._models import Batch, criterion

WIDTH, LENGTH, CLASSES = 256, 32, 10


class Pooled(nn.Module):
    """Layers on sequences (B, T, width), then the mean over T, then a layer for classes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = (
                layer(x, x, x)
                if isinstance(layer, (nn.MultiheadAttention, Attention))
                else layer(x)
            )
            x = y[0] if isinstance(y, tuple) else y
        return self.head(x.mean(1))


class Attention(nn.Module):
    """The products of attention, without linear layers."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Normed(nn.Module):
    """Convolutions with a norm after each."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 32, 3, padding=1), norm(), nn.ReLU()]
        layers += [nn.Conv2d(32, 32, 3, padding=1), norm(), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def nll(output: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(output.log_softmax(-1), targets)


def sequences(n: int) -> Batch:
    return torch.randn(n, LENGTH, WIDTH), torch.randint(CLASSES, (n,))


def maps(n: int) -> Batch:
    return torch.randn(n, 3, 16, 16), torch.randint(CLASSES, (n,))


def vectors(classes: int) -> Callable[[int], Batch]:
    return lambda n: (torch.randn(n, WIDTH), torch.randint(classes, (n,)))


def tokens(n: int) -> Batch:
    return torch.randint(1000, (n, LENGTH)), torch.randint(CLASSES, (n,))


@dataclass(frozen=True)
class RuleCase:
    """An override, under the name that stacks count, and a task that mostly uses it."""

    rule: str
    functions: tuple[str, ...]
    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    criterion: Callable[[Tensor, Tensor], Tensor] = criterion


def linears() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)], nn.Linear(WIDTH, CLASSES))


def convs() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()]
    layers += [nn.Conv2d(64, 128, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128 * 3 * 3, CLASSES))


def classifier() -> nn.Module:
    return nn.Linear(WIDTH, 2000)


CONVS = tuple(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))
CASES = [
    RuleCase("linear", ("linear",), linears, vectors(CLASSES)),
    RuleCase("conv", CONVS, convs, maps),
    RuleCase("embedding", ("embedding",), lambda: Pooled(nn.Embedding(1000, WIDTH)), tokens),
    RuleCase("batch_norm", ("batch_norm",), lambda: Normed(lambda: nn.BatchNorm2d(32)), maps),
    RuleCase(
        "layer_norm",
        ("layer_norm",),
        lambda: Pooled(*[nn.LayerNorm(WIDTH) for _ in range(4)]),
        sequences,
    ),
    RuleCase(
        "rms_norm", ("rms_norm",), lambda: Pooled(*[nn.RMSNorm(WIDTH) for _ in range(4)]), sequences
    ),
    RuleCase("group_norm", ("group_norm",), lambda: Normed(lambda: nn.GroupNorm(8, 32)), maps),
    RuleCase(
        "instance_norm",
        ("instance_norm",),
        lambda: Normed(lambda: nn.InstanceNorm2d(32, affine=True)),
        maps,
    ),
    RuleCase(
        "attention",
        ("scaled_dot_product_attention",),
        lambda: Pooled(nn.Linear(WIDTH, WIDTH), Attention(), Attention()),
        sequences,
    ),
    RuleCase(
        "multi_head_attention",
        ("multi_head_attention_forward",),
        lambda: Pooled(nn.MultiheadAttention(WIDTH, 4, batch_first=True)),
        sequences,
    ),
    RuleCase(
        "rnn",
        ("lstm", "gru", "rnn_tanh", "rnn_relu"),
        lambda: Pooled(nn.LSTM(WIDTH, WIDTH, batch_first=True)),
        sequences,
    ),
    RuleCase(
        "weight_norm",
        ("_weight_norm",),
        lambda: nn.Sequential(*[weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(4)]),
        vectors(CLASSES),
    ),
    RuleCase("cross_entropy", ("cross_entropy",), classifier, vectors(2000)),
    RuleCase("nll_loss", ("nll_loss",), classifier, vectors(2000), nll),
]
