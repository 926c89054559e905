"""A clip before an update rule: its products are computed block by block, where the rule reads."""

import pytest
import torch
from benchmarks._memory import peak_bytes

import gradfilter as gf
from gradfilter._scaled_tree import ScaledTree
from gradfilter.transforms import _clipping, _update_rules

CLIPS = {
    "agc_clip": lambda: gf.agc_clip(0.01),
    "agc_clip without the head": lambda: gf.agc_clip(0.01, exclude=lambda name: "head" in name),
    "clip_by_global_norm": lambda: gf.clip_by_global_norm(0.1),
    "agc_clip, off": lambda: gf.agc_clip(None),
    "agc_clip by another name": lambda: gf.named("units", gf.agc_clip(0.01)),
}
RULES = {
    "sgd": lambda: gf.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda: gf.adam(0.1),
    "adamw by another name": lambda: gf.named("rule", gf.adamw(0.1)),
    "rmsprop": lambda: gf.rmsprop(0.1),  # torch has no kernel for it
}
SHAPES = {"body.weight": (5, 3, 2), "body.bias": (5,), "head.weight": (4, 7), "scale": ()}


def tree(seed, size, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {n: (size * torch.randn(s, generator=g)).to(dtype) for n, s in SHAPES.items()}


def copy(found):
    return {k: copy(v) if isinstance(v, dict) else v.clone() for k, v in found.items()}


def one_after_the_other(clip, rule, params, state, grads, **extra):
    """Clip the whole gradient, and give it to the rule: what a chain does without this file."""
    clip_name, rule_name = state
    clipped, own, out = clip.update(grads, state[clip_name], params)
    alone = gf.chain(rule)
    params, rest, info = alone(params, {rule_name: state[rule_name]}, clipped, **extra)
    return params, {clip_name: own, **rest}, out | info


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", CLIPS)
def test_no_bit_differs_from_clipping_first(clip, rule, dtype, monkeypatch):
    clip_name, clip, rule = clip, CLIPS[clip](), RULES[rule]()
    update = gf.chain(clip, rule)
    for module in (_clipping, _update_rules):
        monkeypatch.setattr(module, "BLOCK", 20)
    params = expected = tree(0, 0.05, dtype)
    state = wanted = update.init(params)
    for step in range(4):
        grads = tree(step + 1, 0.5, dtype)
        if step == 2:
            grads["head.weight"][1, 2] = torch.nan
            grads["body.bias"][0] = torch.inf
        keep = torch.tensor(step != 1)
        before = copy(grads)
        expected, wanted, out = one_after_the_other(clip, rule, expected, wanted, grads, keep=keep)
        params, state, info = update(params, state, grads, keep=keep, donate=step > 0)
        torch.testing.assert_close(params, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(state, wanted, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(grads, before, rtol=0, atol=0, equal_nan=True)
        name = f"{clip.name}/clipped_fraction"
        torch.testing.assert_close(info[name], out["clipped_fraction"], rtol=0, atol=0)
        if step == 0:
            assert (info[name] > 0) == (clip_name != "agc_clip, off")
    assert all(p.dtype == dtype for p in params.values())


@pytest.mark.parametrize("shared", ["the parameters", "the momentum"])
def test_gradients_in_the_memory_of_what_is_written_are_read_before(shared):
    clip, rule = gf.agc_clip(0.01), gf.sgd(0.1, momentum=0.9)
    update, params = gf.chain(clip, rule), tree(0, 0.05)
    state = update.init(params)
    params, state, _ = update(params, state, tree(1, 0.5))
    own = params if shared == "the parameters" else state["sgd"]["momentum"]
    grads = {name: leaf.view(leaf.shape) for name, leaf in own.items()}
    expected, *_ = one_after_the_other(clip, rule, copy(params), copy(state), copy(grads))
    params, *_ = update(params, state, grads, donate=True)
    torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_vmap_and_grad_run_around_the_chain(float64):
    update = gf.chain(gf.clip_by_global_norm(0.5), gf.sgd(0.1))
    params, grads = {"w": torch.tensor([0.5, -1.0])}, {"w": torch.tensor([2.0, 1.0])}
    state = update.init(params)

    def after(scale):
        return update(params, state, {"w": scale * grads["w"]})[0]["w"].sum()

    found = torch.func.vmap(after)(torch.tensor([0.1, 1.0, 5.0]))
    torch.testing.assert_close(
        found, torch.stack([after(s) for s in torch.tensor([0.1, 1.0, 5.0])])
    )
    # Below the limit the update is −0.1 g, above it its length does not depend on the scale.
    torch.testing.assert_close(torch.func.grad(after)(torch.tensor(0.1)), torch.tensor(-0.3))
    torch.testing.assert_close(torch.func.grad(after)(torch.tensor(5.0)), torch.tensor(0.0))


def test_a_schedule_may_read_what_the_clip_publishes():
    def at(count, state, **extra):
        return 0.1 * extra["agc_clip/clipped_fraction"].to(torch.float64), state

    update = gf.chain(gf.agc_clip(0.01), gf.sgd(gf.Schedule(at, 0.1, 0.0)))
    params, grads = tree(0, 0.05), tree(1, 0.5)
    _, _, info = update(params, update.init(params), grads)
    fraction = info["agc_clip/clipped_fraction"].item()
    assert fraction > 0
    assert info["sgd/lr"].item() == pytest.approx(0.1 * fraction)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), gf.schedules.cosine(0.1, 10)])
def test_the_order_of_what_is_published_is_that_of_the_chain(lr):
    update = gf.chain(gf.finite_filter(), gf.mean_rows(), gf.agc_clip(0.01), gf.sgd(lr))
    params = {"w": torch.ones(2)}
    *_, info = update(params, update.init(params), {"w": torch.ones(3, 2)})
    assert [*info][-2:] == ["agc_clip/clipped_fraction", "sgd/lr"]


def test_scaled_gradients_are_never_held_whole():
    shapes = {f"layer{i}": (64, 1024) for i in range(64)}
    g = torch.Generator().manual_seed(0)
    params, grads = ({n: torch.randn(s, generator=g) for n, s in shapes.items()} for _ in range(2))
    size = sum(leaf.nbytes for leaf in params.values())
    update = gf.chain(gf.agc_clip(0.01), gf.sgd(1e-4, momentum=0.9))
    now = [params, update.init(params)]

    def step():
        now[:] = update(*now, grads, donate=True)[:2]

    # The products of one block of the update rule.
    assert peak_bytes(step, torch.device("cpu")) < size / 4


def test_leaves_in_half_precision_are_multiplied_in_float32():
    leaf = torch.tensor([1000.0, 2000.0], dtype=torch.float16)
    scaled = ScaledTree({"w": leaf, "b": leaf}, lambda names: {"w": torch.tensor(1e-8)})
    assert scaled.wide(["w", "b"])["w"].tolist() == pytest.approx([1e-5, 2e-5], rel=1e-6)
    read = scaled.read(["w", "b"])
    assert read["w"].dtype == torch.float16 and read["w"][1] > 0
    assert read["b"] is leaf
