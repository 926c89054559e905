"""Donated updates, applied by one kernel: their conditions, results and memory."""

import pytest
import torch
from benchmarks._memory import peak_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import assert_close, assert_same, generator, normal
from gradfilter.transforms import _update_rules as _kernel

SHAPES = {"weight": (40, 30), "bias": (40,), "scale": (), "none": (0, 3), "kernel": (6, 5, 3, 3)}
RULES = {
    "sgd": lambda **more: gf.sgd(0.1, **more),
    "momentum": lambda **more: gf.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1, **more),
    "adam": lambda **more: gf.adam(0.01, amsgrad=True, weight_decay=0.1, **more),
    "adamw": lambda **more: gf.adamw(0.01, **more),
}
every_rule = pytest.mark.parametrize("rule", RULES)
SGD_RULES = ("sgd", "momentum")
KEEP, SKIP = torch.tensor(True), torch.tensor(False)


def tree(seed, dtype=torch.float32):
    g = generator(seed)
    draw = lambda shape: torch.randn(shape, dtype=torch.float64, generator=g)
    return {name: draw(shape).to(dtype) for name, shape in SHAPES.items()}


def copied(anything):
    return {k: copied(v) if isinstance(v, dict) else v.clone() for k, v in anything.items()}


def begun(update, dtype=torch.float32):
    """Parameters and state after two steps, and gradients for the third."""
    params = tree(1, dtype)
    state = update.init(params)
    for seed in (2, 3):
        params, state, _ = update(params, state, tree(seed, dtype))
    return params, state, tree(4, dtype)


def by_formulas(update, params, state, grads, **extra):
    """One step from updates that are added, as ema_params and partition have it."""
    updates, new_state, _ = update.update(grads, state, params, **extra)
    return {name: p + updates[name] for name, p in params.items()}, new_state


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


def uses_a_kernel(update, *args, **extra):
    with Seen() as seen:
        update(*args, **extra)
    return any("_fused" in name for name in seen.names)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("donate", [False, True])
def test_the_kernel_follows_the_formulas(rule, dtype, donate):
    update = RULES[rule]()
    params, state, grads = begun(update, dtype)
    expected = by_formulas(update, params, state, grads)
    right = rule not in SGD_RULES or dtype is not torch.bfloat16
    assert uses_a_kernel(update, copied(params), copied(state), grads, donate=donate) == right
    got = update(copied(params), copied(state), grads, donate=donate)[:2]
    rounding = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 0.02}[dtype]
    assert_close(got, expected, rtol=rounding, atol=rounding)


@every_rule
@pytest.mark.parametrize("donate", [False, True])
def test_many_small_calls_are_one_large_one(rule, donate, monkeypatch):
    update = RULES[rule]()
    params, state, grads = begun(update)
    expected = update(params, state, grads)
    monkeypatch.setattr(_kernel, "BLOCK", 20)
    with Seen() as seen:
        got = update(params, state, grads, donate=donate)
    assert sum("_fused" in name for name in seen.names) > 2
    assert list(got[0]) == list(params)
    assert_same(got, expected)


@every_rule
@pytest.mark.parametrize("keep", [KEEP, SKIP])
def test_donation_writes_into_every_old_tensor_and_makes_no_new_one(rule, keep):
    update = gf.chain(gf.finite_filter(), RULES[rule]())
    params, state, grads = begun(update)
    addresses = [t.data_ptr() for t in [*params.values(), *gf.state_dict(state).values()]]
    expected = update(copied(params), copied(state), grads, keep=keep)[:2]
    new_params, new_state, _ = update(params, state, grads, donate=True, keep=keep)
    assert_same((new_params, new_state), expected)
    after = [*new_params.values(), *gf.state_dict(new_state).values()]
    assert [t.data_ptr() for t in after] == addresses
    assert all(new_params[name] is params[name] for name in params)


@every_rule
def test_donation_needs_no_memory(rule):
    update, params = RULES[rule](), {"w": torch.ones(100_000)}
    state, grads = update.init(params), {"w": torch.ones(100_000)}
    size = 4 * 100_000 * (1 + len(gf.state_dict(state)) - 1)  # all but the count
    cpu = torch.device("cpu")
    donated = peak_bytes(lambda: update(params, state, grads, donate=True, keep=KEEP), cpu)
    assert donated < 1000
    assert size <= peak_bytes(lambda: update(params, state, grads, keep=KEEP), cpu) < size + 1000


@every_rule
def test_a_skipped_donated_step_changes_no_bit_whatever_the_gradients_are(rule):
    update = gf.chain(gf.finite_filter(), RULES[rule]())
    params, state, grads = begun(update)
    params["weight"][0, :2] = torch.tensor([-0.0, torch.nan])
    grads["weight"][0, 0] = torch.inf
    before = copied(params), copied(state)
    *_, info = update(params, state, grads, donate=True)
    assert not info["keep"]
    assert_same((params, state), before)
    assert params["weight"][0, 0].signbit()


def test_a_schedule_and_the_count_stand_still_with_a_skipped_step():
    update = gf.sgd(gs.plateau(0.1, patience=0), momentum=0.9)
    params, state, grads = begun(update)
    skipped = update(params, state, grads, keep=SKIP, value=torch.tensor(1.0))
    assert_same(skipped[:2], (params, state))
    kept = update(params, state, grads, keep=KEEP, value=torch.tensor(1.0))
    assert kept[1]["count"] == 3 and kept[1]["lr"]["best"] == 1


@pytest.mark.parametrize("donate", [False, True])
def test_parameters_of_a_module_are_updated_and_gradients_are_not(donate):
    params = {"w": nn.Parameter(torch.ones(3))}
    grads, update = {"w": torch.arange(3.0)}, gf.sgd(1.0, momentum=0.9, maximize=True)
    new, _, _ = update(params, update.init(params), grads, donate=donate)
    assert new["w"].tolist() == [1, 2, 3]
    assert (new["w"] is params["w"]) == donate
    assert grads["w"].tolist() == [0, 1, 2] and grads["w"]._version == 0


def test_autograd_notices_a_donation():
    params, update = {"w": nn.Parameter(torch.ones(3))}, gf.sgd(1.0)
    loss = params["w"].square().sum()
    update(params, update.init(params), {"w": torch.ones(3)}, donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Where the formulas have to do it


def every_other(params):
    wide = {name: torch.full((*p.shape[:-1], 2 * p.shape[-1]), 7.0) for name, p in params.items()}
    views = {name: p[..., ::2] for name, p in wide.items()}
    for name, p in params.items():
        views[name].copy_(p)
    return views, wide


@pytest.mark.parametrize("donate", [False, True])
def test_a_view_with_gaps_is_updated_and_its_gaps_are_not(donate):
    update, params, grads = gf.sgd(0.1, momentum=0.9), {"w": torch.ones(2, 3)}, normal(2, 3)
    grads = {"w": grads.float()}
    expected = update(params, update.init(params), grads)[0]
    views, wide = every_other(params)
    new, _, _ = update(views, update.init(params), grads, donate=donate)
    assert_close(new, expected, rtol=1e-6)
    assert (wide["w"][..., 1::2] == 7).all()
    if donate:
        assert_close(wide["w"][..., ::2], expected["w"], rtol=1e-6)


LAYOUTS = {
    "transposed": lambda g: g.mT.contiguous().mT,
    "expanded": lambda g: g[:, :1].expand_as(g),
    "channels last": lambda g: g.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["params", "grads"])
def test_the_layout_in_memory_does_not_matter(layout, of):
    update = gf.adamw(0.1)
    params, grads = {"w": normal(2, 3, 4, 5).float()}, {"w": normal(2, 3, 4, 5, seed=1).float()}
    trees = {"params": params, "grads": grads}
    trees[of]["w"] = LAYOUTS[layout](trees[of]["w"])
    plain = {key: {"w": tree["w"].clone().contiguous()} for key, tree in trees.items()}
    assert not uses_a_kernel(update, params, update.init(params), grads)
    got = update(params, update.init(params), grads)[0]
    want = update(plain["params"], update.init(params), plain["grads"])[0]
    assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_vmap_over_an_update():
    update = gf.sgd(0.5, momentum=0.9)

    def step(p, g):
        return update({"w": p}, update.init({"w": p}), {"w": g})[0]["w"]

    p, g = normal(4, 3), normal(4, 3, seed=1)
    assert_close(torch.vmap(step)(p, g), p - 0.5 * g)


def test_leaves_of_several_dtypes_get_calls_of_their_own():
    dtypes = dict(zip(SHAPES, [torch.float32, torch.float64, torch.bfloat16] * 2, strict=False))
    cast = lambda tree: {name: t.to(dtypes[name]) for name, t in tree.items()}
    update, params, grads = gf.adamw(0.1), cast(tree(1)), cast(tree(2))
    state = update.init(params)
    expected = by_formulas(update, params, state, grads)[0]
    with Seen() as seen:
        new = update(params, state, grads)[0]
    assert sum("_fused" in name for name in seen.names) == 3
    assert list(new) == list(params)
    assert_close(new, expected, rtol=0.01, atol=0.01)


def test_gradients_wider_than_their_parameters_are_rounded_last():
    update, params = gf.sgd(1.0), {"w": torch.zeros(2, dtype=torch.bfloat16)}
    grads = {"w": torch.tensor([1.0, 3.0])}
    assert not uses_a_kernel(update, params, update.init(params), grads)
    assert update(params, update.init(params), grads)[0]["w"].tolist() == [-1, -3]


@pytest.mark.parametrize("rule", SGD_RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("donate", [False, True])
def test_sgd_in_half_precision_on_a_cpu_moves_every_number(rule, dtype, donate):
    """The kernel of torch 2.11 leaves whole vectors of them as they were."""
    update, params, grads = RULES[rule](), tree(1, dtype), tree(2, dtype)
    wide = [{name: t.float() for name, t in each.items()} for each in (params, grads)]
    expected = update(wide[0], update.init(wide[0]), wide[1])[0]
    assert not uses_a_kernel(update, copied(params), update.init(params), grads, donate=donate)
    new = update(params, update.init(params), grads, donate=donate)[0]
    assert_close({name: t.float() for name, t in new.items()}, expected, rtol=0.02, atol=0.02)


class Tagged(torch.Tensor):
    """A subclass that knows nothing of the kernels."""


def test_subclasses_are_left_to_the_formulas():
    update, params = gf.sgd(1.0), {"w": torch.zeros(2).as_subclass(Tagged)}
    grads = {"w": torch.ones(2)}
    assert not uses_a_kernel(update, params, update.init(params), grads)
    new = update(params, update.init(params), grads)[0]["w"]
    assert isinstance(new, Tagged) and new.tolist() == [-1, -1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: gf.chain(gf.sgd(0.1, momentum=0.9), gf.ema_params(0.5)),
        lambda: gf.chain(gf.sgd(0.1, momentum=0.9), gf.freeze(lambda name: name == "bias")),
        lambda: gf.gate(gf.sgd(0.1, momentum=0.9), "late"),
        lambda: gf.partition({"all": gf.sgd(0.1, momentum=0.9)}, lambda name: "all"),
        lambda: gf.scheduled(gf.sgd, lr=gs.linear(0.1, 10), momentum=gs.linear(0.9, 10)),
        lambda: gf.named("outer", gf.chain(gf.agc_clip(), gf.sgd(0.1, momentum=0.9))),
        lambda: gf.sgd(0.1, momentum=0.9, dampening=0.5),
        lambda: gf.rmsprop(0.1),
        lambda: gf.gate(gf.sgd(0.1), "never"),
    ],
)
@pytest.mark.parametrize("donate", [False, True])
def test_a_rule_that_is_not_the_last_word_only_gives_updates(make, donate):
    update, flags = make(), {"late": KEEP, "never": SKIP}
    params = tree(1)
    state = update.init(params)
    assert not uses_a_kernel(update, params, state, tree(2), **flags)
    expected = by_formulas(update, params, state, tree(2), **flags)
    got = update(copied(params), copied(state), tree(2), donate=donate, **flags)[:2]
    assert_same(got, expected)


def test_a_link_of_ones_own_may_hand_everything_on_to_a_rule_inside():
    inner = gf.sgd(0.1, momentum=0.9)

    def doubled(grads, state, params, /, **extra):
        updates, state, out = inner.update(grads, state, params, **extra)
        return {name: 2 * u for name, u in updates.items()}, state, out

    twice = gf.link("twice", "tree -> update", doubled, init=inner.init, publishes=("lr",))
    params, grads = tree(1), tree(2)
    new = twice(params, twice.init(params), grads)[0]
    assert_close(new, {n: p - 0.2 * grads[n] for n, p in params.items()}, rtol=1e-5, atol=1e-6)


def test_leaves_that_do_not_match_are_named_by_a_rule_alone():
    update, params = gf.sgd(0.1, momentum=0.9), tree(1)
    state = update.init(params)
    with pytest.raises(ValueError, match=r"sgd: expected one gradient leaf.*missing \['bias'\]"):
        update(params, state, {n: g for n, g in tree(2).items() if n != "bias"})
    with pytest.raises(ValueError, match=r"gradient 'bias' of shape \(40,\), found \(1,\)"):
        update(params, state, tree(2) | {"bias": torch.ones(1)})
    del state["momentum"]["bias"]
    with pytest.raises(ValueError, match=r"sgd: state 'momentum'.*missing \['bias'\]"):
        update(params, state, tree(2))


# Memory that would be written twice


def flat_views():
    flat = torch.zeros(10)
    return {"a": flat[:6].view(2, 3), "b": flat[6:]}


SHARED = {
    "one tensor under two names": lambda w: {"a": w, "b": w},
    "two views of it": lambda w: {"a": w, "b": w.view(3, 2)},
    "overlapping slices": lambda w: {"a": w.view(-1)[:4], "b": w.view(-1)[3:]},
    "a number inside": lambda w: {"a": w, "b": w[1, 2]},
    "columns": lambda w: {"a": w[:, :2], "b": w[:, 1:]},
    "a transpose": lambda w: {"a": w, "b": w.T},
    "parameters": lambda w: {"a": nn.Parameter(w), "b": w},
}


@every_rule
@pytest.mark.parametrize("kind", SHARED)
def test_memory_that_would_be_updated_twice_is_refused(rule, kind):
    params, update = SHARED[kind](torch.ones(2, 3)), RULES[rule]()
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    state, before = update.init(params), params["a"].detach().clone()
    with pytest.raises(ValueError, match=r"found 'params\.a' and 'params\.b' in the same"):
        update(params, state, grads, donate=True)
    assert torch.equal(params["a"], before)
    update(params, state, grads)  # results of their own may come from one memory


def test_a_state_in_the_memory_of_the_parameters_is_not_donated():
    params = tree(1)
    update = gf.chain(gf.sgd(0.1), gf.ema_params(0.9))
    state = update.init(params)
    state["ema_params"]["ema_average"]["weight"] = params["weight"]
    with pytest.raises(ValueError, match=r"'params\.weight' and 'state\.ema_params"):
        update(params, state, tree(2), donate=True)


@pytest.mark.parametrize(
    "views",
    [
        lambda: {"a": torch.zeros(2, 6)[:, ::2], "b": torch.zeros(2, 6)[:, 1::2]},
        lambda: dict(zip("ab", torch.zeros(2, 6).chunk(2, 1), strict=True)),
        lambda: {"a": (w := torch.zeros(2, 6))[:, ::2], "b": w[:, 1::2]},
        flat_views,
        lambda: {"a": torch.zeros(0, 3), "b": torch.zeros(0, 3)},
    ],
)
def test_views_that_interlock_are_donated(views):
    params, update = views(), gf.sgd(1.0)
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    new, _, _ = update(params, update.init(params), grads, donate=True)
    assert all((p == -1).all() and new[name] is p for name, p in params.items())
