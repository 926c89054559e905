"""The plain reducers and `finite_filter` against their definitions."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import (
    BAD,
    assert_close,
    assert_same,
    flat,
    normal_tree,
    random_matrix,
    run,
    unflat,
    zeros,
)

seeds = st.integers(0, 2**20)
MIXED = ("plain", "plain", "zero", *BAD)


def filtered(matrix):
    """The stack that finite_filter leaves."""
    return run(gf.finite_filter(), gf.DenseStack(unflat(matrix)))


# mean_rows


@given(seed=seeds, rows=st.integers(1, 9))
def test_mean_rows_is_the_mean(seed, rows):
    matrix = random_matrix(seed, rows, ("plain", "zero"))
    grads, out = run(gf.mean_rows(), unflat(matrix))
    assert_close(flat(grads), matrix.mean(0), atol=1e-9)
    assert_close(out["weights"], torch.full((rows,), 1 / rows, dtype=torch.float64))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_shows_in_the_mean(kind):
    matrix = torch.cat([random_matrix(1, 3), random_matrix(2, 1, (kind,))])
    grads, out = run(gf.mean_rows(), unflat(matrix))
    assert_same(flat(grads).isfinite(), matrix.isfinite().all(0))
    assert (out["weights"] == 0.25).all()


@given(seed=seeds, rows=st.integers(1, 9))
def test_after_finite_filter_the_mean_is_over_the_finite_rows(seed, rows):
    matrix = random_matrix(seed, rows, MIXED)
    finite = matrix.isfinite().all(1)
    grads, out = run(gf.mean_rows(), filtered(matrix)[0])
    expected = matrix[finite].mean(0) if finite.any() else torch.zeros_like(matrix[0])
    assert_close(flat(grads), expected, atol=1e-9)
    assert_close(out["weights"], finite / finite.sum().clamp(min=1).double())


# aggregate


def shortest_of_two(gram):
    """Min-norm weights of two rows: the point of the segment between them nearest to 0."""
    a, b, c = gram[0, 0], gram[0, 1], gram[1, 1]
    share = ((c - b) / (a - 2 * b + c)).clamp(0, 1)
    return torch.stack([share, 1 - share])


@given(seed=seeds)
def test_aggregate_combines_with_the_weights_of_the_gram(seed):
    matrix = random_matrix(seed, 2)
    grads, out = run(gf.aggregate(shortest_of_two), unflat(matrix))
    assert_close(out["weights"], shortest_of_two(matrix @ matrix.T))
    assert_close(flat(grads), out["weights"] @ matrix, atol=1e-9)
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    segment = (shares * matrix[0] + (1 - shares) * matrix[1]).norm(dim=1)
    assert flat(grads).norm() <= segment.min() * (1 + 1e-6)


def test_aggregate_sees_the_whole_gram_once():
    matrix, seen = random_matrix(3, 4), []

    def weighting(gram):
        seen.append(gram)
        return torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=gram.dtype)

    grads, _ = run(gf.aggregate(weighting), unflat(matrix))
    assert_close(flat(grads), matrix[0] - 2 * matrix[1] + 0.5 * matrix[3], atol=1e-9)
    assert len(seen) == 1
    assert_close(seen[0], matrix @ matrix.T)


def test_a_weight_of_zero_masks_a_bad_row():
    matrix = random_matrix(4, 3)
    matrix[1] = torch.nan
    pick = lambda gram: torch.tensor([0.5, 0.0, 0.5], dtype=gram.dtype)
    grads, _ = run(gf.aggregate(pick), unflat(matrix))
    assert_close(flat(grads), (matrix[0] + matrix[2]) / 2)


class Resettable:
    def __call__(self, gram):
        return gram.diagonal()

    def reset(self):
        pass


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(2))

    def forward(self, gram):
        return gram.diagonal()


class Pure(nn.Module):
    def forward(self, gram):
        return gram.diagonal().softmax(0)


@pytest.mark.parametrize("weighting", [Resettable(), WithBuffer(), nn.Linear(2, 2)])
def test_weightings_with_hidden_state_are_refused(weighting):
    with pytest.raises(TypeError, match=rf"found {type(weighting).__name__}, which keeps state"):
        gf.aggregate(weighting)


def test_a_stateless_module_is_a_weighting():
    matrix = random_matrix(5, 3)
    weights = (matrix @ matrix.T).diagonal().softmax(0)
    assert_close(run(gf.aggregate(Pure()), unflat(matrix))[1]["weights"], weights)


@pytest.mark.parametrize("shape", [(3, 3), (2,), (3, 1), ()])
def test_weights_of_another_shape_are_refused(shape):
    link = gf.aggregate(lambda gram: torch.ones(shape, dtype=gram.dtype))
    with pytest.raises(ValueError, match=r"weights of shape \(3,\), found.*one number per row"):
        run(link, unflat(random_matrix(0, 3)))


def test_a_weighting_has_to_be_callable():
    with pytest.raises(TypeError, match=r"function \(M, M\) -> \(M,\), found Tensor"):
        gf.aggregate(torch.ones(3))


# sign_agreement


def and_mask(matrix, fraction):
    """Coordinate by coordinate, with whole numbers: |Σ sign| >= fraction · M."""
    kept = []
    for column in matrix.T.tolist():
        signs = sum((g > 0) - (g < 0) for g in column)
        kept.append(abs(signs) / len(column) >= fraction)
    return torch.tensor(kept)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1 / 3, 0.5, 0.6, 0.7, 0.8, 1.0])
def test_sign_agreement_keeps_the_coordinates_of_one_sign(fraction):
    for seed in range(30):
        rows = 1 + seed % 10
        matrix = random_matrix(seed, rows, ("plain", "plain", "plain", "zero"))
        matrix -= matrix.mean(0) * (seed % 3) / 2
        grads, out = run(gf.sign_agreement(fraction), unflat(matrix))
        kept = and_mask(matrix, fraction)
        assert_close(flat(grads), torch.where(kept, matrix.mean(0), 0.0), atol=1e-9)
        assert_close(out["kept_fraction"].item(), kept.double().mean().item(), atol=1e-6)
        assert (out["weights"] == 1 / rows).all()


@pytest.mark.parametrize("rows", range(1, 16))
def test_a_fraction_that_is_met_exactly_is_met(rows):
    for positive in range(rows + 1):
        signs = torch.ones(rows, 1, dtype=torch.float64)
        signs[positive:] = -1
        net = abs(2 * positive - rows)
        mean = (2 * positive - rows) / rows
        for fraction, kept in ((net / rows, True), ((net + 0.01) / rows, False)):
            if fraction <= 1:
                out = run(gf.sign_agreement(fraction), {"w": signs}, {"w": signs[0]})
                assert out[0]["w"].item() == pytest.approx(mean if kept else 0.0)
                assert out[1]["kept_fraction"] == kept


def test_sign_agreement_after_finite_filter_is_over_the_finite_rows():
    matrix = random_matrix(6, 7, ("plain", "plain", *BAD))
    finite = matrix.isfinite().all(1)
    assert 1 < finite.sum() < 7
    grads, _ = run(gf.sign_agreement(0.6), filtered(matrix)[0])
    assert_close(grads, run(gf.sign_agreement(0.6), unflat(matrix[finite]))[0], atol=1e-9)


def test_sign_agreement_counts_the_rows_as_clipped():
    matrix = random_matrix(7, 5)
    rows, _ = run(gf.clip_per_row(0.5), unflat(matrix))
    clipped = matrix * (0.5 / matrix.norm(dim=1, keepdim=True)).clamp(max=1)
    kept = and_mask(matrix, 0.6)
    assert 0 < kept.sum() < len(kept)
    assert_close(
        flat(run(gf.sign_agreement(0.6), rows)[0]), torch.where(kept, clipped.mean(0), 0.0)
    )


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fractions_outside_the_unit_interval_are_refused(fraction):
    with pytest.raises(ValueError, match=r"0 <= fraction <= 1, found.*unanimity"):
        gf.sign_agreement(fraction)


# finite_filter


@given(seed=seeds, rows=st.integers(1, 9))
def test_finite_filter_takes_the_rows_that_are_not_finite_out(seed, rows):
    matrix = random_matrix(seed, rows, MIXED)
    finite = matrix.isfinite().all(1)
    stack, out = filtered(matrix)
    expected = torch.where(finite[:, None], matrix, 0.0)
    assert torch.equal(out["finite"], finite)
    assert out["keep"] == finite.any()
    assert torch.equal(stack.live, finite)
    assert_same(flat(stack.stacked(), batch_dims=1), expected)
    assert_close(stack.gram(), expected @ expected.T, atol=1e-9)
    assert_close(stack.sq_norms(), expected.square().sum(1), atol=1e-9)


@pytest.mark.parametrize("bad", [None, *BAD])
def test_finite_filter_on_a_tree_keeps_the_step_if_every_entry_is_finite(bad):
    grads = normal_tree(8)
    if bad is not None:
        grads = unflat(random_matrix(8, 1, (bad,))[0])
    same, out = run(gf.finite_filter(), grads)
    assert_same(same, grads)
    assert out["keep"].item() is out["finite"].item() is (bad is None)


def test_a_step_without_a_finite_row_changes_nothing():
    update = gf.chain(gf.finite_filter(), gf.mean_rows(), gf.adam(0.1))
    params = normal_tree(9)
    state = update.init(params)
    moved, after, info = update(params, state, gf.DenseStack(unflat(random_matrix(0, 3, BAD))))
    assert not info["keep"]
    assert_same(moved, params)
    assert_same(gf.state_dict(after), gf.state_dict(state))
    assert_same(run(gf.mean_rows(), filtered(random_matrix(0, 3, BAD))[0])[0], zeros())


# aggregate with a memory


def momentum_of_norms(gram, state):
    average = 0.5 * state["average"] + 0.5 * gram.diagonal()
    return average / average.sum(), {"average": average, "calls": state["calls"] + 1}


MEMORY = {
    "average": torch.ones(4, dtype=torch.float64),
    "calls": torch.zeros((), dtype=torch.int64),
}


@pytest.mark.parametrize("init", [MEMORY, lambda params: MEMORY])
def test_a_weighting_with_memory_gets_its_last_state(init):
    update = gf.chain(gf.finite_filter(), gf.aggregate(momentum_of_norms, init), gf.sgd(1.0))
    params = zeros()
    state, average, calls = update.init(params), torch.ones(4, dtype=torch.float64), 0
    for seed in range(6):
        matrix = random_matrix(seed, 4, ("plain", "plain", "nan") if seed % 2 else ("nan",))
        finite = matrix.isfinite().all(1)
        clean = torch.where(finite[:, None], matrix, 0.0)
        given = zeros()
        moved, state, info = update(given, state, unflat(matrix), donate=seed % 3 == 0)
        assert info["keep"] == finite.any()
        if info["keep"]:  # a skipped step leaves the memory
            average, calls = (average + clean.square().sum(1)) / 2, calls + 1
            assert_close(flat(params) - flat(moved), average / average.sum() @ clean, atol=1e-9)
        own = state["aggregate"]["weighting"]
        assert_close(own["average"], average)
        assert own["calls"] == calls
    assert 0 < calls < 6
    assert MEMORY["calls"] == 0 and (MEMORY["average"] == 1).all()  # never written into
    assert "aggregate.weighting.average" in gf.state_dict(state)


def test_the_memory_of_a_weighting_keeps_its_dtype():
    link = gf.aggregate(lambda gram, state: (gram.diagonal(), gram.diagonal()), torch.zeros(3))
    _, state, _ = link.update(unflat(random_matrix(0, 3)), link.init(zeros()), zeros())
    assert state["weighting"].dtype == torch.float32 and state["weighting"].any()


@pytest.mark.parametrize("init", [1.0, {"beta": 0.5}, [torch.ones(2), None], lambda params: 2])
def test_a_memory_has_tensors_only(init):
    with pytest.raises(TypeError, match=r"init as a tensor, a nested dict.*shape \(\)"):
        gf.aggregate(momentum_of_norms, init).init(zeros())


def test_a_weighting_with_memory_returns_weights_and_state():
    link = gf.aggregate(lambda gram, state: gram.diagonal(), torch.ones(3))
    with pytest.raises(TypeError, match=r"-> \(weights, state\), because init is given, found Ten"):
        run(link, unflat(random_matrix(0, 3)))
    link = gf.aggregate(lambda gram, state: (gram[0, :2], state), torch.ones(3))
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        run(link, unflat(random_matrix(0, 3)))
    link = gf.aggregate(lambda gram, state: (gram[0], {"other": gram}), {"own": torch.ones(3)})
    with pytest.raises(ValueError, match=r"aggregate: expected the state that update returns"):
        run(link, unflat(random_matrix(0, 3)))


@pytest.mark.parametrize("weighting", [Resettable(), WithBuffer()])
def test_the_error_about_hidden_state_names_the_way_to_keep_it(weighting):
    with pytest.raises(TypeError, match=r"weighting\(gram, state\) -> .*aggregate\(.*init=\.\.\."):
        gf.aggregate(weighting)


# TorchJD's weightings, where that package is installed


def on_simplex(point):
    """The nearest point with entries >= 0 of sum 1: subtract a constant, and cut at 0."""
    descending = point.sort(descending=True).values
    counts = torch.arange(1, len(point) + 1, dtype=point.dtype)
    levels = (descending.cumsum(0) - 1) / counts
    used = (descending > levels).sum() - 1
    return (point - levels.gather(0, used[None])).clamp(min=0)


def modo(gram, weights, *, gamma=0.1, rho=0.1):
    """A step on the weights towards the shortest combination."""
    weights = on_simplex(weights - gamma * (gram @ weights + rho * weights))
    return weights, weights


def sdmgrad(gram, weights, *, lr=10.0, momentum=0.5, steps=20, pull=0.3):
    """Such steps with momentum, on a Gram of unit size, towards the mean."""
    gram = gram / (gram.diagonal().sqrt().mean() ** 2 + 1e-8)
    mean, velocity = torch.full_like(weights, 1 / len(weights)), torch.zeros_like(weights)
    for _ in range(steps):
        velocity = momentum * velocity + gram @ (weights + pull * mean)
        weights = on_simplex(weights - lr * velocity)
    return (weights + pull * mean) / (1 + pull), weights


def gradvac(gram, targets, *, beta=0.5, eps=1e-8):
    """Move every row until its cosines with the others are those of before, on average."""
    count = len(gram)
    mixed, targets = [], targets.clone()
    for i in range(count):
        own = torch.eye(count, dtype=gram.dtype)[i]
        others = [j for j in range(count) if j != i]
        for j in (others[k] for k in torch.randperm(count - 1).tolist()):
            norm, other = (own @ gram @ own).clamp(min=0).sqrt(), gram[j, j].sqrt()
            cosine, target = own @ gram[:, j] / (norm * other + eps), targets[i, j].clone()
            sine, wanted = (1 - cosine**2).clamp(min=0).sqrt(), (1 - target**2).clamp(min=0).sqrt()
            added = norm * (target * sine - cosine * wanted) / (other * wanted + eps)
            own = own + torch.where(cosine < target, added, 0.0) * torch.eye(count).to(gram)[j]
            targets[i, j] = (1 - beta) * target + beta * cosine
        mixed.append(own)
    return torch.stack(mixed).sum(0), targets


def smoothed(weighting, alpha=0.9):
    """CR-MOGM: a moving average of the weights, which begins with the first ones."""

    def averaged(gram, state):
        new = weighting(gram)
        before = torch.where(state["begun"], state["weights"], new)
        weights = alpha * before + (1 - alpha) * new
        return weights, {"weights": weights, "begun": torch.ones_like(state["begun"])}

    return averaged


def uniform(m):
    return torch.full((m,), 1 / m, dtype=torch.float64)


STATEFUL = {
    "MoDoWeighting": ({}, modo, uniform),
    # At the usual lr of 10 two rows swing, and rounding grows from step to step.
    "SDMGradWeighting": ({"lr": 1.0}, partial(sdmgrad, lr=1.0), uniform),
    "GradVacWeighting": ({}, gradvac, lambda m: torch.zeros(m, m, dtype=torch.float64)),
}


@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize("name", STATEFUL)
def test_stateful_weightings_of_torchjd_as_functions(name, m):
    torchjd = pytest.importorskip("torchjd.aggregation")
    options, pure, first = STATEFUL[name]
    theirs = getattr(torchjd, name)(**options)
    with pytest.raises(TypeError, match=rf"found {name}, which keeps state.*init="):
        gf.aggregate(theirs)
    link, params = gf.aggregate(pure, first(m)), zeros()
    state = link.init(params)
    for seed in range(20):
        matrix = random_matrix(seed, m)
        matrix = matrix / matrix.norm(dim=1, keepdim=True)
        torch.manual_seed(seed)
        expected = theirs(matrix @ matrix.T)
        torch.manual_seed(seed)
        grads, state, out = link.update(unflat(matrix), state, params)
        assert_close(out["weights"], expected, rtol=1e-6, atol=1e-8)
        assert_close(flat(grads), expected @ matrix, rtol=1e-6, atol=1e-8)


def test_smoothed_weights_of_torchjd_as_a_function():
    torchjd = pytest.importorskip("torchjd.aggregation")
    theirs = torchjd.CRMOGMWeighting(torchjd.MGDAWeighting(), alpha=0.8)
    first = {"weights": uniform(4), "begun": torch.tensor(False)}
    link = gf.aggregate(smoothed(torchjd.MGDAWeighting(), 0.8), first)
    state = link.init(zeros())
    for seed in range(20):
        matrix = random_matrix(seed, 4)
        _, state, out = link.update(unflat(matrix), state, zeros())
        assert_close(out["weights"], theirs(matrix @ matrix.T), rtol=1e-6, atol=1e-8)


STATELESS = {
    "AlignedMTLWeighting": (),
    "CAGradWeighting": (0.5,),
    "ConstantWeighting": (torch.tensor([0.5, 0.25, 0.25, 1.0]).double(),),
    "DualProjWeighting": (),
    "FairGradWeighting": (1.0,),
    "IMTLGWeighting": (),
    "KrumWeighting": (1, 2),
    "MeanWeighting": (),
    "MGDAWeighting": (),
    "PCGradWeighting": (),
    "RandomWeighting": (),
    "SumWeighting": (),
    "UPGradWeighting": (),
}


SOLVERS = {
    "CAGradWeighting": ("cvxpy", "clarabel"),
    "DualProjWeighting": ("qpsolvers", "quadprog"),
    "UPGradWeighting": ("qpsolvers", "quadprog"),
}
"""The packages that a weighting needs in addition to TorchJD, which makes them an option."""


@pytest.mark.parametrize("name", STATELESS)
def test_stateless_weightings_of_torchjd_work_as_they_are(name):
    torchjd = pytest.importorskip("torchjd.aggregation")
    for solver in SOLVERS.get(name, ()):
        pytest.importorskip(solver, reason=f"{name} of TorchJD needs {solver}")
    weighting = getattr(torchjd, name)(*STATELESS[name])
    matrix = random_matrix(3, 4)
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    torch.manual_seed(0)
    expected = weighting(matrix @ matrix.T)
    torch.manual_seed(0)
    grads, out = run(gf.aggregate(weighting), unflat(matrix))
    assert_close(out["weights"], expected.double(), rtol=1e-6, atol=1e-8)
    assert_close(flat(grads), expected.double() @ matrix, rtol=1e-6, atol=1e-8)
