"""Agreement of rows against the Gram, and the noise scale against noise of a known size."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import gradfilter as gf
import gradfilter.diagnostics as gd
from _rounding import rounding


def stack_of(count, seed=0, shift=0.3):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3, count)
    return {
        "a": scale[:, None, None] * (torch.randn(count, 3, 2, generator=generator) + shift),
        "b": scale[:, None] * torch.randn(count, 5, generator=generator),
    }


def matrix(rows):
    return torch.cat([leaf.flatten(1) for leaf in rows.values()], 1).double()


def pairwise(rows):
    """The mean over pairs, one by one."""
    units = F.normalize(matrix(rows), dim=1)
    cosines = [units[i] @ units[j] for i in range(len(units)) for j in range(i)]
    return torch.stack(cosines).mean()


class NoGram(gf.DenseStack):
    """A stack of which the M x M matrix is not to be asked."""

    def gram(self):
        raise AssertionError("the Gram was asked for")


@given(count=st.integers(2, 40), seed=st.integers(0, 99))
def test_agreement_is_the_mean_pairwise_cosine(count, seed):
    rows = stack_of(count, seed)
    expected = pairwise(rows)
    torch.testing.assert_close(gd.agreement(rows), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gd.agreement(gf.DenseStack(rows)), expected, rtol=1e-5, atol=1e-6)


def test_many_rows_need_no_gram():
    rows = stack_of(50)
    torch.testing.assert_close(gd.agreement(NoGram(rows)), pairwise(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [6, 40])  # by the Gram, and by products
def test_rows_that_cannot_be_compared_are_left_out(count):
    # In double precision: the noise is a difference, which rounding in float32 is a large part of.
    rows = {name: leaf.double() for name, leaf in stack_of(count).items()}
    good = {name: leaf[3:] for name, leaf in rows.items()}
    rows["a"][0] = torch.nan
    rows["b"][1, 2] = torch.inf
    for leaf in rows.values():
        leaf[2] = 0
    torch.testing.assert_close(gd.agreement(rows), pairwise(good), rtol=1e-5, atol=1e-6)
    # Of the noise a zero row is part, one that is not finite is not.
    kept = {name: leaf[2:] for name, leaf in rows.items()}
    for found, expected in zip(gd.noise_scale(rows, 3), gd.noise_scale(kept, 3), strict=True):
        torch.testing.assert_close(found, expected)
    off = gf.DenseStack(stack_of(count)).scaled(torch.tensor([0.0] * 3 + [1.0] * (count - 3)))
    torch.testing.assert_close(gd.agreement(off), pairwise(good), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, 60])
def test_extremes(count):
    same = {"w": torch.randn(1, 8).expand(count, -1) * torch.linspace(1, 2, count)[:, None]}
    error = rounding(8 + count)  # of a unit vector, and of the sum of all
    assert gd.agreement(same) == pytest.approx(1, abs=2 * error) and gd.agreement(same) <= 1
    pair = torch.randn(1, 8)
    opposed = {"w": torch.cat([pair, -pair] * (count // 2))}
    assert gd.agreement(opposed) == pytest.approx(-1 / (count - 1), abs=2 * error)
    alone = {"w": torch.randn(1, 8)}
    assert gd.agreement(alone).isnan() and gd.noise_scale(alone, 1).samples.isnan()
    assert gd.agreement({"w": torch.zeros(count, 8)}).isnan()


@given(count=st.integers(2, 20), seed=st.integers(0, 99), size=st.integers(1, 9))
def test_noise_scale_is_what_the_gram_gives(count, seed, size):
    rows = stack_of(count, seed)
    gram = matrix(rows) @ matrix(rows).T
    of_mean = gram.sum() / count**2
    trace = (gram.diagonal().sum() - count * of_mean) / (count - 1)
    sq_norm = of_mean - trace / count
    found = gd.noise_scale(rows, size)
    for value, expected in ((found.trace, trace), (found.sq_norm_of_mean, of_mean)):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sq_norm, sq_norm, rtol=1e-4, atol=1e-5)
    if sq_norm > 1e-3:
        torch.testing.assert_close(found.samples, size * trace / sq_norm, rtol=2e-2, atol=0)
    else:
        assert found.samples > 100 * size or found.samples.isinf()


def test_noise_scale_finds_the_noise_that_was_put_in():
    true, count, batch = torch.full((400,), 0.1), 2000, 4  # ‖G‖² = 4
    noise = torch.randn(count, 400) * 0.5 / batch**0.5  # per sample, trΣ = 100
    found = gd.noise_scale({"w": true + noise}, batch)
    assert found.trace * batch == pytest.approx(100, rel=0.02)
    assert found.sq_norm == pytest.approx(4, rel=0.02)
    assert found.samples == pytest.approx(25, rel=0.03)
    assert gd.noise_scale({"w": noise[:2]}, batch).samples > 0


def test_of_rows_that_are_all_the_same_there_is_no_noise():
    same = {"w": torch.tensor([[3.0, 4.0]]).expand(5, -1)}
    found = gd.noise_scale(same, 8)
    assert found.trace == 0 and found.samples == 0
    nothing = gd.noise_scale({"w": torch.zeros(5, 2)}, 8)
    assert nothing.trace == 0 and nothing.samples.isnan()


def test_rows_of_a_model_and_of_a_chain():
    model = torch.nn.Linear(4, 3)
    params, _ = gf.extract(model)
    batch = torch.randn(40, 4), torch.randint(3, (40,))
    rows = gf.per_sample_grads(gf.model_loss(model, F.cross_entropy))(params, batch)
    torch.testing.assert_close(gd.agreement(rows), pairwise(rows.stacked()), rtol=1e-5, atol=1e-6)
    assert gd.noise_scale(rows, 1).trace > 0


@pytest.mark.parametrize(("count", "kind"), [(6, gf.DenseStack), (48, NoGram)])
def test_the_noise_of_rows_in_half_precision_is_not_that_of_a_rounded_mean(count, kind):
    step = 2.0**-7  # of bfloat16 from 1 on: a mean of 1 + 4/3 steps is no number of it
    column = 1 + step * torch.tensor([0.0, 0.0, 4.0]).repeat(count // 3)
    rows = {"w": torch.stack([column.roll(i) for i in range(200)], 1).bfloat16()}
    values = matrix(rows)
    trace, of_mean = values.var(0).sum(), values.mean(0).square().sum()
    found = gd.noise_scale(kind(rows), 4)
    # A difference of sums in float32 over rows and columns, of which a rounded mean is off by 1.
    error = 3 * rounding(200 + count) * values.square().sum(1).mean()
    assert error < 0.5 * trace
    torch.testing.assert_close(found.trace, trace, rtol=0, atol=error.item())
    torch.testing.assert_close(found.sq_norm_of_mean, of_mean, rtol=0, atol=error.item())
    samples = 4 * trace / of_mean
    torch.testing.assert_close(found.samples, samples, rtol=2 * (error / trace).item(), atol=0)
