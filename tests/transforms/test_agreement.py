"""`agree_filter` against the sequential rule, written out."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
from _naive import BAD, assert_close, flat, normal, random_matrix, run, unflat, zeros
from gradfilter._readable import readable
from gradfilter.transforms import _agreement as _running

INF = float("inf")
RULES = [(against, average) for against in ("running", "first") for average in ("mean", "halving")]
every_rule = pytest.mark.parametrize(("against", "average"), RULES)


def sequential(rows, threshold, against="running", average="mean"):
    """The rule on flat rows (M, P): merged row, weights, accepted, cosines, smallest margin."""
    units = torch.eye(len(rows), dtype=rows.dtype)
    merged, weights = torch.zeros_like(rows[0]), torch.zeros_like(units[0])
    accepted, cosines = [], []
    first, n, margin = None, 0, INF
    for g, unit in zip(rows, units, strict=True):
        if not g.isfinite().all():
            accepted.append(False)
            cosines.append(torch.nan)
            continue
        if first is None:
            first, merged, weights, n = g, g, unit, 1
            accepted.append(True)
            cosines.append(1.0)
            continue
        c = merged if against == "running" else first
        s = c @ g / (c.norm().clamp(min=1e-8) * g.norm().clamp(min=1e-8))
        accept = bool(1 - s <= threshold) or threshold >= 2
        if s != 0 and threshold < 2:  # at a zero row there is no rounding, and ties are meant
            margin = min(margin, abs((1 - s).item() - threshold))
        if accept and average == "mean":
            merged, weights = (n * merged + g) / (n + 1), (n * weights + unit) / (n + 1)
        elif accept:
            merged, weights = (merged + g) / 2, (weights + unit) / 2
        n += accept
        accepted.append(accept)
        cosines.append(s.item())
    as_row = lambda values: torch.tensor(values, dtype=rows.dtype)
    return merged, weights, torch.tensor(accepted), as_row(cosines), margin


@cache
def random_case(seed):
    """A stack of 2 to 8 rows, a threshold and a min_accepted; some stacks are all bad."""
    g = torch.Generator().manual_seed(seed)
    kinds = BAD if seed % 11 == 10 else ("plain",) * 6 + ("zero", "tiny", *BAD)
    matrix = random_matrix(seed, 2 + seed % 7, kinds)
    fixed = (0.0, 0.5, 0.9, 0.97, 1.0, 1.05, 1.5, 2.0, INF)
    drawn = 2.0 * torch.rand((), dtype=torch.float64, generator=g).item()
    threshold = drawn if seed % 2 else fixed[seed // 2 % len(fixed)]
    return matrix, threshold, 1 + int(torch.randint(4, (), generator=g))


def assert_follows_the_rule(matrix, threshold, min_accepted, against, average):
    link = gf.agree_filter(threshold, against=against, average=average, min_accepted=min_accepted)
    grads, out = run(link, unflat(matrix))
    merged, weights, accepted, cosines, margin = sequential(matrix, threshold, against, average)
    assert margin > 1e-9  # no decision hangs on rounding
    assert torch.equal(out["accepted"], accepted)
    assert_close(out["weights"], weights)
    assert_close(out["cosine"], cosines, atol=1e-9)
    assert_close(flat(grads), merged)
    assert out["keep"].item() == (accepted.sum().item() >= min_accepted)
    return accepted


@every_rule
def test_a_thousand_random_stacks_follow_the_sequential_rule(against, average):
    cases = [random_case(seed) for seed in range(1000)]
    found = [assert_follows_the_rule(*case, against, average) for case in cases]
    counts = {int(accepted.sum()) for accepted in found}
    first_is_bad = [not case[0][0].isfinite().all() for case in cases]
    assert counts == set(range(9))  # from all rows bad to all rows merged
    assert sum(first_is_bad) > 100
    assert any(a.any() and not a.all() for a, bad in zip(found, first_is_bad, strict=True) if bad)


@given(seed=st.integers(0, 2**20), threshold=st.floats(0, 2), rule=st.sampled_from(RULES))
def test_weights_are_those_of_an_average_of_the_accepted_rows(seed, threshold, rule):
    link = gf.agree_filter(threshold, against=rule[0], average=rule[1])
    matrix = random_matrix(seed, 6, ("plain", "plain", "zero", "nan"))
    grads, out = run(link, unflat(matrix))
    weights, accepted = out["weights"], out["accepted"]
    assert torch.equal(weights > 0, accepted)
    assert_close(weights.sum(), accepted.any().to(weights.dtype))
    expected = (weights[:, None] * matrix.nan_to_num()).sum(0)
    assert_close(flat(grads), expected, atol=1e-9)


@every_rule
@pytest.mark.parametrize("kind", BAD)
def test_the_first_finite_row_is_the_anchor(against, average, kind):
    bad, good = random_matrix(1, 2, (kind,)), random_matrix(2, 4)
    link = gf.agree_filter(1.0, against=against, average=average)
    grads, out = run(link, unflat(torch.cat([bad, good])))
    without, out_without = run(link, unflat(good))
    assert_close(grads, without)
    assert_close(out["weights"][2:], out_without["weights"])
    assert out["accepted"][:3].tolist() == [False, False, True]
    assert out["cosine"][2] == 1


@every_rule
def test_all_rows_bad_is_a_skip_with_finite_zeros(against, average):
    matrix = random_matrix(3, 4, BAD)
    grads, out = run(gf.agree_filter(INF, against=against, average=average), unflat(matrix))
    assert not out["keep"]
    assert not out["accepted"].any()
    assert out["cosine"].isnan().all()
    assert_close(grads, zeros())


@every_rule
@pytest.mark.parametrize("at", [0, 1])
def test_a_zero_row_has_distance_one_exactly(against, average, at):
    matrix = random_matrix(4, 2)
    matrix[at] = 0
    below = torch.nextafter(torch.ones(()), torch.zeros(())).item()
    for threshold, keep in ((below, False), (1.0, True)):
        link = gf.agree_filter(threshold, against=against, average=average)
        out = run(link, unflat(matrix))[1]
        assert out["keep"].item() is keep
        assert out["cosine"].tolist() == [1, 0]


@pytest.mark.parametrize("threshold", [2.0, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_rule
def test_from_two_on_every_finite_row_is_accepted(threshold, dtype, against, average):
    # 1 − cos of opposite rows is 2 up to rounding, on either side of it.
    for seed in range(20):
        row = normal(301, seed=seed).to(dtype)
        rows = {"w": torch.stack([row, -3 * row, row / 7, row * torch.nan])}
        link = gf.agree_filter(threshold, against=against, average=average)
        out = run(link, rows, {"w": row})[1]
        assert out["accepted"].tolist() == [True, True, True, False]


def test_rows_that_cancel_leave_a_zero_mean_to_compare_with():
    row = torch.arange(1.0, 4.0, dtype=torch.float64)
    rows = {"w": torch.stack([row, -row, 2 * row])}
    grads, out = run(gf.agree_filter(2.0), rows, {"w": row})
    assert_close(grads["w"], 2 * row / 3)
    assert_close(out["cosine"], torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))


def test_a_squared_norm_that_rounding_makes_negative_is_one_of_zero():
    for seed in range(50):
        x, y, z = normal(3, 30, seed=seed)
        rows = {"w": torch.stack([x, y, -(x + y), z])}
        out = run(gf.agree_filter(2.0), rows, {"w": x})[1]
        assert out["accepted"].all()
        assert out["cosine"].isfinite().all()


def test_halving_gives_the_last_row_half_of_all_weight_and_the_mean_does_not():
    matrix = random_matrix(5, 5)
    halving = run(gf.agree_filter(INF, average="halving"), unflat(matrix))[1]["weights"]
    assert halving.tolist() == [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert_close(
        run(gf.agree_filter(INF), unflat(matrix))[1]["weights"], torch.full_like(halving, 0.2)
    )


def test_both_averages_are_one_at_two_rows():
    rows = unflat(random_matrix(6, 2))
    mean, halving = (run(gf.agree_filter(1.5, average=a), rows)[0] for a in ("mean", "halving"))
    assert_close(mean, halving)


@every_rule
def test_rows_that_finite_filter_took_out_are_absent(against, average):
    matrix = random_matrix(7, 6, ("plain", "nan", "plain", "inf"))
    assert 0 < matrix.isfinite().all(1).sum() < 6
    filtered, out = run(gf.finite_filter(), gf.DenseStack(unflat(matrix)))
    link = gf.agree_filter(1.0, against=against, average=average)
    assert_close(run(link, filtered), run(link, unflat(matrix)))
    finite = unflat(matrix[out["finite"]])
    assert_close(run(link, filtered)[0], run(link, finite)[0])


@every_rule
def test_rows_with_the_factor_zero_are_absent_even_where_they_are_finite(against, average):
    matrix, there = random_matrix(8, 5), torch.tensor([False, True, True, False, True])
    link = gf.agree_filter(1.3, against=against, average=average)
    scaled = gf.DenseStack(unflat(matrix)).scaled(there.to(torch.float64))
    grads, out = run(link, scaled)
    alone, out_alone = run(link, unflat(matrix[there]))
    assert_close(grads, alone)
    assert_close(out["weights"][there], out_alone["weights"])
    assert not out["accepted"][~there].any()


@every_rule
def test_rows_are_merged_as_clip_per_row_left_them(against, average):
    matrix = random_matrix(9, 6)
    clipped = matrix * (0.5 / matrix.norm(dim=1, keepdim=True)).clamp(max=1)
    assert 0 < (matrix.norm(dim=1) > 0.5).sum() < 6
    rows = run(gf.clip_per_row(0.5), unflat(matrix))[0]
    grads, out = run(gf.agree_filter(1.1, against=against, average=average), rows)
    merged, weights, *_ = sequential(clipped, 1.1, against, average)
    assert_close(out["weights"], weights)
    assert_close(flat(grads), merged)


@pytest.mark.parametrize("mean", [True, False])
def test_in_numbers_or_in_tensors_the_rule_is_one(mean):
    """A CPU reads the Gram; a GPU, a compiler or a transform works on tensors throughout."""
    told = 0
    for seed in range(400):
        matrix, threshold, _ = random_case(seed)
        average = "mean" if mean else "halving"
        *_, margin = sequential(matrix, threshold, "running", average)
        if margin > 1e-9:
            told += 1
            usable = matrix.isfinite().all(1)
            gram = matrix @ matrix.T
            numbers = _running._in_numbers(gram, usable, threshold, mean)
            tensors = _running._in_tensors(gram, usable, threshold, mean)
            assert torch.equal(numbers[1], tensors[1])
            assert_close(numbers[0], tensors[0])
            assert_close(numbers[2], tensors[2], atol=1e-10)
    assert told > 200


def test_many_rows_are_judged_as_a_few_are():
    matrix = random_matrix(12, _running.FEW + 30) + 0.3
    merged, weights, accepted, *_ = sequential(matrix, 0.9)
    grads, out = run(gf.agree_filter(0.9), unflat(matrix))
    assert 2 < accepted.sum() < len(matrix)
    assert torch.equal(out["accepted"], accepted)
    assert_close(out["weights"], weights)
    assert_close(flat(grads), merged)


@pytest.mark.parametrize(("against", "average"), RULES)
def test_a_gram_a_little_below_zero_is_that_of_a_zero_row(against, average):
    """A Gram of signed terms: that of a row which is zero but for rounding may be negative."""

    class Signed(gf.DenseStack):
        def gram(self):
            gram = super().gram()
            gram[1, 1] = -1e-9
            return gram

    matrix = random_matrix(3, 4)
    matrix[1] = 0
    grads, out = run(gf.agree_filter(0.9, against=against, average=average), Signed(unflat(matrix)))
    assert out["cosine"][1] == 0 and not out["accepted"][1]
    assert all(leaf.isfinite().all() for leaf in grads.values())


def test_a_microbatch_of_one_sample_again_and_again():
    """Behind BatchNorm its gradient is zero but for rounding, and so is its ghost Gram."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False))
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, lambda output, y: (output * y).mean())
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = torch.randn(16, 64), torch.randn(16, 64)
        x[4:8] = x[4]
        rows = gf.microbatch_grads(loss, 4, plan="fused")(params, (x, y), buffers=buffers)
        assert (rows.gram().diagonal() >= 0).all()
        link = gf.agree_filter(0.97)
        _, _, out = link.update(rows, {}, params)
        assert out["cosine"].isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_numbers_are_read_where_nobody_waits_or_follows():
    x = torch.ones(2)
    seen = []
    assert readable(x) and readable(nn.Parameter(x, requires_grad=False))
    seen.append(readable(nn.Parameter(x)))
    with torch.no_grad():
        assert readable(nn.Parameter(x))
    traced = lambda y: (seen.append(readable(y)), y.sum())[1]
    torch.jit.trace(traced, (x,), check_trace=False)
    with Count():
        seen.append(readable(x))
    torch.vmap(lambda row: (seen.append(readable(row)), row)[1])(x)
    torch.func.grad(lambda y: (seen.append(readable(y)), y.sum())[1])(x)
    seen.append(readable(x.to("meta")))
    assert seen == [False] * 6


class Count(TorchDispatchMode):
    """Counts all operations."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("average", ["mean", "halving"])
@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1e150])
def test_cosines_do_not_know_the_size_of_the_rows(average, scale):
    """Apart from the 1e-8 that every norm is at least."""
    matrix = random_matrix(10, 7)
    link = gf.agree_filter(1.1, average=average)
    out = run(link, unflat(scale * matrix))[1]
    _, weights, accepted, cosines, _ = sequential(scale * matrix, 1.1, "running", average)
    assert torch.equal(out["accepted"], accepted)
    assert_close(out["weights"], weights)
    assert_close(out["cosine"], cosines, atol=1e-9)


def test_one_row_has_nothing_to_agree_with():
    with pytest.raises(ValueError, match=r"at least two rows, found M = 1.*mean_rows"):
        run(gf.agree_filter(), unflat(random_matrix(0, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, r"0 <= threshold <= 2, found threshold=-0.1.*cosine distance"),
        ({"threshold": float("nan")}, "found threshold=nan"),
        ({"min_accepted": 0}, "1 <= min_accepted"),
        ({"against": "last"}, "found against='last'"),
        ({"average": "median"}, "average='median'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.agree_filter(**arguments)
