"""A stack against that of the loop: the questions, their orders, and the tolerances."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import gradfilter as gf
from gradfilter import _products, _tree

FLOOR = 1e-12  # of a row's whole norm: gradients that are zero but for rounding

ORDERS = [
    ("gram", "combine"),
    ("combine", "gram", "stacked"),
    ("sq_norms", "combine", "dot", "combine without a row"),
    ("stacked", "dot", "gram", "sq_norms", "agree_filter"),
]


@dataclass(frozen=True)
class Probe:
    """The arguments of the questions: weights, a random tree, parameters for the transforms."""

    params: gf.GradStack
    weights: torch.Tensor
    tree: dict[str, torch.Tensor]


def probe_for(params, m: int) -> Probe:
    """Make weights of both signs, all different."""
    generator = torch.Generator().manual_seed(3)
    like = lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    weights = torch.linspace(-0.7, 1.3, m, dtype=torch.float64).square() - 0.3
    return Probe(params, weights, {name: like(p) for name, p in params.items()})


def agree(rows: gf.GradStack, probe: Probe) -> dict[str, torch.Tensor]:
    """Return the filtered gradient and the weights."""
    link = gf.agree_filter(1.0)
    grads, _, out = link.update(rows, link.init(probe.params), probe.params)
    return {**grads, "weights of the filter": out["weights"]}


def without_a_row(rows: gf.GradStack, probe: Probe) -> dict[str, torch.Tensor]:
    return rows.combine(torch.where(torch.arange(len(rows)) == 0, 0.0, probe.weights))


QUESTIONS: dict[str, Callable[[gf.GradStack, Probe], Any]] = {
    "gram": lambda rows, probe: rows.gram(),
    "combine": lambda rows, probe: rows.combine(probe.weights),
    "combine without a row": without_a_row,
    "dot": lambda rows, probe: rows.dot(probe.tree),
    "sq_norms": lambda rows, probe: rows.sq_norms(),
    "stacked": lambda rows, probe: rows.stacked(),
    "agree_filter": agree,
}


class Oracle:
    """The answers of the loop, and the comparison of another stack with them."""

    def __init__(self, loop: gf.GradStack, probe: Probe, rtol: float = 1e-10) -> None:
        self.loop, self.probe, self.rtol, self.floor = loop, probe, rtol, FLOOR * rtol / 1e-10
        self.answers: dict[str, Any] = {}
        self.norms = loop.sq_norms().sqrt()
        self.total = (self.norms * probe.weights.abs().clamp(min=1.0)).sum()
        assert self.norms.isfinite().all()

    def check(self, rows: gf.GradStack, question: str, where: str) -> None:
        """Ask one question and compare."""
        if question not in self.answers:
            self.answers[question] = QUESTIONS[question](self.loop, self.probe)
        got, want = QUESTIONS[question](rows, self.probe), self.answers[question]
        where = f"{where}: {question}"
        if question == "stacked":
            for m, norm in enumerate(self.norms):
                row = lambda tree, m=m: {name: leaf[m] for name, leaf in tree.items()}
                assert_trees_close(
                    row(got), row(want), self.rtol, self.floor * norm, f"{where}, row {m}"
                )
        elif isinstance(want, dict):
            assert_trees_close(got, want, self.rtol, self.floor * self.total, where)
        else:
            scale = {
                "gram": self.norms[:, None] * self.norms,
                "sq_norms": self.norms**2,
                "dot": self.norms * _products.norm(self.probe.tree),
            }[question]
            assert got.dtype == want.dtype, f"{where}: {got.dtype}"
            assert got.shape == want.shape, f"{where}: {got.shape}"
            error = ((got - want).abs() / scale.clamp(min=1e-30)).max()
            assert error <= self.rtol, f"{where}: off by {error:.1e}\n{got}\n{want}"

    def check_pass(self, rows: gf.GradStack, where: str) -> None:
        """Check losses, buffers, aux and shapes, which are known after the forward passes."""
        close = lambda got, want, what: torch.testing.assert_close(
            got, want, rtol=self.rtol, atol=1e-13, msg=lambda m: f"{where}: {what}: {m}"
        )
        assert len(rows) == len(self.loop), where
        assert rows.shapes == self.loop.shapes, where
        close(rows.losses, self.loop.losses, "losses")
        assert not rows.losses.requires_grad, where
        close(rows.buffers, self.loop.buffers, "buffers")
        close(_tree.leaves(rows.aux), _tree.leaves(self.loop.aux), "aux")


def assert_trees_close(got, want, rtol, floor, where: str) -> None:
    """Compare leaf by leaf, by the norm of the difference."""
    assert list(got) == list(want) or set(got) == set(want), f"{where}: leaves {sorted(got)}"
    for name, leaf in want.items():
        assert got[name].dtype == leaf.dtype, f"{where}: {name} is {got[name].dtype}"
        assert got[name].shape == leaf.shape, f"{where}: {name} is {tuple(got[name].shape)}"
        assert not got[name].requires_grad, f"{where}: {name} carries a graph"
        error = (got[name] - leaf).norm()
        bound = rtol * leaf.norm() + floor
        assert error <= bound, f"{where}: {name} off by {error:.1e} of {leaf.norm():.1e}"
