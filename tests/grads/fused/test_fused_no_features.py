"""Layers without features or positions: a size of 0, from which no other size can be inferred."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf


class Summed(nn.Module):
    """An embedding of width 0."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 0), nn.Linear(0, 3)

    def forward(self, x):
        return self.head(self.table(x).sum(1))


CASES = {
    "no inputs": (lambda: nn.Linear(0, 3), lambda: torch.randn(8, 0)),
    "no units": (
        lambda: nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)),
        lambda: torch.randn(8, 4),
    ),
    "no inputs, several positions": (
        lambda: nn.Sequential(nn.Linear(0, 2), nn.Flatten(), nn.Linear(10, 3)),
        lambda: torch.randn(8, 5, 0),
    ),
    "no positions": (
        lambda: nn.Sequential(nn.Linear(4, 2), nn.Flatten(), nn.Linear(0, 3)),
        lambda: torch.randn(8, 0, 4),
    ),
    "no normalised features": (
        lambda: nn.Sequential(nn.Linear(4, 0), nn.LayerNorm(0), nn.Linear(0, 3)),
        lambda: torch.randn(8, 4),
    ),
    "no width": (Summed, lambda: torch.randint(5, (8, 3))),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_a_plain_backward_pass(case):
    make, inputs = CASES[case]
    model, x, y = make().double(), inputs(), torch.arange(8) % 3
    x = x.double() if x.is_floating_point() else x
    expected = []
    for part, labels in zip(x.split(2), y.split(2), strict=True):
        model.zero_grad()
        F.cross_entropy(model(part), labels).backward()
        expected.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    matrix = torch.stack(expected)

    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 4, plan="fused")
    flat = lambda tree, start: torch.cat([leaf.flatten(start) for leaf in tree.values()], start)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    per_row = {name: p.expand(4, *p.shape).clone() for name, p in params.items()}
    first = grads_of(params, (x, y))
    for rows in (first, first.at(params), first.at_rows(per_row)):
        torch.testing.assert_close(rows.gram(), matrix @ matrix.T)
        torch.testing.assert_close(rows.sq_norms(), matrix.square().sum(1))
        torch.testing.assert_close(flat(rows.combine(weights), 0), weights @ matrix)
        torch.testing.assert_close(rows.dot(rows.combine(weights)), matrix @ (weights @ matrix))
        torch.testing.assert_close(flat(rows.stacked(), 1), matrix)
