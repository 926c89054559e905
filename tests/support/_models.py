"""Small models for tests: one for every unusual behaviour of a loss."""

import torch
import torch.nn.functional as F
from torch import nn


class ConvBN(nn.Module):
    """BatchNorm with fixed momentum, with momentum=None, and one used twice per forward pass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.cumulative = nn.BatchNorm2d(4, momentum=None)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.cumulative(self.bn(self.conv(x)).relu())
        h = self.cumulative(self.bn(h * h))
        return self.head(h.mean((2, 3)))


class Normed(nn.Module):
    """BatchNorm, dropout and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x):
        h = F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training)
        return self.last(h + self.frozen(h))


class Tied(nn.Module):
    """An embedding tied to the output, with an unused and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.mix.bias.requires_grad_(False)

    def forward(self, ids, scale=1.0, shift=None):
        h = self.mix(self.embed(ids)).tanh() * scale
        return self.out(h if shift is None else h + shift[:, None, None])


class WithLoss(Tied):
    """A model like those of Hugging Face: keyword arguments in, an object with .loss out."""

    def forward(self, input_ids, attention_mask, labels, return_dict=True):
        assert return_dict
        logits = super().forward(input_ids) * attention_mask[..., None]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return type("Output", (), {"loss": loss, "logits": logits})()


class OldStyle(torch.autograd.Function):
    """Doubles. Without setup_context: torch.vmap cannot look into it."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Dropped(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(6, 32), nn.Dropout(p), nn.Linear(32, 3)

    def forward(self, x):
        return self.b(self.drop(self.a(x).relu()))


class Counting(nn.Module):
    """A buffer outside of BatchNorm, written in place or by assignment."""

    def __init__(self, assign):
        super().__init__()
        self.linear, self.assign = nn.Linear(6, 3), assign
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.assign:
            self.calls = self.calls + 1
        else:
            self.calls.add_(1)
        return self.linear(x)


def token_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def images(n=12):
    return torch.randn(n, 1, 6, 6), torch.arange(n) % 3


def vectors(n=12):
    return torch.randn(n, 6), torch.arange(n) % 3


def tokens(n=12):
    return torch.randint(0, 7, (n, 4)), torch.randint(0, 7, (n, 4))
