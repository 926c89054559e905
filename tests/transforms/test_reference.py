"""`reference_filter` against its formula, and where the reference comes from."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import BAD, assert_close, flat, normal, random_matrix, unflat, zeros
from gradfilter.diagnostics import influence
from gradfilter.interop import Filtered

MIXED = ("plain",) * 5 + ("zero", *BAD)
seeds = st.integers(0, 2**20)
P = flat(zeros()).numel()


def weights_of(matrix, reference, soft, threshold, by, live):
    """The weights from the definition, row by row."""
    found = []
    for row, here in zip(matrix, live, strict=True):
        usable = bool(here) and bool(row.isfinite().all())
        s = (row @ reference).item() if usable else 0.0
        if by == "cosine" and usable:
            length = (row.norm() * reference.norm()).item()
            s = s / length if length else 0.0
        if not usable:
            found.append(0.0)
        elif not reference.any():
            found.append(1.0)
        else:
            found.append(max(0.0, s - threshold) if soft else float(s > threshold))
    total = sum(found)
    return torch.tensor([w / total if total else 0.0 for w in found], dtype=torch.float64)


@given(
    seeds,
    st.booleans(),
    st.sampled_from(["product", "cosine"]),
    st.sampled_from([-0.5, 0.0, 0.3]),
    st.booleans(),
)
def test_random_stacks_follow_the_definition(seed, soft, by, threshold, zero):
    matrix = random_matrix(seed, 1 + seed % 7, MIXED)
    live = torch.rand(len(matrix), generator=torch.Generator().manual_seed(seed)) < 0.8
    reference = torch.zeros(P, dtype=torch.float64) if zero else normal(P, seed=seed)
    expected = weights_of(matrix, reference, soft, threshold, by, live)
    rows = gf.DenseStack(unflat(matrix)).scaled(live.double())
    rule = gf.reference_filter(soft=soft, by=by, threshold=threshold)
    grads, _, out = rule.update(rows, {}, zeros(), reference=unflat(reference))
    assert_close(out["weights"], expected)
    assert out["accepted"].tolist() == (expected > 0).tolist()
    assert out["keep"].item() is bool((expected > 0).any())
    used = expected > 0
    assert_close(flat(grads), expected[used] @ matrix[used])
    same = gf.reference_filter(unflat(reference), soft=soft, by=by, threshold=threshold)
    assert_close(same.update(rows, {}, zeros())[2]["weights"], expected)


@given(seeds, st.floats(0.0, 0.95))
def test_an_average_of_mean_rows(seed, decay):
    rule, params = gf.reference_filter("average", decay=decay), zeros()
    state, reference = rule.init(params), torch.zeros(P, dtype=torch.float64)
    for step in range(4):
        matrix = random_matrix(seed + step, 4, MIXED)
        _, state, out = rule.update(unflat(matrix), state, params)
        expected = weights_of(matrix, reference, True, 0.0, "product", torch.ones(4))
        assert_close(out["weights"], expected, rtol=1e-8)
        finite = matrix[matrix.isfinite().all(1)]
        if len(finite):
            reference = decay * reference + (1 - decay) * finite.mean(0)


def test_the_mean_row_of_the_step_before():
    rule, params = gf.reference_filter("previous"), zeros()
    first, second = normal(3, P, seed=1), normal(3, P, seed=2)
    _, state, out = rule.update(unflat(first), rule.init(params), params)
    assert_close(out["weights"], torch.full((3,), 1 / 3, dtype=torch.float64))
    _, _, out = rule.update(unflat(second), state, params)
    expected = weights_of(second, first.mean(0), True, 0.0, "product", torch.ones(3))
    assert_close(out["weights"], expected)


def test_an_average_that_opposes_all_rows_gives_in():
    """Its state observes: otherwise no step would be applied for ever."""
    update = gf.chain(gf.reference_filter("average", decay=0.8), gf.sgd(0.1))
    params = zeros()
    state, common = update.init(params), normal(P)
    kept = []
    for step in range(30):
        sign = 1.0 if step < 10 else -1.0
        rows = unflat(sign * common + 0.1 * normal(4, P, seed=step))
        params, state, info = update(params, state, rows)
        kept.append(info["keep"].item())
    assert all(kept[:10]) and not kept[10] and all(kept[14:])


# --- The gradient of a clean batch ---


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x)).tanh()))


def network(dropout=0.0):
    model = Net().double()
    model.drop.p = dropout
    return model


def samples(seed, n=12):
    return normal(n, 4, seed=seed), torch.arange(n) % 3


def plain_gradient(model, x, y):
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_reference_batch_by_ordinary_backward_passes(plan, compiled):
    model, plain = network(), network()
    update = gf.chain(gf.reference_filter(), gf.sgd(0.3))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=4, plan=plan)
    step = gf.compile(step, backend="graph") if compiled else step
    state = (step.step if compiled else step).init(model, seed=0)
    clean = samples(99, 5)
    for number in range(4):
        x, y = samples(number)
        reference = plain_gradient(plain, *clean)
        parts = zip(x.chunk(4), y.chunk(4), strict=True)
        rows = []
        for part in parts:
            loss = F.cross_entropy(plain(part[0]), part[1])  # moves the running statistics
            grads = torch.autograd.grad(loss, list(plain.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        rows = torch.stack(rows)
        weights = weights_of(rows, reference, True, 0.0, "product", torch.ones(4))
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(plain.parameters()).detach() - 0.3 * weights @ rows,
            plain.parameters(),
        )
        state, info = step(state, (x, y), reference_batch=clean)
        accepted = info["reference_filter/accepted"]
        assert accepted.tolist() == (weights > 0).tolist()
        assert_close(info["reference_filter/score"][accepted], (rows @ reference)[accepted])
    for (name, p), leaf in zip(plain.named_parameters(), state["params"].values(), strict=True):
        torch.testing.assert_close(leaf, p.detach(), rtol=1e-9, atol=1e-11, msg=name)
    for name, b in plain.named_buffers():
        torch.testing.assert_close(state["buffers"][name], b, msg=name)


def test_the_draws_of_the_rows_do_not_depend_on_the_reference_batch():
    model = network(dropout=0.5)
    step = gf.train_step(
        gf.model_loss(model, F.cross_entropy),
        gf.chain(gf.reference_filter(), gf.sgd(0.1)),
        microbatches=4,
    )
    state = step.init(model, seed=3)
    found = [step(state, samples(0), reference_batch=samples(9, n)) for n in (3, 6)]
    assert torch.equal(found[0][1]["loss"], found[1][1]["loss"])


def test_rows_per_sample_take_a_reference_batch_too():
    model = nn.Linear(4, 3).double()
    step = gf.train_step(
        gf.model_loss(model, F.cross_entropy), gf.chain(gf.reference_filter(), gf.sgd(0.1))
    )
    x, y = samples(0)
    _, info = step(step.init(model), (x, y), reference_batch=(x, y))
    clean = plain_gradient(model, x, y)
    each = torch.stack([plain_gradient(model, x[m : m + 1], y[m : m + 1]) for m in range(len(x))])
    assert_close(info["reference_filter/score"], each @ clean)


@pytest.mark.parametrize("options", [{}, {"compile": "graph"}], ids=["eager", "compiled"])
def test_a_host_takes_a_reference_batch(options):
    """The same weights as `train_step`, with a running BatchNorm and dropout."""
    own, other = network(0.5), network(0.5)
    filtered = Filtered(
        own,
        F.cross_entropy,
        gf.chain(gf.reference_filter()),
        torch.optim.SGD(own.parameters(), lr=0.1),
        4,
        **options,
    )
    rule = gf.chain(gf.reference_filter(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(other, F.cross_entropy), rule, microbatches=4)
    state = step.init(other, seed=0)
    torch.manual_seed(0)
    for number in range(3):
        x, y = samples(number)
        result = filtered.step(x, y, reference_batch=samples(99, 5))
        state, info = step(state, (x, y), reference_batch=samples(99, 5))
        for key in ("score", "accepted"):
            assert_close(result.info[f"reference_filter/{key}"], info[f"reference_filter/{key}"])
    for name, p in own.named_parameters():
        torch.testing.assert_close(p.detach(), state["params"][name])
    for name, b in own.named_buffers():
        torch.testing.assert_close(b, state["buffers"][name])


def test_partitions_see_their_leaves_of_the_reference():
    label = lambda name: "head" if name.startswith("fc") else "body"
    rule = gf.partition(
        {name: gf.chain(gf.reference_filter(), gf.sgd(1.0)) for name in ("head", "body")}, label
    )
    matrix, reference = random_matrix(0, 4), normal(P, seed=5)
    params = zeros()
    rows, wanted = unflat(matrix), unflat(reference)
    moved, _, _ = rule(params, rule.init(params), rows, reference=wanted)
    for group in ("head", "body"):
        names = [name for name in params if label(name) == group]
        own = flat({n: rows[n] for n in names}, batch_dims=1)
        weights = weights_of(
            own, flat({n: wanted[n] for n in names}), True, 0.0, "product", [1] * 4
        )
        assert_close(flat({n: moved[n] for n in names}), -weights @ own)


# --- The question behind it ---


@given(seeds)
def test_influence_is_the_product_with_the_reference(seed):
    matrix, reference = random_matrix(seed, 5), normal(P, seed=seed)
    assert_close(influence(unflat(matrix), unflat(reference)), matrix @ reference)


# --- Errors ---


def test_without_a_reference_it_says_so():
    with pytest.raises(ValueError, match=r"found none.*reference_batch=clean"):
        gf.reference_filter().update(unflat(random_matrix(0, 3)), {}, zeros())


def test_a_reference_with_other_leaves_is_refused():
    wrong = {**zeros(), "stray": torch.ones(1)}
    with pytest.raises(ValueError, match=r"reference_filter: reference.*extra \['stray'\]"):
        gf.reference_filter().update(unflat(random_matrix(0, 3)), {}, zeros(), reference=wrong)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: gf.reference_filter("clean"), ValueError, "reference_batch="),
        (lambda: gf.reference_filter(torch.ones(3)), TypeError, "dict"),
        (lambda: gf.reference_filter(by="angle"), ValueError, "by as"),
        (lambda: gf.reference_filter(by="cosine", threshold=2.0), ValueError, "threshold"),
        (lambda: gf.reference_filter("average", decay=1.0), ValueError, "decay"),
    ],
)
def test_bad_arguments_are_named(make, error, said):
    with pytest.raises(error, match=said):
        make()
