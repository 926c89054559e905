"""Everything that a pass depends on, reads, writes and leaves in addition to its arguments.

Random numbers of the host, attributes of modules, in-place writes, other threads. The reference is
an ordinary backward pass per microbatch on the plain module.
"""

import copy
import io
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _plain import module_rows
from gradfilter import diagnostics
from gradfilter.interop import SAM, Filtered

pytestmark = pytest.mark.usefixtures("float64")

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(12) % 5
SAME = X[:2].repeat(6, 1), Y[:2].repeat(6)  # rows that differ by what was drawn alone


class Scaled(nn.Module):
    """A network whose output is multiplied by what a function of the module says."""

    def __init__(self, scale):
        super().__init__()
        self.n = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        self.scale = scale

    def forward(self, x):
        return self.n(x) * self.scale(self)


def python(module):
    return random.uniform(1, 4)


def numpy_global(module):
    return float(np.random.uniform(1, 4))


def own_numpy(module):
    return float(module.rng.uniform(1, 4))


def own_python(module):
    return module.rng.uniform(1, 4)


def own_torch(module):
    return 1 + 3 * torch.rand((), generator=module.rng)


GENERATORS = {
    python: lambda: None,
    numpy_global: lambda: None,
    own_numpy: lambda: np.random.default_rng(0),
    own_python: lambda: random.Random(0),
    own_torch: lambda: torch.Generator().manual_seed(0),
}


def model_that_draws(scale):
    torch.manual_seed(1)
    random.seed(0)
    np.random.seed(0)
    model = Scaled(scale)
    model.rng = GENERATORS[scale]()
    return model


def quiet_rows(model, batch, m, plan, criterion=F.cross_entropy, **kwargs):
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return params, gf.microbatch_grads(loss, m, plan=plan, **kwargs)(
            params, batch, buffers=buffers
        )


@pytest.mark.parametrize("plan", ["auto", "loop"])
@pytest.mark.parametrize("scale", GENERATORS)
def test_every_row_has_a_draw_of_its_own_and_repeats_it(scale, plan):
    model = model_that_draws(scale)
    params, rows = quiet_rows(model, SAME, 6, plan)
    assert len({round(float(v), 9) for v in rows.losses}) == 6
    weights = torch.linspace(0.1, 1, 6)
    combined = rows.combine(weights)
    rows.release()
    stacked = rows.stacked()
    for name, leaf in stacked.items():
        want = torch.einsum("m,m...->...", weights, leaf)
        torch.testing.assert_close(combined[name], want, rtol=1e-10, atol=1e-12)
    state = random.getstate()
    again = rows.at(params)
    torch.testing.assert_close(again.losses, rows.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(again.stacked(), stacked, rtol=1e-10, atol=1e-12)
    assert random.getstate() == state


@pytest.mark.parametrize("plan", ["fused", "vmap"])
@pytest.mark.parametrize("scale", [python, numpy_global, own_numpy, own_python])
def test_one_draw_for_all_rows_is_refused_by_name(scale, plan):
    model = model_that_draws(scale)
    source = {python: "Python's random", numpy_global: r"numpy\.random"}.get(scale, "rng")
    with pytest.raises(RuntimeError, match=f"draws random numbers from {source}"):
        quiet_rows(model, SAME, 6, plan)


def test_auto_says_why_it_took_the_loop():
    model = model_that_draws(python)
    params, _ = gf.extract(model)
    with pytest.warns(UserWarning, match=r"Fell back to plan \"loop\": .* Python's random") as seen:
        gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 6)(params, SAME)
    assert seen[0].filename == __file__


@pytest.mark.parametrize("scale", GENERATORS)
def test_the_second_pass_of_sam_draws_the_numbers_of_the_first(scale):
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        losses.append(loss.item())
        return loss

    model = model_that_draws(scale)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SAM(model.parameters(), base, rho=0.0)
    optimizer.step(closure)
    assert losses[0] == losses[1]
    optimizer.step(closure)
    assert losses[2] == losses[3]
    assert losses[2] != losses[0]


@pytest.mark.parametrize("scale", GENERATORS)
def test_sharpness_compares_two_points_at_one_draw(scale):
    model = model_that_draws(scale)
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    assert diagnostics.sharpness(loss, params, (X, Y), buffers=buffers, rho=0.0) == 0


def counts(module):
    module.calls = getattr(module, "calls", 0) + 1
    return module.calls


@pytest.mark.parametrize("plan", ["fused", "vmap"])
def test_a_counter_in_an_attribute_is_refused_by_name(plan):
    model = Scaled(counts)
    model.calls = 0
    with pytest.raises(RuntimeError, match="changes attribute 'calls'"):
        quiet_rows(model, (X, Y), 3, plan)


def test_a_counter_counts_rows_in_the_loop_and_repeats_them():
    model = Scaled(counts)
    model.calls = 0
    params, rows = quiet_rows(model, (X, Y), 3, "auto")
    assert model.calls == 3
    for m, (x, y) in enumerate(zip(X.chunk(3), Y.chunk(3), strict=True)):
        want = F.cross_entropy(model.n(x) * (m + 1), y)
        torch.testing.assert_close(rows.losses[m], want.detach())
    torch.testing.assert_close(rows.at(params).losses, rows.losses)
    assert model.calls == 3


def carries_a_state(module):
    if getattr(module, "state", None) is None:
        module.state = torch.ones(())
    module.state = module.state * 0.5
    return module.state


@pytest.mark.parametrize("plan", ["fused", "vmap", "auto"])
def test_a_state_in_an_attribute_is_handed_from_row_to_row_or_refused(plan):
    for begun in (None, torch.ones(())):
        model = Scaled(carries_a_state)
        model.state = begun
        if plan != "auto":
            with pytest.raises(RuntimeError, match="attribute 'state'"):
                quiet_rows(model, (X, Y), 3, plan)
            continue
        _, rows = quiet_rows(model, (X, Y), 3, plan)
        for m, (x, y) in enumerate(zip(X.chunk(3), Y.chunk(3), strict=True)):
            want = F.cross_entropy(model.n(x) * 0.5 ** (m + 1), y)
            torch.testing.assert_close(rows.losses[m], want.detach())


class Habit(nn.Module):
    """A linear layer, and what a test wants done in the forward pass."""

    count = 0

    def __init__(self, forward, **attributes):
        super().__init__()
        self.n, self.does = nn.Linear(6, 5), forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.does(self, self.n(x), x)


def counts_in_a_list(module, h, x):
    module.count[0] += 1
    return 2 * h if module.count[0] > 2 else h


def counts_in_a_tuple(module, h, x):
    module.count = (module.count[0] + 1,)
    return 2 * h if module.count[0] > 2 else h


def reads_a_transposed_state(module, h, x):
    h = h + x @ module.h.T
    module.h = h.detach().T @ x / 9
    return h


def reads_a_state_by_data(module, h, x):
    h = h + x @ module.h.data.t()
    module.h = h.detach().T @ x / 9
    return h


def holds_a_state_twice(module, h, x):
    h = h + x @ module.h.t()
    module.h = h.detach().T @ x / 9
    return h


def counts_in_an_object(module, h, x):
    module.count.n += 1
    return 2 * h if module.count.n > 2 else h


def reads_a_state_of_an_object(module, h, x):
    h = h + x @ module.h.state
    module.h.state = x.t() @ h.detach() / 9
    return h


def counts_in_the_class(module, h, x):
    type(module).count += 1
    return 2 * h if module.count > 2 else h


class Notes:
    """A plain object that a module holds."""

    def __init__(self, **values):
        vars(self).update(values)


def state():
    return torch.linspace(-1, 1, 30).view(5, 6)


def shared_state():
    held = state()
    return {"h": held, "history": [held]}


HABITS = {
    counts_in_a_list: lambda: {"count": [0]},
    counts_in_a_tuple: lambda: {"count": (0,)},
    reads_a_transposed_state: lambda: {"h": state()},
    reads_a_state_by_data: lambda: {"h": state()},
    holds_a_state_twice: shared_state,
    counts_in_an_object: lambda: {"count": Notes(n=0)},
    reads_a_state_of_an_object: lambda: {"h": Notes(state=state().t())},
    counts_in_the_class: dict,
}


def plain_rows_of(model, m, x=X):
    return module_rows(model, F.cross_entropy, (x, Y), m)


@pytest.mark.parametrize("habit", HABITS)
def test_what_a_row_leaves_for_the_next_is_handed_on_or_refused(habit, monkeypatch):
    monkeypatch.setattr(Habit, "count", 0)
    model = Habit(habit, **HABITS[habit]())
    want = copy.deepcopy(model)
    for plan in ("fused", "vmap"):
        with pytest.raises(RuntimeError, match=r"attribute '(Habit\.count|(count|h)(\.\w+)?)'"):
            quiet_rows(copy.deepcopy(model), (X, Y), 4, plan)
        Habit.count = 0
    losses, stacked = plain_rows_of(want, 4)
    Habit.count = 0
    _, rows = quiet_rows(model, (X, Y), 4, "auto")
    torch.testing.assert_close(rows.losses, losses)
    torch.testing.assert_close(rows.stacked(), stacked)


def test_a_container_in_a_container_is_what_it_was_at_every_pass():
    def lengthens(module, h, x):
        module.seen["rows"].append(1)
        return h * len(module.seen["rows"])

    model = Habit(lengthens, seen={"rows": []})
    params, rows = quiet_rows(model, (X, Y), 4, "loop")
    for _ in range(3):
        assert torch.equal(rows.at(params).losses, rows.losses)
    assert model.seen == {"rows": [1, 1, 1, 1]}


@pytest.mark.parametrize("plan", ["fused", "vmap"])
def test_an_equal_number_written_again_is_no_change(plan):
    def notes_its_size(module, h, x):
        module.size, module.sizes = 1000 * len(x), [1000 * len(x)]
        return h

    model = Habit(notes_its_size)
    for _ in range(3):
        _, rows = quiet_rows(model, (X, Y), 4, plan)
    losses, _ = plain_rows_of(model, 4)
    torch.testing.assert_close(rows.losses, losses)
    assert model.size == 3000 and model.sizes == [3000]


def test_another_pass_leaves_the_modes_as_they_were():
    def freezes(module, h, x):
        module.part.eval()
        return module.part(h)

    model = Habit(freezes, part=nn.Dropout(0.5))
    params, rows = quiet_rows(model, (X, Y), 4, "auto")
    model.eval()
    rows.at(params)
    assert not model.part.training


def test_a_forward_of_an_object_may_draw_on_the_host():
    def replaced():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5))
        model.forward = lambda x: nn.Sequential.forward(model, x) * random.uniform(1, 4)
        random.seed(0)
        return model

    losses, stacked = plain_rows_of(replaced(), 4)
    _, rows = quiet_rows(replaced(), (X, Y), 4, "auto")
    torch.testing.assert_close(rows.losses, losses)
    torch.testing.assert_close(rows.stacked(), stacked)


def registers_a_buffer(module, h, x):
    if "first" not in module._buffers:
        module.register_buffer("first", x.detach().mean())
    return h * module.first


def registers_a_module(module, h, x):
    if "more" not in module._modules:
        module.add_module("more", nn.Linear(5, 5))
    return module.more(h)


@pytest.mark.parametrize(
    "habit, plan",
    [
        *((registers_a_buffer, plan) for plan in ("auto", "fused", "vmap", "loop")),
        *((registers_a_module, plan) for plan in ("auto", "loop")),
    ],
)
def test_a_part_that_appears_in_the_forward_pass_is_taken_back_and_refused(habit, plan):
    model = Habit(habit)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=r"keeps the parts of the module, found '(first|more)'"):
        quiet_rows(model, (X, Y), 4, plan)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("plan", ["auto", "fused", "vmap", "loop"])
def test_a_module_without_tensors_may_appear_in_the_forward_pass(plan):
    def registers_a_function(module, h, x):
        module.act = nn.Tanh()
        return module.act(h)

    model = Habit(registers_a_function)
    losses, _ = plain_rows_of(copy.deepcopy(model), 4)
    _, rows = quiet_rows(model, (X, Y), 4, plan)
    torch.testing.assert_close(rows.losses, losses)


@pytest.mark.parametrize("plan", ["auto", "fused", "vmap", "loop"])
def test_a_buffer_that_is_given_up_is_refused_by_name(plan):
    def gives_up(module, h, x):
        module.n.seen = None
        return h

    model = Habit(gives_up)
    model.n.register_buffer("seen", torch.zeros(3))
    with pytest.raises(ValueError, match=r"keeps the set of buffers, found 'n\.seen' removed"):
        quiet_rows(model, (X, Y), 4, plan)
    assert torch.equal(model.n.seen, torch.zeros(3))


@pytest.mark.parametrize("plan", ["auto", "fused", "vmap", "loop"])
def test_tied_buffers_that_come_apart_are_refused(plan):
    def replaces_one(module, h, x):
        h = h + module.n.other
        module.n.other = h.detach().mean()
        return h

    model = Habit(replaces_one)
    model.n.register_buffer("seen", torch.zeros(()))
    model.n.register_buffer("other", model.n.seen)
    with pytest.raises(ValueError, match="stay tied, found 'other' replaced"):
        quiet_rows(model, (X, Y), 4, plan)
    assert model.n.other is model.n.seen and model.n.seen == 0


@pytest.mark.parametrize("plan, m", [("auto", 1), ("auto", 4), ("loop", 4), ("vmap", 4)])
def test_a_loss_that_raises_leaves_the_modules_their_own_parameters(plan, m):
    def caches_and_raises(module, h, x):
        module.cached = [module.n.weight]
        raise ValueError("bad row")

    model = Habit(caches_and_raises)
    with pytest.raises(ValueError, match="bad row"):
        quiet_rows(model, (X, Y), m, plan)
    assert not hasattr(model, "cached") or model.cached[0] is model.n.weight


class Remembers(nn.Module):
    """Keeps activations in an attribute, a list, a dict and a tuple."""

    def __init__(self, recurrent):
        super().__init__()
        self.n, self.rnn = nn.Linear(6, 8), None
        if recurrent:
            self.rnn = nn.LSTM(8, 5, batch_first=True)
        self.last, self.several, self.named, self.pair = None, [None], {}, None

    def forward(self, x):
        h = self.n(x)
        self.last = h.detach()
        self.several[0] = h.detach() * 2
        self.named["h"] = h.detach() * 3
        self.pair = h.detach() * 4, x.shape
        return h[:, :5] if self.rnn is None else self.rnn(h[:, None])[0][:, 0]


@pytest.mark.parametrize("plan", ["fused", "vmap", "loop", "auto"])
def test_what_a_module_remembers_is_the_last_row(plan):
    model = Remembers(recurrent=plan != "vmap")  # torch has no rule for LSTM there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, buffers = gf.extract(model)
        loss = gf.model_loss(model, F.cross_entropy)
        for _ in range(2):
            gf.microbatch_grads(loss, 3, plan=plan)(params, (X, Y), buffers=buffers).gram()
    want = model.n(X[8:]).detach()
    torch.testing.assert_close(model.last, want)
    torch.testing.assert_close(model.several[0], want * 2)
    torch.testing.assert_close(model.named["h"], want * 3)
    torch.testing.assert_close(model.pair[0], want * 4)
    if model.rnn is not None:
        own = zip(model.rnn.parameters(), model.rnn._flat_weights, strict=True)
        assert all(p is w for p, w in own)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.last, want)
    torch.save(model, io.BytesIO())


def test_lists_of_the_users_own_parameters_stay_as_they_are():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    model.mine = [model[0].weight, {"b": model[0].bias}]
    for plan in ("fused", "vmap", "loop"):
        quiet_rows(model, (X, Y), 3, plan)
        assert model.mine[0] is model[0].weight and model.mine[1]["b"] is model[0].bias


class WritesItsBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 5))

    def forward(self, x):
        x.sub_(0.3)
        x[:, 0] = 1.0
        return self.n(x)


@pytest.mark.parametrize("plan, m", [("fused", 3), ("auto", 1), ("loop", 3), ("vmap", 3)])
def test_a_forward_pass_that_writes_into_the_batch(plan, m):
    model, x = WritesItsBatch(), X.clone()
    params, rows = quiet_rows(model, (x, Y), m, plan)
    assert torch.equal(x, X)
    want = [
        F.cross_entropy(model(part.clone()), y).detach()
        for part, y in zip(X.chunk(m), Y.chunk(m), strict=True)
    ]
    torch.testing.assert_close(rows.losses, torch.stack(want))
    first = rows.combine(torch.ones(m))
    rows.release()
    torch.testing.assert_close(rows.combine(torch.ones(m)), first)
    torch.testing.assert_close(rows.at(params).losses, rows.losses)


@pytest.mark.parametrize("plan, m", [("auto", 3), ("auto", 1), ("fused", 3), ("loop", 3)])
def test_parameters_written_between_questions_are_seen(plan, m):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    params, rows = quiet_rows(model, (X, Y), m, plan)
    before = rows.gram().clone()
    grads = rows.combine(torch.full((m,), 1 / m))
    rows.release()
    for name, p in params.items():
        p.sub_(grads[name])
    if plan == "loop":
        assert torch.equal(rows.gram(), before)  # the rows are what the stack is
    else:
        torch.testing.assert_close(rows.gram(), before)
        with pytest.raises(RuntimeError, match=r"'0\.weight' written in place since"):
            rows.stacked()
    with pytest.raises(RuntimeError, match=r"parameter '2\.bias' written in place since"):
        rows.at({name: p for name, p in params.items() if name != "2.bias"})
    there = rows.at(params)  # all of them given: where they are now
    fresh = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), m)(params, (X, Y))
    torch.testing.assert_close(there.losses, fresh.losses)
    want = fresh.stacked()
    elsewhere = {name: p.clone() for name, p in params.items()}
    apart = rows.at(elsewhere)
    apart.gram()
    apart.release()
    params["0.weight"].add_(1)  # no matter of a stack at other parameters
    torch.testing.assert_close(apart.stacked(), want)
    if plan != "loop":
        apart.release()
        elsewhere["2.bias"].add_(1)
        with pytest.raises(RuntimeError, match=r"'2\.bias' written in place since"):
            apart.stacked()


@pytest.mark.parametrize("what", ["batch", "buffer", "attribute"])
def test_other_tensors_written_between_questions_are_seen(what):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).eval()
    model.mask = torch.ones(3)
    params, buffers = gf.extract(model)
    batch = X.clone(), Y
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3)(
        params, batch, buffers=buffers
    )
    tensor = {"batch": batch[0], "buffer": buffers["1.running_mean"], "attribute": model.mask}[what]
    tensor.add_(1)
    with pytest.raises(RuntimeError, match=f"{what}.* written in place since"):
        rows.at(params)


def test_a_fused_optimizer_leaves_no_trace_and_is_seen_by_the_losses():
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    params = dict(model.named_parameters())
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3)(params, (X, Y))
    for name, grad in rows.combine(torch.ones(3)).items():
        params[name].grad = grad
    optimizer.step()
    rows.release()
    with pytest.raises(RuntimeError, match=r"losses of the first|written in place since"):
        rows.stacked()


class Clamps(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.n, self.how = nn.Linear(6, 5), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                self.n.weight.clamp_(-0.1, 0.1)
        elif self.how == "data":
            self.n.weight.data.clamp_(-0.1, 0.1)
        else:
            self.n.weight.data = self.n.weight.data * 0.9
        return self.n(x)


@pytest.mark.parametrize("plan, m", [("auto", 3), ("auto", 1), ("loop", 3), ("vmap", 3)])
@pytest.mark.parametrize("how", ["no_grad", "data", "set data"])
def test_a_forward_pass_that_writes_its_parameters_is_refused_before_it_does(how, plan, m):
    model = Clamps(how)
    before = copy.deepcopy(model.state_dict())
    params, _ = gf.extract(model)
    given = {name: p.clone() for name, p in params.items()}
    loss = gf.model_loss(model, F.cross_entropy)
    with pytest.raises(ValueError, match=r"parameter 'n\.weight' written in place in the forward"):
        gf.microbatch_grads(loss, m, plan=plan)(params, (X, Y))
    assert all(torch.equal(params[name], value) for name, value in given.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class BehindTheWatch(nn.Module):
    """Writes a buffer in a way that raises no version, or puts a counter to another use."""

    def __init__(self, how):
        super().__init__()
        self.n, self.how = nn.Linear(6, 5), how
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        if self.how == "data":
            self.seen.data.add_(1)
        elif self.how == "numpy":
            self.seen.numpy()[...] += 1
        elif self.how == "multiplied":
            self.num_batches_tracked.add_(1).mul_(2)
        elif self.how == "read":
            self.num_batches_tracked.add_(1)
            return self.n(x) / self.num_batches_tracked
        return self.n(x) * (1 + self.seen)


@pytest.mark.parametrize("how", ["data", "numpy", "multiplied", "read"])
def test_buffers_written_behind_the_watch_are_handed_from_row_to_row(how):
    want = BehindTheWatch(how)
    model = copy.deepcopy(want)
    losses = [F.cross_entropy(want(x), y) for x, y in zip(X.chunk(3), Y.chunk(3), strict=True)]
    _, rows = quiet_rows(model, (X, Y), 3, "auto")
    torch.testing.assert_close(rows.losses, torch.stack(losses).detach())
    torch.testing.assert_close(rows.buffers, dict(want.named_buffers()))
    assert model.seen == 0 and model.num_batches_tracked == 0
    for plan in ("fused", "vmap"):
        with pytest.raises(RuntimeError, match=r"'(seen|num_batches_tracked)'"):
            quiet_rows(model, (X, Y), 3, plan)


class OwnMomentum(nn.BatchNorm1d):
    """Averages its statistics by a momentum that it reads off its counter."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        momentum = 2.0 / (1.0 + float(self.num_batches_tracked))
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps
        )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_norm_with_a_momentum_of_its_own(momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), OwnMomentum(8, momentum=momentum), nn.Linear(8, 5))
    want = copy.deepcopy(model)
    for x in X.chunk(3):
        want(x)
    _, rows = quiet_rows(model, (X, Y), 3, "auto")
    torch.testing.assert_close(rows.buffers, dict(want.named_buffers()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plan", ["loop", "fused", "auto"])
def test_threads_that_share_a_module(plan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    own = dict(model.named_parameters())
    loss = gf.model_loss(model, F.cross_entropy)
    grads_of = gf.microbatch_grads(loss, 3, plan=plan)
    points = [{name: p.detach() + 0.1 * k for name, p in own.items()} for k in range(4)]
    want = [grads_of(params, (X, Y)).stacked() for params in points]
    wrong: list[object] = []

    def work(k):
        try:
            for _ in range(8):
                got = grads_of(points[k], (X, Y)).stacked()
                if not all(torch.allclose(got[n], want[k][n], rtol=1e-10) for n in got):
                    wrong.append(k)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p is own[name] for name, p in model.named_parameters())


def test_the_modules_own_tensors_are_back_whatever_happens():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    own = [*model.parameters(), *model.buffers()]

    def criterion(out, y):
        model[1]._buffers["running_mean"] = torch.zeros(3)
        raise KeyboardInterrupt

    for plan in ("fused", "loop", "vmap", "auto"):
        with pytest.raises(KeyboardInterrupt):
            quiet_rows(model, (X, Y), 3, plan, criterion)
        assert all(
            a is b for a, b in zip([*model.parameters(), *model.buffers()], own, strict=True)
        )


class Resized(nn.Module):
    """Replaces a table of positions by one for the present size, as some vision models do."""

    def __init__(self):
        super().__init__()
        self.n = nn.Linear(6, 5)
        self.register_buffer("table", torch.zeros(3))

    def forward(self, x):
        if len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)
        return self.n(x + self.table)


def test_a_buffer_that_forward_replaces_by_another_shape_is_written_back():
    model = Resized()
    filtered = Filtered(
        model, F.cross_entropy, gf.mean_rows(), torch.optim.SGD(model.parameters(), lr=0.1), 3
    )
    with pytest.warns(UserWarning, match="'table'"):
        filtered.step(X, Y)
    assert torch.equal(model.table, torch.arange(6).double())
    filtered.step(X, Y)
    with pytest.raises(ValueError, match="shape"):
        gf.insert(model, {"n.bias": torch.zeros(7)}, {"table": torch.zeros(9)})
    assert len(model.table) == 6


class BackwardRefuses(torch.autograd.Function):
    """Runs forward under vmap; its backward pass asks for a number that differs from row to row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (2 if bool(x.sum() > 0) else 3)


class Branches(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.a, self.b, self.d = nn.Linear(6, 8), nn.Linear(8, 5), nn.Dropout(dropout)

    def forward(self, x):
        return self.b(self.d(BackwardRefuses.apply(self.a(x))))


@pytest.mark.parametrize("first", ["gram", "combine", "stacked", "sq_norms"])
def test_a_refusal_in_the_backward_pass_falls_back_as_one_in_the_forward_pass(first):
    model = Branches()
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    want = gf.microbatch_grads(loss, 3, plan="loop")(params, (X, Y), buffers=buffers)
    rows = gf.microbatch_grads(loss, 3)(params, (X, Y), buffers=buffers)
    weights = torch.linspace(0.5, 1, 3)
    ask = {
        "gram": lambda r: r.gram(),
        "combine": lambda r: r.combine(weights),
        "stacked": lambda r: r.stacked(),
        "sq_norms": lambda r: r.sq_norms(),
    }
    with pytest.warns(UserWarning, match="Fell back to plan"):
        got = ask[first](rows)
    torch.testing.assert_close(got, ask[first](want))
    for question in ask.values():
        torch.testing.assert_close(question(rows), question(want))


def test_no_fallback_to_other_random_numbers():
    model = Branches(dropout=0.5)
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3)(params, (X, Y))
    with pytest.raises(RuntimeError, match="drew their random numbers all at once"):
        rows.gram()


def test_at_falls_back_where_rows_no_longer_agree():
    def loss(params, batch):
        x, y = batch
        h = x @ params["w"]
        w = (params["w"].sum() + 1e-3 * x.sum()).detach()
        return (
            F.cross_entropy(h.abs() if w.numpy() > 0 else h, y)
            if params["w"].sum() < 0
            else (F.cross_entropy(h, y))
        )

    torch.manual_seed(0)
    params = {"w": torch.rand(6, 5)}
    rows = gf.microbatch_grads(loss, 3)(params, (X, Y))
    elsewhere = {"w": -params["w"]}
    want = gf.microbatch_grads(loss, 3, plan="loop")(elsewhere, (X, Y))
    with pytest.warns(UserWarning, match="Fell back to plan"):
        there = rows.at(elsewhere)
    torch.testing.assert_close(there.losses, want.losses)
    torch.testing.assert_close(there.stacked(), want.stacked())
