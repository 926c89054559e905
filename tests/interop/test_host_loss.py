"""Criteria with parameters and buffers, which the optimizer also holds."""

import copy
import pickle
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import vectors
from gradfilter.interop import Filtered, step_gaf


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.1, momentum=0.9)


def filtered(model, criterion, optimizer):
    return Filtered(model, criterion, gf.mean_rows(), optimizer, 4)


def by_hand(model, criterion, optimizer, batches, m=1):
    """An ordinary loop whose gradient is the mean over microbatches."""
    for x, y in batches:
        optimizer.zero_grad()
        for part, targets in zip(x.chunk(m), y.chunk(m), strict=True):
            (criterion(model(part), targets) / m).backward()
        optimizer.step()


class Arc(nn.Module):
    """A criterion with class centres of its own, and running statistics."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 3))
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, output, targets):
        cosines = F.normalize(self.norm(output)) @ F.normalize(self.centres).T
        return F.cross_entropy(cosines, targets)

    def loss(self, output, targets):
        return self(output, targets)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("way", [lambda arc: arc, lambda arc: arc.loss, partial])
@pytest.mark.parametrize("chain", [gf.mean_rows(), gf.chain(gf.mean_rows(), gf.sam_perturb(0.0))])
def test_a_criterion_is_trained_with_the_model(plan, way, chain):
    model, arc = nn.Linear(6, 3, bias=False), Arc()
    model.criterion = nn.Identity()  # the name is taken
    other, own = copy.deepcopy((model, arc))
    batches = [vectors() for _ in range(3)]
    optimizer = torch.optim.Adam([*model.parameters(), *arc.parameters()], lr=0.1)
    wrapper = Filtered(model, way(arc), chain, optimizer, 4, plan=plan)
    for batch in batches:
        wrapper.step(*batch)
    by_hand(other, own, torch.optim.Adam([*other.parameters(), *own.parameters()], 0.1), batches, 4)
    for found, expected in ((model, other), (arc, own)):
        torch.testing.assert_close(
            dict(found.state_dict()), dict(expected.state_dict()), rtol=1e-10, atol=1e-10
        )
    assert sorted(dict(wrapper._module.named_parameters())) == ["criterion_.centres", "weight"]


class Weighted(nn.Module):
    """A model with a module called ``criterion``, whose class weights are a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x):
        return self.linear(x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("inside", [False, True])
def test_accumulated_batches_meet_a_criterion_with_buffers_again(plan, inside):
    model = Weighted()
    other = copy.deepcopy(model)
    loss = model.criterion if inside else Weighted().criterion
    chain = gf.chain(gf.mean_rows(), gf.sam_perturb(0.5))
    wrapper = Filtered(model, loss, chain, sgd(model), 2, plan=plan)
    optimizer = sgd(other)
    for _ in range(3):
        x, y = vectors(12)
        wrapper.accumulate(x[:4], y[:4])
        wrapper.accumulate(x[4:8], y[4:8])
        wrapper.step(x[8:], y[8:])
        old = copy.deepcopy(other.state_dict())
        optimizer.zero_grad()
        for rho in (0.5, 0.0):
            for part, targets in zip(x.chunk(6), y.chunk(6), strict=True):
                (other.criterion(other(part), targets) / 6).backward()
            if rho:
                grads = [p.grad.clone() for p in other.parameters()]
                size = torch.cat([g.flatten() for g in grads]).norm()
                with torch.no_grad():
                    for p, g in zip(other.parameters(), grads, strict=True):
                        p += rho * g / size
                optimizer.zero_grad()
        other.load_state_dict(old)
        optimizer.step()
        torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()))


def test_a_criterion_of_the_model_itself_adds_nothing():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.arc = nn.Linear(6, 3), Arc()

        def forward(self, x):
            return self.linear(x)

        def loss(self, output, targets):
            return self.arc(output, targets)

    for criterion in (lambda whole: whole.loss, lambda whole: whole.arc):
        model = Whole()
        wrapper = filtered(model, criterion(model), sgd(model))
        before = model.arc.centres.detach().clone()
        wrapper.step(*vectors())
        assert wrapper._module is model and not torch.equal(model.arc.centres, before)


@pytest.mark.parametrize(
    "wrap", [filtered, lambda m, **k: step_gaf(m, k["optimizer"], k["criterion"], [vectors()] * 2)]
)
def test_parameters_that_nothing_would_train_are_refused(wrap):
    model, arc = nn.Linear(6, 3), Arc()
    with pytest.raises(ValueError, match=r"found 'centres' \(1 in all\) that nothing would train"):
        wrap(model, criterion=arc, optimizer=sgd(model))
    both = sgd(model, arc)
    with pytest.raises(
        ValueError, match=r"found 1 of neither \(shape \(3, 3\)\), which no gradient"
    ):
        wrap(model, criterion=lambda output, targets: arc(output, targets), optimizer=both)
    named = [*model.named_parameters(), ("arc.centres", arc.centres)]
    with pytest.raises(ValueError, match=r"found 1 of neither \(arc\.centres\)"):
        wrap(model, criterion=F.cross_entropy, optimizer=torch.optim.SGD(named, lr=0.1))
    arc.requires_grad_(False)
    wrap(model, criterion=arc, optimizer=sgd(model))
    wrap(model, criterion=F.cross_entropy, optimizer=both)


def test_a_group_that_nothing_would_train_is_refused_when_it_comes():
    model, arc = nn.Linear(6, 3), Arc()
    wrapper = filtered(model, F.cross_entropy, sgd(model))
    wrapper.step(*vectors())
    wrapper.optimizer.add_param_group({"params": arc.parameters()})
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="found 1 of neither"):
        wrapper.step(*vectors())
    assert torch.equal(model.weight, before)


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings('ignore:Filtered took plan "loop"')
@pytest.mark.parametrize("compiled", ["model", "criterion", "both"])
def test_a_compiled_criterion_is_trained_under_its_original_names(compiled):
    torch._dynamo.reset()
    model, arc = nn.Linear(6, 3, bias=False), Arc()
    other, own = copy.deepcopy((model, arc))
    optimizer = sgd(model, arc)
    wrapped = [torch.compile(part, backend="eager") for part in (model, arc)]
    used = (
        wrapped[0] if compiled != "criterion" else model,
        wrapped[1] if compiled != "model" else arc,
    )
    wrapper = filtered(*used, optimizer)
    x, y = vectors()
    wrapper.step(x, y)
    by_hand(other, own, sgd(other, own), [(x, y)], 4)
    torch.testing.assert_close(model.weight, other.weight)
    torch.testing.assert_close(arc.centres, own.centres)
    assert sorted(dict(wrapper._module.named_parameters())) == ["criterion.centres", "weight"]


def test_a_copy_trains_its_own_criterion():
    model, arc = nn.Linear(6, 3), Arc()
    wrapper = filtered(model, arc, sgd(model, arc))
    copies = copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))
    before, batch = arc.centres.detach().clone(), vectors()
    for other in copies:
        other.step(*batch)
        assert torch.equal(arc.centres, before) and not torch.equal(other.criterion.centres, before)
    wrapper.step(*batch)
    for other in copies:
        torch.testing.assert_close(other.criterion.centres, arc.centres)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("wrap", "plan"),
    [("gaf", "auto"), *product(["filtered", "scaled"], ["auto", "fused", "loop", "vmap"])],
)
def test_a_criterion_may_penalise_the_model_and_call_it_again(wrap, plan):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    other = copy.deepcopy(model)

    def objective(net):
        def criterion(output, targets):
            penalty = sum(p.square().sum() for p in net.parameters() if p.requires_grad)
            again = net(torch.ones(1, 6)).square().mean()
            return F.cross_entropy(output, targets) + 0.5 * penalty + again

        return criterion

    optimizer, batches = sgd(model), [vectors() for _ in range(30)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if wrap == "scaled" else None
    options = {"plan": plan, "scaler": scaler}
    wrapper = Filtered(model, objective(model), gf.mean_rows(), optimizer, 2, **options)
    for x, y in batches:
        if wrap == "gaf":
            parts = list(zip(x.chunk(2), y.chunk(2), strict=True))
            step_gaf(model, optimizer, objective(model), parts, cos_distance_thresh=2.0)
        else:
            wrapper.step(x, y)
    by_hand(other, objective(other), sgd(other), batches)
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    assert sum(p.square().sum() for p in model.parameters()) < 0.5  # without the penalty, 3
