"""The measured models, with data and sizes; all are small enough for a laptop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, random data for it, and the sizes (M, B) at which it is measured."""

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    workloads: tuple[tuple[int, int], ...]
    classifies: bool = True  # one class per sample, as the published step requires


def criterion(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy over the last axis of the logits, for images and sequences."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3072, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def resnet18() -> nn.Module:
    """Return the model of torchvision, with BatchNorm and in-place ReLUs."""
    from torchvision.models import resnet18 as build  # imported here because the import is slow

    return build(num_classes=100)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "b t (three h d) -> three b h t d", three=3, h=self.heads
        ).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(rearrange(mixed, "b h t d -> b t (h d)"))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A Vision Transformer with patches of 4, images of 32, and a mean over the 64 tokens."""

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, images: Tensor) -> Tensor:
        tokens = rearrange(self.patches(images), "b d h w -> b (h w) d") + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class GPT(nn.Module):
    """A causal language model; its head shares the weight of the token embedding."""

    def __init__(
        self,
        vocab: int = 1000,
        length: int = 64,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.tokens(tokens) + self.positions)
        return F.linear(self.norm(x), self.tokens.weight)


def images(classes: int, size: int = 32) -> Callable[[int], Batch]:
    return lambda n: (torch.randn(n, 3, size, size), torch.randint(classes, (n,)))


def texts(vocab: int, length: int) -> Callable[[int], Batch]:
    return lambda n: (torch.randint(vocab, (n, length)), torch.randint(vocab, (n, length)))


# (128, 1) has one row per sample. --quick runs the first workload of each model.
TASKS = {
    "mlp": Task("MLP 3072-512-512-10", mlp, images(10), ((8, 16), (32, 4), (128, 1))),
    "lenet": Task("LeNet", lenet, images(10), ((8, 16), (128, 1))),
    "resnet18": Task("ResNet18, BN", resnet18, images(100), ((8, 16), (2, 100), (16, 8))),
    "vit": Task("ViT 6 x 192", ViT, images(100), ((8, 16),)),
    "gpt": Task("GPT 4 x 256, T = 64", GPT, texts(1000, 64), ((8, 4),), classifies=False),
}
