"""Embeddings with max_norm: a plain forward pass renormalises the weights in place."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from gradfilter.interop import Filtered


class Bag(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.e = kind(9, 6, max_norm=0.5)
        self.o = nn.Linear(6, 5)

    def forward(self, ids):
        h = self.e(ids)
        return self.o(h if h.ndim == 2 else h.mean(1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["auto", "loop"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_filtered_training_equals_the_plain_one(kind, plan):
    torch.manual_seed(0)
    plain = Bag(kind)
    model = copy.deepcopy(plain)
    batches = [(torch.randint(0, 7, (12, 4)), torch.arange(12) % 5) for _ in range(4)]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    mine = torch.optim.SGD(model.parameters(), lr=0.5)
    filtered = Filtered(model, F.cross_entropy, gf.mean_rows(), mine, 3, plan=plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, y in batches:
            filtered.step(x, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, plain.get_parameter(name), rtol=1e-9, atol=1e-11)
    assert not model.e._forward_pre_hooks
