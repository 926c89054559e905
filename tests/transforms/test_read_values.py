"""What a compiled step reads from outside may change between steps: it is traced again."""

import contextvars
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import vectors
from gradfilter.interop import Filtered

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:gradfilter.compile.*trace number"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Fell back"),
]

SCALE = 1.0
SETTINGS = ModuleType("own_settings")
VARIABLE = contextvars.ContextVar("variable", default=1.0)


def scaled(factor):
    """A loss that depends on the factor more than by its size."""
    return lambda output, y: factor * F.cross_entropy(output, y) + output.square().mean()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x)


class Hidden(Net):
    """A module that another one calls, but does not register."""

    def __init__(self):
        super().__init__()
        self.others = [nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))]
        self.others[0].requires_grad_(False).eval()

    def forward(self, x):
        return super().forward(x) + self.others[0](self.linear(x))


class Methods:
    """A criterion whose first method reads nothing itself."""

    def __call__(self, output, y):
        return self.inner(output, y)

    def inner(self, output, y):
        return scaled(SCALE)(output, y)


def of_global(model, optimizer):
    def change(step):
        globals()["SCALE"] = 1.0 + step

    return (lambda output, y: scaled(SCALE)(output, y)), change


def of_method(model, optimizer):
    return Methods(), of_global(model, optimizer)[1]


def of_cell(model, optimizer):
    factor = 1.0

    def change(step):
        nonlocal factor
        factor = 1.0 + step

    return (lambda output, y: scaled(factor)(output, y)), change


def of_none(model, optimizer):
    weights = None

    def change(step):
        nonlocal weights
        weights = torch.tensor([1.0, 2.0, 3.0]) if step else None

    return (lambda output, y: F.cross_entropy(output, y, weight=weights)), change


def of_settings(model, optimizer):
    def change(step):
        SETTINGS.factor = 1.0 + step

    change(0)
    return (lambda output, y: scaled(SETTINGS.factor)(output, y)), change


def of_partial(model, optimizer):
    criterion = partial(F.cross_entropy, label_smoothing=0.0)
    return criterion, lambda step: criterion.keywords.update(label_smoothing=0.1 * step)


def of_defaults(model, optimizer):
    def criterion(output, y, factor=1.0, *, other=1.0):
        return scaled(factor * other)(output, y)

    def change(step):
        criterion.__defaults__ = (1.0 + step,)
        criterion.__kwdefaults__ = {"other": 1.0 + step}

    return criterion, change


def of_variable(model, optimizer):
    return (lambda o, y: scaled(VARIABLE.get())(o, y)), lambda step: VARIABLE.set(1.0 + step)


def of_optimizer(model, optimizer):
    held = {"optimizer": optimizer}

    def change(step):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)

    rate = lambda: held["optimizer"].param_groups[0]["lr"]
    return (lambda output, y: scaled(rate())(output, y)), change


def of_hook(model, optimizer):
    hooks = []

    def change(step):
        if step == 1:
            hooks.append(model.linear.register_forward_hook(lambda m, args, out: 2 * out))
        elif step == 3:
            hooks.pop().remove()

    return scaled(1.0), change


def of_hook_on_all_modules(model, optimizer):
    hooks = []

    def change(step):
        if step == 1:
            double = lambda m, args, out: 2 * out if m is model.linear else None
            hooks.append(nn.modules.module.register_module_forward_hook(double))
        elif step == 3:
            hooks.pop().remove()

    return scaled(1.0), change


def of_backward_hook(model, optimizer):
    def change(step):
        if step == 2:
            model.linear.register_full_backward_hook(lambda m, given, out: None)
            model.linear.weight.register_hook(lambda g: 2 * g)

    return scaled(1.0), change


def of_hidden_mode(model, optimizer):
    def change(step):
        model.others[0].train(step % 2 == 1)

    return scaled(1.0), change


def of_hidden_parameter(model, optimizer):
    def change(step):
        model.others[0][0].weight = nn.Parameter(torch.full((3, 3), 0.1 * step), False)

    return scaled(1.0), change


def of_hidden_part(model, optimizer):
    def change(step):
        if step == 2:
            model.others[0][0] = nn.Linear(3, 3, bias=False).requires_grad_(False)

    return scaled(1.0), change


OUTSIDE = {f.__name__.removeprefix("of_").replace("_", " "): f for f in (
    of_global, of_method, of_cell, of_none, of_settings, of_partial, of_defaults, of_variable,
    of_optimizer, of_hook, of_hook_on_all_modules, of_backward_hook, of_hidden_mode,
    of_hidden_parameter, of_hidden_part,
)}  # fmt: skip


def train(outside, compile):
    torch.manual_seed(0)
    model = Hidden() if "hidden" in outside else Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion, change = OUTSIDE[outside](model, optimizer)
    host = Filtered(model, criterion, gf.mean_rows(), optimizer, 3, compile=compile)
    losses = []
    for step in range(5):
        change(step)
        losses.append(host.step(*vectors()).loss)
    change(0)
    return torch.stack(losses), model.state_dict(), host


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_host_sees_what_changes_outside(outside):
    losses, weights, _ = train(outside, False)
    found, own, host = train(outside, "graph")
    torch.testing.assert_close(found, losses, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(own, weights, rtol=1e-13, atol=1e-13)
    assert len(host._graphs.entries) <= 5


def test_a_global_of_the_name_of_an_attribute_is_not_watched():
    """`output` is a global here, and an attribute of what the criterion gets."""
    module = ModuleType("of_the_test")
    sys.modules[module.__name__] = module
    source = "def criterion(output, y):\n    return (output - output.mean()).square().mean()\n"
    exec(source, vars(module))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    host = Filtered(model, module.criterion, gf.mean_rows(), optimizer, 3, compile="graph")
    for step in range(4):
        module.mean = module.output = step  # the code has these names, but reads no such global
        host.step(*vectors())
    del sys.modules[module.__name__]
    assert host._graphs._traces == 1


def test_a_function_of_an_object_with_a_network():
    class Loop:
        def __init__(self):
            self.net = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))

        def step(self, state, batch):
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            return state, {"loss": loss.detach()}

    loop = Loop()
    compiled = gf.compile(loop.step, backend="graph")
    for step in range(4):
        loop.net.train(step % 2 == 0)
        if step == 2:
            loop.net[0] = nn.Linear(6, 3)
        batch = vectors()
        torch.manual_seed(step)
        _, info = loop.step({}, batch)
        torch.manual_seed(step)
        _, found = compiled({}, batch)
        torch.testing.assert_close(found, info)
