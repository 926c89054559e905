"""What a donated step or an optimizer overwrites is not what states, metrics and aux still show."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import gradfilter as gf
from _formulas import formulas
from _naive import assert_close, normal

STEPS, LR = 4, 0.1


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))

    def forward(self, x):
        return (self.w * x).sum(1) + (self.b * x.square()).sum(1)


def criterion(output, target):
    return (output - target).square().mean()


def remembering(view):
    """A transform whose state holds the parameters themselves, and what it held before."""

    def init(params):
        copied = lambda: {name: view(p.clone()) for name, p in params.items()}
        return {"last": copied(), "before": copied()}

    def update(grads, state, params, **extra):
        last = {name: leaf.reshape(params[name].shape) for name, leaf in state["last"].items()}
        pulled = {name: g + 0.5 * (params[name] - last[name]) for name, g in grads.items()}
        # In another order than in the first state.
        new = {"before": state["last"], "last": {name: view(p) for name, p in params.items()}}
        shown = {"first": params["w"][0], "held": state["before"]["b"], "all": params["w"]}
        return pulled, new, shown

    return gf.transform("remembering", "tree -> tree", update, init=init)


def batches():
    return [(normal(6, 3, seed=seed), normal(6, seed=10 + seed)) for seed in range(STEPS)]


def expected():
    """The same training in plain torch: the parameters, the states and the metrics of every step.

    The optimizer is SGD with momentum, as `torch.optim.SGD` has it.
    """
    model = Product()
    params = dict(model.named_parameters())
    last = {name: p.detach().clone() for name, p in params.items()}
    before = {name: p.clone() for name, p in last.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    states, metrics = [], []
    for x, y in batches():
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        now = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad += 0.5 * (now[name] - last[name])
        metrics.append({"first": now["w"][0], "held": before["b"], "all": now["w"]})
        last, before = now, last
        states.append({"last": last, "before": before})
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}, states, metrics


VIEWS = {"itself": lambda p: p, "a view": lambda p: p.view(1, -1), "a part": lambda p: p[:3]}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def shaped(states):
    """The states with the shapes of the parameters: a view keeps its own."""
    return {
        part: {name: leaf.reshape(3) for name, leaf in tree.items()}
        for part, tree in states.items()
    }


def check(states, infos, params):
    """Compare with training in plain torch."""
    right_params, right_states, right_metrics = expected()
    close = lambda a, b: assert_close(a, b, rtol=1e-12, atol=1e-12)
    for found, right in zip(states, right_states, strict=True):
        close(shaped(found), right)
    for info, right in zip(infos, right_metrics, strict=True):
        close(
            {name: info[f"remembering/{name}"].reshape(v.shape) for name, v in right.items()}, right
        )
    close(params, right_params)


@every_view
@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("way", ["kernel", "formulas", "graph"])
def test_a_donated_step_keeps_what_states_and_metrics_show(view, donate, way):
    update = gf.chain(gf.mean_rows(), remembering(view), gf.sgd(LR, momentum=0.9))
    step = gf.train_step(gf.model_loss(Product(), criterion), update, microbatches=2)
    step = gf.compile(step, backend="graph") if way == "graph" else step
    state, states, infos = step.init(Product()), [], []
    with formulas() if way == "formulas" else nullcontext():
        for batch in batches():
            state, info = step(state, batch, donate=donate)
            infos.append(info)
            # The state is overwritten by the next step, the metrics are not.
            states.append(copy.deepcopy(state["transforms"]["remembering"]))
    check(states, infos, state["params"])


@every_view
@pytest.mark.parametrize("compiled", [False, "graph"])
def test_an_optimizer_leaves_what_states_and_metrics_show(view, compiled):
    model = Product()
    filtered = gf.interop.Filtered(
        model,
        criterion,
        gf.chain(gf.mean_rows(), remembering(view)),
        torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
        microbatches=2,
        compile=compiled,
    )
    states, infos = [], []
    for x, y in batches():
        infos.append(filtered.step(x, y).info)
        flat = filtered.state_dict()["transforms"]
        states.append({
            part: {name: flat[f"remembering.{part}.{name}"].clone() for name in ("w", "b")}
            for part in ("last", "before")
        })  # fmt: skip
    check(states, infos, {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
@pytest.mark.parametrize("way", ["step", "graph", "Filtered"])
def test_an_aux_shows_the_parameters_of_its_own_step(plan, way):
    model = Product()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}

    def with_aux(output, target):
        return criterion(output, target), {"w": model.w.detach(), "b": model.b[:2]}

    ((x, y), *_) = batches()
    if way == "Filtered":
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        filtered = gf.interop.Filtered(
            model, with_aux, gf.mean_rows(), optimizer, microbatches=2, plan=plan, has_aux=True
        )
        aux = filtered.step(x, y).aux
    else:
        loss = gf.model_loss(model, with_aux, has_aux=True)
        step = gf.train_step(loss, gf.chain(gf.mean_rows(), gf.sgd(LR)), microbatches=2, plan=plan)
        step = gf.compile(step, backend="graph") if way == "graph" else step
        _, info = step(step.init(model), (x, y), donate=True)
        aux = info["aux"]
    for row in range(2):
        assert torch.equal(aux["w"][row], first["w"])
        assert torch.equal(aux["b"][row], first["b"][:2])


@pytest.mark.parametrize("rule", [gf.sgd(LR, momentum=0.9), gf.adam(LR)], ids=["sgd", "adam"])
@pytest.mark.parametrize("swapped", [False, True])
def test_gradients_that_are_the_parameters_are_read_before_they_are_written(rule, swapped):
    """For example the update of a penalty: the gradient of Σp²/2 is p."""
    params = {name: p.detach() for name, p in Product().named_parameters()}
    of = {"w": "b", "b": "w"} if swapped else {"w": "w", "b": "b"}
    apart = {name: params[other].clone() for name, other in of.items()}
    expected_params, expected_state, _ = rule(params, rule.init(params), apart)
    shared = {name: params[other] for name, other in of.items()}
    found, state, _ = rule(params, rule.init(params), shared, donate=True)
    assert all(found[name] is p for name, p in params.items())
    assert_close(found, expected_params, rtol=1e-12, atol=1e-12)
    assert_close(state, expected_state, rtol=1e-12, atol=1e-12)
