"""`spike_clip` and `spike_skip` against plain Python, and what they do after a change of level."""

import math
import random
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import assert_close, flat, normal, unflat, zeros
from gradfilter.interop import Filtered
from gradfilter.testing._laws import no_host_sync

lengths = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=40)


def of_length(length, seed=0):
    """A gradient of several leaves with this norm."""
    vector = normal(sum(leaf.numel() for leaf in zeros().values()), seed=seed)
    return unflat(vector * (length / vector.norm()))


def norms_after(clip, given):
    """The norms of the gradients after a clip, and what it published, step by step."""
    state, found, outs = clip.init(zeros()), [], []
    for step, length in enumerate(given):
        grads, state, out = clip.update(of_length(length, step), state, zeros())
        found.append(flat(grads).norm().item())
        outs.append(out)
    return found, outs


# --- spike_clip ---


def zclip(given, z, decay, warmup, warmup_norm=math.inf):
    """The algorithm of the paper, on numbers."""
    seen, mean, variance, found = [], None, None, []
    for n in given:
        if mean is None:
            n = min(n, warmup_norm)
            found.append(n)
            seen.append(n)
            if len(seen) == warmup:
                mean, variance = statistics.fmean(seen), statistics.pvariance(seen)
            continue
        deviation = math.sqrt(variance)
        if n - mean > z * deviation:
            score = (n - mean) / deviation if deviation else math.inf
            n = mean + z * deviation * z / score
        found.append(n)
        mean = decay * mean + (1 - decay) * n
        variance = decay * variance + (1 - decay) * (n - mean) ** 2
    return found


@given(lengths, st.floats(0.5, 4.0), st.floats(0.0, 0.99), st.integers(1, 12))
def test_random_norms_follow_the_paper(given, z, decay, warmup):
    clip = gf.spike_clip(z, decay=decay, warmup=warmup)
    found, outs = norms_after(clip, given)
    expected = zclip(given, z, decay, warmup)
    assert found == pytest.approx(expected, rel=1e-6)
    clipped = [out["clipped_fraction"].item() for out in outs]
    sure = [abs(e - n) > 1e-5 * n for e, n in zip(expected, given, strict=True)]
    assert all(c == 1 for c, is_sure in zip(clipped, sure, strict=True) if is_sure)


@given(lengths, st.floats(0.5, 4.0), st.integers(1, 12), st.floats(0.05, 50.0))
def test_zclip_with_a_fixed_bound_in_the_warmup(given, z, warmup, bound):
    found, outs = norms_after(gf.spike_clip(z, decay=0.9, warmup=warmup, warmup_norm=bound), given)
    assert found == pytest.approx(zclip(given, z, 0.9, warmup, bound), rel=1e-6)
    for n, out in list(zip(given, outs, strict=True))[:warmup]:
        if abs(n - bound) > 1e-6 * bound:
            assert out["clipped_fraction"].item() == (n > bound)
        assert out["norm"].item() == pytest.approx(n)


bounds = st.one_of(st.none(), st.floats(0.5, 8.0))


@given(st.integers(0, 99), st.floats(0.5, 2.0), st.floats(0.0, 0.99), st.integers(1, 5), bounds)
def test_adagc_leaf_by_leaf(seed, factor, decay, warmup, bound):
    """In the warm-up one factor for all leaves, and the smallest norm after it is remembered."""
    options = {"factor": factor, "decay": decay, "warmup": warmup, "warmup_norm": bound}
    clip, params = gf.spike_clip(per_leaf=True, **options), zeros()
    state, memory = clip.init(params), {}
    for step in range(12):
        length = 1 + 5 * random.Random(seed + step).random()
        grads = of_length(length, seed * 20 + step)
        clipped, state, out = clip.update(grads, state, params)
        for place, (name, leaf) in enumerate(grads.items()):
            n = leaf.norm().item()
            assert out["norm"][place].item() == pytest.approx(n)
            if step < warmup:
                h = 1.0 if bound is None else min(1.0, bound / length)
                memory[name] = min(memory.get(name, math.inf), h * n)
                assert_close(clipped[name], h * leaf)
                continue
            h = min(1.0, factor * memory[name] / n)
            assert_close(clipped[name], h * leaf, rtol=1e-6)
            memory[name] = decay * memory[name] + (1 - decay) * h * n


@pytest.mark.slow
def test_the_published_package_gives_the_same():
    package = pytest.importorskip("zclip")
    draw = random.Random(0)
    given = [draw.gauss(1, 0.1) * (10 if draw.random() < 0.1 else 1) for _ in range(200)]
    theirs = package.ZClip(alpha=0.97, z_thresh=2.5, warmup_steps=25, max_grad_norm=None, eps=0)
    found, _ = norms_after(gf.spike_clip(), given)
    for length, ours in zip(given, found, strict=True):
        model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.float64))])
        model[0].grad = torch.tensor([0.6, 0.8], dtype=torch.float64) * length
        theirs.step(model)
        assert model[0].grad.norm().item() == pytest.approx(ours, rel=1e-5)


def test_after_a_lasting_change_of_the_level_adagc_follows_and_zclip_stays():
    """As published: what ZClip remembers of a long gradient is hardly longer than the mean."""
    given = [*([1.0, 1.1] * 20), *([3.0, 3.1] * 200)]
    found, _ = norms_after(gf.spike_clip(decay=0.9, warmup=10, factor=1.05), given)
    assert found[40] < 1.2 and found[-1] == pytest.approx(3.1)
    found, _ = norms_after(gf.spike_clip(decay=0.9, warmup=10), given)
    assert found[40] < 1.2 and found[-1] < 1.2


def test_what_is_not_finite_is_neither_clipped_nor_remembered():
    clip = gf.spike_clip(warmup=2)
    state = clip.init(zeros())
    for step, length in enumerate([1.0, 3.0]):
        _, state, _ = clip.update(of_length(length, step), state, zeros())
    bad = of_length(1.0)
    bad["fc.bias"][1] = torch.inf
    grads, after, _ = clip.update(bad, state, zeros())
    assert_close(flat(grads), flat(bad))
    for name, value in state.items():
        assert torch.equal(after[name], value)


@pytest.mark.parametrize("per_leaf", [False, True])
def test_in_the_warmup_a_norm_that_is_not_finite_clips_no_leaf(per_leaf):
    clip = gf.spike_clip(warmup=2, per_leaf=per_leaf, warmup_norm=0.1, factor=1.05)
    state, bad = clip.init(zeros()), of_length(1.0)
    bad["fc.bias"][1] = torch.nan
    grads, after, out = clip.update(bad, state, zeros())
    torch.testing.assert_close(flat(grads), flat(bad), equal_nan=True)
    assert out["clipped_fraction"] == 0
    counted = [name != "fc.bias" for name in zeros()] if per_leaf else [False]
    assert after["count"].reshape(-1).tolist() == [int(one) for one in counted]


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_warmup_clips_the_whole_gradient_as_a_global_clip_does(per_leaf, dtype):
    clip, known = gf.spike_clip(per_leaf=per_leaf, warmup_norm=0.7), gf.clip_by_global_norm(0.7)
    params = {name: leaf.to(dtype) for name, leaf in zeros().items()}
    state = clip.init(params)
    for step, length in enumerate((0.5, 3.0, 0.0, 700.0)):
        grads = {name: leaf.to(dtype) for name, leaf in of_length(length, step).items()}
        found, state, _ = clip.update(grads, state, params)
        expected = known.update(grads, known.init(params), params)[0]
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("form", [{}, {"factor": 1.05, "per_leaf": True}], ids=["zclip", "adagc"])
def test_a_compiled_step_leaves_the_warmup(form):
    update = gf.chain(gf.spike_clip(warmup=2, warmup_norm=0.7, **form), gf.sgd(0.1))
    run = torch.compile(update, backend="eager", fullgraph=True)
    params = zeros()
    state = update.init(params)
    found, own = params, state
    for step, length in enumerate((2.0, 0.6, 0.5, 9.0)):
        params, state, info = update(params, state, of_length(length, step))
        found, own, other = run(found, own, of_length(length, step))
        torch.testing.assert_close((found, own, other), (params, state, dict(info)))


def test_a_step_skipped_by_another_transform_is_remembered():
    update = gf.chain(gf.spike_clip(warmup=5), gf.sgd(0.1, momentum=0.9))
    params = zeros()
    state = update.init(params)
    _, after, info = update(params, state, of_length(2.0), keep=torch.tensor(False))
    assert not info["keep"] and after["spike_clip"]["count"] == 1
    assert after["spike_clip"]["mean"].item() == pytest.approx(2.0)
    assert all(torch.equal(a, b) for a, b in zip(*map(leaves_of, (after, state)), strict=True))


def leaves_of(state):
    return [*state["sgd"]["momentum"].values(), state["sgd"]["count"]]


@pytest.mark.parametrize("per_leaf", [False, True])
def test_followed_by_a_rule_it_gives_what_it_gives_alone(per_leaf):
    """A rule with a kernel reads the products block by block."""
    clip = gf.spike_clip(factor=0.5, warmup=1, per_leaf=per_leaf)
    whole, params = gf.chain(clip, gf.sgd(1.0)), zeros()
    state, own = whole.init(params), clip.init(params)
    for step in range(3):
        grads = of_length(1.0 + step, step)
        clipped, own, _ = clip.update(grads, own, params)
        moved, state, info = whole(params, state, grads)
        assert_close(flat(moved), -flat(clipped))
        assert info["spike_clip/norm"].shape == ((len(params),) if per_leaf else ())


def test_scheduled_arguments():
    clip = gf.scheduled(gf.spike_clip, z=gf.schedules.linear(4.0, 10), warmup=3)
    update = gf.chain(clip, gf.sgd(1.0))
    params = zeros()
    state = update.init(params)
    for step, length in enumerate([1.0, 1.2, 1.1, 9.0]):
        params, state, info = update(params, state, of_length(length, step))
    assert info["spike_clip/z"] < 4 and info["spike_clip/clipped_fraction"] == 1


# --- spike_skip ---


class Naive:
    """The rule on numbers: whether to keep a value, and what to remember."""

    def __init__(self, window, sigmas):
        self.window, self.sigmas, self.seen = window, sigmas, []

    def keeps(self, value):
        known = self.seen[-self.window :]
        ready = len(self.seen) >= max(2, self.window // 2)
        mean = statistics.fmean(known) if known else 0.0
        deviation = statistics.stdev(known) if len(known) > 1 else 0.0
        spike = not math.isfinite(value) or (ready and value > mean + self.sigmas * deviation)
        if math.isfinite(value):
            most = mean + 3 * self.sigmas * deviation
            self.seen.append(min(value, most) if spike and deviation > 0 else value)
        return not spike


values = st.one_of(st.floats(0.1, 2.0), st.floats(10, 1000), st.just(math.nan))


@given(st.lists(values, min_size=1, max_size=30), st.integers(2, 9), st.floats(0.5, 6.0))
def test_random_losses_follow_the_rule(losses, window, sigmas):
    skip, params = gf.spike_skip(window, sigmas=sigmas, of="loss", max_consecutive=3), zeros()
    naive, state, row, gave_up = Naive(window, sigmas), skip.init(params), 0, False
    for value in losses:
        loss = torch.tensor(value, dtype=torch.float64)
        _, state, out = skip.update(of_length(1.0), state, params, loss=loss)
        keep = naive.keeps(value)
        row = 0 if keep else row + 1
        gave_up = gave_up or row >= 3
        assert out["keep"].item() is keep
        assert out["consecutive"].item() == row and out["gave_up"].item() is gave_up


def test_the_norm_and_the_loss_are_both_watched():
    skip, params = gf.spike_skip(4), zeros()
    state = skip.init(params)
    for step in range(4):
        _, state, out = skip.update(
            of_length(1 + 0.1 * step), state, params, loss=torch.tensor(2.0 + 0.1 * step)
        )
        assert out["keep"]
    for length, loss, keep in [(1.1, 2.1, True), (9.0, 2.1, False), (1.1, 9.0, False)]:
        _, _, out = skip.update(of_length(length), state, params, loss=torch.tensor(loss))
        assert out["keep"].item() is keep
        assert out["norm"].item() == pytest.approx(length)
        assert out["loss_limit"].isfinite() and out["norm_limit"].isfinite()


def test_the_loss_is_that_of_the_rows():
    """The third batch has a loss far above those of the others, though its gradient is short."""
    model = nn.Linear(3, 1).double()
    loss = gf.model_loss(model, lambda out, y: out.mean() * 1e-3 + y.mean())
    update = gf.chain(gf.mean_rows(), gf.spike_skip(4, of="loss"), gf.sgd(0.1))
    step = gf.train_step(loss, update, microbatches=2)
    state = step.init(model)
    x = normal(4, 3)
    for level, keep in [(1.0, True), (1.1, True), (90.0, False), (1.05, True)]:
        before = state["params"]
        state, info = step(state, (x, torch.full((4,), level, dtype=torch.float64)))
        assert info["keep"].item() is keep
        assert torch.equal(before["weight"], state["params"]["weight"]) is not keep
        assert info["spike_skip/loss"].item() == pytest.approx(info["loss"].item())


def test_rows_in_parts_have_the_same_loss():
    model = nn.Linear(3, 2).double()
    loss = gf.model_loss(model, F.cross_entropy)
    update = gf.chain(gf.clip_per_row(1.0), gf.mean_rows(), gf.spike_skip(4), gf.sgd(0.1))
    batch = normal(12, 3), torch.arange(12) % 2
    infos = []
    for at_once in (None, 4):
        step = gf.train_step(loss, update, rows_at_once=at_once)
        infos.append(step(step.init(model, seed=0), batch)[1])
    assert_close(*(info["spike_skip/loss"] for info in infos))
    assert_close(*(info["spike_skip/norm"] for info in infos))


@pytest.mark.parametrize("level", [1.5, 3.0, 100.0])
def test_a_lasting_change_of_the_level_is_accepted_before_it_gives_up(level):
    skip, params = gf.spike_skip(of="norm"), zeros()
    state, draw = skip.init(params), random.Random(0)
    kept = []
    for step in range(200):
        length = draw.gauss(1, 0.05) * (level if step >= 140 else 1)
        _, state, out = skip.update(of_length(length), state, params)
        kept.append(out["keep"].item())
    assert all(kept[:140]) and not kept[140] and all(kept[154:]) and not state["gave_up"]


def test_a_huge_spike_does_not_hide_the_next():
    skip, params = gf.spike_skip(32, of="norm"), zeros()
    state, draw = skip.init(params), random.Random(0)
    for _ in range(32):
        _, state, _ = skip.update(of_length(draw.gauss(1, 0.05)), state, params)
    for length in (1e6, 1e6, 10.0):
        _, state, out = skip.update(of_length(length), state, params)
        assert not out["keep"]


def test_it_never_reads_a_number():
    update = gf.chain(gf.spike_skip(4, of="norm"), gf.sgd(0.1))
    params = zeros()
    with no_host_sync():
        update(params, update.init(params), of_length(1.0))


def test_without_a_loss_it_says_so():
    with pytest.raises(ValueError, match=r'keyword loss=.*found none.*spike_skip\(of="norm"\)'):
        skip = gf.spike_skip()
        skip.update(of_length(1.0), skip.init(zeros()), zeros())


# --- A host ends a training whose gradients have exploded ---


def host(**options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    rule = gf.chain(gf.mean_rows(), gf.spike_skip(4, of="norm", max_consecutive=2))
    criterion = lambda out, y: (out * y).mean()
    return model, Filtered(model, criterion, rule, optimizer, 2, **options)


@pytest.mark.parametrize("options", [{}, {"compile": "graph"}], ids=["eager", "compiled"])
def test_a_host_raises_at_the_step_at_which_the_rule_gives_up(options):
    model, filtered = host(**options)
    x = normal(4, 3)
    batch = lambda scale: (x, torch.full((4, 1), scale, dtype=torch.float64))
    for scale in (1.0, 1.1, 1.0, 1.1):
        assert filtered.step(*batch(scale)).info["keep"]
    before = model.weight.detach().clone()
    assert not filtered.step(*batch(1e9)).info["keep"]
    with pytest.raises(RuntimeError, match=r"spike_skip gave up.*Load an earlier checkpoint"):
        filtered.step(*batch(1e19))
    assert torch.equal(model.weight, before)
    flags = filtered.state_dict()["transforms"]
    assert flags["spike_skip.gave_up"] and flags["spike_skip.consecutive"] == 2


# --- Errors ---


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gf.spike_clip(0), "z"),
        (lambda: gf.spike_clip(decay=1.0), "decay"),
        (lambda: gf.spike_clip(warmup=0), "warmup as a whole number >= 1"),
        (lambda: gf.spike_clip(factor=0.0), "factor"),
        (lambda: gf.spike_clip(warmup_norm=0.0), "0 < warmup_norm"),
        (lambda: gf.spike_skip(1), "window as a whole number >= 2"),
        (lambda: gf.spike_skip(sigmas=0), "sigmas"),
        (lambda: gf.spike_skip(of="grad"), "of= as some of"),
        (lambda: gf.spike_skip(of=()), "of= as some of"),
        (lambda: gf.spike_skip(of=("loss", "loss")), "each once"),
        (lambda: gf.spike_skip(max_consecutive=0), "max_consecutive as a whole number >= 1"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
