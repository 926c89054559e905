"""SAM and GSAM in place, against the pure chain and naive code; the state after the second pass."""

import copy
import os
import pickle
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradfilter as gf
from _naive import assert_close, assert_same
from gradfilter.interop import GSAM, SAM, SGD_AGC, LinearScheduler, ProportionScheduler

pytestmark = pytest.mark.usefixtures("float64")
RHO, ALPHA, LR = 0.3, 0.4, 0.1


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch(seed=2, n=8):
    torch.manual_seed(seed)
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def constant_rho(rho=RHO):
    return LinearScheduler(T_max=10, max_value=rho, min_value=rho)


def sam(model, base=None, **options):
    base = sgd(model) if base is None else base
    return SAM(model.parameters(), base, RHO, model=model, **options)


def gsam(model, base=None, **options):
    base = sgd(model) if base is None else base
    return GSAM(model.parameters(), base, model, ALPHA, constant_rho(), **options)


both = pytest.mark.parametrize("make", [sam, gsam])
forms = pytest.mark.parametrize("adaptive", [False, True])


def train(optimizer, batches, loss_fn=F.cross_entropy):
    losses = []
    for x, y in batches:
        optimizer.set_closure(loss_fn, x, y)
        losses.append(optimizer.step()[1])
    return losses


@both
@forms
def test_twenty_steps_are_those_of_the_pure_chain(make, adaptive):
    model = network()
    perturb = gf.sam_perturb(RHO, adaptive="asam" if adaptive else None, eta=0.0)
    links = [gf.mean_rows(), perturb] + [gf.gsam_decompose(ALPHA)] * (make is gsam)
    update = gf.chain(*links, gf.sgd(LR, momentum=0.9))
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 1)
    state, expected = update.init(params), []
    batches = [batch(seed) for seed in range(20)]
    for pair in batches:
        rows = grads_of(params, pair, buffers=buffers)
        expected.append(rows.losses[0])
        params, state, _ = update(params, state, rows)
    losses = train(make(model, adaptive=adaptive), batches)
    assert_close(values(model), params)
    assert_close(torch.stack(losses), torch.stack(expected))


def naive_step(model, base, x, y, adaptive, alpha):
    """One step of SAM, ASAM or GSAM with its own arithmetic on flat vectors."""
    params = list(model.parameters())
    flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])

    def write(vector):
        with torch.no_grad():
            nn.utils.vector_to_parameters(vector, params)

    def gradient():
        return flat(torch.autograd.grad(F.cross_entropy(model(x), y), params))

    w = flat([p.detach() for p in params]).clone()
    g = gradient()
    e = RHO * w**2 * g / (w * g).norm() if adaptive else RHO * g / g.norm()
    write(w + e)
    h = gradient()
    write(w)
    unit = h / h.norm()
    d = h - alpha * (g - (g @ unit) * unit)
    for p, part in zip(params, d.split([p.numel() for p in params]), strict=True):
        p.grad = part.reshape(p.shape)
    base.step()


@both
@forms
def test_naive_steps_around_adam(make, adaptive):
    model = network()
    other = copy.deepcopy(model)
    batches = [batch(seed) for seed in range(10)]
    adam = lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)
    train(make(model, adam(model), adaptive=adaptive), batches)
    base = adam(other)
    for x, y in batches:
        naive_step(other, base, x, y, adaptive, ALPHA if make is gsam else 0.0)
    assert_close(values(model), values(other), rtol=1e-9)


@both
def test_the_gradient_that_was_applied_is_left_and_can_be_zeroed(make):
    model = network()
    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=LR))
    before = values(model)
    train(optimizer, [batch()])
    for name, p in model.named_parameters():
        assert_close(p.detach(), before[name] - LR * p.grad)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@both
def test_an_lr_of_zero_leaves_every_bit(make):
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
        model[0].weight[0, 1] = 1e-300
    before = values(model)
    train(make(model, torch.optim.SGD(model.parameters(), lr=0.0)), [batch(s) for s in range(5)])
    assert_same(values(model), before)


def normed():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(("make", "known"), [(sam, True), (sam, False), (gsam, True)])
def test_batch_norm_is_updated_by_the_first_pass_only(make, known):
    model = normed()
    once = copy.deepcopy(model)
    x, y = batch()
    once(x)
    optimizer = make(model)
    if not known:
        optimizer.model = None
    optimizer.step(lambda: closure_of(model, x, y))
    assert_same(dict(model.named_buffers()), dict(once.named_buffers()))
    assert model[1].num_batches_tracked == 1
    assert not nn.modules.module._global_forward_pre_hooks


def closure_of(model, x, y):
    predictions = model(x)
    loss = F.cross_entropy(predictions, y)
    loss.backward()
    return predictions, loss


class Counts(nn.Module):
    """Its output depends on a buffer, which every pass replaces by another tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", None)
        self.started_from = []

    def forward(self, x):
        self.started_from.append(self.calls.item())
        self.calls = self.calls + 1
        self.seen = x.detach().sum()
        return x @ self.weight * self.calls


@pytest.mark.parametrize("known", [True, False])
def test_the_second_pass_starts_from_the_buffers_of_the_first(known):
    model = Counts()
    optimizer = SAM(model.parameters(), sgd(model), RHO, model=model if known else None)
    for _ in range(2):
        optimizer.step(lambda: backward(model(torch.ones(2, 4)).square().mean()))
    assert model.started_from == [0, 0, 1, 1]
    assert model.calls == 2
    assert model.seen == 8


def backward(loss):
    loss.backward()
    return loss


def count_in(container, key):
    container[key] += 1
    return container[key]


def count_last(calls):
    calls.append(calls[-1] + 1)
    return calls[-1]


PLACES = {
    "list": (lambda: [0], lambda calls: count_in(calls, 0)),
    "dict": (lambda: {"n": 0}, lambda calls: count_in(calls, "n")),
    "deque": (lambda: deque([0], maxlen=1), count_last),
    "namespace": (lambda: SimpleNamespace(n=0), lambda calls: count_in(vars(calls), "n")),
    "tensor": (lambda: torch.zeros(()), lambda calls: calls.add_(1).clone()),
    "list of tensors": (lambda: [torch.zeros(())], lambda calls: calls[0].add_(1).clone()),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_state_in_a_container_counts_once_per_step(place, known):
    make, count = PLACES[place]

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.calls, self.seen = make(), []

        def forward(self, x):
            number = count(self.calls)
            self.seen.append(float(number))
            return x @ self.weight * number

    model = Counted()
    optimizer = SAM(model.parameters(), sgd(model), RHO, model=model if known else None)
    for _ in range(3):
        optimizer.step(lambda: backward(model(torch.ones(2, 4)).square().mean()))
    assert model.seen == [1, 1, 2, 2, 3, 3]


@both
def test_buffers_of_a_criterion_are_updated_by_the_first_pass_only(make):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, output, y):
            return F.cross_entropy(self.norm(output), y)

    model, criterion = network(), Normed()
    base = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=LR)
    params = [*model.parameters(), *criterion.parameters()]
    optimizer = (
        SAM(params, base, RHO, model=model)
        if make is sam
        else GSAM(params, base, model, ALPHA, constant_rho())
    )
    x, y = batch()
    once = copy.deepcopy(criterion.norm)
    once(model(x))
    optimizer.set_closure(criterion, x, y)
    optimizer.step()
    assert criterion.norm.num_batches_tracked == 1
    assert_close(criterion.norm.running_mean, once.running_mean)


@both
def test_dropout_masks_of_the_second_pass_are_those_of_the_first(make):
    masks = []

    class Recorded(nn.Dropout):
        def forward(self, x):
            masks.append(super().forward(torch.ones_like(x)))
            return x * masks[-1]

    model = nn.Sequential(nn.Linear(4, 50), Recorded(0.5), nn.Linear(50, 3))
    optimizer = make(model)
    x, y = batch()
    train(optimizer, [(x, y)])
    after = torch.rand(3)
    train(optimizer, [(x, y)])
    assert_same(masks[0], masks[1])
    assert_same(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])
    # The random numbers go on as after one pass.
    batch()
    model(x)
    assert_same(torch.rand(3), after)


def test_a_generator_that_two_modules_share_is_set_back_to_where_the_first_found_it():
    masks = []

    class Masked(nn.Module):
        def __init__(self, generator):
            super().__init__()
            self.generator = generator

        def forward(self, x):
            masks.append(torch.rand(x.shape, generator=self.generator))
            return x * masks[-1]

    generator = torch.Generator()
    model, first, second = network(), Masked(generator), Masked(generator)
    optimizer = SAM(model.parameters(), sgd(model), RHO)
    x, y = batch()

    def closure():
        loss = F.cross_entropy(model(second(first(x))), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_same(masks[:2], masks[2:])
    assert not torch.equal(masks[0], masks[1])
    other = torch.Generator()
    torch.rand(2 * x.numel(), generator=other)
    assert_same(generator.get_state(), other.get_state())


@both
def test_a_closure_that_raises_in_the_second_pass_leaves_everything(make):
    model = normed()
    x, y = batch()
    once = copy.deepcopy(model)
    once(x)
    calls, seen = [], []

    def closure():
        result = closure_of(model, x, y)
        calls.append(result)
        seen.append(values(model))
        if len(calls) == 2:
            torch.rand(7)
            raise KeyboardInterrupt
        return result

    before = values(model)
    random = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        make(model).step(closure)
    assert not torch.equal(seen[1]["0.weight"], before["0.weight"])
    assert_same(values(model), before)
    assert_same(dict(model.named_buffers()), dict(once.named_buffers()))
    assert torch.equal(torch.get_rng_state(), random)


@both
def test_a_closure_that_raises_in_the_first_pass_leaves_no_hook(make):
    model = network()
    optimizer = make(model)
    optimizer.model = None
    before = values(model)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_same(values(model), before)
    assert not nn.modules.module._global_forward_pre_hooks


@both
def test_parameters_without_gradient_are_not_touched(make):
    model = network()
    model.unused = nn.Parameter(torch.ones(2))
    model[0].bias.requires_grad_(False)
    base = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.5, momentum=0.9)
    seen = []

    def loss_fn(predictions, targets):
        seen.append(values(model))
        return F.cross_entropy(predictions, targets)

    before = values(model)
    forward = nn.Sequential(*list(model)[:3])
    optimizer = make(model, base)
    optimizer.model = forward
    train(optimizer, [batch(), batch(3)], loss_fn)
    for name in ("unused", "0.bias"):
        assert all(torch.equal(at[name], before[name]) for at in seen)
        assert_same(values(model)[name], before[name])
    assert model.unused.grad is None and model[0].bias.grad is None
    assert not torch.equal(seen[1]["0.weight"], seen[0]["0.weight"])


@both
def test_a_gradient_of_the_second_pass_alone_is_dropped(make):
    model = network()
    model.late = nn.Parameter(torch.ones(2))
    calls = []

    def loss_fn(predictions, targets):
        calls.append(1)
        late = model.late.sum() if len(calls) == 2 else 0.0
        return F.cross_entropy(predictions, targets) + late

    optimizer = make(model)
    optimizer.model = nn.Sequential(*list(model)[:3])
    train(optimizer, [batch()], loss_fn)
    assert model.late.grad is None and torch.equal(model.late, torch.ones(2))
    assert len(calls) == 2


@both
@forms
def test_a_zero_gradient_gives_a_finite_step(make, adaptive):
    model = network()
    before = values(model)
    train(make(model, adaptive=adaptive), [batch()], lambda p, t: (p * 0).sum())
    assert_same(values(model), before)
    train(make(model, adaptive=adaptive), [batch()])
    assert all(p.isfinite().all() for p in model.parameters())


def test_no_gradient_at_all_is_an_ordinary_step():
    model = network()
    before = values(model)
    assert sam(model).step(lambda: torch.ones(())) == (None, 1)
    assert_same(values(model), before)


@both
def test_a_closure_may_accumulate_over_several_backward_passes(make):
    model = network()
    whole = copy.deepcopy(model)
    x, y = batch(n=12)
    optimizer = make(model)

    def closure():
        optimizer.zero_grad(set_to_none=False)  # PyTorch's habit; in place it must do no harm
        total = 0
        for part, target in zip(x.split(4), y.split(4), strict=True):
            loss = F.cross_entropy(model(part), target) / 3
            loss.backward()
            total = total + loss
        return total

    for _ in range(3):
        predictions, loss = optimizer.step(closure)
    losses = train(make(whole), [(x, y)] * 3)
    assert predictions is None
    assert_close(loss, losses[-1])
    assert_close(values(model), values(whole))


@both
def test_autocast_around_the_step_sees_the_perturbed_weights(make):
    model = network().float()
    x, y = batch()
    x, seen = x.float(), []

    def loss_fn(predictions, targets):
        seen.append(predictions.detach())
        return F.cross_entropy(predictions, targets)

    optimizer = make(model)
    optimizer.set_closure(loss_fn, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
        optimizer.step()
    assert seen[0].dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    losses = [F.cross_entropy(p.float(), y) for p in seen]
    assert losses[1] > losses[0] + 0.05  # RHO uphill
    assert losses[2] < losses[0]
    assert losses[3] > losses[2] + 0.05


def scaler_of(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale)


@both
def test_a_grad_scaler_changes_nothing_but_the_scale(make):
    model, scaler = network().float(), scaler_of(1024.0)
    other = copy.deepcopy(model)
    batches = [(x.float(), y) for x, y in (batch(seed) for seed in range(5))]
    optimizer = make(model, scaler=scaler)
    for x, y in batches:
        optimizer.set_closure(F.cross_entropy, x, y)
        _, loss = optimizer.step()
        scaler.update()
    losses = train(make(other), batches)
    assert_close(loss, losses[-1], rtol=1e-5)
    assert_close(values(model), values(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad_pass", [1, 2])
@both
def test_a_gradient_that_is_not_finite_skips_the_step(make, bad_pass):
    model, scaler = network(), scaler_of(8.0)
    optimizer = make(model, scaler=scaler)
    before, calls = values(model), []

    def loss_fn(predictions, targets):
        calls.append(1)
        factor = torch.inf if len(calls) == bad_pass else 1.0
        return F.cross_entropy(predictions, targets) * factor

    x, y = batch()
    optimizer.set_closure(loss_fn, x, y)
    optimizer.step()
    scaler.update()
    assert len(calls) == bad_pass
    assert_same(values(model), before)
    assert not optimizer.state
    assert scaler.get_scale() == 4.0
    optimizer.step()
    scaler.update()
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(p.isfinite().all() for p in model.parameters())


@both
def test_a_scaler_that_is_off_is_none_at_all(make):
    model = network()
    other = copy.deepcopy(model)
    train(make(model, scaler=torch.amp.GradScaler("cpu", enabled=False)), [batch()] * 3)
    train(make(other), [batch()] * 3)
    assert_same(values(model), values(other))


@both
@pytest.mark.parametrize("wrapped", [True, False])
def test_schedulers_of_torch_work_on_either_optimizer(make, wrapped):
    model = network()
    base = sgd(model)
    optimizer = make(model, base)
    assert optimizer.param_groups is base.param_groups
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if wrapped else base, 1, gamma=0.5)
    for k in range(3):
        assert base.param_groups[0]["lr"] == LR * 0.5**k
        train(optimizer, [batch()])
        scheduler.step()


@both
def test_a_checkpoint_goes_on_bit_for_bit(make):
    batches = [batch(seed) for seed in range(6)]
    model = network()
    optimizer = make(model)
    train(optimizer, batches[:3])
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(optimizer, batches[3:])
    again = network()
    again.load_state_dict(weights)
    resumed = make(again)
    resumed.load_state_dict(saved)
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    train(resumed, batches[3:])
    assert_same(values(again), values(model))


@both
def test_a_state_loaded_into_the_base_optimizer_is_shared_from_the_next_step_on(make):
    model = network()
    optimizer = make(model)
    train(optimizer, [batch()])
    base = optimizer.base_optimizer
    base.load_state_dict(copy.deepcopy(base.state_dict()))
    train(optimizer, [batch()])
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state


def test_gsam_checkpoints_its_radius():
    make = lambda model: GSAM(
        model.parameters(), sgd(model), model, ALPHA, LinearScheduler(T_max=10, max_value=1.0)
    )
    first, second, third = (make(network()) for _ in range(3))
    first.update_rho_t()
    second.load_state_dict(first.state_dict())
    assert second.rho_t == first.rho_t == pytest.approx(0.9)
    assert second.update_rho_t() == pytest.approx(0.8)
    third.load_state_dict(first.base_optimizer.state_dict())
    assert third.rho_t == 1.0
    alien = first.state_dict()
    alien["param_groups"] = alien["param_groups"] * 2
    with pytest.raises(ValueError, match="parameter group"):
        third.load_state_dict(alien)
    assert third.rho_t == 1.0 and third.update_rho_t() == pytest.approx(0.9)


@both
def test_a_saved_checkpoint_goes_on_bit_for_bit(make, tmp_path):
    batches = [batch(seed) for seed in range(6)]
    model = network()
    optimizer = make(model)
    train(optimizer, batches[:3])
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
    train(optimizer, batches[3:])
    again = network()
    resumed = make(again)
    weights, state = torch.load(tmp_path / "run.pt", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)  # before its first step
    train(resumed, batches[3:])
    assert_same(values(again), values(model))


L = torch.optim.lr_scheduler
SCHEDULERS = {
    "one cycle": lambda o: L.OneCycleLR(o, 0.1, total_steps=9),
    "sequence": lambda o: L.SequentialLR(o, [L.LinearLR(o), L.ExponentialLR(o, 0.5)], [3]),
    "plateau": lambda o: L.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


@both
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_any_scheduler_of_torch_moves_the_base_optimizer(make, wrapped, schedule):
    model = network()
    base = sgd(model)
    optimizer = make(model, base)
    alone = torch.optim.SGD([torch.zeros(1)], lr=LR, momentum=0.9)
    mine, theirs = (SCHEDULERS[schedule](o) for o in (optimizer if wrapped else base, alone))
    lrs = set()
    for _ in range(7):
        train(optimizer, [batch()])
        alone.step()
        for scheduler in (mine, theirs):
            scheduler.step(*([1.0] if schedule == "plateau" else []))
        found, expected = base.param_groups[0], alone.param_groups[0]
        assert (found["lr"], found["momentum"]) == (expected["lr"], expected["momentum"])
        lrs.add(found["lr"])
    assert len(lrs) > 2


@forms
def test_gsam_with_alpha_zero_is_sam(adaptive):
    model = network()
    other = copy.deepcopy(model)
    batches = [batch(seed) for seed in range(10)]
    train(sam(model, adaptive=adaptive), batches)
    train(GSAM(other.parameters(), sgd(other), other, 0.0, constant_rho(), adaptive), batches)
    assert_same(values(model), values(other))


KERNELS = {
    "one by one": lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9, foreach=False),
    "foreach": lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9, foreach=True),
    "fused": lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9, fused=True),
}


@both
@pytest.mark.parametrize("kernel", KERNELS)
def test_channels_last_under_every_kernel(make, kernel):
    def run(layout, base):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
        model = nn.Sequential(*layers).to(memory_format=layout)
        x = torch.randn(8, 3, 6, 6).to(memory_format=layout)
        train(make(model, base(model.parameters())), [(x, torch.arange(8) % 3)] * 3)
        return model[0].weight

    found = run(torch.channels_last, KERNELS[kernel])
    assert found.grad.stride() == found.stride() != found.contiguous().stride()
    assert_close(found, run(torch.contiguous_format, KERNELS["one by one"]))


def test_clipping_by_the_base_optimizer_is_by_the_old_weights():
    model = network()
    update = gf.chain(gf.mean_rows(), gf.sam_perturb(RHO), gf.agc_clip(0.01), gf.sgd(LR))
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 1)
    state = update.init(params)
    batches = [batch(seed) for seed in range(5)]
    for pair in batches:
        params, state, _ = update(params, state, grads_of(params, pair, buffers=buffers))
    train(sam(model, SGD_AGC(model.parameters(), lr=LR, clipping=0.01)), batches)
    assert_close(values(model), params)


@both
def test_tied_weights_are_perturbed_once(make):
    def tied():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    model, other = tied(), tied()
    x, y = batch()
    train(make(model), [(x, y)])
    naive_step(other, sgd(other), x, y, False, ALPHA if make is gsam else 0.0)
    assert_close(values(model), values(other))


@both
def test_parameters_may_be_frozen_freed_added_and_moved_to_another_dtype(make):
    model = network()
    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=LR))
    for frozen in (True, False):
        model[0].requires_grad_(not frozen)
        before = values(model)
        train(optimizer, [batch()])
        assert torch.equal(model[0].weight, before["0.weight"]) == frozen
        assert not torch.equal(model[2].weight, before["2.weight"])
    model.float()
    x, y = batch()
    train(optimizer, [(x.float(), y)])
    assert model[0].weight.grad.dtype == torch.float32
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert [g["lr"] for g in optimizer.base_optimizer.param_groups] == [LR, 0.5]


@both
def test_parameters_of_no_group_are_neither_perturbed_nor_moved(make):
    model = network()
    seen = []

    def loss_fn(predictions, targets):
        seen.append(values(model))
        return F.cross_entropy(predictions, targets)

    train(make(model, torch.optim.SGD(model[0].parameters(), lr=LR)), [batch()], loss_fn)
    for at in (seen[1], values(model)):
        assert_same(at["2.weight"], seen[0]["2.weight"])
        assert not torch.equal(at["0.weight"], seen[0]["0.weight"])


@both
def test_a_loss_that_is_nan_is_returned_and_applied_as_by_any_optimizer(make):
    model = network()
    losses = train(make(model), [batch()], lambda p, t: p.sum() * torch.nan)
    assert losses[0].isnan() and all(p.isnan().all() for p in model.parameters())


@both
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model(make):
    torch._dynamo.reset()
    model = normed()
    other = copy.deepcopy(model)
    batches = [batch(seed) for seed in range(4)]
    user = torch.compile(model, backend="aot_eager")
    train(make(user), batches)
    train(make(other), batches)
    assert_close(values(model), values(other))
    assert_close(dict(model.named_buffers()), dict(other.named_buffers()))


@both
def test_copies_are_refused(make):
    optimizer = make(network())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"Expected a state_dict\(\) of G?SAM, found .* Make"):
            copied(optimizer)


def test_every_group_has_its_lr_and_one_norm():
    model = network()
    other = copy.deepcopy(model)
    groups = lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 0.01}]
    base = torch.optim.SGD(groups(model), lr=LR)
    optimizer = SAM(groups(model), base, RHO, model=model)
    train(optimizer, [batch()])
    naive_step(other, torch.optim.SGD(groups(other), lr=LR), *batch(), False, 0.0)
    assert_close(values(model), values(other))


class PublishedSAM(torch.optim.Optimizer):
    """One step of the published class, with its groups, its one norm and what it keeps."""

    def __init__(self, params, base_optimizer, rho, adaptive, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)

    def step(self, closure):
        self.zero_grad()
        closure()
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        scaled = [(p.detach().abs() if g["adaptive"] else 1.0) * p.grad for g, p in pairs]
        norm = torch.stack([s.norm() for s in scaled]).norm()
        for group, p in pairs:
            self.state[p]["old_p"] = p.detach().clone()
            size = p.detach() ** 2 if group["adaptive"] else 1.0
            p.data.add_(size * p.grad * group["rho"] / (norm + 1e-12))
        self.zero_grad()
        closure()
        for _, p in pairs:
            p.data.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()


def own_groups(model):
    return [
        {"params": model[0].parameters(), "rho": 0.5, "adaptive": True},
        {"params": model[2].weight},
        {"params": model[2].bias, "rho": 0.0},
    ]


@pytest.mark.parametrize("by_class", [True, False])
def test_every_group_has_its_radius_and_its_form(by_class):
    model = network()
    other = copy.deepcopy(model)
    base = torch.optim.SGD if by_class else torch.optim.SGD(own_groups(model), LR, momentum=0.9)
    options = {"lr": LR, "momentum": 0.9} if by_class else {}
    optimizer = SAM(own_groups(model), base, 0.05, model=model, **options)
    published = PublishedSAM(own_groups(other), torch.optim.SGD, 0.05, False, lr=LR, momentum=0.9)
    for k in range(6):
        x, y = batch(k)
        optimizer.set_closure(F.cross_entropy, x, y)
        optimizer.step()
        published.step(lambda x=x, y=y: F.cross_entropy(other(x), y).backward())
        for i, (ours, theirs) in enumerate(
            zip(optimizer.param_groups, published.param_groups, strict=True)
        ):
            assert ours["rho"] == theirs["rho"] and ours["adaptive"] == theirs["adaptive"]
            ours["rho"] = theirs["rho"] = 0.1 * k + 0.02 * i  # a schedule
        assert_close(values(model), values(other))


def test_the_radius_is_in_the_state_and_a_group_keeps_what_a_state_lacks():
    model = network()
    optimizer = sam(model)
    optimizer.param_groups[0]["rho"] = 0.7
    again = sam(network(), adaptive=True)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["rho"] == 0.7 and again.param_groups[0]["adaptive"] is False
    again.load_state_dict(sgd(network()).state_dict())
    assert again.param_groups[0]["rho"] == 0.7
    again.base_optimizer.load_state_dict(sgd(network()).state_dict())
    train(again, [batch()])  # by its own radius
    again.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="0 <= rho, found rho=-1"):
        train(again, [batch()])


def test_a_second_sam_around_an_optimizer_has_its_own_radius():
    model = network()
    base = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.2}], LR
    )
    SAM(model.parameters(), base, 0.05, model=model)
    optimizer = SAM(model.parameters(), base, 0.7, adaptive=True, model=model)
    assert [(g["rho"], g["adaptive"]) for g in base.param_groups] == [(0.7, True), (0.2, True)]
    more = nn.Linear(2, 2)
    optimizer.add_param_group({"params": more.parameters()})
    assert base.param_groups[2]["rho"] == 0.7


def test_an_optimizer_with_a_rho_of_its_own_keeps_it():
    model = network()
    base = torch.optim.Adadelta(model.parameters(), lr=1.0)
    optimizer = SAM(model.parameters(), base, 0.05, model=model)
    group = optimizer.param_groups[0]
    assert (group["rho"], group["sam_rho"]) == (0.9, 0.05)
    group["sam_rho"] = 0.0
    other = network()
    train(optimizer, [batch()])
    plain = torch.optim.Adadelta(other.parameters(), lr=1.0)
    F.cross_entropy(other(batch()[0]), batch()[1]).backward()
    plain.step()
    assert_close(values(model), values(other))


@pytest.mark.parametrize("entry", [{"rho": 0.1}, {"adaptive": True}])
def test_gsam_has_one_radius_and_says_so(entry):
    model = network()
    base = torch.optim.SGD([{"params": model.parameters(), **entry}], lr=LR)
    with pytest.raises(ValueError, match=rf"found '{next(iter(entry))}' in a parameter group"):
        gsam(model, base)


@both
def test_gradients_that_a_step_cannot_repeat_are_refused(make):
    model = network()
    optimizer = make(model)
    first, second = batch(0), batch(1)
    optimizer.set_closure(F.cross_entropy, *second)
    F.cross_entropy(model(first[0]), first[1]).backward()  # as Lightning accumulates
    before = values(model)
    with pytest.raises(RuntimeError, match=r"expected no gradients before step\(closure\).*Lightn"):
        optimizer.step()
    assert_same(values(model), before)
    optimizer.zero_grad(set_to_none=False)  # zeros are nothing to lose
    optimizer.step()
    optimizer.step()  # and what the last step left is not an accumulated gradient
    F.cross_entropy(model(first[0]), first[1]).backward()
    with pytest.raises(RuntimeError, match="expected no gradients before"):
        optimizer.step()
    model.zero_grad()
    optimizer.step()

    def broken():
        F.cross_entropy(model(first[0]), first[1]).backward()
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(broken)
    optimizer.step()  # the rest of a broken pass is not accumulated either
    another = make(model)  # nor is what was there before it
    another.set_closure(F.cross_entropy, *second)
    another.step()


def test_the_state_of_a_published_class_has_no_momentum():
    model = network()
    published = PublishedSAM(model.parameters(), torch.optim.Adam, 0.05, False, lr=LR)
    x, y = batch()
    published.step(lambda: F.cross_entropy(model(x), y).backward())
    optimizer = sam(model, torch.optim.Adam(model.parameters(), lr=1.0))
    with pytest.warns(UserWarning, match="which does not save it: momentum starts afresh"):
        optimizer.load_state_dict(published.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.05 and optimizer.param_groups[0]["lr"] == LR
    optimizer.zero_grad()
    train(optimizer, [batch()])  # Adam finds no state that is not its own
    complete = published.state_dict() | {"base_optimizer": published.base_optimizer.state_dict()}
    optimizer.load_state_dict(complete)  # as pytorch_optimizer saves it
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.load_state_dict(published.base_optimizer.state_dict())


def test_the_class_of_a_base_optimizer_will_do():
    model = network()
    other = copy.deepcopy(model)
    made = SAM(model.parameters(), torch.optim.SGD, RHO, model=model, lr=LR, momentum=0.9)
    train(made, [batch()] * 3)
    train(sam(other), [batch()] * 3)
    assert_same(values(model), values(other))


def test_extra_arguments_of_set_closure_reach_the_loss():
    model = network()
    x, y = batch()
    optimizer = sam(model)
    expected = F.cross_entropy(model(x), y, label_smoothing=0.3)
    optimizer.set_closure(F.cross_entropy, x, y, label_smoothing=0.3)
    predictions, loss = optimizer.step()
    assert_close(loss, expected.detach())
    assert not predictions.requires_grad and not loss.requires_grad


def test_only_the_passes_that_may_be_local_are_under_no_sync():
    inside, seen = [], []

    @contextmanager
    def no_sync():
        inside.append(1)
        yield
        inside.pop()

    def loss_fn(predictions, targets):
        seen.append(len(inside))
        return F.cross_entropy(predictions, targets)

    train(sam(network(), no_sync=no_sync), [batch()], loss_fn)
    assert seen == [1, 0]


def test_the_radius_belongs_to_the_lr_of_the_step_in_whatever_order_they_move():
    for order in ("lr first", "rho first"):
        model = network()
        base = sgd(model)
        lr = torch.optim.lr_scheduler.LinearLR(base, 1.0, 0.1, total_iters=5)
        rho = ProportionScheduler(lr, max_lr=LR, min_lr=0.0, max_value=1.0, min_value=0.0)
        optimizer = GSAM(model.parameters(), base, model, ALPHA, rho)
        for _ in range(5):
            train(optimizer, [batch()])
            assert optimizer.rho_t == pytest.approx(base.param_groups[0]["lr"] / LR)
            moves = [lr.step, optimizer.update_rho_t]
            for move in moves if order == "lr first" else moves[::-1]:
                move()


def one_rank(rank, folder):
    """Two local steps in a rank of two, whose parameters are saved."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for name, make, lr, options in (
        ("sam", sam, LR, {}),
        ("gsam", gsam, LR, {}),
        ("sum", gsam, LR / 2, {"grad_reduce": "sum"}),
    ):
        model = network()
        ddp = nn.parallel.DistributedDataParallel(model)
        base = torch.optim.SGD(model.parameters(), lr=lr)
        optimizer = make(ddp, base, no_sync=ddp.no_sync, **options)
        train(optimizer, [batch(rank), batch(rank + 2)])
        torch.save(values(model), f"{folder}/{name}{rank}.pt")
    torch.distributed.barrier()  # no rank leaves while another still works
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of torch's may outlive the interpreter, and abort its end


def test_gradients_that_are_views_of_buckets(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = network()
        ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        train(gsam(ddp), [batch(seed) for seed in range(3)])
    finally:
        torch.distributed.destroy_process_group()
    other = network()
    train(gsam(other), [batch(seed) for seed in range(3)])
    assert_close(values(model), values(other))


def test_ranks_that_perturb_on_their_own_apply_the_mean(tmp_path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    for name, alpha in (("sam", 0.0), ("gsam", ALPHA), ("sum", ALPHA)):
        model = network()
        for k in (0, 2):
            alone = [copy.deepcopy(model) for _ in range(2)]
            for rank, local in enumerate(alone):
                naive = torch.optim.SGD(local.parameters(), lr=LR)
                naive_step(local, naive, *batch(rank + k), False, alpha)
            moved = [values(local) for local in alone]
            gf.insert(model, {name: (moved[0][name] + moved[1][name]) / 2 for name in moved[0]})
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            assert_close(found, values(model))


class NoRadius:
    """Steps like the schedulers of torch.optim."""

    def step(self):
        return None


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda m: SAM(m.parameters(), sgd(m), -1.0), ValueError, "0 <= rho, found rho=-1"),
        (lambda m: SAM(m.parameters(), sgd(m), lr=0.1), TypeError, r"found \['lr'\]"),
        (lambda m: SAM(m[0].parameters(), sgd(m)), ValueError, "found 2 that are missing"),
        (lambda m: SAM(m.parameters(), sgd(m)).step(), RuntimeError, "Expected a closure"),
        (
            lambda m: SAM(m.parameters(), sgd(m)).set_closure(F.mse_loss, None, None),
            ValueError,
            "model=model",
        ),
        (
            lambda m: sam(m, scaler=scaler_of(1.0), no_sync=torch.no_grad),
            ValueError,
            "found both",
        ),
        (
            lambda m: SAM(m.parameters(), torch.optim.LBFGS, RHO),
            TypeError,
            "SAM: .* found LBFGS, whose step needs a closure",
        ),
        (lambda m: sam(m, sam(m)), TypeError, "SAM: .* found SAM, whose step needs a closure"),
        (lambda m: gsam(m, sam(m)), TypeError, "GSAM: .* found SAM, whose step needs"),
        (lambda m: sam(m, 0.1), TypeError, r"SAM: .* torch\.optim\.Optimizer, found float\. Make"),
        (
            lambda m: GSAM(m.parameters(), sgd(m), m, ALPHA, NoRadius()),
            TypeError,
            r"found None of a NoRadius\. Use ProportionScheduler",
        ),
        (
            lambda m: GSAM(m.parameters(), sgd(m), m, -1.0, constant_rho()),
            ValueError,
            "0 <= alpha",
        ),
        (lambda m: gsam(m, grad_reduce="max"), ValueError, "or \"sum\", found 'max'"),
        (lambda m: gsam(m, grad_reduce="sum"), ValueError, "are a mean already"),
    ],
)
def test_impossible_arguments_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong(network())


def test_sparse_gradients_are_refused():
    model = nn.Embedding(3, 2, sparse=True)
    optimizer = SAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), RHO)
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step(lambda: backward(model(torch.tensor([1])).sum()))


def test_averaged_weights_are_those_of_a_loop_by_hand():
    model = network()
    plain = copy.deepcopy(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer, base, expected = sam(model), sgd(plain), None
    for step in range(4):
        x, y = batch(step)
        optimizer.set_closure(F.cross_entropy, x, y)
        optimizer.step()
        average.update_parameters(model)
        params = list(plain.parameters())
        old = [p.detach().clone() for p in params]
        first = torch.autograd.grad(F.cross_entropy(plain(x), y), params)
        norm = torch.cat([g.flatten() for g in first]).norm() + 1e-12
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p += RHO * g / norm
        second = torch.autograd.grad(F.cross_entropy(plain(x), y), params)
        with torch.no_grad():
            for p, kept, g in zip(params, old, second, strict=True):
                p.copy_(kept)
                p.grad = g
        base.step()
        now = [p.detach().clone() for p in params]
        if expected is None:
            expected = now
        expected = [0.8 * mean + 0.2 * p for mean, p in zip(expected, now, strict=True)]
    for mean, p in zip(expected, average.module.parameters(), strict=True):
        torch.testing.assert_close(p, mean, rtol=1e-9, atol=1e-9)
