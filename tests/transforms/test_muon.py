"""Muon against `torch.optim.Muon`, and what it refuses."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import gradfilter as gf
from _naive import assert_same, generator, normal

STEPS = 100
SHAPES = {"wide": (3, 7), "tall": (6, 2), "square": (4, 4), "row": (1, 5)}
SCALINGS = ["original", "match_rms_adamw"]
if "spectral_unclamped" in torch.optim.Muon.__doc__:  # not in torch 2.11
    SCALINGS.append("spectral_unclamped")


def draws(steps=STEPS, dtype=torch.float64):
    g = generator(0)
    draw = lambda shape: torch.randn(shape, dtype=torch.float64, generator=g)
    params = {name: draw(shape).to(dtype) for name, shape in SHAPES.items()}
    # Gradients that share a direction, so that the momentum matters.
    common = {name: draw(shape) for name, shape in SHAPES.items()}
    grads = [
        {name: (common[name] + draw(s)).to(dtype) for name, s in SHAPES.items()}
        for _ in range(steps)
    ]
    return params, grads


def torch_training(params, grads, lrs, **flags):
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = torch.optim.Muon(leaves.values(), lr=lrs[0], **flags)
    for g, lr in zip(grads, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for name, p in leaves.items():
            p.grad = g[name].clone()
        optimizer.step()
    return {name: p.detach() for name, p in leaves.items()}


def trained(update, params, grads, **extra):
    state = update.init(params)
    for g in grads:
        params, state, _ = update(params, state, g, **extra)
    return params, state


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"weight_decay": 0.0},
        {"momentum": 0.5, "weight_decay": 0.3},
        {"momentum": 0.0},
        {"nesterov": False},
        {"ns_steps": 1},
        {"ns_steps": 9, "ns_coefficients": (2.0, -1.5, 0.5)},
        {"eps": 5.0},
        *({"adjust_lr_fn": name} for name in SCALINGS),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hundred_steps_are_those_of_torch_optim(flags, dtype):
    params, grads = draws(dtype=dtype)
    ours, state = trained(gf.muon(0.02, **flags), params, grads)
    expected = torch_training(params, grads, [0.02] * STEPS, **flags)
    # One bfloat16 digit of one iteration that rounds otherwise would be 1e-4.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    assert state["count"] == STEPS


def test_a_schedule_and_the_defaults_are_those_of_torch_optim():
    params, grads = draws()
    lr = gf.schedules.cosine(0.05, 80, min_value=0.001, warmup_steps=10)
    ours, _ = trained(gf.muon(lr), params, grads)
    expected = torch_training(params, grads, [lr(k).item() for k in range(STEPS)])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    defaults = torch.optim.Muon([torch.zeros(1, 1)]).defaults
    assert defaults["lr"] == 1e-3
    assert gf.hyperparameters(gf.muon()) == {
        "muon/lr": 1e-3,
        **{f"muon/{key}": defaults[key] for key in ("weight_decay", "momentum", "nesterov")},
        **{f"muon/ns_coefficients/{i}": c for i, c in enumerate(defaults["ns_coefficients"])},
        **{f"muon/{key}": defaults[key] for key in ("eps", "ns_steps")},
        "muon/adjust_lr_fn": "original",
        "muon/decays": None,
    }


def test_a_bfloat16_step_is_near_that_of_torch_optim():
    params, grads = draws(1, torch.bfloat16)
    ours, state = trained(gf.muon(0.1), params, grads)
    # torch rounds the parameters twice, after the decay and after the update.
    expected = torch_training(params, grads, [0.1])
    torch.testing.assert_close(ours, expected, rtol=2**-7, atol=2**-7)
    assert all(b.dtype == torch.bfloat16 for b in state["momentum"].values())


def test_the_update_is_nearly_orthogonal_for_gradients_of_any_size():
    for size in (1e-5, 1.0, 1e12):
        params = {"w": torch.zeros(8, 5)}
        grads = {"w": size * normal(8, 5).float()}
        moved = trained(gf.muon(1.0, adjust_lr_fn="original"), params, [grads])[0]["w"]
        values = torch.linalg.svdvals(moved) / (8 / 5) ** 0.5
        assert values.min() > 0.6 and values.max() < 1.25


def test_a_zero_gradient_moves_nothing_and_nan_shows():
    params = {"w": torch.ones(2, 3)}
    update = gf.muon(0.1, weight_decay=0.0)
    assert_same(trained(update, params, [{"w": torch.zeros(2, 3)}])[0], params)
    bad = {"w": torch.ones(2, 3)}
    bad["w"][0, 0] = torch.nan
    assert trained(update, params, [bad])[0]["w"].isnan().any()
    guarded = gf.chain(gf.finite_filter(), update)
    assert_same(trained(guarded, params, [bad])[0], params)


def test_autocast_does_not_alter_it():
    params, grads = draws(3, torch.float32)
    expected = trained(gf.muon(0.1), params, grads)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found = trained(gf.muon(0.1), params, grads)
        assert_same(found, expected)


def test_a_skipped_step_changes_no_bit():
    params, grads = draws(3)
    update = gf.muon(0.1)
    params, state = trained(update, params, grads[:2])
    after = update(params, state, grads[2], keep=torch.tensor(False))[:2]
    assert_same(after, (params, state))


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 1), (2, 1, 3, 3)])
def test_other_leaves_than_matrices_are_refused_with_advice(shape):
    params = {"w": torch.zeros(2, 2), "odd": torch.zeros(shape)}
    advice = r"partition\(\{\"matrices\": muon\(lr\), \"rest\": adamw\(lr\)\}, label\)"
    with pytest.raises(ValueError, match=rf"muon: expected leaves with two dims, .*{advice}"):
        gf.muon(0.1).init(params)
    with pytest.raises(ValueError, match="'odd'"):
        gf.scheduled(gf.muon, lr=gf.schedules.linear(0.1, 3)).init(params)


def test_the_advice_works():
    params = {"w": normal(2, 3), "kernel": normal(2, 1, 2, 2), "b": normal(3)}
    label = lambda name: "matrices" if params[name].ndim == 2 else "rest"
    update = gf.partition({"matrices": gf.muon(0.1), "rest": gf.adamw(0.1)}, label)
    grads = {name: normal(*p.shape, seed=1) for name, p in params.items()}
    moved = trained(update, params, [grads])[0]
    only = trained(gf.muon(0.1), {"w": params["w"]}, [{"w": grads["w"]}])[0]
    assert_same(moved["w"], only["w"])
    assert not torch.equal(moved["b"], params["b"])


def test_sharded_matrices_are_refused_by_name(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            params = {"fc": distribute_tensor(torch.ones(2, 3), mesh, [placement])}
            with pytest.raises(ValueError, match="muon: expected whole matrices, found 'fc' as a"):
                gf.muon(0.1).init(params)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gf.muon(-1), "muon: expected 0 <= lr"),
        (lambda: gf.muon(momentum=1.5), "muon: expected 0 <= momentum <= 1"),
        (lambda: gf.muon(weight_decay=-1), "muon: expected 0 <= weight_decay"),
        (lambda: gf.muon(eps=0), "muon: expected 0 < eps"),
        (lambda: gf.muon(ns_steps=0), "ns_steps as a whole number from 1 to 99, found 0"),
        (lambda: gf.muon(ns_steps=100), "found 100"),
        (lambda: gf.muon(ns_steps=2.0), "found 2.0"),
        (lambda: gf.muon(ns_coefficients=(1.0, 2.0)), "three plain numbers"),
        (lambda: gf.muon(ns_coefficients=(1.0, 2.0, gf.schedules.constant(1))), "are fixed"),
        (lambda: gf.muon(adjust_lr_fn="moonshot"), "adjust_lr_fn among .*'original'.*'moonshot'"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scheduled_numbers_are_the_factory_called_by_hand():
    params, grads = draws(8)
    momentum = gf.schedules.linear(0.95, 6, min_value=0.5)
    decay, eps = gf.schedules.linear(0.3, 5), gf.schedules.linear(9.0, 4, min_value=1e-7)
    schedules = {"momentum": momentum, "weight_decay": decay, "eps": eps}
    update = gf.scheduled(gf.muon, lr=0.1, **schedules)
    state, hand, hand_state = update.init(params), params, gf.muon(0.1).init(params)
    for k, g in enumerate(grads):
        by_hand = gf.muon(0.1, **{name: s(k).item() for name, s in schedules.items()})
        hand, hand_state, _ = by_hand(hand, hand_state, g)
        params, state, info = update(params, state, g)
        torch.testing.assert_close(params, hand, rtol=1e-6, atol=1e-6)
        assert info["muon/momentum"] == momentum(k)
