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
from gradfilter.transforms._chain import row_part
from gradfilter.transforms._streaming import ReducedRows

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


# --- Rows in parts ---


def in_parts(update, params, state, rows, sizes, **extra):
    """Run a step on rows that were reduced part by part."""
    reduced = ReducedRows(row_part(update), state, params, extra)
    low = 0
    for size in sizes:
        part = {name: leaf[low : low + size] for name, leaf in rows["rows"].items()}
        reduced.add(gf.DenseStack(part).scaled(rows["scale"][low : low + size]))
        low += size
    return update.update(reduced, state, params, **extra)


SOURCES = ["keyword", "dict"]


@given(
    seeds,
    st.booleans(),
    st.sampled_from(["product", "cosine"]),
    st.sampled_from([-0.5, 0.0, 0.3, 1.0]),
    st.sampled_from(["zero", "plain", "opposed"]),
    st.sampled_from(SOURCES),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_parts_weigh_as_all_rows_do(seed, soft, by, threshold, kind, source, sizes):
    """Also with a zero reference, without a row of positive weight, with dead rows and NaN."""
    matrix = random_matrix(seed, sum(sizes), MIXED)
    live = torch.rand(len(matrix), generator=torch.Generator().manual_seed(seed)) < 0.8
    reference = torch.zeros(P, dtype=torch.float64) if kind == "zero" else normal(P, seed=seed)
    if kind == "opposed":
        matrix = -reference * normal(len(matrix), 1, seed=seed).abs()
    given_as = unflat(reference)
    rule = gf.reference_filter(
        given_as if source == "dict" else "given", soft=soft, by=by, threshold=threshold
    )
    extra = {} if source == "dict" else {"reference": given_as}
    update, params = gf.chain(rule), zeros()
    state = update.init(params)
    whole = gf.DenseStack(unflat(matrix)).scaled(live.double())
    expected = update.update(whole, state, params, **extra)
    given_rows = {"rows": unflat(matrix), "scale": live.double()}
    found = in_parts(update, params, state, given_rows, sizes, **extra)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert list(found[2]) == list(expected[2])
    by_hand = weights_of(matrix, reference, soft, threshold, by, live)
    assert_close(found[2]["weights"], by_hand)
    used = by_hand > 0
    assert found[2]["keep"].item() is bool(used.any())
    assert_close(flat(found[0]), by_hand[used] @ matrix[used])


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_parts_of_float32_rows_of_any_scale(scale):
    """Products of 1e-28 times gradients of 1e-14 are below the range of float32."""
    matrix = (scale * normal(6, P, seed=3)).float()
    reference = (scale * normal(P, seed=4)).float()
    params = {name: p.float() for name, p in zeros().items()}
    update = gf.chain(gf.reference_filter(unflat(reference)))
    state, rows = update.init(params), unflat(matrix)
    expected = flat(update.update(rows, state, params)[0])
    given_rows = {"rows": rows, "scale": torch.ones(6)}
    found = flat(in_parts(update, params, state, given_rows, (1, 3, 2))[0])
    assert expected.abs().max() > scale / 100
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale)


def test_the_sum_of_the_margins_is_published():
    rows, r = {"w": torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])}, torch.tensor([2.0, 0.0])
    total = lambda **given: gf.reference_filter({"w": r}, **given).update(
        rows, {}, {"w": torch.zeros(2)}
    )[2]["total"]
    assert total() == 0.5  # ⟨g, r⟩/‖r‖² = 2/4
    assert total(threshold=-1.0) == (3 + 1) / 4
    assert total(by="cosine", threshold=-0.5) == 1.5 + 0.5
    assert total(soft=False, threshold=-0.5) == 2


def test_an_average_needs_all_rows():
    for word in ("average", "previous"):
        assert row_part(gf.chain(gf.reference_filter(word), gf.sgd(1.0))) is None
    assert row_part(gf.chain(gf.reference_filter(), gf.sgd(1.0))) is not None


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_reference_batch_with_rows_in_parts(plan, compiled, at_once):
    model = network()
    update = gf.chain(gf.clip_per_row(1.0), gf.reference_filter(by="cosine"), gf.sgd(0.3))
    loss = gf.model_loss(model, F.cross_entropy)
    whole = gf.train_step(loss, update, microbatches=4, plan=plan)
    parts = gf.train_step(loss, update, microbatches=4, plan=plan, rows_at_once=at_once)
    state = other = whole.init(model, seed=0)
    parts = gf.compile(parts, backend="graph") if compiled else parts
    for number in range(3):
        given_batch = {"reference_batch": samples(99, 5)}
        state, expected = whole(state, samples(number), **given_batch)
        other, found = parts(other, samples(number), **given_batch)
        assert list(found) == list(expected)
        torch.testing.assert_close(dict(found), dict(expected), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other, state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("word", ["average", "previous"])
def test_an_average_holds_the_rows_of_all_parts(word):
    model = network()
    update = gf.chain(gf.reference_filter(word), gf.sgd(0.3))
    loss = gf.model_loss(model, F.cross_entropy)
    steps = [gf.train_step(loss, update, microbatches=4, rows_at_once=k) for k in (None, 2)]
    states = [step.init(model, seed=0) for step in steps]
    for number in range(3):
        states = [
            step(state, samples(number))[0] for step, state in zip(steps, states, strict=True)
        ]
    torch.testing.assert_close(states[1], states[0], rtol=1e-10, atol=1e-12)


def host(model, options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chain = gf.chain(gf.reference_filter())
    return Filtered(model, F.cross_entropy, chain, optimizer, 4, **options)


def held_bytes(filtered):
    return len(filtered._held) + sum("rows" in b.tensors for b in filtered._earlier.batches)


@pytest.mark.parametrize("options", [{}, {"compile": "graph"}], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["batch", "keyword", "late keyword", "both"])
def test_accumulated_batches_follow_the_reference_of_the_step(options, how):
    """Rows wait for a reference that comes with the step, and are reduced if it is known."""
    model, plain = network(), network()
    filtered = host(model, options)
    x, y = samples(1)
    tree = dict(
        zip(dict(plain.named_parameters()), unflat_like(plain, samples(99, 5)), strict=True)
    )
    early = {"reference": tree} if how in ("keyword", "both") else {}
    filtered.accumulate(x, y, **early)
    assert held_bytes(filtered) == (not early)
    filtered.accumulate(x, y, **({} if how == "late keyword" else early))
    if how == "both":
        with pytest.raises(ValueError, match="keyword 'reference' with one value"):
            filtered.step(x, y, reference_batch=samples(99, 5))
        return
    late = {"reference_batch": samples(99, 5)} if how == "batch" else {"reference": tree}
    result = filtered.step(x, y, **late)
    rows = []
    for part in zip(x.chunk(4), y.chunk(4), strict=True):
        loss = F.cross_entropy(plain(part[0]), part[1])
        grads = torch.autograd.grad(loss, list(plain.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(rows * 3)
    reference = torch.cat([leaf.flatten() for leaf in tree.values()])
    weights = weights_of(rows, reference, True, 0.0, "product", torch.ones(12))
    assert 0 < (weights > 0).sum() < 12
    assert result.info["reference_filter/accepted"].tolist() == (weights > 0).tolist()
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    before = torch.nn.utils.parameters_to_vector(plain.parameters()).detach()
    assert_close(moved, before - 0.1 * weights @ rows, rtol=1e-9, atol=1e-12)


def unflat_like(model, batch):
    """The leaves of the gradient of a batch."""
    vector, leaves = plain_gradient(model, *batch), []
    for p in model.parameters():
        leaves.append(vector[: p.numel()].reshape(p.shape))
        vector = vector[p.numel() :]
    return leaves


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
