"""Compiled steps: equal to the step itself, traced again where they must be, or refused."""

import copy
import gc
import inspect
import random
import warnings
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _cases import EXTRA, VARIANTS, build
from _formulas import formulas
from _models import ConvBN, Counting, Dropped, OldStyle, Tied, WithLoss, images, token_loss, vectors
from gradfilter import _tree
from gradfilter.transforms._compile import decisions

pytestmark = pytest.mark.usefixtures("float64")
PLANS = ["auto", "fused", "vmap", "loop"]


def labelled(n=8):
    return torch.randn(n, 6), torch.randint(3, (n,))


class Everything(nn.Module):
    """Convolution, BatchNorm, dropout, a frozen layer, and layers called head and body."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv1d(1, 3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        h = self.frozen(self.norm(self.body(x[:, None]))).tanh()
        return self.head(self.drop(h.flatten(1)))


def equal(a, b):
    """All leaves equal to the bit, NaN at the same places, and the same structure."""
    one, two = (_tree.flatten_with_names(tree)[0] for tree in (a, b))
    assert one.keys() == two.keys()
    return [
        name for name in one if not torch.equal(one[name].nan_to_num(7), two[name].nan_to_num(7))
    ]


def close(a, b, tolerance):
    one, two = (_tree.flatten_with_names(tree)[0] for tree in (a, b))
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        torch.testing.assert_close(leaf, two[name], rtol=tolerance, atol=tolerance, msg=name)


def pair(model, update, criterion=F.cross_entropy, *, backend="graph", **options):
    options = {"microbatches": 4, **options}
    step = gf.train_step(gf.model_loss(model, criterion), update, **options)
    return step, gf.compile(step, backend=backend)


def follow(step, compiled, state, batches, *, tolerance=0.0, **extra):
    """Train by both, and compare them after every step; to the bit without a tolerance."""
    own = state
    for batch in batches:
        with formulas():
            state, info = step(state, batch, **extra)
        own, found = compiled(own, batch, **extra)
        if tolerance:
            close(own, state, tolerance)
            continue
        assert equal(own, state) == []
        assert equal(dict(found), dict(info)) == []
        assert type(found) is type(info)
    return own


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param((name, i), id=f"{name}-{i}", marks=[pytest.mark.slow] * (i > 1))
        for name, i in VARIANTS
    ],
)
def test_every_chain_trains_to_the_bit_as_without_compiling(variant):
    torch.manual_seed(0)
    model = Everything()
    step, compiled = pair(model, build(variant))
    extra = EXTRA if variant[0] == "gate" else {}
    state = step.init(model, seed=1)
    follow(step, compiled, state, [labelled() for _ in range(3)], **extra)
    # every and late: a graph for the steps in which their transform runs, and one for the others.
    counts = bool(decisions(step.update, state["transforms"]))
    assert len(compiled.graphs.entries) == (2 if counts else 1)


def sharp():
    return gf.chain(
        gf.agree_filter(1.2),
        gf.sam_perturb(0.05),
        gf.gsam_decompose(0.1),
        gf.agc_clip(0.1),
        gf.adamw(gf.schedules.cosine(0.01, 30, warmup_steps=3)),
        gf.ema_params(0.9),
    )


@pytest.mark.parametrize("plan", PLANS)
def test_thirty_steps_of_sam_with_batchnorm_and_dropout(plan):
    torch.manual_seed(0)
    model = Everything()
    step, compiled = pair(model, sharp(), plan=plan)
    follow(step, compiled, step.init(model, seed=1), [labelled() for _ in range(30)])
    assert len(compiled.graphs.entries) == 1


MODELS = {
    "BatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), Pooled(), nn.Linear(4, 3)),
        F.cross_entropy,
        images,
    ),
    "dropout": (Dropped, F.cross_entropy, vectors),
    "tied": (Tied, token_loss, lambda: (torch.randint(7, (12, 4)), torch.randint(7, (12, 4)))),
    "assigned buffer": (lambda: Counting(assign=True), F.cross_entropy, vectors),
    "LSTM": (
        lambda: Recurrent(),
        F.cross_entropy,
        lambda: (torch.randn(8, 5, 4), torch.randint(3, (8,))),
    ),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        F.cross_entropy,
        lambda: (torch.randn(8, 3, 8), torch.randint(3, (8,))),
    ),
}


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fell back")
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        (name, plan)
        for name in MODELS
        for plan in ("auto", "vmap", "loop")
        if plan != "vmap" or name not in ("LSTM", "assigned buffer")  # vmap refuses these
    ],
)
def test_models_under_every_plan(name, plan):
    torch.manual_seed(0)
    build_model, criterion, batch = MODELS[name]
    model = build_model()
    update = gf.chain(gf.agree_filter(1.5), gf.sam_perturb(0.05), gf.sgd(0.1, momentum=0.9))
    step, compiled = pair(model, update, criterion, plan=plan)
    # A graph holds the operations of a LSTM one by one; eager execution has a kernel for all.
    tolerance = 1e-12 if name == "LSTM" else 0.0
    batches = [batch() for _ in range(3)]
    follow(step, compiled, step.init(model, seed=2), batches, tolerance=tolerance)


def test_a_dict_batch_a_plain_loss_and_rows_of_samples():
    model = WithLoss()
    ids = torch.randint(7, (8, 4))
    batch = {"input_ids": ids, "attention_mask": torch.ones(8, 4), "labels": ids}
    step = gf.train_step(
        gf.model_loss(model), gf.chain(gf.mean_rows(), gf.sgd(0.1)), microbatches=2
    )
    follow(step, gf.compile(step, backend="graph"), step.init(model), [batch, batch])
    plain = lambda params, x: (params["w"] * x).sum(1).square().mean()
    step = gf.train_step(plain, gf.chain(gf.clip_per_row(0.5), gf.mean_rows(), gf.sgd(0.1)))
    state = step.init({"w": torch.ones(6)})
    follow(step, gf.compile(step, backend="graph"), state, [torch.randn(8, 6) for _ in range(3)])


@pytest.mark.filterwarnings("ignore:gradfilter.compile. trace number")
def test_aux_keep_count_and_value():
    def criterion(output, y):
        return F.cross_entropy(output, y), {"right": (output.argmax(1) == y).double().mean()}

    model = Dropped(0.0)
    loss = gf.model_loss(model, criterion, has_aux=True)
    step = gf.train_step(loss, gf.chain(gf.mean_rows(), gf.sgd(0.1)), microbatches=2)
    compiled = gf.compile(step, backend="graph")
    state, batch = step.init(model), vectors()
    for keep in (True, False, torch.tensor(True), torch.tensor(False)):
        with formulas():
            expected = step(state, batch, keep=keep)
        found = compiled(state, batch, keep=keep)
        assert equal(found[0], expected[0]) == []
        assert torch.equal(found[1]["aux"]["right"], expected[1]["aux"]["right"])
    assert len(compiled.graphs.entries) == 3  # one for all tensors, one for each bool


@pytest.mark.parametrize("backend", ["graph", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_donated_step_writes_into_the_old_tensors(backend):
    torch.manual_seed(0)
    model = Everything()
    update = gf.chain(gf.agree_filter(1.5), gf.sam_perturb(0.05), gf.sgd(0.1, momentum=0.9))
    step, compiled = pair(model, update, backend=backend)
    expected = own = step.init(model, seed=3)
    own = copy.deepcopy(own)
    tensors = [*own["params"].values(), *_tree.leaves(own["transforms"])]
    for _ in range(3):
        batch = labelled()
        expected, _ = step(expected, batch)
        own, _ = compiled(own, batch, donate=True)
        close(own, expected, 1e-12)
    now = [*own["params"].values(), *_tree.leaves(own["transforms"])]
    assert [t for t, old in zip(now, tensors, strict=True) if t is not old] == []


# --- Every change on which a trace depends: two steps on either side ---


class Adjustable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.frozen, self.b = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(0.5)
        self.scale, self.power, self.weights = torch.tensor(2.0), 1.0, [1.0, 2.0]

    def forward(self, x):
        h = self.drop(self.norm(self.frozen(self.a(x)))).tanh() * self.scale
        return self.b(h) * self.power * self.weights[0]


def load(model):
    with torch.no_grad():
        for p in model.frozen.parameters():
            p.mul_(2)


def replace_frozen(model):
    model.frozen.weight = nn.Parameter(torch.randn(7, 7), requires_grad=False)


def swap_layer(model):
    model.frozen = nn.Linear(7, 7).requires_grad_(False)


CHANGES = {
    "frozen weights are loaded": load,
    "a frozen weight is replaced": replace_frozen,
    "a frozen layer is replaced": swap_layer,
    "an attribute tensor is written": lambda model: model.scale.fill_(3.0),
    "an attribute tensor is replaced": lambda model: setattr(model, "scale", torch.tensor(0.5)),
    "a number is set": lambda model: setattr(model, "power", 0.5),
    "a list is changed": lambda model: model.weights.insert(0, 3.0),
    "a rate of dropout": lambda model: setattr(model.drop, "p", 0.1),
    "evaluation mode": lambda model: model.eval(),
    "evaluation mode of a layer": lambda model: model.norm.eval(),
}


@pytest.mark.filterwarnings("ignore:gradfilter.compile. trace number")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen(change):
    torch.manual_seed(0)
    model = Adjustable()
    step, compiled = pair(model, gf.chain(gf.agree_filter(1.5), gf.sgd(0.1, momentum=0.9)))
    batches = [labelled() for _ in range(4)]
    state = follow(step, compiled, step.init(model, seed=0), batches[:2])
    before = compiled(state, batches[2])[0]
    CHANGES[change](model)
    follow(step, compiled, state, batches[2:])
    assert equal(before["params"], compiled(state, batches[2])[0]["params"]) != []


def autocast(step, compiled, state, batches):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return follow(step, compiled, state, batches)


def other_batch(step, compiled, state, batches):
    doubled = [tuple(torch.cat([t, t]) for t in batch) for batch in batches]
    return follow(step, compiled, state, doubled)


def strides(step, compiled, state, batches):
    turned = [(x.T.contiguous().T, y) for x, y in batches]
    return follow(step, compiled, state, turned)


def half_labels(step, compiled, state, batches):
    return follow(step, compiled, state, [(x, y.to(torch.int32).long()) for x, y in batches])


def deterministic(step, compiled, state, batches):
    torch.use_deterministic_algorithms(True)
    try:
        return follow(step, compiled, state, batches)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:gradfilter.compile. trace number")
@pytest.mark.parametrize(
    ("around", "traces"),
    [(autocast, 2), (other_batch, 2), (strides, 2), (half_labels, 1), (deterministic, 2)],
)
def test_a_change_of_the_call_is_seen(around, traces):
    torch.manual_seed(0)
    model = Adjustable()
    step, compiled = pair(model, gf.chain(gf.agree_filter(1.5), gf.sgd(0.1, momentum=0.9)))
    batches = [labelled() for _ in range(2)]
    state = follow(step, compiled, step.init(model, seed=0), batches)
    state = around(step, compiled, state, batches)
    follow(step, compiled, state, batches)
    assert len(compiled.graphs.entries) == traces


@pytest.mark.filterwarnings("ignore:gradfilter.compile. trace number")
def test_the_set_of_trainable_parameters_is_part_of_the_key():
    model = Adjustable()
    step, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sgd(0.1)))
    batches = [labelled() for _ in range(2)]
    follow(step, compiled, step.init(model, seed=0), batches)
    model.frozen.requires_grad_(True)
    follow(step, compiled, step.init(model, seed=0), batches)
    with pytest.raises(ValueError, match="missing"):
        model.frozen.requires_grad_(False)
        state = step.init(model)
        model.frozen.requires_grad_(True)
        compiled(state, batches[0])


def test_a_learning_rate_of_a_schedule_is_no_other_trace():
    model = Dropped()
    schedule = gf.schedules.cosine(0.1, 6, warmup_steps=2)
    step, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sgd(schedule)))
    follow(step, compiled, step.init(model), [vectors() for _ in range(6)])
    assert len(compiled.graphs.entries) == 1


def test_a_third_trace_warns_and_the_cache_is_bounded():
    from gradfilter.transforms._compile import MOST_TRACES

    plain = lambda params, x: (params["w"] * x).sum(1).mean()
    step = gf.train_step(plain, gf.chain(gf.mean_rows(), gf.sgd(0.1)), microbatches=1)
    compiled = gf.compile(step, backend="graph")
    state = compiled.init({"w": torch.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(state, torch.ones(8, 2))
        compiled(state, torch.ones(3, 2))
    with pytest.warns(
        UserWarning, match="trace number 3 .* state, batch or keywords differ"
    ) as one:
        compiled(state, torch.ones(5, 2))
    assert one[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(1, MOST_TRACES + 5):
            compiled(state, torch.ones(n, 2))
    assert len(compiled.graphs.entries) == MOST_TRACES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(state, torch.ones(MOST_TRACES + 4, 2))


# --- Random numbers ---


def test_a_run_is_reproducible_and_resumes_to_the_bit():
    torch.manual_seed(0)
    model = Everything()
    step, compiled = pair(model, sharp())
    batches = [labelled() for _ in range(4)]
    before = torch.get_rng_state()
    state = start = compiled.init(model, seed=4)
    for batch in batches[:2]:
        state, _ = compiled(state, batch)
    flat = gf.state_dict(state)
    for batch in batches[2:]:
        state, _ = compiled(state, batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    resumed = gf.load_state_dict(compiled.init(model), flat)
    for batch in batches[2:]:
        resumed, _ = gf.compile(step, backend="graph")(resumed, batch)
    assert equal(resumed, state) == []
    assert not torch.equal(start["random"]["cpu"], state["random"]["cpu"])


def test_noise_of_a_transform_is_drawn_anew_in_every_step():
    def update(grads, state, params, /, **extra):
        return {n: g + torch.randn_like(g) for n, g in grads.items()}, state, {}

    noise = gf.transform("noise", "tree -> tree", update)
    model = Dropped()
    step, compiled = pair(model, gf.chain(gf.mean_rows(), noise, gf.sam_perturb(0.1), gf.sgd(0.1)))
    follow(step, compiled, step.init(model, seed=0), [vectors() for _ in range(3)])


class FallsBack(nn.Module):
    """Draws, and then does what no pass over all rows can."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, x):
        h = self.drop(x)
        h = self.drop(h) if False else h
        return self.linear(h) + OldStyle.apply(h)[:, :3]


@pytest.mark.filterwarnings("ignore:Fell back")
def test_the_draws_of_a_pass_that_was_given_up_do_not_count():
    model = FallsBack()
    step, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sam_perturb(0.1), gf.sgd(0.1)))
    follow(step, compiled, step.init(model, seed=0), [vectors() for _ in range(3)])


# --- What cannot be in a graph ---


def cross_entropy_with(act):
    def criterion(output, y):
        loss = F.cross_entropy(output, y)
        act(loss)  # here
        return loss

    return criterion


COUNTS = {"calls": 0}
UNTRACEABLE = {
    "item": (lambda t: t.item(), "reads the value of a tensor"),
    "float": (lambda t: float(t), "reads the value of a tensor"),
    "bool": (lambda t: bool(t > 0), "reads the value of a tensor"),
    "tolist": (lambda t: t.tolist(), "reads the value of a tensor"),
    "numpy": (lambda t: t.detach().numpy(), "numpy"),
    "nonzero": (lambda t: t[None].nonzero(), "depends on values"),
    "python": (lambda t: random.random(), "draws from Python's random"),
    "numpy.random": (lambda t: numpy.random.rand(), "draws from numpy.random"),
    "counter": (lambda t: COUNTS.update(calls=COUNTS["calls"] + 1), "changes attribute"),
}


@pytest.mark.filterwarnings("ignore:Fell back")
@pytest.mark.parametrize(
    ("what", "plan"), [*((what, "auto") for what in UNTRACEABLE), ("item", "loop")]
)
def test_a_loss_that_cannot_be_traced_is_refused_with_the_line(what, plan):
    act, reason = UNTRACEABLE[what]
    model = nn.Linear(6, 3)
    _, compiled = pair(
        model, gf.chain(gf.mean_rows(), gf.sgd(0.1)), cross_entropy_with(act), plan=plan
    )
    COUNTS["calls"] = 0
    drawn, drawn_numpy = random.getstate(), numpy.random.get_state()[2]
    with pytest.raises(RuntimeError, match="The step cannot be traced") as caught:
        compiled(compiled.init(model), vectors())
    text = str(caught.value)
    assert reason in text and "without compiling it" in text
    line = int(text.split(f"{__file__}, line ")[1].split(":")[0].split(".")[0])
    code = Path(__file__).read_text().splitlines()[line - 1]
    assert f'"{what}": (' in code or "# here" in code
    assert random.getstate() == drawn and numpy.random.get_state()[2] == drawn_numpy
    assert COUNTS["calls"] == 0 and compiled.graphs.entries == {}


@pytest.mark.parametrize("what", [*UNTRACEABLE, "own attribute"])
def test_a_transform_that_cannot_be_traced_is_refused_with_the_line(what):
    calls = []
    act, reason = UNTRACEABLE.get(what, (lambda t: calls.append(1), "changes a list"))

    def update(grads, state, params, /, **extra):
        act(next(iter(grads.values())).sum())  # here
        return grads, state, {}

    model = nn.Linear(6, 3)
    bad = gf.masked(gf.named("outer", gf.transform("bad", "tree -> tree", update)), lambda n: True)
    _, compiled = pair(model, gf.chain(gf.mean_rows(), bad, gf.sgd(0.1)))
    with pytest.raises(RuntimeError, match="The step cannot be traced") as caught:
        compiled(compiled.init(model), vectors())
    assert reason in str(caught.value) and f"{__file__}, line" in str(caught.value)
    assert calls == []


def test_a_batchnorm_that_reads_its_counter_is_refused():
    """With momentum=None, torch's module divides by the number of batches on the host."""
    model = ConvBN()
    _, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sgd(0.1)))
    with pytest.raises(RuntimeError, match=r"reads the value of a tensor, in .*_models.py, line"):
        compiled(compiled.init(model), images())


class Stash(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        self.output = self.linear(x)
        return self.output


def test_an_activation_in_an_attribute_is_refused_and_no_fake_tensor_stays():
    model = Stash()
    _, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sgd(0.1)))
    with pytest.raises(
        RuntimeError, match=r"changes attribute 'output'.*test_compile.py, line \d+"
    ):
        compiled(compiled.init(model), vectors())
    assert not hasattr(model, "output")
    copy.deepcopy(model)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class StashOfOwnLayer(Stash):
    def __init__(self):
        super().__init__()
        self.linear = Doubled(6, 3)


@pytest.mark.parametrize("between", ["a function of the user's", "the garbage collector"])
def test_the_line_is_found_when_other_code_runs_in_the_middle_of_it(between):
    model = Stash() if between == "the garbage collector" else StashOfOwnLayer()
    if between == "the garbage collector":
        model.linear.register_forward_hook(lambda *a: gc.collect(0) and None)
    _, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sgd(0.1)))
    line = inspect.getsourcelines(Stash.forward)[1] + 1

    def callback(phase, info):
        assert phase in ("start", "stop")

    gc.callbacks.append(callback)
    try:
        with pytest.raises(RuntimeError, match=rf"'output'.*test_compile.py, line {line}\."):
            compiled(compiled.init(model), vectors())
    finally:
        gc.callbacks.remove(callback)


def test_a_generator_of_ones_own_and_draws_of_a_recomputation_are_refused():
    generator = torch.Generator()
    noisy = lambda output, y: F.cross_entropy(output, y) + torch.rand((), generator=generator)
    model = nn.Linear(6, 3)
    _, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sgd(0.1)), noisy, plan="loop")
    with pytest.raises(RuntimeError, match=r"torch\.Generator of one's own"):
        compiled(compiled.init(model), vectors())

    class Checkpointed(Dropped):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed()
    _, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sgd(0.1)), plan="loop")
    with pytest.raises(RuntimeError, match="in a backward pass, as activation checkpointing does"):
        compiled(compiled.init(model), vectors())


def test_bad_arguments():
    step = gf.train_step(lambda p, x: (p["w"] * x).mean(), gf.chain(gf.mean_rows(), gf.sgd(0.1)))
    for wrong in (nn.Linear(2, 2), gf.mean_rows(), step.grads_of, nn.Linear, 3):
        with pytest.raises(TypeError, match="Expected a step made by train_step, or a function"):
            gf.compile(wrong)
    with pytest.raises(ValueError, match='Expected backend "inductor", "graph" or a function'):
        gf.compile(step, backend="cuda")
    compiled = gf.compile(step, backend="graph")
    state = compiled.init({"w": torch.ones(2)})
    with pytest.raises(TypeError, match=r"step\(state, \(x, y\)\)"):
        compiled(state, torch.ones(2, 2), torch.ones(2))
    with pytest.raises(TypeError, match=r"Begin with state = step\.init"):
        compiled(nn.Linear(1, 1), torch.ones(2, 2))


# --- Functions of the user's own ---


def test_a_function_of_a_gradient_function_and_a_chain():
    model = Dropped()
    grads_of = gf.per_sample_grads(gf.model_loss(model, F.cross_entropy))
    chain = gf.chain(gf.clip_per_row(0.5), gf.mean_rows(), gf.sgd(0.1, momentum=0.9))

    def step(state, batch):
        params, inner = state
        rows = grads_of(params, batch)
        params, inner, info = chain(params, inner, rows)
        return (params, inner), {"loss": rows.mean_loss(), "norms": rows.sq_norms(), **info}

    compiled = gf.compile(step, backend="graph")
    params, _ = gf.extract(model)
    own = state = params, chain.init(params)
    for seed in range(4):
        batch = vectors()
        model.train(seed != 2)
        torch.manual_seed(seed)
        with formulas():
            state, info = step(state, batch)
        numbers = torch.get_rng_state()
        torch.manual_seed(seed)
        own, found = compiled(own, batch)
        assert equal(own, state) == [] and equal(found, info) == []
        assert torch.equal(torch.get_rng_state(), numbers)
    assert len(compiled.graphs.entries) == 2  # training mode and the other one


def test_a_function_around_a_training_step():
    model = Dropped()
    chain = gf.chain(gf.mean_rows(), gf.sam_perturb(0.05), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), chain, microbatches=3)

    class Loop:
        factor = 0.5

        def twice(self, state, batch):
            state, first = step(state, batch)
            state, second = step(state, batch)
            return state, {"drop": self.factor * (first["loss"] - second["loss"])}

    loop = Loop()
    compiled = gf.compile(loop.twice, backend="graph")
    state = own = step.init(model, seed=3)
    for factor in (0.5, 0.5, 2.0):
        loop.factor = factor
        batch, before = vectors(), torch.get_rng_state()
        with formulas():
            state, info = loop.twice(state, batch)
        own, found = compiled(own, batch)
        assert equal(own, state) == [] and equal(found, info) == []
        assert torch.equal(torch.get_rng_state(), before)


def test_a_function_that_sets_generators_is_refused():
    model = Dropped()
    chain = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), chain, microbatches=3)

    def hidden(state, batch):
        new, info = step(state["of the step"], batch)
        return {"of the step": new}, info

    with pytest.raises(RuntimeError, match="cannot set torch's generators to a state"):
        gf.compile(hidden, backend="graph")({"of the step": step.init(model)}, vectors())


# --- Compilers ---


def test_a_function_gets_the_graph():
    seen = []

    def backend(graph):
        seen.append(graph)
        return graph

    model = Dropped()
    step, compiled = pair(model, gf.chain(gf.mean_rows(), gf.sgd(0.1)), backend=backend)
    follow(step, compiled, step.init(model, seed=0), [vectors() for _ in range(2)])
    (graph,) = seen
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert isinstance(graph, torch.fx.GraphModule)
    assert any("bernoulli" in name for name in names) and "aten.alias.default" not in names


@pytest.mark.slow
def test_inductor_agrees_and_repeats_itself_to_the_bit():
    torch.manual_seed(0)
    model = Everything()
    update = gf.chain(gf.agree_filter(1.5), gf.sam_perturb(0.05), gf.sgd(0.1, momentum=0.9))
    step, compiled = pair(model, update, backend="inductor")
    state = own = step.init(model, seed=0)
    for _ in range(3):
        batch = labelled()
        with torch._inductor.config.patch(fallback_random=True):  # the same draws as eager ones
            state, info = step(state, batch)
            own, found = compiled(own, batch)
        close(own["params"], state["params"], 1e-12)
        close(own["transforms"], state["transforms"], 1e-12)
        torch.testing.assert_close(found["loss"], info["loss"], rtol=1e-12, atol=1e-12)
    once, again = compiled(own, batch)[0], compiled(own, batch)[0]
    assert equal(once, again) == []
