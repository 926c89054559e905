"""The algebra of stacks, against J as an explicit matrix."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
from _cases import make_params, make_rows, make_stack
from _rounding import assert_within, rounding
from gradfilter.grads import _stack
from gradfilter.grads._joined_stacks import choose, join


def matrix(stack):
    return torch.cat([g.reshape(len(stack), -1) for g in stack.stacked().values()], 1)


def vector(tree):
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


def dense():
    params = make_params(torch.float64)
    return make_stack(params, make_rows(params))


def scaled():
    return dense().scaled(torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0], dtype=torch.float64))


def joined():
    stack = dense()
    return join(
        stack.columns(["head.bias", "body.conv"]), stack.columns(["body.weight", "head.weight"])
    )


def selected():
    return choose(torch.tensor(True), scaled(), dense())


KINDS = {"dense": dense, "scaled": scaled, "joined": joined, "selected": selected}
every_stack = pytest.mark.parametrize("kind", KINDS)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_stack
def test_the_four_questions(kind):
    stack = KINDS[kind]()
    j, w = matrix(stack), torch.linspace(-1, 2, len(stack), dtype=torch.float64)
    tree = {name: torch.randn(shape, dtype=torch.float64) for name, shape in stack.shapes.items()}
    close(stack.gram(), j @ j.T)
    close(vector(stack.combine(w)), w @ j)
    close(stack.dot(tree), j @ vector(tree))
    close(stack.sq_norms(), (j * j).sum(1))


@every_stack
def test_columns_are_reduced_piece_by_piece(kind, monkeypatch):
    stack, sizes = KINDS[kind](), []

    def spread(columns):
        sizes.append(columns.shape[1])
        return columns.amax(0) - 2 * columns.amin(0)

    j = matrix(stack)
    expected = j.amax(0) - 2 * j.amin(0)
    for piece in (1, 15, 2**18):
        monkeypatch.setattr(_stack, "PIECE", piece)
        sizes.clear()
        found = stack.reduce_columns(spread)
        assert {name: leaf.shape for name, leaf in found.items()} == stack.shapes
        close(vector(found), expected)
        assert max(sizes) <= max(1, piece // len(stack))
        one = stack.columns(["head.weight"]).first(3).reduce_columns(spread)
        close(vector(one), spread(stack.stacked()["head.weight"][:3].reshape(3, -1)))


@every_stack
def test_scaled_columns_and_first_are_what_they_say(kind):
    stack = KINDS[kind]()
    j, c = matrix(stack), torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    close(matrix(stack.scaled(c)), c[:, None] * j)
    close(stack.scaled(c).gram(), (c[:, None] * j) @ (c[:, None] * j).T)
    assert torch.equal(stack.scaled(c).live, (c != 0) & stack.live)
    close(matrix(stack.first(3)), j[:3])
    assert len(stack.first(3)) == 3 and len(stack.first(3).losses) == 3
    names = ["head.weight", "body.conv"]
    chosen = stack.columns(names)
    assert set(chosen.shapes) == set(names)
    for name in names:
        close(chosen.stacked()[name], stack.stacked()[name])
    close(chosen.gram(), sum(stack.columns([name]).gram() for name in names))


@every_stack
def test_everything_commutes_with_at(kind):
    stack, params = KINDS[kind](), make_params(torch.float64, seed=5)
    c = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    close(matrix(stack.scaled(c).at(params)), matrix(stack.at(params).scaled(c)))
    close(matrix(stack.first(2).at(params)), matrix(stack.at(params).first(2)))
    some = {"head.weight": params["head.weight"]}
    close(
        stack.columns(["head.weight"]).at(some).stacked()["head.weight"],
        stack.at(some).stacked()["head.weight"],
    )


@every_stack
def test_like_repeats_what_made_the_stack(kind):
    stack, params = KINDS[kind]().first(4), make_params(torch.float64, seed=5)
    close(matrix(stack.like(dense().at(params))), matrix(stack.at(params)))


@every_stack
def test_at_rows_is_at_row_by_row(kind):
    stack = KINDS[kind]().first(4)
    own = {n: p + torch.randn(4, *p.shape) for n, p in make_params(torch.float64, seed=5).items()}
    got = matrix(stack.at_rows(own))
    for m in range(4):
        close(got[m], matrix(stack.at({n: p[m] for n, p in own.items()}))[m])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_of_weight_zero_never_gets_through(bad):
    rows = {"w": torch.tensor([[1.0, 2.0], [bad, 1.0]]), "b": torch.tensor([3.0, 4.0])}
    stack = gf.DenseStack(rows)
    w = torch.tensor([2.0, 0.0])
    assert torch.equal(stack.combine(w)["w"], torch.tensor([2.0, 4.0]))
    removed = stack.scaled(torch.tensor([1.0, 0.0]))
    assert removed.gram().tolist() == [[14.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(removed.sq_norms(), torch.tensor([14.0, 0.0]).double())
    assert removed.dot({"w": torch.ones(2), "b": torch.ones(())}).tolist() == [6.0, 0.0]
    assert torch.equal(removed.stacked()["w"], torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert torch.equal(removed.combine(torch.ones(2))["w"], torch.tensor([1.0, 2.0]))


@given(
    rows=st.integers(1, 6),
    widths=st.lists(st.sampled_from([1, 7, 1023, 1024, 1025, 3000]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_gram_and_norms_at_any_width_are_accumulated_wide(rows, widths, dtype):
    leaves = {str(i): torch.randn(rows, width).to(dtype) + 3 for i, width in enumerate(widths)}
    stack = gf.DenseStack(leaves)
    j = torch.cat([leaf.double() for leaf in leaves.values()], 1)
    assert stack.gram().dtype == torch.float64
    # In float32 over a leaf, in float64 over leaves; also what is exact is so only up to rounding.
    terms = rounding(max(widths), torch.promote_types(dtype, torch.float32))
    terms = terms + 2 * rounding(sum(widths), torch.float64)
    sizes = j.abs() @ j.abs().T
    assert_within(stack.gram(), j @ j.T, terms * sizes)
    assert_within(stack.sq_norms(), (j * j).sum(1), terms * sizes.diagonal())
    tree = {name: leaf[0] for name, leaf in leaves.items()}
    assert_within(stack.dot(tree), j @ j[0], terms * sizes[0])


@given(
    rows=st.integers(1, 6),
    width=st.sampled_from([0, 1, 7, 64, 96, 1000, 4096]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    dead=st.sets(st.integers(0, 5)),
    strided=st.booleans(),
)
def test_combine_at_any_width_and_with_any_rows_dead(rows, width, dtype, dead, strided):
    leaf = torch.randn(width, rows).T if strided else torch.randn(rows, width)
    leaf, w = leaf.to(dtype), torch.randn(rows, dtype=torch.float64)
    expected = leaf.double().clone()
    for m in dead & set(range(rows)):
        leaf[m], w[m], expected[m] = torch.nan, 0.0, 0.0
    got = gf.DenseStack({"w": leaf}).combine(w)["w"]
    assert got.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), w @ expected, rtol=tolerance, atol=tolerance)


def test_a_wide_float32_gram_keeps_its_digits():
    """Partial products in float32 and totals in float64.

    Of small integers float32 holds sums over a block as they are, and no totals above 2^24.
    """
    g = torch.randint(0, 16, (3, 3_000_000)).float()
    exact = g.double() @ g.double().T
    assert exact.min() > 2**24 and (exact != exact.float()).any()
    assert torch.equal(gf.DenseStack({"w": g}).gram(), exact)


def test_bad_stacks_and_questions():
    with pytest.raises(ValueError, match=r"sizes \{'a': 2, 'b': 3\}"):
        gf.DenseStack({"a": torch.ones(2, 1), "b": torch.ones(3, 1)})
    with pytest.raises(ValueError, match="leading axis M >= 1"):
        gf.DenseStack({"a": torch.ones(())})
    with pytest.raises(TypeError, match="found list"):
        gf.DenseStack([torch.ones(2)])
    stack = gf.DenseStack({"a": torch.ones(2, 1)})
    with pytest.raises(ValueError, match=r"weights of shape \(2,\), found \(3,\)"):
        stack.combine(torch.ones(3))
    with pytest.raises(ValueError, match=r"factors of shape \(2,\), found \(3,\)"):
        stack.scaled(torch.ones(3))
    with pytest.raises(ValueError, match=r"missing \['a'\], extra \['b'\]"):
        stack.dot({"b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"found \['b'\]"):
        stack.columns(["b"])
    with pytest.raises(ValueError, match="1 <= count <= M = 2"):
        stack.first(3)
    with pytest.raises(ValueError, match=r"cannot answer `at`.*grad_fn"):
        stack.at({"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"unknown \['b'\]"):
        dense().at({"b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"one set of parameters per row"):
        dense().at_rows({"head.bias": torch.ones(3)})


class Followed(TorchDispatchMode):
    """Somebody who follows the operations, and from whom no number may be hidden."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("live", ["1111", "0110", "1010", "0001", "1000", "0000", "1101"])
@pytest.mark.parametrize("followed", [False, True])
def test_a_weighted_sum_reads_no_dead_row(live, followed):
    """With weights that may be read and with traced ones, for dead rows at every place."""
    rows = torch.randn(4, 9)
    weights = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    expected = torch.zeros(9)
    for i, alive in enumerate(live):
        if alive == "1":
            expected += weights[i].float() * rows[i]
        else:
            rows[i, i] = torch.nan
            weights[i] = 0.0
    stack = gf.DenseStack({"w": rows})
    with Followed() if followed else nullcontext():
        found = stack.combine(weights)["w"]
    torch.testing.assert_close(found, expected)
