"""`Filtered` against the pure loop, and the tensors that it must not change."""

import copy
import io
from collections import UserDict
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradfilter as gf
from _models import ConvBN, Dropped, Tied, WithLoss, images, token_loss, tokens, vectors
from gradfilter import _tree
from gradfilter.grads._row_parts import join_stacks
from gradfilter.grads._stack import StackOrigin
from gradfilter.interop import GSAM, SAM, SGD_AGC, Filtered, LinearScheduler, step_gaf

PICKY = 0.9  # of random batches this accepts some rows and skips some steps
NOTHING, ALL = 0.0, 2.0


def spied(optimizer):
    """Count the calls of the optimizer."""
    calls, step = [], optimizer.step
    optimizer.step = lambda *args, **kwargs: (calls.append(1), step(*args, **kwargs))[1]
    return calls


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def filtered(model, threshold=ALL, criterion=F.cross_entropy, m=4, optimizer=None, **options):
    optimizer = sgd(model) if optimizer is None else optimizer
    return Filtered(model, criterion, gf.agree_filter(threshold), optimizer, m, **options)


def bits(*things):
    """Everything a step may write, as copies."""
    tensors = []
    for thing in things:
        state = thing if isinstance(thing, dict) else thing.state_dict()
        tensors += [
            torch.as_tensor(leaf).clone() for leaf in _tree.leaves(state) if leaf is not None
        ]
    return tensors


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(
        dict(a.state_dict()), dict(b.state_dict()), rtol=tolerance, atol=tolerance
    )


CASES = {
    "batch norm": (ConvBN, images, F.cross_entropy),
    "tied, frozen and unused": (Tied, tokens, token_loss),
    "plain": (lambda: Dropped(0.0), vectors, F.cross_entropy),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("plan", ["auto", "loop"])
def test_twenty_steps_are_those_of_the_pure_loop(case, plan):
    make, batches, criterion = CASES[case]
    model = make()
    pure = copy.deepcopy(model)
    update = gf.chain(gf.agree_filter(PICKY), gf.agc_clip(0.1), gf.sgd(0.05, momentum=0.9))
    step = gf.train_step(gf.model_loss(pure, criterion), update, microbatches=4)
    state = step.init(pure)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    transforms = gf.chain(gf.agree_filter(PICKY), gf.agc_clip(0.1))
    wrapper = Filtered(model, criterion, transforms, optimizer, microbatches=4, plan=plan)
    kept = 0
    for _ in range(20):
        batch = batches()
        state, expected = step(state, batch)
        result = wrapper.step(*batch)
        kept += int(result.info["keep"])
        torch.testing.assert_close(result.loss, expected.pop("loss"), rtol=1e-10, atol=1e-10)
        assert result.info.keys() == expected.keys() - {"sgd/lr"}
        for name, value in result.info.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-8)
        gf.insert(pure, state["params"], state["buffers"])
        close(model, pure)
    assert 0 < kept <= 20


@pytest.mark.usefixtures("float64")
def test_groups_and_a_scheduler_as_in_a_loop_by_hand():
    model = Dropped(0.0)
    other = copy.deepcopy(model)

    def adamw(net):
        groups = [{"params": net.a.parameters()}, {"params": net.b.parameters(), "lr": 3e-2}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, foreach=True)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 3e-2], 12)

    optimizer, scheduler = adamw(model)
    wrapper = filtered(model, optimizer=optimizer)
    by_hand, other_scheduler = adamw(other)
    for _ in range(10):
        x, y = vectors()
        wrapper.step(x, y)
        scheduler.step()
        by_hand.zero_grad()
        F.cross_entropy(other(x), y).backward()  # all rows accepted: their mean is the gradient
        by_hand.step()
        other_scheduler.step()
        close(model, other)
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in by_hand.param_groups]


class SignSGD(torch.optim.Optimizer):
    """Somebody else's optimizer, which writes into the gradients it is given."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign_(), alpha=group["lr"])


OPTIMIZERS = {
    "plain": lambda params: torch.optim.Adam(params, lr=0.01, foreach=False),
    "foreach": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
    "fused": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "with tensor lr": lambda params: torch.optim.SGD(params, lr=torch.tensor(0.01)),
    "clipping": lambda params: SGD_AGC(params, lr=0.1, clipping=1e-3),
    "third-party": lambda params: SignSGD(params, lr=0.01),
    "muon": lambda params: torch.optim.Muon([p for p in params if p.ndim == 2]),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("m", [1, 3])
def test_any_optimizer_gets_the_gradient_of_the_batch(optimizer, m):
    model = Dropped(0.0)
    other = copy.deepcopy(model)
    first, second = (OPTIMIZERS[optimizer](list(net.parameters())) for net in (model, other))
    wrapper = Filtered(model, F.cross_entropy, gf.mean_rows(), first, m)
    for _ in range(4):
        x, y = vectors()
        result = wrapper.step(x, y)
        other.zero_grad()
        loss = F.cross_entropy(other(x), y)
        loss.backward()
        second.step()
        torch.testing.assert_close(result.loss, loss.detach())
        close(model, other, tolerance=1e-3 if optimizer == "muon" else 1e-10)  # muon: bfloat16


def test_parameters_of_other_optimizers_stay():
    model = Dropped(0.0)
    before = bits(model.b)
    wrapper = filtered(model, optimizer=sgd(model.a))
    wrapper.step(*vectors())
    assert same(bits(model.b), before) and model.b.weight.grad is not None
    after = bits(model.a)
    sgd(model.b).step()  # its gradients are there
    assert same(bits(model.a), after) and not same(bits(model.b), before)


L = torch.optim.lr_scheduler
SCHEDULERS = {
    "lambda": lambda o: L.LambdaLR(o, lambda k: 0.9**k),
    "one cycle": lambda o: L.OneCycleLR(o, 0.1, total_steps=9),
    "warm restarts": lambda o: L.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: L.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "sequence": lambda o: L.SequentialLR(o, [L.LinearLR(o), L.ExponentialLR(o, 0.5)], [3]),
    "chained": lambda o: L.ChainedScheduler([L.LinearLR(o), L.ExponentialLR(o, 0.5)]),
    "plateau": lambda o: L.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers_of_torch(schedule):
    model = Dropped(0.0)
    other = copy.deepcopy(model)
    optimizers = [sgd(net) for net in (model, other)]
    wrapper = filtered(model, optimizer=optimizers[0])
    schedulers = [SCHEDULERS[schedule](o) for o in optimizers]
    lrs = set()
    for _ in range(7):
        x, y = vectors()
        result = wrapper.step(x, y)
        other.zero_grad()
        loss = F.cross_entropy(other(x), y)
        loss.backward()
        optimizers[1].step()
        metrics = [(result.loss,), (loss.detach(),)] if schedule == "plateau" else [(), ()]
        for scheduler, metric in zip(schedulers, metrics, strict=True):
            scheduler.step(*metric)
        found, expected = (o.param_groups[0]["lr"] for o in optimizers)
        assert found == expected
        lrs.add(found)
        close(model, other)
    assert len(lrs) > 2


class HostQuestions(TorchDispatchMode):
    """Count how often the value of a tensor is read."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("chain", "questions"),
    [(gf.agree_filter(ALL), 1), (gf.agree_filter(NOTHING), 1), (gf.mean_rows(), 0)],
)
def test_the_host_asks_once_and_only_where_a_step_may_be_skipped(chain, questions, scaled):
    model = nn.Linear(6, 3)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    plain = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    wrapper = Filtered(model, F.cross_entropy, chain, plain, 4, scaler=scaler)
    wrapper.step(*vectors())
    batch = vectors()
    plain.step = lambda: None  # what an optimizer asks is its own
    with HostQuestions() as asked:
        wrapper.accumulate(*batch)
        assert asked.count == 0
        wrapper.step(*batch)
    assert asked.count == (1 if scaled else questions)  # finite_filter comes with a scaler


def opposed():
    """Two microbatches whose gradients disagree."""
    x = torch.randn(3, 1, 6, 6)
    return torch.cat([x, x]), torch.tensor([0, 0, 0, 1, 1, 1])


def test_a_skipped_step_leaves_everything_but_buffers_to_the_bit():
    model = ConvBN()
    model.conv.weight.data[0] = -0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    wrapper = filtered(model, optimizer=optimizer, m=2)
    wrapper.step(*images())
    wrapper.transforms = gf.chain(gf.agree_filter(NOTHING))
    calls = spied(optimizer)
    params = {name: p.detach() for name, p in model.named_parameters()}
    grads = [p.grad for p in model.parameters()]
    before, values = bits(optimizer, params), bits(dict(enumerate(grads)))
    seen = int(model.bn.num_batches_tracked)
    mean = model.bn.running_mean.clone()
    result = wrapper.step(*opposed())
    assert not result.info["keep"] and not calls
    assert same(bits(optimizer, params), before)
    assert torch.signbit(model.conv.weight[0]).all()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert same(bits(dict(enumerate(grads))), values)
    assert model.bn.num_batches_tracked == 2 * seen  # as many as in the step before
    assert not torch.equal(model.bn.running_mean, mean)
    wrapper.transforms = gf.chain(gf.agree_filter(ALL))
    wrapper.step(*opposed())
    assert len(calls) == 1 and not same(bits(optimizer, params), before)


def counting(stop=None):
    """A link with a state, which says how often it ran."""

    def update(grads, state, params, **extra):
        return grads, {"count": state["count"] + 1}, {"ran": state["count"]}

    zero = lambda params: {"count": torch.zeros((), dtype=torch.int64)}
    return gf.link("counting", "tree -> tree", update, init=zero, publishes=("ran",))


def test_the_states_of_links_are_gated_with_the_optimizer():
    model = ConvBN()
    chain = gf.chain(gf.agree_filter(1.0), counting())
    wrapper = Filtered(model, F.cross_entropy, chain, sgd(model), 2)
    wrapper.step(*images(), keep=False)
    wrapper.step(*images(), keep=torch.tensor(False))
    assert wrapper.state_dict()["transforms"]["counting.count"] == 0
    chain = gf.chain(gf.mean_rows(), counting())
    wrapper = Filtered(model, F.cross_entropy, chain, sgd(model), 2)
    wrapper.step(*images(), keep=False)
    wrapper.step(*images())
    assert wrapper.state_dict()["transforms"]["counting.count"] == 1


def test_a_state_may_hold_parameters_and_gradients():
    def update(grads, state, params, **extra):
        return grads, {"params": params, "grads": grads}, {}

    init = lambda params: {"params": params, "grads": params}
    keeping = gf.link("keeping", "tree -> tree", update, init=init)
    model = Dropped(0.0)
    optimizer = sgd(model, lr=1.0)
    chain = gf.chain(gf.mean_rows(), keeping)
    wrapper = Filtered(model, F.cross_entropy, chain, optimizer, 2)
    before = bits(dict(model.named_parameters()))
    assert same(bits(gf.state_dict(wrapper._state["keeping"]["params"])), before)
    wrapper.step(*vectors())
    grads = bits(wrapper._state["keeping"]["grads"])
    optimizer.zero_grad(set_to_none=False)
    assert same(bits(wrapper._state["keeping"]["params"]), before)
    assert same(bits(wrapper._state["keeping"]["grads"]), grads)
    assert not same(bits(dict(model.named_parameters())), before)


def test_a_run_goes_on_bit_for_bit(tmp_path):
    def new(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        chain = gf.chain(gf.agree_filter(ALL), counting())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return Filtered(model, F.cross_entropy, chain, optimizer, 4, scaler=scaler)

    model, batches = ConvBN(), [images() for _ in range(6)]
    wrapper = new(model)
    for batch in batches[:3]:
        wrapper.step(*batch)
    saved = {"model": model.state_dict(), **wrapper.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    torch.save(saved["transforms"], tmp_path / "transforms.pt")
    torch.load(tmp_path / "transforms.pt", weights_only=True)
    resumed = ConvBN()
    again = new(resumed)
    states = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(states.pop("model"))
    again.load_state_dict(states)
    for batch in batches[3:]:
        wrapper.step(*batch)
        again.step(*batch)
    assert same(bits(model, wrapper.state_dict()), bits(resumed, again.state_dict()))
    assert again.state_dict()["transforms"]["counting.count"] == 6
    assert again.scaler.get_scale() == 64.0
    with pytest.raises(ValueError, match=r"Expected the states .*'scaler'.*found"):
        again.load_state_dict({k: v for k, v in states.items() if k != "scaler"})
    before = bits(again.state_dict())
    off = {
        **copy.deepcopy(states),
        "scaler": torch.amp.GradScaler("cpu", enabled=False).state_dict(),
    }
    off["optimizer"]["param_groups"][0]["lr"] = 5.0
    with pytest.raises(ValueError, match="a GradScaler that is on, found that of one that was off"):
        again.load_state_dict(off)
    assert again.optimizer.param_groups[0]["lr"] == 0.01 and same(bits(again.state_dict()), before)


@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_autocast_around_one_step_or_many(plan):
    batches = [vectors() for _ in range(3)]
    model = Dropped(0.0)
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    a, b, c = (filtered(net, plan=plan) for net in (model, other, plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches:
            a.step(*batch)
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = b.step(*batch)
        c.step(*batch)
    assert same(bits(model), bits(other)) and result.loss.isfinite()
    assert not same(bits(model), bits(plain))
    close(model, plain, tolerance=5e-2)


def steep(output, targets):
    """Cross entropy; targets of class 2 pass a gradient times 1e30, of the same loss."""
    factor = torch.where(targets == 2, 1e33, 1.0)[:, None]
    return F.cross_entropy(output + (output - output.detach()) * (factor - 1), targets)


@pytest.mark.parametrize("plan", ["fused", "loop", "vmap"])
def test_a_row_that_overflows_is_rejected_alone_and_the_scale_backs_off(plan):
    model = nn.Linear(6, 3)
    other = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    x, y = torch.randn(9, 6), torch.tensor([0, 1, 0, 2, 2, 2, 1, 0, 1])
    wrapper = filtered(model, criterion=steep, m=3, scaler=scaler, plan=plan)
    result = wrapper.step(x, y)
    assert result.info["keep"] and result.info["finite_filter/finite"].tolist() == [1, 0, 1]
    assert scaler.get_scale() == 2.0**19
    torch.testing.assert_close(result.loss, F.cross_entropy(other(x), y))
    filtered(other, m=2).step(torch.cat([x[:3], x[6:]]), torch.cat([y[:3], y[6:]]))
    close(model, other, tolerance=1e-6)


def test_a_row_without_a_finite_loss_does_not_lower_the_scale():
    model = nn.Linear(6, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    x, y = vectors()
    x[4] = torch.inf
    result = filtered(model, scaler=scaler).step(x, y)
    assert result.info["finite_filter/finite"].tolist() == [1, 0, 1, 1]
    assert result.info["keep"] and scaler.get_scale() == 8.0
    before = bits(model)
    result = filtered(model, scaler=scaler).step(x + torch.inf, y)
    assert not result.info["keep"] and same(bits(model), before)


def test_a_scale_changes_nothing_else():
    model = WithLoss()
    other, off = copy.deepcopy(model), copy.deepcopy(model)
    ids, labels = tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones(12, 4), "labels": labels}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = filtered(model, criterion=None, scaler=scaler)
    disabled = filtered(off, criterion=None, scaler=torch.amp.GradScaler("cpu", enabled=False))
    plain = filtered(other, criterion=None)
    for _ in range(2):
        result, expected = scaled.step(batch), plain.step(batch)
        assert disabled.step(batch).info.keys() == expected.info.keys()  # nothing of a guard
        torch.testing.assert_close(result.loss, expected.loss)
    close(model, other, tolerance=1e-6)
    assert same(bits(off), bits(other))


@pytest.mark.parametrize("scale", [2.0**10, 2.0**100])
@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_metrics_are_those_of_losses_without_a_scale(plan, scale):
    model = Dropped(0.0)
    other = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    make = lambda net, s: Filtered(net, F.cross_entropy, SHARP(), sgd(net), 4, scaler=s, plan=plan)
    scaled, plain = make(model, scaler), make(other, None)
    for _ in range(2):
        batch = vectors()
        found, expected = scaled.step(*batch).info, plain.step(*batch).info
        assert "sam_perturb/surrogate_gap" in expected
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    close(model, other, tolerance=1e-5)


@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_half_precision_under_a_scale(plan):
    model = nn.Linear(6, 3).half()
    before = bits(model)
    wrapper = filtered(model, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10), plan=plan)
    x, y = vectors()
    result = wrapper.step(x.half(), y)
    assert result.info["finite_filter/finite"].all() and not same(bits(model), before)


def test_a_users_finite_filter_is_enough_where_it_guards_rows():
    scaler = torch.amp.GradScaler("cpu")
    model = nn.Linear(6, 3)
    first = gf.chain(gf.clip_per_row(1.0), gf.finite_filter(), gf.agree_filter())
    late = gf.chain(gf.agree_filter(), gf.finite_filter())
    make = lambda chain, s: Filtered(model, F.cross_entropy, chain, sgd(model), 4, scaler=s)
    names = lambda chain, s=scaler: [part.name for part in make(chain, s).transforms.parts]
    assert names(first) == ["clip_per_row", "finite_filter", "agree_filter"]
    assert names(late) == ["finite_filter", "agree_filter", "finite_filter"]
    assert names(late, None) == ["agree_filter", "finite_filter"]
    make(late, scaler).step(*vectors())


SHARP = lambda: gf.chain(gf.agree_filter(1.2), gf.sam_perturb(0.05))
PER_ROW = lambda: gf.chain(gf.sam_perturb(0.05, per_microbatch=True), gf.agree_filter(1.2))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["fused", "loop"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("transforms", [lambda: gf.agree_filter(1.2), SHARP, PER_ROW])
def test_accumulated_batches_are_one_batch(plan, scaled, transforms):
    model = ConvBN()
    model.cumulative.momentum = 0.1
    other = copy.deepcopy(model)
    scaler = lambda: torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    make = lambda net, m: Filtered(
        net, F.cross_entropy, transforms(), sgd(net), m, plan=plan, scaler=scaler()
    )
    a, b = make(model, 2), make(other, 6)
    for _ in range(3):
        x, y = images(18)
        before = bits(dict(model.named_parameters()))
        loss = a.accumulate(x[:6], y[:6])
        torch.testing.assert_close(
            loss, F.cross_entropy(copy.deepcopy(other)(x[:6]), y[:6]), rtol=1, atol=1
        )
        a.accumulate(x[6:12], y[6:12])
        assert same(bits(dict(model.named_parameters())), before)
        with pytest.raises(RuntimeError, match="no accumulated rows in a checkpoint, found 2"):
            a.state_dict()
        result, expected = a.step(x[12:], y[12:]), b.step(x, y)
        assert result.info["agree_filter/accepted"].shape == (6,)
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(dict(result.info), dict(expected.info))
        close(model, other)
    a.state_dict()


class Masked(nn.Module):
    """Dropout that hands its masks to a list of the test's, and BatchNorm."""

    def __init__(self, masks):
        super().__init__()
        # Not a list of the module's own: that would be set back after every repeated pass.
        self.keep = masks.append
        self.a, self.norm, self.b = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x):
        h = self.norm(self.a(x))
        mask = F.dropout(torch.ones_like(h), 0.5, self.training)
        self.keep(mask)
        return self.b(h.tanh() * mask)


@pytest.mark.usefixtures("float64")
def test_accumulated_batches_meet_their_own_masks_and_buffers_again():
    masks = []
    model = Masked(masks)
    wrapper = Filtered(model, F.cross_entropy, SHARP(), sgd(model, lr=0.0), 2, plan="loop")
    wrapper.accumulate(*vectors(12))
    wrapper.accumulate(*vectors(4))
    after = bits(model.norm)
    torch.rand(3)
    wrapper.step(*vectors(8))
    assert [len(mask) for mask in masks] == [6, 6, 2, 2, 4, 4] * 2
    assert same(masks[:6], masks[6:]) and not torch.equal(masks[0], masks[1])
    assert model.norm.num_batches_tracked == 6 and not same(bits(model.norm), after)


@pytest.mark.usefixtures("float64")
def test_rows_of_batches_of_several_sizes_count_alike():
    model = nn.Linear(6, 3)
    wrapper = Filtered(model, F.cross_entropy, gf.mean_rows(), sgd(model, lr=0.0), 2)
    batches = [vectors(12), vectors(4)]
    wrapper.accumulate(*batches[0])
    result = wrapper.step(*batches[1])
    losses = [F.cross_entropy(model(x), y) for x, y in batches]  # rows of one batch: equal sizes
    torch.testing.assert_close(result.loss, (losses[0] + losses[1]).detach() / 2)
    expected = torch.autograd.grad(losses[0] + losses[1], model.weight)[0] / 2
    torch.testing.assert_close(model.weight.grad, expected)


def test_loading_a_state_drops_accumulated_rows():
    model = nn.Linear(6, 3)
    wrapper = filtered(model)
    state = wrapper.state_dict()
    wrapper.accumulate(*vectors())
    wrapper.load_state_dict(state)
    assert wrapper.step(*vectors()).info["agree_filter/accepted"].shape == (4,)


def test_joined_rows_have_the_buffers_after_the_last():
    parts = [gf.DenseStack({"w": torch.ones(2, 3)}, buffers={"b": torch.tensor(k)}) for k in (1, 2)]
    origin = StackOrigin(2, {"w": torch.ones(3)}, None)
    assert join_stacks([replace(part, origin=origin) for part in parts]).buffers["b"] == 2


def test_what_fails_drops_no_accumulated_rows():
    model = nn.Linear(6, 3)
    wrapper = filtered(model)
    wrapper.accumulate(*vectors())
    with pytest.raises(ValueError, match="divisible"):
        wrapper.step(*vectors(13))
    assert wrapper.step(*vectors()).info["agree_filter/accepted"].shape == (8,)


@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_batch_norm_autocast_a_scale_and_accumulation_together(plan):
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3))
    other = copy.deepcopy(model)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8) for _ in range(2)]
    make = lambda net, m, s: filtered(net, m=m, plan=plan, scaler=s)
    a, b = make(model, 2, scalers[0]), make(other, 6, scalers[1])
    for _ in range(2):
        x, y = vectors(36)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a.accumulate(x[:12], y[:12])
            a.accumulate(x[12:24], y[12:24])
            found, expected = a.step(x[24:], y[24:]), b.step(x, y)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(dict(found.info), dict(expected.info), rtol=0.05, atol=0.05)
        close(model, other, tolerance=5e-3)
    assert model[1].num_batches_tracked == 12 and model[0].weight.grad.dtype == torch.float32


def test_accumulated_rows_of_other_parameters():
    model = nn.Linear(6, 3)
    wrapper = filtered(model)
    wrapper.accumulate(*vectors())
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"same trainable parameters .* found \['bias'\]"):
        wrapper.step(*vectors())


def test_a_parameter_frozen_later_is_not_stepped_on():
    model = nn.Linear(6, 3)
    wrapper = filtered(model)
    wrapper.step(*vectors())
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    wrapper.step(*vectors())
    assert torch.equal(model.bias, before) and model.bias.grad is None


def test_parameters_may_be_frozen_and_freed_again():
    model = Dropped(0.0)
    wrapper = filtered(model)
    wrapper.step(*vectors())
    model.a.requires_grad_(False)
    before = bits(model.a)
    wrapper.step(*vectors())
    assert same(bits(model.a), before)
    model.a.requires_grad_(True)
    wrapper.step(*vectors())
    assert not same(bits(model.a), before)


def test_a_model_may_move_to_another_dtype():
    model = Dropped(0.0)
    wrapper = filtered(model)
    wrapper.step(*vectors())
    model.double()
    x, y = vectors()
    result = wrapper.step(x.double(), y)
    assert result.loss.dtype == model.a.weight.grad.dtype == torch.float64


def test_a_step_in_evaluation_mode_leaves_statistics():
    model = ConvBN().eval()
    before = bits(dict(model.named_buffers()))
    filtered(model).step(*images())
    assert same(bits(dict(model.named_buffers())), before) and not model.training


class Encoding(UserDict):
    """A mapping like those that tokenizers return."""


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_a_batch_in_one_mapping(kind):
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x, y):
            return self.linear(x)

    model = Keyed()
    other = copy.deepcopy(model.linear)
    x, y = vectors()
    filtered(model, criterion=lambda output, batch: F.cross_entropy(output, batch["y"])).step(
        kind(x=x, y=y)
    )
    filtered(other).step(x, y)
    close(model.linear, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_model_compiled_by_aot_autograd_is_itself():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    other = copy.deepcopy(model)
    backend = CompileCounterWithBackend("aot_eager")
    user = torch.compile(model, backend=backend, fullgraph=True)
    for net in (user, other):
        torch.manual_seed(1)
        wrapper = Filtered(net, F.cross_entropy, SHARP(), sgd(net), 4, plan="loop")
        for _ in range(3):
            wrapper.step(*vectors())
    assert backend.frame_count == 1  # one graph for every row of every step, moved or not
    close(model, other, tolerance=1e-6)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


# Dynamo asks an activation, which is no leaf, for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_model_takes_the_loop_and_says_why(inner):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    other, names = copy.deepcopy(model), []
    seen = gf.link(
        "seen",
        "tree -> tree",
        lambda grads, state, params, **extra: (grads, names.append(list(params)) or state, {}),
    )
    chain = gf.chain(gf.agree_filter(1.2), seen)
    runs = []
    model[0].register_forward_hook(lambda *_: runs.append(torch.compiler.is_compiling()))
    if inner:
        model[2] = compiled(model[2])
    user = model if inner else compiled(model)
    with pytest.warns(UserWarning, match="torch runs no compiled module under vmap") as caught:
        wrapper = Filtered(user, F.cross_entropy, chain, sgd(model), 4)
    assert len(caught) == 1 and caught[0].filename == __file__
    plain = filtered(other, 1.2, plan="loop")
    for _ in range(3):
        batch = vectors()
        wrapper.step(*batch)
        plain.step(*batch)
    assert any(runs) or inner
    for (_, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b)
    if not inner:
        assert names[0] == [name for name, _ in other.named_parameters()]
    Filtered(user, F.cross_entropy, chain, sgd(model), 4, plan="loop")
    with pytest.raises(ValueError, match=r'expected plan "loop" .* compiled module, found .fused'):
        Filtered(user, F.cross_entropy, chain, sgd(model), 4, plan="fused")


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(checkpoint(lambda h: self.a(h).tanh(), x, use_reentrant=False))


def test_a_checkpointed_model_trains_as_in_the_loop():
    model = Checkpointed()
    other = copy.deepcopy(model)
    wrapper, plain = filtered(model, plan="fused"), filtered(other, plan="loop")
    for _ in range(3):
        batch = vectors()
        wrapper.step(*batch)
        plain.step(*batch)
    close(model, other, tolerance=1e-6)


def test_channels_last_stays():
    model = ConvBN().to(memory_format=torch.channels_last)
    model.conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    other = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    wrapper = filtered(model, optimizer=optimizer)
    x, y = torch.randn(12, 2, 6, 6), torch.arange(12) % 3
    wrapper.step(x.to(memory_format=torch.channels_last), y)
    assert model.conv.weight.grad.stride() == model.conv.weight.stride()
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    filtered(other, optimizer=torch.optim.SGD(other.parameters(), lr=0.1)).step(x, y)
    close(model, other, tolerance=1e-4)


def test_one_row_per_sample():
    model = nn.Linear(6, 3)
    wrapper = Filtered(model, F.cross_entropy, gf.consensus_filter(), sgd(model), None)
    assert wrapper.step(*vectors()).info["consensus_filter/accepted"].shape == (12,)


def test_a_chain_of_another_kind_is_refused_with_its_remedy():
    model = nn.Linear(6, 3)
    make = lambda chain: Filtered(model, F.cross_entropy, chain, sgd(model), 4)
    for chain, remedy in [
        (gf.chain(gf.agree_filter(), gf.sgd(0.1), gf.ema_params()), "Remove 'sgd', 'ema_params'"),
        (gf.sgd(0.1), "Remove 'sgd'"),
        (gf.clip_per_row(1.0), "Insert a reducer after 'clip_per_row'"),
        (gf.chain(gf.agc_clip(), gf.clip_by_global_norm(1.0)), "a reducer before 'agc_clip'"),
    ]:
        with pytest.raises(TypeError, match=remedy):
            make(chain)
    with pytest.raises(TypeError, match="Call the factory"):
        make(gf.agree_filter)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS"),
        (lambda model: SAM(model.parameters(), sgd(model)), "SAM"),
        (
            lambda model: GSAM(model.parameters(), sgd(model), model, 0.1, LinearScheduler(5, 0.1)),
            "GSAM",
        ),
    ],
)
def test_an_optimizer_that_needs_a_closure_is_refused(make, kind):
    model = nn.Linear(6, 3)
    with pytest.raises(
        TypeError, match=rf"found {kind}, whose step needs a closure\. .* the chain"
    ):
        filtered(model, optimizer=make(model))


def test_what_is_no_module_criterion_or_optimizer_is_refused():
    model = nn.Linear(6, 3)
    make = lambda m, c, o: Filtered(m, c, gf.agree_filter(), o, 4)
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module, found function\. Pass"):
        make(lambda x: x, F.cross_entropy, sgd(model))
    with pytest.raises(TypeError, match=r"a criterion to call, or None, found str\. Give"):
        make(model, "mse", sgd(model))
    for wrong, kind in ((torch.optim.SGD, "type"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"torch\.optim\.Optimizer, found {kind}\. Make"):
            make(model, F.cross_entropy, wrong)


def test_a_module_whose_wrapper_would_not_average_over_ranks_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(6, 3))
        for wrapped in (model, nn.Sequential(model)):
            with pytest.raises(
                ValueError, match=r"found DistributedDataParallel.*Pass its \.module"
            ):
                filtered(wrapped)
            with pytest.raises(ValueError, match=r"step_gaf: .* found DistributedDataParallel"):
                step_gaf(wrapped, sgd(model), F.cross_entropy, [vectors(), vectors()])
        filtered(model.module).step(*vectors())
    finally:
        torch.distributed.destroy_process_group()


def test_arguments_that_cannot_be():
    model, wrong = nn.Linear(6, 3), nn.Linear(6, 3)
    with pytest.raises(ValueError, match="an optimizer over trainable parameters of the model"):
        filtered(model, optimizer=sgd(wrong))
    with pytest.raises(ValueError, match="microbatches >= 1"):
        filtered(model, m=0)
    with pytest.raises(ValueError, match="Expected plan"):
        filtered(model, plan="fast")
    wrapper = filtered(model)
    before = bits(model)
    with pytest.raises(TypeError, match=r"Expected step\(inputs, targets\), or one dict"):
        wrapper.step(torch.randn(12, 6))
    with pytest.raises(TypeError, match=r"Expected a criterion for step\(inputs, targets\)"):
        filtered(model, criterion=None).step(*vectors())
    with pytest.raises(ValueError, match="divisible by the number of microbatches"):
        wrapper.step(*vectors(10))
    with pytest.raises(ValueError, match="found an empty batch"):
        wrapper.step(*vectors(0))
    with pytest.raises(ValueError, match="found M = 1"):
        filtered(model, m=1).step(*vectors())
    assert same(bits(model), before)


def by_hand(model, criterion, optimizer, batches, m=1):
    """An ordinary loop whose gradient is the mean over microbatches."""
    for x, y in batches:
        optimizer.zero_grad()
        for part, targets in zip(x.chunk(m), y.chunk(m), strict=True):
            (criterion(model(part), targets) / m).backward()
        optimizer.step()


@pytest.mark.parametrize("step", ["filtered", "gaf"])
def test_a_scheduler_does_not_warn_of_a_first_step_that_was_skipped(step):
    model = nn.Linear(6, 3)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    x, y = vectors()
    for _ in range(3):
        if step == "gaf":
            step_gaf(model, optimizer, F.cross_entropy, [(x, y), (-x, y)], cos_distance_thresh=0.0)
        else:
            assert not filtered(model, NOTHING, optimizer=optimizer).step(x, y).info["keep"]
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8


def tripled(gradient):
    return 3 * gradient


def halved(parameter):
    parameter.grad.mul_(0.5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["auto", "loop", "vmap"])
def test_hooks_on_parameters_run_as_in_a_backward_pass(plan):
    seen = {}

    def hooked(net):
        mask = (torch.arange(net.a.weight.numel()).view_as(net.a.weight) % 2).double()
        net.a.weight.data.mul_(mask)
        net.a.weight.register_hook(lambda g: g * mask)
        net.b.bias.register_hook(tripled)
        net.a.bias.register_post_accumulate_grad_hook(halved)
        watched = [net.b.weight, net.b.bias]
        log = seen.setdefault(net, [])
        torch.autograd.graph.register_multi_grad_hook(watched, lambda grads: log.append(len(grads)))
        return mask

    model = Dropped(0.0)
    other = copy.deepcopy(model)
    mask = hooked(model)
    hooked(other)
    batches = [vectors() for _ in range(3)]
    wrapper = filtered(model, plan=plan)
    for batch in batches:
        wrapper.step(*batch)
    by_hand(other, F.cross_entropy, sgd(other), batches)
    close(model, other)
    assert not (model.a.weight * (1 - mask)).any()
    assert seen[model] == seen[other] == [2, 2, 2]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("plan", ["auto", "loop"])
def test_pruned_weights_stay_pruned(plan):
    model = Dropped(0.0)
    other = copy.deepcopy(model)
    for net in (model, other):
        prune.l1_unstructured(net.a, "weight", 0.5)
    batches = [vectors() for _ in range(3)]
    wrapper = filtered(model, plan=plan)
    for batch in batches:
        wrapper.step(*batch)
    by_hand(other, F.cross_entropy, sgd(other), batches)
    close(model, other)


def with_hits(output, targets):
    hits = (output.argmax(1) == targets).float().sum()
    return F.cross_entropy(output, targets), {"hits": hits, "logits": output.detach()}


@pytest.mark.parametrize("plan", ["auto", "loop"])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_the_criterion_says_in_addition_to_its_loss(plan, scaled):
    model = Dropped(0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    wrapper = filtered(model, criterion=with_hits, plan=plan, scaler=scaler, has_aux=True)
    x, y = vectors()
    logits = model(x).detach()
    expected = [with_hits(part, t) for part, t in zip(logits.chunk(4), y.chunk(4), strict=True)]
    result = wrapper.step(x, y)
    losses, aux = zip(*expected, strict=True)
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())
    assert result.aux["hits"].tolist() == [float(a["hits"]) for a in aux]
    torch.testing.assert_close(result.aux["logits"], torch.stack([a["logits"] for a in aux]))
    wrapper.accumulate(x, y)
    assert wrapper.step(*vectors()).aux["logits"].shape == (8, 3, 3)
    wrapper.accumulate(x, y)
    with pytest.raises(ValueError, match=r"shapes \(4, 3, 3\) and \(4, 2, 3\)\. Reduce"):
        wrapper.step(x[:8], y[:8])
    assert filtered(model).step(x, y).aux is None


def test_arguments_in_another_order_are_seen():
    model = nn.Linear(6, 3)
    chain, optimizer = gf.mean_rows(), sgd(model)
    for wrong, found in [
        ((optimizer, chain, F.cross_entropy), "found SGD, Transform, function after"),
        ((F.cross_entropy, optimizer, chain), "found function, SGD, Transform after"),
        ((chain, F.cross_entropy, optimizer), "found Transform, function, SGD after"),
    ]:
        with pytest.raises(TypeError, match=rf"in this order, {found} the model"):
            Filtered(model, *wrong, 4)
    with pytest.raises(TypeError, match=r"GradScaler or None, found bool\. Make"):
        filtered(model, scaler=True)
    with pytest.raises(TypeError, match=r"found one tuple of two. Unpack it: step\(\*batch\)"):
        filtered(model).step(vectors())
    with pytest.raises(ValueError, match=r"Give what state_dict\(\) of a Filtered returned"):
        filtered(model).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_no_pair_is_no_loss_with_aux(scaled):
    model = nn.Linear(6, 3)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    for criterion, found in [
        (F.cross_entropy, "Tensor"),
        (lambda output, y: (F.cross_entropy(output, y), output, y), "tuple of 3"),
    ]:
        wrapper = filtered(model, criterion=criterion, has_aux=True, scaler=scaler)
        with pytest.raises(TypeError, match=rf"a pair \(loss, aux\) .*, found {found}\. Return"):
            wrapper.step(*vectors())
    loss = lambda params, batch: (params["w"] * batch).sum()
    with pytest.raises(TypeError, match=r"a pair \(loss, aux\)"):
        gf.microbatch_grads(loss, 2, has_aux=True)({"w": torch.ones(3)}, torch.ones(4, 3))


def test_aux_needs_somebody_who_gives_it():
    model = nn.Linear(6, 3)
    with pytest.raises(
        TypeError, match=r"found None with has_aux=True\. Give criterion\(output, ba"
    ):
        filtered(model, criterion=None, has_aux=True)
    with pytest.raises(TypeError, match="needs has_aux=True"):
        filtered(model, criterion=with_hits, plan="loop").step(*vectors())


def test_what_is_saved_needs_no_module():
    model = nn.Linear(6, 3)
    file = io.BytesIO()
    torch.save(filtered(model).state_dict()["transforms"], file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == {}


@pytest.mark.usefixtures("float64")
def test_averaged_weights_are_those_of_a_loop_by_hand():
    model = Dropped(0.0)
    plain = copy.deepcopy(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    expected = [p.detach().clone() for p in model.parameters()]
    wrapper, optimizer = filtered(model, 0.97, m=2), sgd(plain)
    kept = []
    for step in range(8):
        x, y = vectors()
        kept.append(bool(wrapper.step(x, y).info["keep"]))
        average.update_parameters(model)
        if kept[-1]:
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()  # with two rows, a step has both or is skipped
            optimizer.step()
        for mean, p in zip(expected, plain.parameters(), strict=True):
            mean.copy_(p.detach() if step == 0 else 0.8 * mean + 0.2 * p.detach())
    assert 0 < sum(kept) < 8
    for mean, p in zip(expected, average.module.parameters(), strict=True):
        torch.testing.assert_close(p, mean, rtol=1e-10, atol=1e-10)


def test_a_module_of_sharded_parameters_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = fully_shard(nn.Linear(6, 3), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"expected across_ranks\(\) first in the chain"):
        filtered(model)
