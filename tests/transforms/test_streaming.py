"""Rows that are reduced part by part give what all rows together give, and one gradient is held."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
import gradfilter.schedules as gs
from _allocations import Peak
from _cases import is_head
from gradfilter.transforms._chain import row_part
from gradfilter.transforms._streaming import ReducedRows

pytestmark = pytest.mark.usefixtures("float64")


def normalise():
    """Unit rows, as a transform of a user."""

    def update(rows, state, params, /, **extra):
        norms = rows.sq_norms().sqrt()
        usable = rows.live & (norms > 0)
        return rows.scaled(torch.where(usable, 1 / torch.where(usable, norms, 1), 1)), state, {}

    return gf.transform("normalise", "rows -> rows", update, joins={})


def weighted_by_loss():
    """A reducer of a user: weights from the losses, divided by their sum."""

    def weights_of(rows):
        return torch.where(rows.live, (-rows.losses).exp(), 0.0)

    def total(rows):
        return weights_of(rows).sum()

    def update(rows, state, params, /, **extra):
        weights = weights_of(rows)
        weights = weights / torch.where(weights.sum() > 0, weights.sum(), 1)
        return rows.combine(weights), state, {"weights": weights, "likely": weights_of(rows) > 0.2}

    return gf.transform(
        *("weighted_by_loss", "rows -> tree", update),
        publishes=("weights", "likely"),
        joins={"weights": "shares", "likely": "rows"},
        divisor=total,
    )


def summed():
    """A reducer without a divisor."""

    def update(rows, state, params, /, **extra):
        weights = rows.live.to(torch.float64)
        return rows.combine(weights), state, {"weights": weights}

    joins = {"weights": "shares"}
    return gf.transform("summed", "rows -> tree", update, publishes=("weights",), joins=joins)


def by_norm_of_before():
    """Weights from a metric of an earlier transform, one number per row."""

    def update(rows, state, params, /, **extra):
        return rows.scaled(1 / (1 + extra["clip_per_row/norm"])), state, {}

    name, reads = "by_norm", ("clip_per_row/norm",)
    return gf.transform(name, "rows -> rows", update, joins={}, reads=reads)


def reads_rows(grads, state, params, /, rows=None, weights=None, **extra):
    largest = rows.sq_norms().max()
    return {name: g / (1 + largest) for name, g in grads.items()}, state, {"largest": largest}


RATE = gs.linear(0.4, 10)
CLIP = lambda: gf.clip_per_row(0.5)
CHAINS = {
    "mean": lambda: (gf.mean_rows(),),
    "clipped": lambda: (CLIP(), gf.mean_rows()),
    "finite, clipped": lambda: (gf.finite_filter(), CLIP(), gf.mean_rows(), gf.agc_clip(0.01)),
    "scheduled": lambda: (
        gf.scheduled(gf.clip_per_row, max_norm=gs.linear(0.6, 4)),
        gf.mean_rows(),
        gf.scheduled(gf.clip_by_global_norm, max_norm=gs.linear(0.1, 4)),
    ),
    "gated": lambda: (gf.gate(CLIP(), "late"), gf.mean_rows(), gf.finite_filter()),
    "every": lambda: (gf.every(2, CLIP()), gf.late(gf.clip_per_row(0.3), 2), gf.mean_rows()),
    "every or other": lambda: (gf.every(2, CLIP(), gf.clip_per_row(0.1)), gf.mean_rows()),
    "masked": lambda: (gf.masked(CLIP(), is_head), gf.mean_rows()),
    "nested": lambda: (gf.named("in", gf.chain(gf.finite_filter(), CLIP())), gf.mean_rows()),
    "own": lambda: (normalise(), gf.mean_rows()),
    "by loss": lambda: (gf.finite_filter(), weighted_by_loss()),
    "sum": lambda: (CLIP(), summed()),
    "by metric": lambda: (CLIP(), by_norm_of_before(), gf.mean_rows()),
    "sharp": lambda: (
        *(gf.finite_filter(), CLIP(), gf.mean_rows()),
        *(gf.sam_perturb(0.1), gf.gsam_decompose(0.4)),
    ),
    "masked, sharp": lambda: (gf.masked(CLIP(), is_head), gf.mean_rows(), gf.sam_perturb(0.1)),
    "gated, sharp": lambda: (gf.gate(CLIP(), "late"), gf.mean_rows(), gf.sam_perturb(0.1)),
    "rows are read": lambda: (
        *(CLIP(), gf.mean_rows()),
        gf.transform("reads", "tree -> tree", reads_rows, publishes=("largest",)),
    ),
    "partition behind": lambda: (
        *(CLIP(), gf.mean_rows()),
        gf.partition({"a": gf.sgd(0.1), "b": gf.adam(0.1)}, lambda n: "ab"[is_head(n)]),
    ),
}
COMPARES = {
    "agreement": lambda: (CLIP(), gf.agree_filter(1.5)),
    "consensus": lambda: (gf.consensus_filter(),),
    "budget": lambda: (gf.budget_clip(0.5), gf.mean_rows()),
    "gram": lambda: (gf.aggregate(lambda gram: gram.diagonal().softmax(0)),),
    "signs": lambda: (gf.sign_agreement(0.6),),
    "sharp before": lambda: (gf.sam_perturb(0.1), gf.mean_rows()),
    "gated by rows": lambda: (gf.finite_filter(), gf.gate(CLIP(), "keep"), gf.mean_rows()),
    "gated reducer": lambda: (gf.gate(gf.mean_rows(), "late"),),
    "reducer at times": lambda: (gf.every(2, gf.mean_rows()),),
    "masked reducer": lambda: (gf.masked(gf.mean_rows(), is_head),),
    "two keeps": lambda: (
        gf.named("in", gf.chain(gf.finite_filter(), gf.finite_filter())),
        gf.mean_rows(),
    ),
    "undeclared": lambda: (gf.transform("own", "rows -> rows", plain_scale), gf.mean_rows()),
}


def plain_scale(rows, state, params, /, **extra):
    return rows.scaled(rows.live.to(torch.float64) / 2), state, {}


def completed(transforms):
    whole = gf.chain(*transforms)
    return whole if whole.is_update_rule else gf.chain(whole, gf.sgd(RATE, momentum=0.9))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 8, bias=False)  # before a norm its gradient is rounding
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).tanh())


def batch(rows=7, size=3, spoilt=()):
    x, y = torch.randn(rows * size, 5), torch.randint(0, 3, (rows * size,))
    x = x * torch.arange(1, rows + 1).repeat_interleave(size)[:, None]
    for m in spoilt:
        x[m * size] = torch.nan
    return x, y


def step_of(model, transforms, **options):
    criterion = lambda o, y: (F.cross_entropy(o, y), {"hits": (o.argmax(1) == y).sum()})
    loss = gf.model_loss(model, criterion, has_aux=True)
    return gf.train_step(loss, completed(transforms), microbatches=7, **options)


FEW = [("fused", 1), ("fused", 3), ("loop", 3)]
EVERY = [(plan, at_once) for plan in ("fused", "loop") for at_once in (1, 3, 5, 9)]


def sizes():
    """Every number of rows at once with three chains, some of them with every chain."""
    for name in (*CHAINS, *COMPARES):
        for plan, at_once in EVERY if name in ("mean", "sharp", "agreement") else FEW:
            yield pytest.param(name, plan, at_once, id=f"{name}-{plan}-{at_once}")


@pytest.mark.parametrize(("name", "plan", "at_once"), list(sizes()))
def test_parts_give_the_step_of_all_rows(name, plan, at_once):
    transforms = (CHAINS | COMPARES)[name]
    torch.manual_seed(3)
    model = Net()
    whole = step_of(model, transforms(), plan=plan)
    parts = step_of(model, transforms(), plan=plan, rows_at_once=at_once)
    state = other = whole.init(model, seed=0)
    for k, late in enumerate((True, False, True)):
        data = batch(spoilt=(1,) if k == 1 and "finite" in name else ())
        late = torch.tensor(late)
        state, expected = whole(state, data, late=late)
        other, found = parts(other, data, late=late)
        assert list(found) == list(expected)
        for got, want in ((found, expected), (other, state)):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, equal_nan=True)
    assert found["aux"]["hits"].shape == (7,)


@pytest.mark.parametrize("name", CHAINS)
def test_what_acts_row_by_row_is_known(name):
    assert row_part(completed(CHAINS[name]())) is not None


@pytest.mark.parametrize("name", COMPARES)
def test_what_compares_rows_is_known(name):
    assert row_part(completed(COMPARES[name]())) is None


def clipped(model, x, y, max_norm):
    """The gradient of an ordinary backward pass, clipped; None if it is not finite."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    if not norm.isfinite():
        return None, norm
    return {name: g * min(1, max_norm / norm) for name, g in grads.items()}, norm


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("plan", ["fused", "loop", "vmap"])
def test_parts_follow_ordinary_backward_passes(plan, samples):
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.3, momentum=0.9)
    update = gf.chain(
        gf.finite_filter(), gf.clip_per_row(0.7), gf.mean_rows(), gf.sgd(0.3, momentum=0.9)
    )
    loss = gf.model_loss(model, F.cross_entropy)
    rows = None if samples == 1 else 7
    step = gf.train_step(loss, update, microbatches=rows, plan=plan, rows_at_once=3)
    state = step.init(model)
    for k in range(4):
        x, y = batch(size=samples, spoilt=(4, 6) if k == 2 else ())
        found, norms = [], []
        for m in range(7):
            part = slice(m * samples, (m + 1) * samples)
            grads, norm = clipped(plain, x[part], y[part], 0.7)
            found += [] if grads is None else [grads]
            norms.append(norm if norm.isfinite() else torch.zeros(()))  # of a removed row
        for name, p in plain.named_parameters():
            p.grad = torch.stack([g[name] for g in found]).mean(0)
        optimizer.step()
        state, info = step(state, (x, y))
        for name, p in plain.named_parameters():
            torch.testing.assert_close(state["params"][name], p.detach(), rtol=1e-12, atol=1e-13)
        norms = torch.stack(norms)
        torch.testing.assert_close(info["clip_per_row/norm"], norms, rtol=1e-12, atol=0)
        over = (norms > 0.7).double().mean()
        torch.testing.assert_close(info["clip_per_row/clipped_fraction"], over)
        assert info["finite_filter/finite"].sum() == len(found)


def test_a_step_without_finite_rows_is_skipped():
    model = Net()
    chain = lambda: (gf.finite_filter(), CLIP(), gf.mean_rows())
    step = step_of(model, chain(), rows_at_once=2)
    state, _ = step(step.init(model), batch())
    after, info = step(state, batch(spoilt=range(7)))
    assert not info["keep"] and not info["finite_filter/finite"].any()
    for part in ("params", "transforms"):
        torch.testing.assert_close(after[part], state[part], rtol=0, atol=0)
    assert int(after["buffers"]["norm.num_batches_tracked"]) == 14


def test_donated_parts_keep_their_storage():
    model = Net()
    data = batch()
    step = step_of(model, (CLIP(), gf.mean_rows()), rows_at_once=2)
    state, donated = step.init(model, seed=1), step.init(model, seed=1)
    expected, info = step(state, data)
    found, same = step(donated, data, donate=True)
    torch.testing.assert_close(found["params"], expected["params"], rtol=0, atol=0)
    torch.testing.assert_close(same["loss"], info["loss"], rtol=0, atol=0)
    assert found["params"]["head.bias"] is donated["params"]["head.bias"]


def test_a_compiled_step_in_parts():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    loss = gf.model_loss(model, F.cross_entropy)
    update = gf.chain(gf.finite_filter(), CLIP(), gf.mean_rows(), gf.sgd(RATE, momentum=0.9))
    step = gf.train_step(loss, update, microbatches=7, rows_at_once=3)
    fast = gf.compile(step, backend="graph")
    state = other = step.init(model, seed=0)
    for _ in range(3):
        data = batch()
        state, expected = step(state, data)
        other, found = fast(other, data)
        torch.testing.assert_close(dict(found), dict(expected), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(other["params"], state["params"], rtol=1e-12, atol=1e-13)


def dense(values, **given):
    return gf.DenseStack({"w": torch.tensor(values)[:, None]}, **given)


def started(update, params=None, **extra):
    params = {"w": torch.zeros(1)} if params is None else params
    state = update.init(params)
    return params, state, ReducedRows(row_part(update), state, params, extra)


def test_sums_of_half_precision_are_wide():
    update = gf.chain(CLIP(), gf.mean_rows(), gf.sgd(1.0))
    params, state, reduced = started(update, {"w": torch.zeros(1, dtype=torch.bfloat16)})
    for _ in range(600):  # bfloat16 has no 257
        reduced.add(gf.DenseStack({"w": torch.full((1, 1), 0.25, dtype=torch.bfloat16)}))
    moved, _, info = update(params, state, reduced)
    assert moved["w"].item() == -0.25 and moved["w"].dtype == torch.bfloat16
    assert len(info["clip_per_row/norm"]) == 600


def test_empty_rows_count_in_no_part():
    update = gf.chain(gf.mean_rows(), gf.sgd(1.0))
    params, state, reduced = started(update)
    nan = torch.nan
    for values, losses in (([0.0, 0.0], [nan, nan]), ([1.0, 0.0], [2.0, nan]), ([4.0], [6.0])):
        reduced.add(dense(values, losses=torch.tensor(losses)))
    moved, _, _ = update(params, state, reduced)
    assert moved["w"].item() == -2.5 and reduced.mean_loss() == 4
    params, state, reduced = started(update)
    reduced.add(dense([0.0], losses=torch.tensor([nan])))
    assert update(params, state, reduced)[0]["w"].item() == 0


def test_keywords_are_those_of_the_parts():
    update = gf.chain(gf.gate(CLIP(), "on"), gf.mean_rows(), gf.sgd(1.0))
    on = torch.tensor(True)
    params, state, reduced = started(update, on=on)
    reduced.add(dense([1.0, 3.0]))
    assert update(params, state, reduced, on=on, other=3, keep=on)[0]["w"].item() == -0.5
    for other in ({}, {"on": torch.tensor(False)}):
        with pytest.raises(ValueError, match="clip_per_row: expected the keyword 'on' with one"):
            update(params, state, reduced, **other)
    scheduled = gf.chain(
        gf.scheduled(gf.clip_per_row, max_norm=gs.linear(1.0, 4)), gf.mean_rows(), gf.sgd(1.0)
    )
    params, state, reduced = started(scheduled, count=2)
    reduced.add(dense([1.0, 3.0]))
    assert scheduled(params, state, reduced, count=2)[0]["w"].item() == -0.5
    with pytest.raises(ValueError, match="keyword 'count'"):
        scheduled(params, state, reduced, count=3)


def test_a_reference_is_that_of_the_parts():
    """A tree of the same tensors; another one is refused without a look at its values."""
    update = gf.chain(gf.reference_filter(), gf.sgd(1.0))
    r = torch.tensor([2.0])
    params, state, reduced = started(update, reference={"w": r})
    reduced.add(dense([1.0, 3.0]))
    reduced.add(dense([-4.0]))
    assert update(params, state, reduced, reference={"w": r})[0]["w"].item() == -2.5
    for other in ({}, {"reference": {"w": r.clone()}}, {"reference": None}):
        with pytest.raises(ValueError, match="expected the keyword 'reference' with one value"):
            update(params, state, reduced, **other)


def test_rows_of_another_chain_are_refused():
    update, other = (gf.chain(gf.clip_per_row(c), gf.mean_rows(), gf.sgd(1.0)) for c in (1.0, 2.0))
    params, state, reduced = started(update)
    reduced.add(dense([1.0]))
    with pytest.raises(TypeError, match="expected rows reduced by this chain, found those of an"):
        other(params, state, reduced)


def test_a_part_that_fails_changes_nothing():
    update = gf.chain(gf.clip_per_row(9.0), gf.mean_rows(), gf.sgd(1.0))
    params, state, reduced = started(update)
    reduced.add(dense([1.0], losses=torch.ones(1), aux=torch.ones(1, 2)))
    with pytest.raises(ValueError, match="same trainable parameters in every"):
        reduced.add(gf.DenseStack({"v": torch.ones(1, 1)}))
    with pytest.raises(ValueError, match="aux of the same shape"):
        reduced.add(dense([5.0], losses=torch.ones(1), aux=torch.ones(1, 3)))
    reduced.add(dense([3.0], losses=torch.ones(1), aux=torch.ones(1, 2)))
    assert len(reduced) == 2 and update(params, state, reduced)[0]["w"].item() == -2


@pytest.mark.parametrize("count", [0, -1, True, 2.0])
def test_a_number_of_rows_is_checked(count):
    with pytest.raises(ValueError, match="rows_at_once as a whole number of rows >= 1 or None"):
        step_of(Net(), (gf.mean_rows(),), rows_at_once=count)


@pytest.mark.parametrize(("plan", "limit"), [("fused", 5), ("loop", 9), ("vmap", 9)])
def test_a_step_in_parts_holds_one_gradient(plan, limit):
    model = nn.Sequential(nn.Linear(150, 150), nn.Tanh(), nn.Linear(150, 150))
    loss = gf.model_loss(model, F.cross_entropy)
    update = gf.chain(gf.finite_filter(), gf.clip_per_row(1.0), gf.mean_rows(), gf.sgd(0.1))
    options = {"microbatches": 48, "plan": plan}
    size = sum(p.nbytes for p in model.parameters())
    data = torch.randn(48, 150), torch.arange(48)
    peaks = []
    for at_once in (3, None):
        step = gf.train_step(loss, update, rows_at_once=at_once, **options)
        state = step.init(model)
        step(state, data)
        with Peak() as memory:
            step(state, data)
        peaks.append(memory.peak / size)
    assert peaks[0] < limit
    assert plan == "fused" or peaks[1] > 48
