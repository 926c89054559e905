"""Every optimizer of torch as a transform, against the optimizer itself over 100 steps."""

import inspect

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import assert_close, assert_same, generator
from _torch_optim import TORCH_CLASSES as CLASSES
from gradfilter.testing._laws import no_host_sync

STEPS = 100
SHAPES = {"weight": (4, 3), "bias": (3,), "scale": (), "kernel": (2, 1, 2, 2)}
REFUSED = {"LBFGS": "closure", "SparseAdam": "dense gradients"}
# A class gets those of the flags that it has; a new class of torch is covered by itself.
FLAGS = [
    {},
    {"weight_decay": 0.05},
    {"maximize": True},
    {"foreach": True},
    {"foreach": False, "weight_decay": 0.05},
    {"fused": True},
    {"amsgrad": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "foreach": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"momentum": 0.9, "centered": True, "weight_decay": 0.05, "maximize": True},
    {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
    {"weight_decay": 0.05, "decoupled_weight_decay": True},
    {"t0": 5, "lambd": 0.01, "alpha": 0.5},
    {"nesterov": False, "ns_steps": 3},
]
CASES = [
    (name, flags)
    for name, kind in CLASSES.items()
    if name not in REFUSED
    for flags in FLAGS
    if set(flags) <= set(inspect.signature(kind).parameters)
]
every_case = pytest.mark.parametrize(("name", "flags"), CASES, ids=lambda v: str(v))
DAILY = [
    ("NAdam", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adafactor", {}),
    ("Muon", {}),
]


def shapes_of(name):
    return {"weight": (4, 3), "head": (2, 4)} if name == "Muon" else SHAPES


def draws(name, dtype, steps=STEPS, seed=0):
    """Parameters, and gradients of very different sizes for every step."""
    g, shapes = generator(seed), shapes_of(name)
    draw = lambda shape: torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)
    params = {leaf: draw(shape) for leaf, shape in shapes.items()}
    sizes = {leaf: 10 ** draw(shape) for leaf, shape in shapes.items()}
    grads = [{leaf: sizes[leaf] * draw(s) for leaf, s in shapes.items()} for _ in range(steps)]
    return params, grads


def skipped(k):
    return k % 7 == 3 or k == 0


def torch_training(kind, flags, params, grads, lrs, skip=skipped):
    """The parameters after every step of the optimizer itself; skipped steps do not happen."""
    own = {leaf: torch.nn.Parameter(p.clone()) for leaf, p in params.items()}
    optimizer = kind(own.values(), lr=lrs[0], **flags)
    seen = []
    for k, (g, lr) in enumerate(zip(grads, lrs, strict=True)):
        optimizer.param_groups[0]["lr"] = lr
        for leaf, p in own.items():
            p.grad = g[leaf].clone()
        if not skip(k):
            optimizer.step()
        seen.append({leaf: p.detach().clone() for leaf, p in own.items()})
    return seen, optimizer


def our_training(update, params, grads, skip=skipped, state=None):
    state = update.init(params) if state is None else state
    seen = []
    for k, g in enumerate(grads):
        params, state, _ = update(params, state, g, keep=torch.tensor(not skip(k)))
        seen.append(params)
    return seen, state


def check_parity(name, flags, dtype, kind=None, lr=0.01):
    kind = kind or CLASSES[name]
    params, grads = draws(name, dtype)
    expected, _ = torch_training(kind, flags, params, grads, [lr] * STEPS)
    found, _ = our_training(gf.from_torch(kind, lr=lr, **flags), params, grads)
    for got, want in zip(found, expected, strict=True):
        assert_same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_case
def test_equals_the_optimizer_bit_for_bit_with_skipped_steps(name, flags, dtype):
    check_parity(name, flags, dtype)


@pytest.mark.parametrize(("name", "flags"), DAILY, ids=str)
def test_some_classes_equal_the_optimizer_bit_for_bit(name, flags):
    check_parity(name, flags, torch.float32)


def test_every_class_of_torch_is_run_or_refused_for_a_reason():
    assert {name for name, _ in CASES} | set(REFUSED) == set(CLASSES)
    assert len(CLASSES) >= 14
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError, match=reason):
            gf.from_torch(CLASSES[name], lr=0.1)


@pytest.mark.slow
@every_case
def test_a_scheduled_lr_equals_one_that_is_written_into_the_group(name, flags):
    lr = gs.cosine(0.05, STEPS, warmup_steps=10, init_value=0.01)
    params, grads = draws(name, torch.float64)
    lrs = [lr(k).item() for k in range(STEPS)]
    expected, _ = torch_training(CLASSES[name], flags, params, grads, lrs, skip=lambda k: False)
    found, _ = our_training(
        gf.from_torch(CLASSES[name], lr=lr, **flags), params, grads, skip=lambda k: False
    )
    for got, want in zip(found, expected, strict=True):
        assert_same(got, want)


READING = {"Adafactor"}


@pytest.mark.slow
@pytest.mark.parametrize("scheduled", [False, True])
@every_case
def test_without_reading_numbers_it_agrees_up_to_rounding(name, flags, scheduled):
    # As torch with capturable=True: the count is float32, so the correction of a bias is as well.
    lr = gs.linear(0.05, 100) if scheduled else 0.01
    update = gf.from_torch(CLASSES[name], lr=lr, **flags)
    params, grads = draws(name, torch.float64, steps=6)
    state = our_state = update.init(params)
    ours = params
    for k, g in enumerate(grads):
        keep = torch.tensor(k != 0)
        params, state, _ = update(params, state, g, keep=keep)
        if name in READING or reads(name, flags, scheduled):
            with no_host_sync(), pytest.raises(RuntimeError, match="reads numbers on the host"):
                update(ours, our_state, g, keep=keep)
            continue
        with no_host_sync():
            ours, our_state, _ = update(ours, our_state, g, keep=keep)
        assert_close(ours, params, 1e-4, 1e-6)


ALPHA = {"SGD", "RMSprop", "Adadelta"}  # these hand an lr that is a tensor to `alpha` or `value`


def reads(name, flags, scheduled):
    """Whether torch's code reads a number even under a compiler."""
    one_by_one = flags.get("foreach") is False
    if name == "Adagrad":
        return one_by_one
    # A first step of Rprop fills the step sizes with the lr.
    return scheduled and (name in ("Muon", "Rprop") or (one_by_one and name in ALPHA))


# --- Around it ---


@pytest.mark.parametrize("backend", ["graph", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_agree_with_eager_ones_also_in_the_first_step(backend):
    # Dampening: the first buffer is the gradient itself, without it.
    for kind, flags in (
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
        (torch.optim.NAdam, {}),
    ):
        loss = lambda params, x: ((params["w"] * x).sum(1) ** 2).mean()
        step = gf.train_step(
            loss, gf.chain(gf.mean_rows(), gf.from_torch(kind, lr=0.1, **flags)), microbatches=2
        )
        compiled = gf.compile(step, backend=backend)
        one = two = step.init({"w": torch.tensor([1.0, -2.0])})
        for k in range(4):
            batch = torch.arange(8.0).reshape(4, 2) / (k + 3)
            one, _ = step(one, batch)
            two, _ = compiled(two, batch)
            assert_close(two["params"], one["params"], 1e-5)


@pytest.mark.parametrize("kind", [torch.optim.RAdam, torch.optim.SGD])
def test_a_graph_has_no_marks_for_profilers_which_the_compiler_of_torch_refuses(kind):
    update = gf.from_torch(kind, lr=0.1)
    params = {"w": torch.ones(2)}
    step = lambda p, state: update(p, state, {"w": torch.ones(2)})[0]
    graph = make_fx(step)(params, update.init(params)).graph
    assert len(graph.nodes) > 5
    assert not [node for node in graph.nodes if "record_function" in str(node.target)]


def test_a_graph_keeps_what_a_class_hangs_around_its_steps():
    class Hooked(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.register_step_post_hook(self.double)

        def double(self, *given):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(2)

    update, params = gf.from_torch(Hooked, lr=0.5), {"w": torch.ones(2)}
    state, grads = update.init(params), {"w": torch.ones(2)}
    step = lambda p, own: update(p, own, grads)[0]
    assert torch.equal(make_fx(step)(params, state)(params, state)["w"], step(params, state)["w"])
    assert torch.equal(step(params, state)["w"], torch.ones(2))


def test_a_class_that_reads_numbers_is_refused_by_compile_with_the_line():
    loss = lambda params, x: ((params["w"] * x).sum(1) ** 2).mean()
    step = gf.train_step(
        loss, gf.chain(gf.mean_rows(), gf.from_torch(torch.optim.Adafactor)), microbatches=2
    )
    state, batch = step.init({"w": torch.ones(2)}), torch.ones(4, 2)
    step(state, batch)
    with pytest.raises(RuntimeError, match=r"Adafactor, which reads numbers .*_adafactor\.py"):
        gf.compile(step, backend="graph")(state, batch)


def test_chains_end_with_the_parameters_of_the_optimizer_itself():
    params, grads = draws("Adam", torch.float32, steps=20)
    expected, _ = torch_training(
        torch.optim.Adam, {}, params, grads, [0.01] * 20, skip=lambda k: False
    )
    update = gf.chain(gf.named("same", gf.agc_clip(None)), gf.from_torch(torch.optim.Adam, lr=0.01))
    found, _ = our_training(update, params, grads, skip=lambda k: False)
    assert_same(found[-1], expected[-1])
    # With a transform behind it, the difference is added, and may differ in the last bits.
    behind = gf.chain(gf.from_torch(torch.optim.Adam, lr=0.01), gf.ema_params(0.9))
    assert_close(
        our_training(behind, params, grads, skip=lambda k: False)[0][-1], expected[-1], 1e-5
    )


def test_muon_takes_matrices_and_partition_the_rest():
    params, grads = draws("SGD", torch.float32, steps=5)
    with pytest.raises(ValueError, match=r"2D parameters.*Use partition"):
        gf.from_torch(torch.optim.Muon).init(params)
    update = gf.partition(
        {"matrices": gf.from_torch(torch.optim.Muon, lr=0.1), "rest": gf.sgd(0.1)},
        lambda name: "matrices" if name == "weight" else "rest",
    )
    found, _ = our_training(update, params, grads, skip=lambda k: False)
    weight = {"weight": params["weight"]}
    only = [{"weight": g["weight"]} for g in grads]
    expected, _ = torch_training(
        torch.optim.Muon, {}, weight, only, [0.1] * 5, skip=lambda k: False
    )
    assert_close({"weight": found[-1]["weight"]}, expected[-1], 1e-5)


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Rprop", "SGD"])
def test_a_running_training_moves_over_and_back(name):
    kind = CLASSES[name]
    flags = {"momentum": 0.9} if name == "SGD" else {}
    params, grads = draws(name, torch.float32, steps=30)
    no = lambda k: False
    expected, _ = torch_training(kind, flags, params, grads, [0.01] * 30, skip=no)
    seen, optimizer = torch_training(kind, flags, params, grads[:10], [0.01] * 10, skip=no)
    update, names = gf.from_torch(kind, lr=0.01, **flags), list(params)
    before = optimizer.state_dict()
    count = 10 if name == "SGD" else None
    state = gf.import_torch_state(update.init(params), before, names, count=count)
    assert state["count"] == 10
    found, state = our_training(update, seen[-1], grads[10:20], skip=no, state=state)
    assert_same(found[-1], expected[19])
    own = {leaf: torch.nn.Parameter(p.clone()) for leaf, p in found[-1].items()}
    new = kind(own.values(), lr=0.01, **flags)
    new.load_state_dict(gf.export_torch_state(state, new.state_dict(), names))
    for g in grads[20:]:
        for leaf, p in own.items():
            p.grad = g[leaf].clone()
        new.step()
    assert_same({leaf: p.detach() for leaf, p in own.items()}, expected[-1])


def test_the_state_round_trips_as_a_flat_dict():
    params, grads = draws("NAdam", torch.float32, steps=3)
    update = gf.from_torch(torch.optim.NAdam)
    _, state = our_training(update, params, grads)
    flat = gf.state_dict(state)
    assert "leaves.mu_product.weight" in flat
    assert_same(gf.state_dict(gf.load_state_dict(update.init(params), flat)), flat)


def test_import_names_what_is_wrong():
    params, grads = draws("SGD", torch.float32, steps=2)
    update = gf.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9)
    _, optimizer = torch_training(
        torch.optim.SGD, {"momentum": 0.9}, params, grads, [0.1] * 2, skip=lambda k: False
    )
    given, state, names = optimizer.state_dict(), update.init(params), list(params)
    with pytest.raises(ValueError, match="expected count="):
        gf.import_torch_state(state, given, names)
    with pytest.raises(ValueError, match="one name for each"):
        gf.import_torch_state(state, given, names[1:], count=1)
    with pytest.raises(ValueError, match="of shape"):
        gf.import_torch_state(state, given, names[::-1], count=1)
    with pytest.raises(ValueError, match="none for \\['bias'\\]"):
        gf.import_torch_state(state, given, ["weight", "b", "scale", "kernel"], count=1)
    with pytest.raises(ValueError, match="expected the state of this transform"):
        gf.import_torch_state({"sgd": state}, given, names, count=1)


class GroupCount(torch.optim.Optimizer):
    """As other packages write it: whole numbers in group and state, first set in a step."""

    def __init__(self, params, lr=0.1, beta=0.5):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"] = p.grad.clone()
                    state["seen"] = 0
                state["seen"] += 1
                p.grad.mul_(2)  # writes into the gradient
                state["average"].lerp_(p.grad, 1 - group["beta"])
                p.add_(state["average"] / group["step"], alpha=-group["lr"] / state["seen"])


def test_numbers_in_groups_and_states_are_carried():
    params, grads = draws("SGD", torch.float64)
    before = [{n: g.clone() for n, g in tree.items()} for tree in grads]
    check_parity("SGD", {}, torch.float64, kind=GroupCount)
    update = gf.from_torch(GroupCount)
    _, state = our_training(update, params, grads[:9], skip=lambda k: False)
    assert state["group"]["step"] == 9
    assert state["group"]["step"].dtype == torch.int64
    assert state["leaves"]["seen"]["scale"] == 9
    for now, then in zip(grads, before, strict=True):
        assert_same(now, then)


class Counting(torch.optim.SGD):
    """Keeps a number that no state has."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.taken = 0

    def step(self, closure=None):
        self.taken += 1
        return super().step(closure)


class Growing(torch.optim.SGD):
    """Adds an entry in its second step."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["second" if self.state[p] else "first"] = torch.zeros(())
        return super().step(closure)


class Odd(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["text"] = "a"
        return super().step(closure)


class Noisy(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.add_(torch.randn_like(p))
        return super().step(closure)


class Hidden(torch.optim.SGD):
    """Keeps a number where nobody looks."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.taken = {"steps": 0}

    def step(self, closure=None):
        self.taken["steps"] += 1
        for p in self.param_groups[0]["params"]:
            p.grad.div_(self.taken["steps"])
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda o: o(o.SGD([torch.ones(1)], lr=0.1)), TypeError, "an instance of SGD.*Give the cl"),
        (lambda o: gf.from_torch(torch.nn.Linear), TypeError, "expected a subclass"),
        (lambda o: gf.from_torch(torch.optim.SGD, lr=0.1, params=[]), TypeError, "no params"),
        (lambda o: gf.from_torch(torch.optim.SGD, lr=0.1, betas=1), TypeError, "unknown.*betas"),
        (
            lambda o: gf.from_torch(torch.optim.SGD, differentiable=True),
            TypeError,
            "differentiable",
        ),
        (lambda o: gf.from_torch(torch.optim.Adam, capturable=True), TypeError, "no capturable"),
        (lambda o: gf.from_torch(torch.optim.Adam, lr=-1.0), ValueError, "lr"),
        (lambda o: gf.from_torch(torch.optim.Adam, betas=(2, 0)), ValueError, "Invalid beta"),
        (
            lambda o: gf.from_torch(torch.optim.Adam, betas=(gs.linear(0.9, 9), 0.9)),
            TypeError,
            "Only lr",
        ),
        (
            lambda o: gf.scheduled(gf.from_torch, optimizer=torch.optim.Adam, lr=gs.linear(1, 9)),
            TypeError,
            "without scheduled",
        ),
        (
            lambda o: gf.from_torch(torch.optim.Adam, foreach=True, fused=True),
            ValueError,
            "cannot be",
        ),
        (lambda o: gf.from_torch(Counting), ValueError, "attributes \\['taken'\\]"),
        (lambda o: gf.from_torch(Noisy), ValueError, "in step 1. It draws random numbers"),
        (lambda o: gf.from_torch(Hidden), ValueError, "in step 2"),
        (lambda o: gf.from_torch(Growing), ValueError, "later"),
        (lambda o: gf.from_torch(Odd), ValueError, "other objects in \\['text'\\]"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make, error, match):
    class Shortcut:
        SGD = torch.optim.SGD

        def __call__(self, given):
            return gf.from_torch(given)

    with pytest.raises(error, match=match):
        make(Shortcut())


def test_no_derivative_of_the_step():
    update, params = gf.from_torch(torch.optim.SGD, lr=0.1), {"w": torch.ones(2)}
    with pytest.raises(RuntimeError, match="expected no derivative"):
        torch.func.grad(lambda p: update(p, update.init(params), params)[0]["w"].sum())(params)


def test_it_draws_no_random_numbers_and_says_its_lr():
    before = torch.get_rng_state()
    update = gf.from_torch(torch.optim.RAdam, lr=gs.linear(0.1, 10))
    params = {"w": torch.ones(2)}
    _, _, info = update(params, update.init(params), params)
    assert torch.equal(torch.get_rng_state(), before)
    assert info["radam/lr"] == 0.1
    assert gf.hyperparameters(update)["radam/optimizer"] == "RAdam"


# --- pytorch_optimizer, where it is installed ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["Lion", "AdaBelief", "AdamP", "DiffGrad", "Lamb", "NovoGrad", "Tiger", "Adan", "AdEMAMix"],
)
def test_optimizers_of_another_package(name):
    package = pytest.importorskip("pytorch_optimizer")
    check_parity("SGD", {}, torch.float32, kind=getattr(package, name), lr=1e-3)
