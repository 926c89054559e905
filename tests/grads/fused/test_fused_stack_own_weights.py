"""Rows at separate weights: SAM per microbatch, through every layer that has an override."""

import pytest
import torch
from torch import nn

import gradfilter as gf
from _plain import off, plain_sam_rows, side_by_side
from _zoo_case import PLAN, wavy

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:The weights of `torch.nn:UserWarning"),
]
M, RHO = 3, 0.3


def maps(norm):
    """A normalisation between two convolutions, its statistics not those of the batch."""
    model = nn.Sequential(nn.Conv2d(4, 6, 2), norm, nn.Tanh(), nn.Conv2d(6, 3, 2))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer))
    return model, torch.randn(12, 4, 5, 5)


def rows(*layers):
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Tanh(), nn.Linear(6, 3)), torch.randn(12, 4)


class Lookup(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed, self.out = embed, nn.Linear(4, 3)

    def forward(self, ids):
        return self.out(self.embed(ids).tanh())


def lookup(embed):
    return Lookup(embed), torch.randint(0, 4, (12, 5))


class Recurrent(nn.Module):
    def __init__(self, kind, cell):
        super().__init__()
        self.core, self.out, self.cell = kind(4, 5), nn.Linear(5, 3), cell

    def forward(self, x):
        x, state = x.transpose(0, 1), None
        if not self.cell:
            return self.out(self.core(x)[0].transpose(0, 1))
        for step in x:
            state = self.core(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


def recurrent(kind, cell=False):
    return Recurrent(kind, cell), torch.randn(12, 3, 4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.core(x, x, x)[0]


TRACKED = {"affine": True, "track_running_stats": True}
LAYERS = {
    **{
        f"{kind.__name__} {options}": (lambda kind=kind, options=options: maps(kind(6, **options)))
        for kind in (nn.BatchNorm2d, nn.InstanceNorm2d)
        for options in (
            {},
            {"affine": True},
            {"affine": False},
            TRACKED,
            {"affine": False, "track_running_stats": True},
            {"momentum": None, **TRACKED},
        )
        if kind is nn.BatchNorm2d or options.get("momentum", 0.1)
    },
    "GroupNorm": lambda: maps(nn.GroupNorm(2, 6)),
    "LayerNorm": lambda: rows(nn.LayerNorm(6)),
    "RMSNorm": lambda: rows(nn.RMSNorm(6)),
    "BatchNorm1d": lambda: rows(nn.BatchNorm1d(6)),
    "PReLU": lambda: maps(nn.PReLU(6)),
    "weight_norm": lambda: rows(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
    **{
        f"Embedding {options}": (lambda options=options: lookup(nn.Embedding(7, 4, **options)))
        for options in (
            {},
            {"padding_idx": 0},
            {"scale_grad_by_freq": True},
            {"padding_idx": -5, "scale_grad_by_freq": True},
        )
    },
    **{
        f"EmbeddingBag {mode}": (
            lambda mode=mode: lookup(nn.EmbeddingBag(7, 4, mode=mode, padding_idx=0))
        )
        for mode in ("sum", "mean", "max")
    },
    **{kind.__name__: (lambda kind=kind: recurrent(kind)) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    **{
        kind.__name__: (lambda kind=kind: recurrent(kind, True))
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    },
    "MultiheadAttention": lambda: (Attention(), torch.randn(12, 3, 4)),
    "TransformerEncoderLayer": lambda: (
        nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        torch.randn(12, 3, 4),
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_sam_per_microbatch_is_that_of_plain_passes(name, training):
    model, x = LAYERS[name]()
    batch = x, torch.arange(12) % 5
    model.train(training)
    want = plain_sam_rows(model, wavy, batch, M, RHO)
    params, buffers = gf.extract(model)
    sam = gf.sam_perturb(RHO, per_microbatch=True)
    for plan in ("loop", PLAN, "auto"):
        found = gf.microbatch_grads(gf.model_loss(model, wavy), M, plan=plan)(
            params, batch, buffers=buffers
        )
        moved, _, _ = sam.update(found, sam.init(params), params)
        assert off(side_by_side(moved.stacked(), params), want) < 1e-9, plan
        assert off(moved.gram(), want @ want.T) < 1e-9, plan
