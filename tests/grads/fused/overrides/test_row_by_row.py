"""Operations without a rule for vmap: split once, equal to ordinary passes, and explained."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _plain import module_rows, off, side_by_side
from gradfilter.grads.fused._fused_stack import FusedStack

pytestmark = [
    pytest.mark.filterwarnings("ignore:index_reduce.. is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.lu_solve is deprecated:UserWarning"),
]
D = 6
M = 3

# By name: function of the activations (B, D); the name that explain() shows.
OPERATIONS = {
    "take": (lambda h: h.take(torch.tensor([0, 3, 3, 5])), "take"),
    "put": (lambda h: h.put(torch.tensor([1, 4]), h[0, :2] * 2), "put"),
    "quantile": (lambda h: torch.quantile(h, 0.3, dim=1), "quantile"),
    "Tensor.quantile": (lambda h: h.quantile(torch.tensor([0.2, 0.9], dtype=h.dtype)), "quantile"),
    "nanquantile": (lambda h: h.nanquantile(0.3, 1), "nanquantile"),
    "renorm": (lambda h: h.renorm(2, 1, 0.3), "renorm"),
    "pdist": (lambda h: F.pdist(h.view(-1, 3)), "pdist"),
    "masked_scatter": (lambda h: h.masked_scatter(h > 0, h.sin()), "masked_scatter"),
    "index_reduce": (
        lambda h: torch.index_reduce(h, 1, torch.tensor([0, 0, 2]), h[:, 3:] + 2, "prod"),
        "index_reduce",
    ),
    "diagflat": (lambda h: torch.diagflat(h), "diagflat"),
    "log_ndtr": (lambda h: torch.special.log_ndtr(h), "special_log_ndtr"),
    "bilinear": (
        lambda h: F.bilinear(h[:, :2], h[:, 2:4], h[0].repeat(2).view(3, 2, 2), None),
        "bilinear",
    ),
    "affine_grid": (
        lambda h: F.affine_grid(h.view(-1, 2, 3), [len(h), 1, 2, 2], align_corners=False),
        "affine_grid",
    ),
    "max_unpool": (
        lambda h: F.max_unpool1d(*F.max_pool1d(h[:, None], 2, return_indices=True), 2),
        "max_unpool1d",
    ),
    "lu_solve": (
        lambda h: torch.lu_solve(
            h[:1].T, *torch.linalg.lu_factor(torch.eye(D, dtype=h.dtype) * 3 + h[0].outer(h[0]))
        ),
        "lu_solve",
    ),
}


class Net(nn.Module):
    """An operation between two layers."""

    def __init__(self, run):
        super().__init__()
        self.run, self.before = run, nn.Linear(D, D)

    def forward(self, x):
        return self.run(self.before(x).tanh())


def spread(y, target):
    places = torch.arange(y.numel(), dtype=y.dtype).view(y.shape)
    return (y * torch.cos(places) * (1 + target.sum())).mean()


def case(run):
    torch.manual_seed(5)
    return Net(run).double(), (torch.randn(2 * M, D).double(), torch.rand(2 * M).double())


def stack(model, batch, plan="auto"):
    loss = gf.model_loss(model, spread)
    return gf.microbatch_grads(loss, M, plan=plan)(gf.extract(model)[0], batch)


@pytest.mark.parametrize("plan", ["auto", "fused"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_rows_of_ordinary_passes(name, plan):
    run, shown = OPERATIONS[name]
    model, batch = case(run)
    losses, want = module_rows(model, spread, batch, M)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        rows = stack(model, batch, plan)
    assert isinstance(rows, FusedStack)
    torch.testing.assert_close(rows.losses, losses)
    assert off(side_by_side(rows.stacked(), want), side_by_side(want, want)) < 1e-10
    assert f"row by row inside the pass: {shown}" in rows.explain()


def test_the_backward_pass_stacks_the_rows_once():
    """vmap selects every row, and fills a tensor of all rows in the backward pass of each."""
    model, batch = case(OPERATIONS["quantile"][0])
    rows = stack(model, batch)
    nodes, seen, names = [rows.run._forward.losses.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            nodes += [following for following, _ in node.next_functions]
    assert names.count("UnbindBackward0") == 1
    assert not any(name.startswith("SelectBackward") for name in names)


def nested(h):
    """Use an operation that no override sees, because torch calls it inside a function."""
    return F.interpolate(h[:, None], scale_factor=2, mode="nearest-exact")


def test_auto_never_shows_torchs_warning_about_vmap():
    model, batch = case(nested)
    _, want = module_rows(model, spread, batch, M)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        rows = stack(model, batch)
    assert isinstance(rows, FusedStack)
    assert off(side_by_side(rows.stacked(), want), side_by_side(want, want)) < 1e-12


def test_other_plans_and_other_code_keep_the_warning():
    model, batch = case(nested)
    stack(model, batch)
    with pytest.warns(UserWarning, match="performance drop"):
        stack(model, batch, "fused")
    with pytest.warns(UserWarning, match="performance drop"):
        torch.func.vmap(nested)(batch[0][None])
