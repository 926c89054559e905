"""A small vision transformer."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from gradfilter.lab._usage import check
from gradfilter.lab.models._images import Shape

HEADS = 8


class Attention(nn.Module):
    """softmax(Q Kᵀ / √size) V for each head, and a linear layer of all heads.

    Written out, because the fused kernels of torch know neither second nor forward derivatives,
    which curvature and Jacobians need; images of a few dozen patches do not miss them.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        q, k, v = (
            rearrange(part, "b t (heads size) -> b heads t size", heads=self.heads)
            for part in self.qkv(x).chunk(3, -1)
        )
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        mixed: Tensor = self.out(rearrange(attention @ v, "b heads t size -> b t (heads size)"))
        return mixed


class EncoderBlock(nn.Module):
    """x ← x + attention(norm1(x)); x ← x + mlp(norm2(x)), with dropout of what is added."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the layers."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        added: Tensor = self.dropout(self.mlp(self.norm2(x)))
        return x + added


class VisionTransformer(nn.Module):
    """Patches and a class token through encoder blocks; the token's last state is classified."""

    def __init__(
        self, width: int, depth: int, patch: int, dropout: float, classes: int, shape: Shape
    ) -> None:
        """Make the layers and the position embedding."""
        super().__init__()
        channels, height, wide = shape
        tokens = 1 + (height // patch) * (wide // patch)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        for embedding in (self.token, self.positions):
            nn.init.trunc_normal_(embedding, std=0.02)
        self.dropout = nn.Dropout(dropout)
        heads = math.gcd(width, HEADS)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to (B, classes)."""
        patches = rearrange(self.patches(x), "b width rows columns -> b (rows columns) width")
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        tokens = self.blocks(self.dropout(tokens + self.positions))
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


def vit(
    width: int,
    *,
    classes: int,
    shape: Shape,
    dropout: float = 0.0,
    patch: int = 4,
    depth: int = 6,
) -> nn.Module:
    """A vision transformer with norms before the layers, hidden layers of 4d, GELU.

    It has 8 heads, or as many as divide d: gcd(d, 8).

    Args:
        width: d.
        classes: C.
        shape: Of one image; its sides are multiples of ``patch``.
        dropout: Of the embedding and of what every layer adds.
        patch: Pixels of a patch's side.
        depth: Encoder blocks.

    Raises:
        UsageError: The image is not made of whole patches.

    References:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020,
        https://arxiv.org/abs/2010.11929
    """
    _, height, wide = shape
    check(
        height % patch == 0 and wide % patch == 0,
        "--model",
        f"images whose sides are multiples of the {patch} pixels of a patch",
        f"{height} x {wide}",
        "resnet18_K, wrn_D_W and mlp_H take images of any size.",
    )
    return VisionTransformer(width, depth, patch, dropout, classes, shape)
