"""State outside of parameters and buffers, wherever a loss reaches it: every row has its own."""

import collections
import contextlib
import pprint
import warnings
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _plain import module_rows
from gradfilter import diagnostics
from gradfilter.grads._state_owners import SEARCHED, PlainValues, owners_in
from gradfilter.interop import SAM, Filtered, step_gaf

pytestmark = pytest.mark.usefixtures("float64")
M = 4


# --- State: each factory makes a function (output, targets) -> loss with a state of its own ---


def counted(self, output, targets):
    self.calls += 1
    return self.calls * F.mse_loss(output, targets)


class Counter:
    def __init__(self):
        self.calls = 0

    __call__ = counted


class CountingModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    forward = counted


class BufferedModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output, targets):
        self.calls = self.calls + 1
        return self.calls * F.mse_loss(output, targets)


class Slotted:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    __call__ = counted


class Previous:
    def __init__(self):
        self.loss = torch.zeros(())

    def __call__(self, output, targets):
        loss = F.mse_loss(output, targets) + self.loss * output.mean()
        self.loss = loss.detach()
        return loss


class Noisy:
    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __call__(self, output, targets):
        return self.generator.random() * F.mse_loss(output, targets)


class NoisyTorch:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, output, targets):
        return torch.rand((), generator=self.generator) * F.mse_loss(output, targets)


def class_counter():
    class ClassCounter:
        calls = 0

        def __call__(self, output, targets):
            type(self).calls += 1
            return type(self).calls * F.mse_loss(output, targets)

    return ClassCounter()


def nonlocal_counter():
    calls = 0

    def loss(output, targets):
        nonlocal calls
        calls += 1
        return calls * F.mse_loss(output, targets)

    return loss


GLOBAL_CALLS = 0


def global_counter():
    global GLOBAL_CALLS
    GLOBAL_CALLS = 0

    def loss(output, targets):
        global GLOBAL_CALLS
        GLOBAL_CALLS += 1
        return GLOBAL_CALLS * F.mse_loss(output, targets)

    return loss


def list_counter():
    calls = [0]

    def loss(output, targets):
        calls[0] += 1
        return calls[0] * F.mse_loss(output, targets)

    return loss


def dict_counter():
    state = {"calls": 0, "seen": []}

    def loss(output, targets):
        state["calls"] += 1
        state["seen"].append(state["calls"])
        return state["calls"] * F.mse_loss(output, targets)

    return loss


def nonlocal_previous():
    previous = torch.zeros(())

    def loss(output, targets):
        nonlocal previous
        loss = F.mse_loss(output, targets) + previous * output.mean()
        previous = loss.detach()
        return loss

    return loss


def list_previous():
    previous = [torch.zeros(())]

    def loss(output, targets):
        loss = F.mse_loss(output, targets) + previous[0] * output.mean()
        previous[0] = loss.detach()
        return loss

    return loss


def closed_over_generator():
    generator = np.random.default_rng(3)
    return lambda output, targets: generator.random() * F.mse_loss(output, targets)


def nested_counter():
    calls = 0

    def loss(output, targets):
        def count():
            nonlocal calls
            calls += 1
            return calls

        return sum(count() for _ in range(1)) * F.mse_loss(output, targets)

    return loss


def function_attribute():
    def loss(output, targets):
        loss.calls = getattr(loss, "calls", 0) + 1
        return loss.calls * F.mse_loss(output, targets)

    return loss


def named_class():
    class Calls:
        calls = 0

        @classmethod
        def count(cls):
            cls.calls += 1
            return cls.calls

    return lambda output, targets: Calls.count() * F.mse_loss(output, targets)


def default_dict():
    state = defaultdict(int, calls=0)

    def loss(output, targets):
        state["calls"] += 1
        return state["calls"] * F.mse_loss(output, targets)

    return loss


def counts_by_name():
    state = collections.Counter(calls=0)

    def loss(output, targets):
        state.update(["calls"])
        return state["calls"] * F.mse_loss(output, targets)

    return loss


def namespace():
    state = SimpleNamespace(calls=0)

    def loss(output, targets):
        state.calls += 1
        return state.calls * F.mse_loss(output, targets)

    return loss


def replaced_tuple():
    state = {"calls": (0,)}

    def loss(output, targets):
        state["calls"] = (state["calls"][0] + 1,)
        return state["calls"][0] * F.mse_loss(output, targets)

    return loss


def tensor_in_place():
    calls = torch.zeros(())

    def loss(output, targets):
        calls.add_(1)
        return calls.clone() * F.mse_loss(output, targets)

    return loss


def taken_from_a_list():
    calls = [4.0, 3.0, 2.0, 1.0] * 50
    return lambda output, targets: calls.pop() * F.mse_loss(output, targets)


SHARED = SimpleNamespace(calls=0)


class GlobalInMethod:
    def __init__(self):
        SHARED.calls = 0

    def __call__(self, output, targets):
        SHARED.calls += 1
        return SHARED.calls * F.mse_loss(output, targets)


class GlobalInForward(nn.Module):
    def __init__(self):
        super().__init__()
        SHARED.calls = 0

    def forward(self, output, targets):
        SHARED.calls += 1
        return SHARED.calls * F.mse_loss(output, targets)


STATES = {
    made.__name__: made
    for made in (
        *(Counter, CountingModule, BufferedModule, Slotted, Previous, Noisy, NoisyTorch),
        *(class_counter, nonlocal_counter, global_counter, list_counter, dict_counter),
        *(nonlocal_previous, list_previous, closed_over_generator),
        *(nested_counter, function_attribute, named_class, default_dict, counts_by_name),
        *(namespace, replaced_tuple, tensor_in_place, taken_from_a_list),
        *(GlobalInMethod, GlobalInForward),
    )
}


# --- Ways to reach it ---


def with_default(inner):
    def loss(output, targets, inner=inner):
        return inner(output, targets)

    return loss


class Holder:
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, output, targets):
        return self.inner(output, targets)

    def loss(self, output, targets):
        return self.inner(output, targets)


class SlottedHolder:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, output, targets):
        return self.inner(output, targets)


class HolderOfMany:
    def __init__(self, inner):
        self.inner = {"losses": [inner]}

    def __call__(self, output, targets):
        return self.inner["losses"][0](output, targets)


def through_a_list(inner):
    losses = [inner]
    return lambda output, targets: losses[0](output, targets)


WAYS = {
    "itself": lambda inner: inner,
    "partial": partial,
    "partial of an argument": lambda inner: partial(with_default(None), inner=inner),
    "bound method": lambda inner: Holder(inner).loss,
    "function": lambda inner: lambda output, targets: inner(output, targets),
    "default": with_default,
    "list": through_a_list,
    "object": Holder,
    "object with slots": SlottedHolder,
    "object with containers": HolderOfMany,
}


def pairs_with(others):
    """Return every state in every way, each with one of the others.

    Every pair of a state and an other, and of a way and an other, is among them.
    """
    others = list(others)
    return [
        (state, way, others[(i + j) % len(others)])
        for i, state in enumerate(STATES)
        for j, way in enumerate(WAYS)
    ]


# --- The plain loop ---


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)


def net():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def gradients(model, criterion):
    return module_rows(model, criterion, data(), M)[1]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def written_in_place(state):
    """A tensor that the first pass has written cannot be read by a second one: it is refused."""
    if state == "tensor_in_place":
        return pytest.raises(RuntimeError, match="calls written in place since")
    return contextlib.nullcontext()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_rows_are_those_of_a_plain_loop(state, way):
    expected = gradients(net(), WAYS[way](STATES[state]()))
    model = net()
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, WAYS[way](STATES[state]()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = gf.microbatch_grads(loss, M)(params, data())
    # A generator of torch draws for every row; everything else is one value for all of them.
    assert [str(w.message).startswith("Fell back") for w in caught] == [True] * bool(caught)
    assert caught or state == "NoisyTorch"
    close(rows.stacked(), expected)
    with written_in_place(state):
        close(rows.at(params).stacked(), expected)
    close(rows.stacked(), expected)


ONE_FOR_ALL_ROWS = [pair for pair in pairs_with(["fused", "vmap"]) if pair[0] != "NoisyTorch"]


@pytest.mark.parametrize(("state", "way", "plan"), ONE_FOR_ALL_ROWS)
def test_a_plan_over_all_rows_names_it(state, way, plan):
    model = net()
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, WAYS[way](STATES[state]()))
    with pytest.raises(RuntimeError) as raised:
        gf.microbatch_grads(loss, M, plan=plan)(params, data())
    names = {
        "Noisy": "generator",
        "Previous": "loss",
        "global_counter": "GLOBAL_CALLS",
        "list_counter": ".0'",
        "list_previous": ".0'",
        "nonlocal_previous": "previous",
        "closed_over_generator": "draws random numbers",
        "taken_from_a_list": ".199'",
    }
    name = names.get(state, "calls")
    # torch's own error: under vmap a buffer without rows cannot hold one value per row.
    assert name in str(raised.value) or (state == "BufferedModule" and plan == "vmap")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_a_module_that_calls_it_in_forward(state, way):
    class Calling(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = net()
            self.own = [WAYS[way](STATES[state]())]

        def forward(self, x):
            out = self.linear(x)
            return out * self.own[0](out, torch.ones_like(out))

    expected = gradients(Calling(), F.mse_loss)
    model = Calling()
    params, _ = gf.extract(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rows = gf.microbatch_grads(gf.model_loss(model, F.mse_loss), M)(params, data())
    close(rows.stacked(), expected)


@pytest.mark.parametrize("state", STATES)
def test_a_plain_loss(state):
    own = STATES[state]()

    def loss(params, batch):
        x, y = batch
        return own(F.linear(x, params["weight"], params["bias"]), y)

    params, _ = gf.extract(net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rows = gf.microbatch_grads(loss, M)(params, data())
    close(rows.stacked(), gradients(net(), STATES[state]()))


HOSTS = {
    "Filtered": lambda model, criterion, optimizer: Filtered(
        model, criterion, gf.mean_rows(), optimizer, M
    ).step(*data()),
    "Filtered, scaled": lambda model, criterion, optimizer: Filtered(
        model, criterion, gf.mean_rows(), optimizer, M,
        scaler=torch.amp.GradScaler("cpu", init_scale=8.0),
    ).step(*data()),
    "step_gaf": lambda model, criterion, optimizer: step_gaf(
        model, optimizer, criterion, list(zip(*(t.chunk(M) for t in data()), strict=True)),
        cos_distance_thresh=2.0, average="mean",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("state", "way", "host"), pairs_with(HOSTS))
def test_steps_of_hosts(state, way, host):
    model, plain = net(), net()
    rows = gradients(plain, WAYS[way](STATES[state]()))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p -= 0.1 * rows[name].mean(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = WAYS[way](STATES[state]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        HOSTS[host](model, criterion, optimizer)
    close(model.state_dict(), plain.state_dict())
    assert getattr(criterion, "calls", M) == M


HOW = ["set_closure", "closure", "closure, no model"]


@pytest.mark.parametrize(("state", "way", "how"), pairs_with(HOW))
def test_the_second_pass_of_sam_sees_the_state_of_the_first(state, way, how):
    x, y = data()
    plain = net()
    WAYS[way](STATES[state]())(plain(x), y).backward()
    model, criterion = net(), WAYS[way](STATES[state]())
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    known = None if how.endswith("no model") else model
    optimizer = SAM(model.parameters(), base, rho=1e-14, model=known)
    if how == "set_closure":
        optimizer.set_closure(criterion, x, y)
        optimizer.step()
    else:

        def closure():
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_sharpness_compares_two_passes_with_one_state(state, way):
    model = net()
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, WAYS[way](STATES[state]()))
    with written_in_place(state):
        assert abs(diagnostics.sharpness(loss, params, data(), rho=1e-12)) < 1e-9


def test_a_loss_that_logs_is_fused():
    log, by_name = [0.5], {"losses": []}

    def criterion(output, targets):
        loss = F.mse_loss(output, targets)
        log.append(float(len(targets)))
        by_name["losses"].append(len(targets))
        return loss

    model = net()
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, criterion), M, plan="fused")(params, data())
    close(rows.stacked(), gradients(net(), F.mse_loss))
    assert log == [0.5, 2.0] and by_name == {"losses": [2]}


def test_a_large_container_is_not_searched():
    few, many = [Counter()] * SEARCHED, [Counter()] * (SEARCHED + 1)
    assert [type(owner) for owner in owners_in(few)] == [Counter]
    assert {type(owner) for owner in owners_in([few])} == {list, Counter}
    assert list(owners_in(many)) == []


def test_a_cycle_of_containers_ends():
    cycle = [Counter()]
    cycle.append(cycle)
    assert [type(owner) for owner in owners_in(cycle)] == [Counter]
    assert {type(owner) for owner in owners_in({"cycle": cycle})} == {list, Counter}


def asserts_and_logs(output, targets):
    assert output.ndim == 2  # pytest rewrites this line, and its code refers to pytest
    if output.isnan().any():
        pytest.fail("a logger has as many objects")
    return F.mse_loss(output, targets)


def test_testing_tools_and_loggers_are_not_searched():
    """Their thousands of objects would be compared in every step."""
    assert "@pytest_ar" in asserts_and_logs.__globals__
    assert [*owners_in(asserts_and_logs, names=True)] == [asserts_and_logs]


class Reads(pprint.PrettyPrinter):
    """An object of a framework: its base class assigns _width, _depth and others."""

    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def width(self):
        return self.scale * self._width


def test_what_a_framework_counts_is_watched_if_the_users_code_names_it():
    found = {*PlainValues(Reads())}
    assert "_width" in found and "scale" in found
    assert "_depth" not in found and "_compact" not in found
