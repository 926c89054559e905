"""The autograd function that all overrides share, with a small operation defined here."""

from dataclasses import dataclass

import pytest
import torch

from gradfilter.grads.fused._factors import DenseFactor
from gradfilter.grads.fused._tape import LeafVisitor, Tape, Weight
from gradfilter.grads.fused.overrides._row_operation import Gradients, RowOperation

M, B, D = 3, 4, 2


@dataclass(eq=False)
class Affine(RowOperation):
    """y = power · w x² + b, per column."""

    power: float

    def forward(self, x, weight, bias):
        return (self.power * weight * x**2 + bias).view(x.shape), (x,)

    def backward(self, grad, saved, weight, bias, wanted):
        (x,) = saved
        self.wanted = wanted
        return Gradients(
            2 * self.power * weight * x * grad if wanted.input else None,
            DenseFactor((self.power * grad * x**2).sum(1)) if wanted.weight else None,
            DenseFactor(grad.sum(1)) if wanted.bias else None,
        )


def values(name="w"):
    torch.manual_seed(len(name))
    return torch.randn(M, B, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)


def expected(x, w, b):
    """Gradients of every row's sum of sines, one row after another."""
    rows = []
    for row in x:
        leaves = [t.clone().requires_grad_() for t in (row, w, b)]
        (1.5 * leaves[1] * leaves[0] ** 2 + leaves[2]).sin().sum().backward()
        rows.append([leaf.grad for leaf in leaves])
    return [torch.stack(grads) for grads in zip(*rows, strict=True)]


def leaf(value):
    return value.expand(M, *value.shape).clone().requires_grad_()


class Collect(LeafVisitor):
    def __init__(self):
        self.found = {}

    def visit(self, name, factors, grad):
        self.found[name] = factors, grad


def run(operation, tape, x, weight, bias):
    visitor = Collect()
    losses = operation.apply(tape, x, weight, bias).sin().sum((1, 2))
    tape.backward(losses, torch.ones(M, dtype=x.dtype), visitor, retain=False)
    return visitor.found


def test_gradients_of_leaves_become_factors():
    x, (w, b) = values()
    tape = Tape({"w": leaf(w), "b": leaf(b)})
    weights = [Weight(value, tape.leaves[name], name) for name, value in (("w", w), ("b", b))]
    found = run(Affine(1.5), tape, x, *weights)
    for name, rows in zip("wb", expected(x, w, b)[1:], strict=True):
        (factor,), grad = found[name]
        assert grad is None
        torch.testing.assert_close(factor.rows(), rows)


def test_gradients_of_inputs_and_of_computed_weights_go_to_autograd():
    x, (w, b) = values()
    tape = Tape({"x": x.clone().requires_grad_(), "v": leaf(w / 2), "b": leaf(b)})
    twice = Weight(w, 2 * tape.leaves["v"], None)
    found = run(Affine(1.5), tape, tape.leaves["x"], twice, Weight(b, tape.leaves["b"], "b"))
    inputs, weights, _ = expected(x, w, b)
    assert found["x"][0] == found["v"][0] == []
    torch.testing.assert_close(found["x"][1], inputs)
    torch.testing.assert_close(found["v"][1], 2 * weights)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_only_what_is_trained_is_wanted(frozen):
    x, (w, b) = values()
    tape = Tape({"weight": leaf(w), "bias": leaf(b)})
    weights = [
        Weight(value, None if name == frozen else tape.leaves[name], name)
        for name, value in (("weight", w), ("bias", b))
    ]
    operation = Affine(1.5)
    assert run(operation, tape, x, *weights).keys() == {"weight", "bias"} - {frozen}
    assert operation.wanted == (False, frozen != "weight", frozen != "bias")


def test_the_output_may_be_written_into():
    x, (w, b) = values()
    tape = Tape({"w": leaf(w)})
    y = Affine(1.5).apply(tape, x, Weight(w, tape.leaves["w"], "w"), Weight(b, None, None))
    y.mul_(2)  # torch refuses this for a view that a Function returns
    torch.testing.assert_close(y.detach(), 2 * (1.5 * w * x**2 + b))
