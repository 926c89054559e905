"""Lion against the formulas of its paper."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _naive import assert_close, assert_same, normal, normal_tree

STEPS = 100


def naive(params, grads, lrs, betas, decay, maximize):
    """The algorithm of the paper, entry by entry, in Python numbers."""
    found = {}
    for name, p in params.items():
        entries = []
        for i, value in enumerate(p.flatten().tolist()):
            m = 0.0
            for tree, lr in zip(grads, lrs, strict=True):
                g = tree[name].flatten()[i].item() * (-1 if maximize else 1)
                c = betas[0] * m + (1 - betas[0]) * g
                sign = (c > 0) - (c < 0)
                value = value - lr * (sign + decay * value)
                m = betas[1] * m + (1 - betas[1]) * g
            entries.append(value)
        found[name] = torch.tensor(entries, dtype=p.dtype).reshape(p.shape)
    return found


def trained(update, params, grads, **extra):
    state = update.init(params)
    for g in grads:
        params, state, _ = update(params, state, g, **extra)
    return params, state


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.5), (0.0, 0.0)])
def test_a_hundred_steps_are_those_of_the_paper(betas, maximize, decay):
    params, grads = normal_tree(0), [normal_tree(k + 1) for k in range(STEPS)]
    lr = gf.schedules.cosine(0.05, 80, min_value=0.001, warmup_steps=10)
    update = gf.lion(lr, betas=betas, weight_decay=decay, maximize=maximize)
    ours, state = trained(update, params, grads)
    lrs = [lr(k).item() for k in range(STEPS)]
    assert_close(ours, naive(params, grads, lrs, betas, decay, maximize))
    assert state["count"] == STEPS
    assert state["m"].keys() == params.keys()


def test_gradients_of_a_module_by_an_ordinary_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = normal(8, 4), torch.arange(8) % 3
    loss = gf.model_loss(model, F.cross_entropy)
    step = gf.train_step(loss, gf.chain(gf.mean_rows(), gf.lion(0.01)), microbatches=2)
    state = step.init(model)
    m = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(5):
        state, _ = step(state, (x, y))
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= 0.01 * (0.9 * m[name] + 0.1 * p.grad).sign()
                m[name] = 0.99 * m[name] + 0.01 * p.grad
    assert_close(state["params"], {name: p.detach() for name, p in model.named_parameters()})


def test_all_entries_move_by_the_learning_rate_and_zeros_stay():
    params = {"w": torch.zeros(4)}
    grads = {"w": torch.tensor([1e-30, -5e20, 0.0, 2.0])}
    moved = trained(gf.lion(0.5), params, [grads])[0]["w"]
    assert moved.tolist() == [-0.5, 0.5, 0.0, -0.5]


def test_a_gradient_that_is_not_finite_shows():
    params = {"w": torch.zeros(3), "b": torch.zeros(())}
    bad = {"w": torch.tensor([torch.nan, torch.inf, 1.0]), "b": torch.tensor(1.0)}
    moved, state = trained(gf.lion(0.5), params, [bad])
    assert moved["w"][0].isnan() and moved["w"][1:].tolist() == [-0.5, -0.5]
    guarded = gf.chain(gf.finite_filter(), gf.lion(0.5))
    first = guarded.init(params)
    after, state, info = guarded(params, first, bad)
    assert not info["keep"]
    assert_same((after, gf.state_dict(state)), (params, gf.state_dict(first)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gf.lion(-1), "lion: expected 0 <= lr"),
        (lambda: gf.lion(betas=(1.0, 0.9)), "lion: expected 0 <= beta.*found beta=1.0"),
        (lambda: gf.lion(betas=(0.9, -1)), "found beta=-1"),
        (lambda: gf.lion(weight_decay=-1), "lion: expected 0 <= weight_decay"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


RULES = {
    "lion": lambda lr, **decay: gf.lion(lr, **decay),
    "cautious": lambda lr, **decay: gf.cautious(gf.adamw(lr, **decay)),
    "schedule_free": lambda lr, **decay: gf.schedule_free(gf.sgd(lr, **decay)),
    "cautious lion": lambda lr, **decay: gf.cautious(gf.lion(lr, **decay)),
}


@pytest.mark.parametrize("name", RULES)
def test_some_leaves_decay_as_in_a_partition_of_two_rules(name):
    make, decays = RULES[name], lambda leaf: leaf.startswith("fc")
    some = make(0.1, weight_decay=0.3, decays=decays)
    branches = {"decays": make(0.1, weight_decay=0.3), "rest": make(0.1, weight_decay=0.0)}
    apart = gf.partition(branches, lambda leaf: "decays" if decays(leaf) else "rest")
    grads = [normal_tree(k + 1) for k in range(20)]
    ours, expected = (trained(rule, normal_tree(0), grads)[0] for rule in (some, apart))
    assert_close(ours, expected)
    plain = trained(make(0.1, weight_decay=0.3), normal_tree(0), grads)[0]
    assert not torch.equal(plain["scale"], ours["scale"])


def test_muon_decays_some_matrices():
    params = {name: normal(3, 4, seed=k) for k, name in enumerate("ab")}
    grads = [{name: normal(3, 4, seed=10 * k + ord(name)) for name in "ab"} for k in range(5)]
    some = gf.muon(0.1, weight_decay=0.5, decays=lambda leaf: leaf == "a")
    found = trained(some, params, grads)[0]
    for name, decay in (("a", 0.5), ("b", 0.0)):
        own = [{name: g[name]} for g in grads]
        alone = trained(gf.muon(0.1, weight_decay=decay), {name: params[name]}, own)[0]
        assert_close(found[name], alone[name])
