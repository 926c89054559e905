"""Losses and batches: extra outputs, omitted labels, contrasts, dicts and keywords."""

import torch
import torch.nn.functional as F
from torch import nn

from _zoo_case import Case, Net, inputs, token_loss, tokens


def net(width=6, out=5):
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, out))


def with_aux(output, y):
    return F.cross_entropy(output, y), {"chosen": output.argmax(1), "spread": output.var()}


def contrast(output, y):
    """Compute InfoNCE within the microbatch: the other samples are the negatives."""
    a, b = F.normalize(output, dim=1).chunk(2, 1)
    return F.cross_entropy(a @ b.t() / 0.3, torch.arange(len(output), device=output.device))


def pairwise(output, y):
    """Compute a loss over all pairs, with a mean over pairs of different classes."""
    distance = (output[:, None] - output[None]).square().sum(-1)
    differ = (y[:, None] != y[None]).to(output.dtype)
    return (distance * differ).sum() / differ.sum().clamp(min=1)


def summed(output, y):
    """Compute a sum instead of a mean, with weight decay in the loss."""
    return F.cross_entropy(output, y, reduction="sum", label_smoothing=0.1)


def quadratic(output, y):
    wanted = y[:, None] == torch.arange(5, device=y.device)
    return F.mse_loss(output, wanted.to(output.dtype)) + output.norm()


def class_weights(y, classes=5):
    return torch.linspace(0.5, 2.0, classes, device=y.device)


def weighted(output, y):
    """Weight the classes, omit one of them, and smooth the labels."""
    options = {"weight": class_weights(y), "ignore_index": 3, "label_smoothing": 0.2}
    return F.cross_entropy(output, y, **options)


def sample_by_sample(output, y):
    """Compute a loss per sample, and stack the losses."""
    losses = F.cross_entropy(output, y, reduction="none")
    return (losses * (1 + torch.arange(len(y), device=y.device))).mean()


def alone(output, y):
    """Use the first sample of each microbatch, without an axis for it."""
    return F.cross_entropy(output[0], y[0]) + F.nll_loss(output[0].log_softmax(0), y[0])


def nll(output, y):
    return F.nll_loss(output.log_softmax(1), y, weight=class_weights(y), ignore_index=1)


def probable(output, y):
    """Use probabilities instead of classes."""
    targets = F.one_hot(y, 5).to(output.dtype) * 0.8 + 0.04
    return F.cross_entropy(output, targets)


def segmentation(output, y):
    """Use a class for every place of a map."""
    place = torch.arange(5, device=y.device)
    places = (y[:, None, None] + place[:, None] + place) % 4
    return F.cross_entropy(output, places, ignore_index=2, weight=class_weights(y, 4))


def of_no_sample(output, y):
    """Omit every label: the sum is over nothing."""
    return F.cross_entropy(output, torch.full_like(y, -100), reduction="sum") + output.sum()


def of_small_numbers(output, y):
    """Use classes as bytes, which index as a mask does."""
    return F.cross_entropy(output, y.to(torch.uint8), weight=class_weights(y))


class OwnLoss(nn.Module):
    """A model with its own loss: keyword arguments in, an object with .loss out."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, input_ids, attention_mask, labels, temperature=1.0):
        h = self.embed(input_ids) * attention_mask[..., None]
        pooled = h.cumsum(1) / attention_mask.cumsum(1)[..., None].clamp(min=1)
        loss = token_loss(self.out(pooled.tanh()) / temperature, labels)
        return type("Output", (), {"loss": loss})()


def keyword_batch(n):
    ids, labels = labels_left_out(n)
    mask = (torch.arange(6) < 1 + torch.arange(n)[:, None] % 6).to(torch.get_default_dtype())
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "temperature": 0.8}


def labels_left_out(n):
    """Make token labels; every sample omits another number of them."""
    ids, labels = tokens()(n)
    labels[torch.arange(6) >= 1 + torch.arange(n)[:, None] % 6] = -100
    return ids, labels


def two_inputs():
    run = lambda net, a, b, scale=1.0: net.out(net.left(a) * net.right(b).tanh()) * scale
    parts = {"left": nn.Linear(6, 4), "right": nn.Linear(3, 4), "out": nn.Linear(4, 5)}
    return Net(run, **parts)


def mapping_inputs(n):
    (a, y), (b, _) = inputs(6)(n), inputs(3)(n)
    return {"a": a, "b": b, "scale": 0.7}, y


def indexed():
    """Use slices, rolls, masks and sorts that depend on no value."""

    def run(net, x):
        h = net.a(x)
        h = torch.where(torch.arange(8, device=h.device) % 2 == 0, h.roll(1, -1), h[..., :1])
        h = torch.cat([h[..., ::2], h.flip(-1)[..., 1::2], h[..., [0, 0, 3]]], -1)
        return net.b(h.sort(-1).values.cumsum(-1))

    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(11, 5))


class FreeBuffers(nn.Module):
    """Buffers without gradient in the computation: a table, a mask, an unused counter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(5, 6))
        self.register_buffer("mask", torch.arange(6) % 2 == 0)
        self.register_buffer("epoch", torch.tensor(3))
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(self.a(x).masked_fill(self.mask, 0.5), self.table)


def mapper():
    return nn.Conv2d(3, 4, 3, padding=1)


def tagger():
    return nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 11))


CASES = [
    Case("aux", net, inputs(6), with_aux, "linear", has_aux=True, sizes=((2, 3), (3, 2))),
    Case("labels-left-out", tagger, labels_left_out, token_loss, "embedding linear"),
    Case("contrastive", lambda: net(out=6), inputs(6), contrast, "linear", sizes=((2, 4), (3, 3))),
    Case("pairwise", net, inputs(6), pairwise, "linear", sizes=((2, 4), (3, 3))),
    Case("summed", net, inputs(6), summed, "linear"),
    Case("loss-weighted", net, inputs(6), weighted, "linear cross_entropy"),
    Case("loss-per-sample", net, inputs(6), sample_by_sample, "linear cross_entropy"),
    Case("loss-alone", net, inputs(6), alone, "linear cross_entropy nll_loss"),
    Case("loss-nll", net, inputs(6), nll, "linear nll_loss", sizes=((2, 3), (3, 2))),
    Case("loss-probable", net, inputs(6), probable, "linear"),
    Case("loss-segmentation", mapper, inputs(3, 5, 5), segmentation, "conv cross_entropy"),
    Case("loss-of-bytes", net, inputs(6), of_small_numbers, "linear cross_entropy"),
    Case("loss-of-no-sample", net, inputs(6), of_no_sample, "linear cross_entropy"),
    Case("quadratic", net, inputs(6), quadratic, "linear"),
    Case("own-loss", OwnLoss, keyword_batch, None, "embedding linear"),
    Case("mapping-inputs", two_inputs, mapping_inputs, rules="linear"),
    Case("indexed", indexed, inputs(6), rules="linear"),
    Case("free-buffers", FreeBuffers, inputs(6), rules="linear"),
]
