"""AGC and its four optimizers against `torch.optim` on gradients that were clipped by hand."""

import copy
import gc
import inspect
import io
import itertools
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import assert_close, assert_same, normal
from gradfilter.interop import AGC, SAM, SGD_AGC, Adam_AGC, AdamW_AGC, RMSprop_AGC

OURS = {
    torch.optim.SGD: SGD_AGC,
    torch.optim.Adam: Adam_AGC,
    torch.optim.AdamW: AdamW_AGC,
    torch.optim.RMSprop: RMSprop_AGC,
}
EVERY = [
    *OURS,
    *(
        getattr(torch.optim, name)
        for name in ("Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam")
    ),
    torch.optim.Rprop,
]
OPTIONS = {
    torch.optim.SGD: {
        "rule": [
            {},
            {"momentum": 0.9, "dampening": 0.2, "maximize": True},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        ],
        "kernel": [{"foreach": False}, {"foreach": True}, {"fused": True}, {}],
    },
    torch.optim.Adam: {
        "rule": [
            {},
            {"amsgrad": True, "weight_decay": 0.1},
            {"betas": (0.5, 0.7), "maximize": True},
        ],
        "kernel": [{"foreach": False}, {"foreach": True}, {"fused": True}],
    },
    torch.optim.RMSprop: {
        "rule": [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"centered": True, "maximize": True}],
        "kernel": [{"foreach": False}, {"foreach": True}],
    },
}
OPTIONS[torch.optim.AdamW] = OPTIONS[torch.optim.Adam]
FLAGS = [
    (base, rule | kernel)
    for base, options in OPTIONS.items()
    for rule, kernel in itertools.product(options["rule"], options["kernel"])
]
SHAPES = {"conv.weight": (4, 2, 1, 3), "fc.weight": (3, 5), "fc.bias": (3,), "scale": ()}


def uneven(shape, seed):
    """Normal numbers whose units have very different norms."""
    values = normal(1, *shape, seed=seed)[0]
    if len(shape) > 1:
        scale = 10 ** normal(shape[0], seed=seed + 1)
        values = values * scale.reshape(-1, *(1 for _ in shape[1:]))
    return values


def network(dtype=torch.float64, seed=0):
    """Named parameters with uneven units."""
    return {
        name: nn.Parameter(uneven(shape, 10 * i + seed).to(dtype))
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def gradient(name, p, step):
    """A function of the parameter, so that a step that differs makes all later ones differ."""
    noise = uneven(p.shape, 1000 * step + 7 * len(name)).to(p.dtype)
    return (p.detach() - 0.3) * 0.5 + noise


def fill(params, step):
    for name, p in params.items():
        p.grad = gradient(name, p, step)


def clip_by_hand(p, clipping, eps=1e-3):
    """The formula, unit by unit, in Python numbers."""
    pairs = [(p.detach(), p.grad)]
    if p.ndim >= 2:
        pairs = zip(p.detach(), p.grad, strict=True)
    for w, g in pairs:
        norm = g.square().sum().sqrt().item()
        limit = clipping * max(w.square().sum().sqrt().item(), eps)
        if norm > limit:
            g.mul_(limit / norm)


def train(optimizer, params, steps, before=lambda: None):
    for step in range(steps):
        fill(params, step)
        before()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def built(base, params, **arguments):
    """The class where there is one, else AGC around the optimizer of PyTorch."""
    own = {name: arguments.pop(name) for name in ("clipping", "exclude") if name in arguments}
    if base in OURS:
        return OURS[base](params, **arguments, **own)
    return AGC(base(params, **arguments), **own)


@pytest.mark.parametrize("off", [0, None, 0.0])
@pytest.mark.parametrize(("base", "flags"), FLAGS)
def test_off_is_torch_bit_for_bit(base, flags, off):
    ours, theirs = network(torch.float32), network(torch.float32)
    lr = {"lr": 0.02}
    first = OURS[base](ours.values(), **lr, **flags, clipping=off)
    second = base(theirs.values(), **lr, **flags)
    assert_same(train(first, ours, 100), train(second, theirs, 100))
    assert_same(ours["fc.weight"].grad, theirs["fc.weight"].grad)
    for p, q in zip(ours.values(), theirs.values(), strict=True):
        assert_same(first.state[p], second.state[q])


@pytest.mark.parametrize(("base", "flags"), FLAGS)
def test_on_is_torch_on_gradients_clipped_by_hand(base, flags):
    ours, theirs, plain = network(), network(), network()
    first = OURS[base](ours.values(), lr=0.02, **flags, clipping=0.05)
    second = base(theirs.values(), lr=0.02, **flags)
    by_hand = lambda: [clip_by_hand(p, 0.05) for p in theirs.values()]
    found = train(first, ours, 100)
    assert_close(found, train(second, theirs, 100, by_hand))
    unclipped = train(base(plain.values(), lr=0.02, **flags), plain, 100)
    assert not any(torch.allclose(found[name], unclipped[name]) for name in SHAPES)


@pytest.mark.parametrize("base", EVERY)
def test_agc_goes_around_every_optimizer(base):
    ours, theirs, off, plain = network(), network(), network(), network()
    optimizer = AGC(base(ours.values(), lr=0.02), 0.05)
    assert type(optimizer) is base
    by_hand = lambda: [clip_by_hand(p, 0.05) for p in theirs.values()]
    found = train(optimizer, ours, 20)
    assert_close(found, train(base(theirs.values(), lr=0.02), theirs, 20, by_hand))
    without = train(base(plain.values(), lr=0.02), plain, 20)
    assert_same(train(AGC(base(off.values(), lr=0.02), None), off, 20), without)
    if base is not torch.optim.Rprop:  # it looks at signs only
        assert not torch.equal(found["fc.weight"], without["fc.weight"])


def test_no_optimizer_of_torch_is_left_out():
    kinds = {kind for kind in vars(torch.optim).values() if inspect.isclass(kind)}
    kinds = {kind for kind in kinds if issubclass(kind, torch.optim.Optimizer)}
    others = {torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.Muon, torch.optim.SparseAdam}
    assert kinds - others == set(EVERY)


def test_muon_gets_clipped_gradients():
    params = {"fc.weight": network()["fc.weight"]}
    assert clipped_places(params, AGC(torch.optim.Muon(params.values()), 0.05)) == set(params)


@given(seed=st.integers(0, 2**16), clipping=st.floats(1e-6, 10), eps=st.floats(1e-6, 10))
def test_gradients_become_those_of_agc_clip(seed, clipping, eps):
    params = network(torch.float32, seed)
    fill(params, seed)
    grads = {name: p.grad.clone() for name, p in params.items()}
    expected, _, _ = gf.agc_clip(clipping, eps=eps).update(grads, {}, params)
    places = {name: p.grad.data_ptr() for name, p in params.items()}
    SGD_AGC(params.values(), lr=0.0, clipping=clipping, agc_eps=eps).step()
    assert_same({name: p.grad for name, p in params.items()}, expected)
    assert {name: p.grad.data_ptr() for name, p in params.items()} == places


@pytest.mark.parametrize("base", OURS)
def test_signatures_are_torchs_and_ours_after_them(base):
    theirs = inspect.signature(base).parameters
    found = inspect.signature(OURS[base]).parameters
    assert list(found) == [*theirs, "clipping", "agc_eps", "exclude"]
    assert all(found[name] == p for name, p in theirs.items())
    own = {name: found[name].default for name in ("clipping", "agc_eps", "exclude")}
    assert own == {"clipping": 0.01, "agc_eps": 1e-3, "exclude": None}
    params = network()
    first, second = OURS[base](params.values(), 0.5), base(params.values(), 0.5)
    assert first.defaults == second.defaults | {"clipping": 0.01, "agc_eps": 1e-3}
    assert isinstance(first, base)


# Closures


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("base", EVERY)
def test_a_closure_is_called_once_with_gradients_on_and_its_gradients_are_clipped(base, by_name):
    ours, theirs = network(), network()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = sum(((p - 0.3) ** 2).sum() for p in ours.values())
        optimizer.zero_grad()
        loss.backward()
        return loss

    optimizer, reference = built(base, ours.values(), lr=0.02), base(theirs.values(), lr=0.02)
    for step in range(3):
        expected = sum(((p - 0.3) ** 2).sum() for p in theirs.values())
        reference.zero_grad()
        expected.backward()
        for p in theirs.values():
            clip_by_hand(p, 0.01)
        with torch.no_grad():
            loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        reference.step()
        assert calls == [True] * (step + 1)
        assert_close(loss, expected)
        assert_close(dict(ours), dict(theirs))
    assert optimizer.step() is None


def test_lbfgs_gets_clipped_gradients_at_every_evaluation():
    params = network()
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params.values())
        loss.backward()
        return loss

    class Watched(torch.optim.LBFGS):
        def _gather_flat_grad(self):
            for p in params.values():
                again = p.grad.clone()
                clip_by_hand(p, 0.05)
                seen.append(torch.allclose(again, p.grad, rtol=1e-12, atol=0))
            return super()._gather_flat_grad()

    optimizer = AGC(Watched(params.values(), max_iter=5), 0.05)
    first = optimizer.step(closure)
    assert len(seen) > 2 * len(params)
    assert all(seen)
    assert closure() < first


# Names and groups


def clipped_places(params, optimizer):
    """Names of the parameters whose gradient a step changes."""
    fill(params, 3)
    before = {name: p.grad.clone() for name, p in params.items()}
    optimizer.step()
    return {name for name, p in params.items() if not torch.equal(p.grad, before[name])}


@pytest.mark.parametrize("base", EVERY)
def test_exclude_goes_by_name(base):
    params = network()
    everything = clipped_places(params, built(base, params.items(), lr=0.1))
    assert everything == set(SHAPES)
    optimizer = built(base, params.items(), lr=0.1, exclude=lambda name: name == "fc.weight")
    assert clipped_places(params, optimizer) == everything - {"fc.weight"}


def test_without_names_a_parameter_is_called_by_its_place():
    params = network()
    conv, weight, bias, scale = params.values()
    seen = []
    optimizer = SGD_AGC(
        [{"params": [conv]}, {"params": [weight, bias, scale]}],
        lr=0.1,
        exclude=lambda name: seen.append(name) or name == "1.1",
    )
    assert clipped_places(params, optimizer) == set(SHAPES) - {"fc.bias"}
    assert seen == ["0.0", "1.0", "1.1", "1.2"]


def test_two_parameters_of_one_name_are_both_clipped():
    a, b = (nn.Parameter(uneven((3, 2), seed)) for seed in (1, 5))
    params = {"a": a, "b": b}
    assert clipped_places(params, SGD_AGC([("w", a), ("w", b)], lr=0.1)) == {"a", "b"}


def test_groups_have_hyperparameters_of_their_own():
    params = network()
    conv, weight, bias, scale = params.values()
    optimizer = Adam_AGC(
        [
            {"params": [conv], "clipping": 0.3},
            {"params": [weight], "agc_eps": 50.0},
            {"params": [bias], "clipping": None},
        ],
        clipping=0.02,
    )
    optimizer.add_param_group({"params": [scale]})
    found = [(g["clipping"], g["agc_eps"]) for g in optimizer.param_groups]
    assert found == [(0.3, 1e-3), (0.02, 50.0), (None, 1e-3), (0.02, 1e-3)]
    fill(params, 2)
    optimizer.param_groups[3]["clipping"] = 0.1  # like an lr, it may change at any time
    expected = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    for name, own in {
        "conv.weight": (0.3, 1e-3),
        "fc.weight": (0.02, 50.0),
        "scale": (0.1, 1e-3),
    }.items():
        expected[name].grad = params[name].grad.clone()
        clip_by_hand(expected[name], *own)
    untouched = bias.grad.clone()
    optimizer.step()
    for name in ("conv.weight", "fc.weight", "scale"):
        assert_close(params[name].grad, expected[name].grad)
    assert_same(bias.grad, untouched)


def test_parameters_without_gradient_are_passed_over():
    params = network()
    optimizer = AdamW_AGC(params.values(), lr=0.1)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in params.items()}
    fill(params, 0)
    params["fc.weight"].grad = None
    optimizer.step()
    assert_same(params["fc.weight"].detach(), before["fc.weight"])
    assert not torch.equal(params["fc.bias"], before["fc.bias"])
    optimizer.zero_grad()
    assert all(p.grad is None for p in params.values())


def test_a_sparse_gradient_is_refused_unless_it_is_left_out():
    table = nn.Embedding(5, 3, sparse=True)
    optimizers = {
        "refused": SGD_AGC(table.named_parameters(), lr=0.1),
        "excluded": SGD_AGC(table.named_parameters(), lr=0.1, exclude=lambda n: n == "weight"),
        "off": SGD_AGC(table.named_parameters(), lr=0.1, clipping=0),
    }
    before = table.weight.detach().clone()
    table(torch.tensor([1, 3, 1])).sum().backward()
    with pytest.raises(ValueError, match=r"dense gradients, found a sparse one for 'weight'\. Use"):
        optimizers["refused"].step()
    assert_same(table.weight.detach(), before)
    optimizers["excluded"].step()
    optimizers["off"].step()
    expected = torch.zeros(5, 1).index_fill(0, torch.tensor([3]), 0.2)
    expected[1] = 0.4
    assert_close(before - table.weight.detach(), expected.expand(5, 3), rtol=1e-5, atol=1e-6)


# State, schedulers, hooks, copies


@pytest.mark.parametrize("base", EVERY)
def test_a_state_dict_brings_everything_back(base):
    params = network(torch.float32)  # what torch loads takes the parameter's dtype
    optimizer = built(base, params.items(), lr=0.1, clipping=0.07)
    optimizer.param_groups[0]["agc_eps"] = 0.5
    train(optimizer, params, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    other = built(base, others.items(), lr=9.0, clipping=None)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["clipping"] == 0.07
    assert other.param_groups[0]["agc_eps"] == 0.5
    assert_same(train(optimizer, params, 5), train(other, others, 5))


def test_the_state_of_a_plain_optimizer_loads_and_is_clipped():
    params = network()
    plain = torch.optim.SGD(params.values(), lr=0.25, momentum=0.5)
    train(plain, params, 2)
    optimizer = SGD_AGC(params.values(), lr=1.0, clipping=0.07)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["clipping"], group["agc_eps"]) == (0.25, 0.07, 1e-3)
    assert clipped_places(params, optimizer) == set(SHAPES)
    plain.load_state_dict(optimizer.state_dict())
    assert clipped_places(params, plain) == set()


def test_the_state_of_a_plain_optimizer_leaves_every_group_its_own_clipping():
    conv, weight, bias, scale = network().values()
    groups = [{"params": [conv, weight]}, {"params": [bias, scale]}]
    own = [{"clipping": 0.3}, {"clipping": None, "agc_eps": 0.5}]
    optimizer = SGD_AGC([g | o for g, o in zip(groups, own, strict=True)], lr=1.0)
    plain = torch.optim.SGD(groups, lr=0.25).state_dict()
    optimizer.load_state_dict(plain)
    found = [(g["clipping"], g["agc_eps"], g["lr"]) for g in optimizer.param_groups]
    assert found == [(0.3, 1e-3, 0.25), (None, 0.5, 0.25)]
    assert "clipping" not in plain["param_groups"][0]
    one = SGD_AGC([conv, weight, bias, scale], lr=1.0)
    for left, right in ((optimizer, one), (one, optimizer)):
        with pytest.raises(ValueError, match="different number of parameter groups"):
            left.load_state_dict(right.state_dict())


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("base", OURS)
def test_schedulers_of_torch_drive_the_lr(base, schedule):
    ours, theirs = network(), network()
    first, second = OURS[base](ours.values(), lr=0.1), base(theirs.values(), lr=0.1)
    schedules = [SCHEDULERS[schedule](o) for o in (first, second)]
    lrs = set()
    for step in range(10):
        fill(ours, step)
        fill(theirs, step)
        for p in theirs.values():
            clip_by_hand(p, 0.01)
        for optimizer, scheduler in zip((first, second), schedules, strict=True):
            optimizer.step()
            scheduler.step()
        assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]
        lrs.add(first.param_groups[0]["lr"])
    assert len(lrs) > 2
    assert_close(dict(ours), dict(theirs))


def test_hooks_of_others_run_once_and_see_clipped_gradients():
    params = network()
    torch.optim.SGD(params.values(), lr=0.1)  # torch puts hooks into a class when it is first used
    optimizer = SGD_AGC(params.values(), lr=0.1, clipping=0.05)
    norms = []
    norm = lambda *_: norms.append(params["fc.bias"].grad.norm().item())
    optimizer.register_step_pre_hook(norm)
    optimizer.register_step_post_hook(norm)
    limit = 0.05 * params["fc.bias"].norm().item()
    fill(params, 0)
    optimizer.step()
    assert norms == pytest.approx([limit, limit])


def is_head(name):
    return name == "fc.weight"


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, lambda o: pickled(saved(o))])
@pytest.mark.parametrize("base", EVERY)
def test_copies_clip_as_the_original_does(base, copied):
    params = network()
    optimizer = built(base, params.items(), lr=0.02, clipping=0.07, exclude=is_head)
    optimizer.param_groups[0]["agc_eps"] = 0.5
    train(optimizer, params, 2)
    twin = copied(optimizer)
    assert type(twin) is type(optimizer)
    others = dict(zip(params, twin.param_groups[0]["params"], strict=True))
    assert not {id(p) for p in others.values()} & {id(p) for p in params.values()}
    assert_same(train(twin, others, 3), train(optimizer, params, 3))
    assert clipped_places(others, twin) == set(SHAPES) - {"fc.weight"}
    twin.load_state_dict(base(params.items(), lr=0.02).state_dict())
    assert twin.param_groups[0]["clipping"] == 0.07
    twin.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))]})
    assert twin.param_groups[1]["clipping"] == 0.07


def test_a_copy_belongs_to_the_copied_model():
    model = nn.Linear(3, 2)
    both = {"model": model, "optimizer": SGD_AGC(model.parameters(), lr=0.1)}
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        found = twin["optimizer"].param_groups[0]["params"]
        assert all(p is q for p, q in zip(found, twin["model"].parameters(), strict=True))
        assert clipped_places(dict(twin["model"].named_parameters()), twin["optimizer"])


def test_an_optimizer_that_clips_does_not_keep_itself_alive():
    optimizer = Adam_AGC(network().values())
    alive = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


def test_a_pickle_does_not_lose_what_it_cannot_hold():
    optimizer = SGD_AGC(network().items(), lr=0.1, exclude=lambda name: False)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(optimizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_steps_clip():
    torch._dynamo.reset()
    params, others = network(), network()
    optimizer = SGD_AGC(params.values(), lr=0.02, clipping=0.05)
    step = torch.compile(optimizer.step, backend="aot_eager")
    reference = SGD_AGC(others.values(), lr=0.02, clipping=0.05)
    for k in range(3):
        fill(params, k)
        fill(others, k)
        step()
        reference.step()
    assert_close(dict(params), dict(others))


def test_parameters_may_change_their_dtype():
    model = nn.Linear(3, 2)
    optimizer = SGD_AGC(model.parameters(), lr=0.1, clipping=0.01)
    model.to(torch.bfloat16)
    params = dict(model.named_parameters())
    assert clipped_places(params, optimizer) == {"weight", "bias"}
    assert all(p.grad.dtype == torch.bfloat16 for p in params.values())


# Mixed precision, differentiable steps


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("flags", [{}, {"fused": True}])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grad_scaler_changes_nothing_and_skips_steps_that_are_not_finite(
    base, flags, unscale, dtype
):
    ours, theirs = network(dtype), network(dtype)
    optimizer = OURS[base](ours.values(), lr=0.02, clipping=0.05, **flags)
    reference = OURS[base](theirs.values(), lr=0.02, clipping=0.05, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(8):
        fill(theirs, step)
        reference.step()
        if step == 4:  # an overflow in between leaves no trace
            before = {name: p.detach().clone() for name, p in ours.items()}
            scale = scaler.get_scale()
        for bad in [True, False] if step == 4 else [False]:
            optimizer.zero_grad()
            loss = sum((p * gradient(name, p, step)).sum() for name, p in ours.items())
            scaler.scale(loss).backward()
            if bad:
                ours["fc.weight"].grad[1, 2] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if bad:
                assert_same({name: p.detach() for name, p in ours.items()}, before)
                assert scaler.get_scale() == scale / 2
    assert scaler.get_scale() != 2.0**10
    assert_close(dict(ours), dict(theirs), rtol=0 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("base", OURS)
def test_a_differentiable_step_has_the_gradient_of_the_clipped_one(base):
    start, g = uneven((3, 2), 1), uneven((3, 2), 5)

    def after(w, g):
        w = w.clone()
        w.grad = g * 1.0
        OURS[base]([w], lr=0.1, differentiable=True, clipping=0.05).step()
        return w

    leaves = (start.requires_grad_(), g.requires_grad_())
    assert torch.autograd.gradcheck(after, leaves, atol=1e-4)
    slope = torch.autograd.grad(after(*leaves).sum(), g)[0]
    assert slope.abs().max() > 0


# Bad arguments


@pytest.mark.parametrize("make", [*OURS.values(), lambda p, **own: AGC(torch.optim.ASGD(p), **own)])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"clipping": -0.1},
            ValueError,
            r"AGC: expected 0 <= clipping, found clipping=-0\.1\. Use",
        ),
        ({"clipping": "a"}, ValueError, r"AGC: expected 0 <= clipping, found clipping='a'\. Use"),
        ({"agc_eps": 0}, ValueError, r"AGC: expected 0 < agc_eps, found agc_eps=0\. The paper"),
        ({"exclude": ["w"]}, TypeError, r"AGC: expected exclude as a function .* found list\. Use"),
    ],
)
def test_impossible_arguments_are_refused(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(network().values(), **arguments)
    if "exclude" not in arguments:
        with pytest.raises(error, match=message):
            make([{"params": list(network().values()), **arguments}])
        params = network()
        optimizer = make(params.values())
        optimizer.param_groups[0].update(arguments)
        fill(params, 0)
        with pytest.raises(error, match=message):
            optimizer.step()


def test_only_optimizers_are_wrapped():
    with pytest.raises(
        TypeError, match=r"AGC: expected a torch\.optim\.Optimizer, found type\. Make"
    ):
        AGC(torch.optim.SGD)


def test_clipping_twice_is_refused():
    optimizer = SGD_AGC(network().values(), lr=0.1)
    for clipping in (optimizer, copy.deepcopy(optimizer)):
        with pytest.raises(ValueError, match=r"does not clip yet, found a SGD_AGC .*\. Change"):
            AGC(clipping, 0.5)


def test_an_optimizer_of_two_passes_is_refused():
    params = list(network().values())
    sam = SAM(params, torch.optim.SGD(params, lr=0.1))
    with pytest.raises(TypeError, match=r"found SAM\. Put AGC around its base optimizer"):
        AGC(sam)


def test_what_torch_refuses_is_refused_by_torch():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SGD_AGC(network().values(), lr=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip'"):
        SGD_AGC(network().values(), lr=1, clip=0.1)


class Slow(torch.optim.Optimizer):
    """A wrapper as several packages write them: it skips Optimizer.__init__."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.defaults, self.state = optimizer.defaults, optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


class HalfSlow(Slow):
    """One that has the tables of hooks, which nothing runs."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks = {}
        self._optimizer_load_state_dict_pre_hooks = {}


WRAPPERS = {
    "by hand": lambda base: Slow(base),
    "with tables": lambda base: HalfSlow(base),
    "timm": lambda base: pytest.importorskip("timm.optim").Lookahead(base),
    "lookahead": lambda base: pytest.importorskip("pytorch_optimizer").Lookahead(base),
    "orthograd": lambda base: pytest.importorskip("pytorch_optimizer").OrthoGrad(base),
    "schedule-free": lambda base: pytest.importorskip("pytorch_optimizer").ScheduleFreeWrapper(
        base
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_without_hooks_is_refused_and_its_base_clips(wrap):
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    make = lambda: torch.optim.SGD([w], lr=1.0)
    wrapped = wrap(make())
    kind = type(wrapped).__name__
    with pytest.raises(TypeError, match=rf"found {kind}, a wrapper of SGD .* {kind}\(AGC\(SGD\("):
        AGC(wrapped)
    inside = wrap(AGC(make(), clipping=0.1))
    if hasattr(inside, "train"):
        inside.train()
    w.grad = torch.tensor([[0.0, 100.0]])
    inside.step()
    assert w.grad.norm() <= 0.5 + 1e-6  # 0.1 of the weight's norm
