"""A small transformer that assigns a class to a sequence of words.

It is called as models of Hugging Face transformers are, and returns its loss. So
`FilteredTrainer` and `gf.model_loss` take it as it is, and `AutoModelForSequenceClassification`
can take its place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Self-attention and two linear layers, each with a norm before it and a sum after it."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers; ``heads`` divides ``width``."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x (N, T, width) after the block; mask (N, 1, 1, T) is true at words."""
        n, length, width = x.shape
        q, k, v = (
            part.view(n, length, self.heads, -1).transpose(1, 2)  # (N, heads, T, width / heads)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Classifier(nn.Module):
    """Embeddings, blocks, the mean over the words, and a linear layer.

    Args:
        words: Number of words that the model knows.
        classes: Number of classes.
        length: Number of words in a sequence, T.
        width: Width of the embeddings.
        heads: Number of attention heads.
        layers: Number of blocks.
    """

    def __init__(
        self,
        words: int,
        classes: int,
        length: int,
        width: int = 48,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        """Make the layers, with torch's usual first parameters but for the tables."""
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the logits (N, classes), and the mean loss if there are labels.

        Args:
            input_ids: Numbers of words. (N, T)
            attention_mask: 1 at words, 0 at padding. (N, T)
            labels: Classes. (N,)
        """
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        mask = attention_mask.bool()[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        weight = attention_mask[..., None].to(x.dtype)
        mean = (self.norm(x) * weight).sum(1) / weight.sum(1)
        logits = self.head(mean)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def new_model(words: int, classes: int, length: int, seed: int) -> Classifier:
    """Return a model whose parameters depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(words, classes, length)
