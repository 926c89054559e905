"""`FilteredModule` in Lightning's `ddp` strategy: ranks train as one process with all rows."""

import json
import os
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _float16 import Perceptron, samples, scaler, scales_by_hand, train_by_hand
from _world import PATIENCE, World
from gradfilter import interop
from gradfilter.distributed import across_ranks
from gradfilter.interop import Filtered

L = pytest.importorskip("lightning")
LightningEnvironment = pytest.importorskip(
    "lightning.fabric.plugins.environments"
).LightningEnvironment
DDPStrategy, FSDPStrategy = L.pytorch.strategies.DDPStrategy, L.pytorch.strategies.FSDPStrategy
FilteredModule = interop.FilteredModule
check_strategy = sys.modules["gradfilter.interop._lightning"].check_strategy

STEPS, SIZE, M = 6, 4, 2  # batches of a rank, their samples, and the rows of one

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


# --- A trainer in processes that exist already ---


class Started(LightningEnvironment):
    """The processes of a World, all on one node."""

    creates_processes_externally = True
    local_rank = global_rank = lambda self: dist.get_rank()
    world_size = lambda self: dist.get_world_size()
    set_global_rank = set_world_size = lambda self, number: None


class Rows(L.pytorch.loggers.logger.Logger):
    """Keeps what is logged on this rank."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    @L.pytorch.utilities.rank_zero_only
    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def trainer(size=None, **options):
    """A trainer over the ranks of this World, or of a single process."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec")
    size = dist.get_world_size() if size is None else size
    if size > 1:
        options = {"strategy": "ddp", "plugins": [Started()], "devices": size} | options
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 1} | options
    return L.Trainer(accelerator="cpu", **quiet | options)


class Net(FilteredModule):
    """A small network with statistics of its own."""

    microbatches = M

    def __init__(self, transforms, lr=0.1):
        super().__init__()
        self.transforms, self.lr = transforms, lr
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.norms, self.lrs, self.outputs = [], [], []

    def forward(self, x):
        return self.head(self.body(x))

    def microbatch_loss(self, batch):
        output = self(batch[0])
        self.log("hits", (output.argmax(1) == batch[1]).double().mean())
        return F.cross_entropy(output, batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        optimizer.register_step_post_hook(self.count)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9),
                "interval": "step",
            },
        }

    def count(self, *_):
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.lrs.append(self.optimizers().param_groups[0]["lr"])


def watched():
    return gf.chain(gf.watch(), gf.agree_filter(1.0))


def clipped():
    return gf.chain(gf.clip_per_row(0.5), gf.mean_rows())


def sharp():
    return gf.chain(gf.mean_rows(), gf.sam_perturb(0.05))


def own_scale():
    return gf.chain(counting_rows(), across_ranks(), gf.mean_rows())


def counting_rows():
    """Rows scaled by a state that depends on the rows of a rank."""

    def update(rows, state, params, /, **extra):
        norm = 0.5 * state["norm"] + rows.sq_norms().mean().sqrt()
        return rows.scaled((1 / norm).expand(len(rows))), {"norm": norm}, {}

    zero = lambda params: {"norm": torch.ones(())}
    return gf.link("counting", "rows -> rows", update, init=zero)


CHAINS = {
    "agreement": watched,
    "consensus": gf.consensus_filter,
    "clip + mean": clipped,
    "sam": sharp,
}


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return torch.utils.data.TensorDataset(torch.randn(n, 3, generator=generator) + y[:, None], y)


def loader(of, size=SIZE, **options):
    return torch.utils.data.DataLoader(of, batch_size=size, **options)


def orders(size, n):
    """The samples of every rank in the first epoch: Lightning's sampler shuffles."""
    sampler = torch.utils.data.DistributedSampler
    return torch.tensor([list(sampler(range(n), size, rank)) for rank in range(size)])


def joined(size, accumulate=1, n=None):
    """The batches of one process, one per step: rank by rank, the samples that it gets."""
    x, y = data(size * SIZE * STEPS * accumulate if n is None else n).tensors
    order = orders(size, len(x)).split(SIZE * accumulate, dim=1)
    return [(x[i.flatten()], y[i.flatten()]) for i in order]


def as_loader(batches):
    """Return a loader for Lightning, to which a list is a list of loaders."""
    return torch.utils.data.DataLoader(batches, batch_size=None)


def by_hand(net, batches, rows, plan="auto"):
    """The same training in one process: what each step reports."""
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)

    def scored(output, y):
        return F.cross_entropy(output, y), (output.argmax(1) == y).double().mean()

    wrapper = Filtered(net, scored, net.transforms, optimizer, rows, has_aux=True, plan=plan)
    reports = []
    for x, y in batches:
        result = wrapper.step(x, y)
        scheduler.step()
        own = {"train_loss": result.loss, "hits": result.aux.mean()}
        reports.append({k: v.item() for k, v in own.items()} | gf.scalars(result.info))
    return reports


def weights_of(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def fresh(chain):
    torch.manual_seed(0)
    return Net(CHAINS[chain]() if chain in CHAINS else chain)


# --- Parity ---


def fitted(chain, accumulate=1, n=None, context=None, **options):
    """Fit on this World; return the parameters, all states and what the host has."""
    net, logger = fresh(chain), Rows()
    for name, value in (context or {}).items():
        setattr(net, name, value)
    size = dist.get_world_size()
    n = size * SIZE * STEPS * accumulate if n is None else n
    fit = trainer(logger=logger, accumulate_grad_batches=accumulate, **options)
    fit.fit(net, loader(data(n)))
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    return {
        "params": weights_of(net),
        "states": {name: value.clone() for name, value in net.state_dict().items()},
        "rows": logger.rows,
        "metrics": metrics,
        "steps": fit.global_step,
        "norms": net.norms,
        "lrs": net.lrs,
    }


def check_parity(world, chain, accumulate=1, **options):
    found = world.run(fitted, chain, accumulate, None, None, *options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        net = fresh(chain)
        reports = by_hand(net, joined(world.size, accumulate), M * world.size * accumulate)
    finally:
        torch.set_default_dtype(before)
    for one in found:
        torch.testing.assert_close(one["params"], weights_of(net), rtol=1e-10, atol=1e-10)
        assert one["steps"] == STEPS
        assert one["metrics"] == found[0]["metrics"]
        for name, value in one["states"].items():  # statistics are a rank's until the next batch
            assert torch.equal(value, found[0]["states"][name]) == (
                "running" not in name or one is found[0]
            )
    assert not any(one["rows"] for one in found[1:])
    logged = found[0]["rows"]
    assert len(logged) == STEPS
    for row, report in zip(logged, reports, strict=True):
        assert row["train_loss"] == pytest.approx(report["train_loss"], rel=1e-10)
        # `scalars` takes the mean of bools in float32.
        assert {name: row[name] for name in report} == pytest.approx(report, rel=1e-7)
    return logged


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("chain", CHAINS)
def test_two_ranks_train_as_one_process_with_the_rows_of_both(two, chain, accumulate):
    logged = check_parity(two, chain, accumulate)
    if chain == "agreement":
        assert {"keep", "agree_filter/accepted", "watch/noise_scale"} <= set(logged[0])
        assert 0 < sum(row["agree_filter/accepted"] for row in logged) < STEPS


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("chain", CHAINS)
def test_three_ranks_train_as_one_process(three, chain, accumulate):
    check_parity(three, chain, accumulate)


# --- Parity with ordinary training ---


class Ordinary(L.LightningModule):
    """The same network in a LightningModule of the host."""

    def __init__(self):
        super().__init__()
        self.lr, self.norms, self.lrs = 0.1, [], []
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    forward, validation_step, count = Net.forward, Net.validation_step, Net.count
    configure_optimizers = Net.configure_optimizers
    on_train_batch_end = Net.on_train_batch_end


def beside_the_host(accumulate):
    """Two epochs with validation: one row per rank, and the host's own module."""
    results = []
    for make in (Ordinary, lambda: Net(gf.mean_rows())):
        torch.manual_seed(0)
        net, logger = make(), Rows()
        net.microbatches = 1
        n = dist.get_world_size() * SIZE * STEPS
        options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
        fit = trainer(logger=logger, gradient_clip_val=0.5, **options)
        fit.fit(net, loader(data(n)), loader(data(12, 1)))
        metrics = {k: fit.callback_metrics[k].clone() for k in ("train_loss", "val_loss")}
        logged = [row for row in logger.rows if "val_loss" in row]
        found = (net.state_dict(), metrics, net.norms, net.lrs, fit.global_step)
        results.append((*found, [row["val_loss"] for row in logged]))
    for one, other in zip(*results, strict=True):
        if isinstance(one, dict) and accumulate > 1:  # the host logs the loss of the last batch
            other.pop("train_loss", None), one.pop("train_loss", None)
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)
    assert len(results[0][2]) == 2 * STEPS // accumulate and max(results[0][2]) < 0.5 + 1e-6
    return results[1][0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mean_of_one_row_per_rank_is_the_training_of_the_host(two, accumulate):
    """Parameters, buffers, clipped norms, learning rates, steps, evaluation and logs are equal."""
    one, other = two.run(beside_the_host, accumulate)
    for name, value in one.items():  # rank 0's buffers are everywhere since the evaluation
        assert torch.equal(value, other[name])


def naive(net, batches):
    """Train by the mean of clipped gradients, with a backward pass for every row."""
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    for rows in batches:
        total = [torch.zeros_like(p) for p in net.parameters()]
        for x, y in rows:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            for sum_, p in zip(total, net.parameters(), strict=True):
                sum_ += p.grad / len(rows)
        for sum_, p in zip(total, net.parameters(), strict=True):
            p.grad = sum_
        optimizer.step()
        scheduler.step()


def uneven():
    """Batches of 6 and then 5 samples on each rank, in rows of 3 and 2."""
    net = fresh("clip + mean")
    net.uneven = True
    n = 11 * dist.get_world_size() - 1  # the sampler adds one
    trainer().fit(net, loader(data(n), 6))
    return weights_of(net)


@pytest.mark.usefixtures("float64")
def test_an_uneven_last_batch_is_cut_into_rows_on_each_rank(two):
    found = two.run(uneven)
    x, y = data(21).tensors
    batches = []
    for batch in orders(2, 21).split(6, dim=1):
        rows = [row for of_rank in batch for row in of_rank.tensor_split(M)]
        batches.append([(x[i], y[i]) for i in rows])
    assert [[len(y) for _, y in rows] for rows in batches] == [[3] * 4, [3, 2, 3, 2]]
    net = fresh("clip + mean")
    naive(net, batches)
    for one in found:
        torch.testing.assert_close(one, weights_of(net), rtol=1e-7, atol=1e-7)  # clip adds 1e-6


COUNTS = (7, 5)  # samples of the ranks: last batches of 3 and 1


class Bare(Net):
    """Without BatchNorm, which refuses single samples."""

    uneven, weighs = True, False

    def __init__(self, rows):
        super().__init__(clipped())
        self.body[1], self.microbatches = nn.Identity(), rows

    def microbatch_loss(self, batch):
        output = self(batch[0])
        self.log("hits", (output.argmax(1) == batch[1]).double().mean())
        reduction = "none" if self.weighs else "mean"
        return F.cross_entropy(output, batch[1], reduction=reduction)

    def sample_weights(self, batch):
        return torch.ones(len(batch[1])) if self.weighs else None


def fewer_samples(rows, weighs, options):
    torch.manual_seed(0)
    net, logger = Bare(rows), Rows()
    net.weighs, net.compile_step = weighs, options.pop("compile", False)
    own = torch.utils.data.TensorDataset(*(t[:: 2 - dist.get_rank()] for t in data(14).tensors))
    own = torch.utils.data.Subset(own, range(COUNTS[dist.get_rank()]))
    trainer(use_distributed_sampler=False, logger=logger, **options).fit(net, loader(own))
    return weights_of(net), logger.rows


FEWER = {
    "rows of two": (2, False, {}),
    "one row per sample": (None, False, {}),
    "weights": (2, True, {}),
    "accumulated": (2, False, {"accumulate_grad_batches": 2}),
    "a graph": (2, False, {"compile": "graph"}),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c == "a graph" else ()) for c in FEWER]
)
def test_ranks_with_fewer_samples_than_others_have_fewer_rows(two, case):
    rows, weighs, options = FEWER[case]
    torch.manual_seed(0)
    net = Bare(rows)
    own = [tuple(t[:: 2 - rank] for t in data(14).tensors) for rank in range(2)]
    of_step = []
    for start in (0, SIZE):
        found = []
        for rank, (x, y) in enumerate(own):
            i = torch.arange(COUNTS[rank])[start : start + SIZE]
            found += [(x[part], y[part]) for part in i.tensor_split(rows or len(i)) if len(part)]
        of_step.append(found)
    if case == "accumulated":
        of_step = [of_step[0] + of_step[1]]
    assert [len(found) for found in of_step][-1] == {"accumulated": 7}.get(case, 3 + (rows is None))
    with torch.no_grad():
        output = net(torch.cat([x for x, _ in of_step[0]]))
    naive(net, of_step)
    found = two.run(fewer_samples, rows, weighs, options)
    for weights, _ in found:
        torch.testing.assert_close(weights, weights_of(net), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weights, found[0][0], rtol=0, atol=0)
    logged = found[0][1]
    if case != "accumulated":
        labels = torch.cat([y for _, y in of_step[0]])
        assert logged[0]["train_loss"] == pytest.approx(F.cross_entropy(output, labels).item())
    assert all(0 <= row["hits"] <= 1 and row["train_loss"] > 0 for row in logged)


def averaged(size):
    net = fresh("agreement")
    averaging = L.pytorch.callbacks.EMAWeightAveraging(decay=0.8)
    batches = as_loader(joined(2)) if size == 1 else loader(data(2 * SIZE * STEPS))
    if size == 1:
        net.microbatches = 2 * M
    trainer(size, callbacks=[averaging]).fit(net, batches)
    return weights_of(net)


@pytest.mark.usefixtures("float64")
@pytest.mark.skipif(not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"), reason="Lightning 2.5")
def test_averaged_weights_are_those_of_one_process(two):
    for found in two.run(averaged, 2):
        torch.testing.assert_close(found, averaged(1), rtol=1e-10, atol=1e-10)


# --- DistributedDataParallel ---


OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "no buffers": {"broadcast_buffers": False},
}


def tripled(p):
    p.grad.mul_(3)


def with_options(accumulate):
    """Fit with hooks on some parameters, which run a backward pass of their own."""
    found = {}
    for name, options in OPTIONS.items():
        net = fresh("agreement")
        net.alone = nn.Parameter(torch.ones(3))  # in no loss
        net.head.weight.register_hook(lambda g: 2 * g)
        net.body[0].weight.register_post_accumulate_grad_hook(tripled)
        fit = trainer(strategy=DDPStrategy(**options), accumulate_grad_batches=accumulate)
        fit.fit(net, loader(data(2 * SIZE * 3 * accumulate)))
        assert torch.equal(net.alone, torch.ones(3))
        found[name] = weights_of(net)
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_options_and_hooks_of_ddp_change_nothing(two, accumulate):
    one, other = two.run(with_options, accumulate)
    for name in OPTIONS:
        for key, value in one[name].items():
            assert torch.equal(value, other[name][key])
            assert torch.equal(value, one["plain"][key])


# --- Resuming ---


def resumed(folder, chain):
    """Train two epochs, and resume after one: the same bits, also in states of one rank."""
    n = dist.get_world_size() * SIZE * STEPS
    path = f"{folder}/half.ckpt"
    whole = fresh(chain())
    trainer(max_epochs=2).fit(whole, loader(data(n)))
    half = trainer(max_epochs=1)
    half.fit(fresh(chain()), loader(data(n)))
    half.save_checkpoint(path)
    rest, net = trainer(max_epochs=2), fresh(chain())
    rest.fit(net, loader(data(n)), ckpt_path=path)
    assert rest.global_step == 2 * STEPS and net.lrs[-1] == whole.lrs[-1]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name
    states = net._hosted.state_dict(), whole._hosted.state_dict()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    saved = torch.load(path, weights_only=True)
    return saved["gradfilter"], saved.get("gradfilter_ranks"), states[0]


def spiky():
    return gf.chain(gf.mean_rows(), gf.spike_clip())


def fewer(path, chain):
    """Resume in one process of its own rank, from a checkpoint of two."""
    net = fresh(chain())
    trainer(1, max_epochs=2).fit(net, loader(data(2 * SIZE * STEPS), 2 * SIZE), ckpt_path=path)


@pytest.mark.usefixtures("float64")
def test_a_resumed_run_is_the_uninterrupted_one(two, tmp_path):
    found = two.run(resumed, str(tmp_path), spiky)
    assert found[0][1] is None and found[0][0]
    net = fresh(spiky())
    path = tmp_path / "half.ckpt"
    fit = trainer(1, max_epochs=2)
    fit.fit(net, loader(data(2 * SIZE * STEPS), 2 * SIZE), ckpt_path=path)  # on one process
    assert fit.global_step == 2 * STEPS


@pytest.mark.usefixtures("float64")
def test_states_of_one_rank_are_resumed_on_that_rank(two, tmp_path):
    (own, gathered, one), (_, _, other) = two.run(resumed, str(tmp_path), own_scale)
    assert gathered["counting.norm"].shape == (2,) and own["counting.norm"].shape == ()
    assert one["counting.norm"] != other["counting.norm"]
    alone = gf.chain(counting_rows(), gf.mean_rows())
    with pytest.raises(ValueError, match=r"saved 'counting.norm', .* found 2 in .* and 1 here"):
        fewer(tmp_path / "half.ckpt", lambda: alone)


# --- Callbacks and logs of the host ---


def stopped(folder):
    """Stop when the loss of all ranks is low enough, and keep the best checkpoint."""
    callbacks = L.pytorch.callbacks
    best = callbacks.ModelCheckpoint(folder, monitor="train_loss", save_on_train_epoch_end=True)
    stop = callbacks.EarlyStopping("train_loss", patience=0, check_on_train_epoch_end=True)
    net = fresh("agreement")
    n = dist.get_world_size() * SIZE * 2
    fit = trainer(max_epochs=20, callbacks=[best, stop], enable_checkpointing=True)
    fit.fit(net, loader(data(n)))
    return fit.current_epoch, best.best_model_path, best.best_model_score.item()


def test_stopping_and_the_best_checkpoint_are_the_same_on_all_ranks(two, tmp_path):
    one, other = two.run(stopped, str(tmp_path))
    assert one == other and one[0] < 20
    saved = torch.load(one[1], weights_only=True)
    assert (
        set(saved["gradfilter"]) == {"watch.sq_norm", "watch.trace"}
        and len(list(tmp_path.iterdir())) == 1
    )


class Logging(Net):
    """Logs in every way that the host has."""

    def microbatch_loss(self, batch):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        hits = (batch[0][:, 0] > 0.5).double().mean()
        self.log("both", hits, on_step=True, on_epoch=True)
        self.log("epoch", hits, on_step=False, on_epoch=True)
        self.log("synced", hits, sync_dist=True)
        self.log("largest", hits, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("total", hits, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        return loss


def everything_logged(size, batches=None):
    torch.manual_seed(0)
    net, logger = Logging(gf.mean_rows()), Rows()
    fit = trainer(size, logger=logger)
    if size == 1:
        net.microbatches = 2 * M
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(net, loader(data(2 * SIZE * STEPS)) if batches is None else as_loader(batches))
    said = {str(w.message) for w in caught if "sync_dist" in str(w.message)}
    return {k: v.item() for k, v in fit.callback_metrics.items()}, logger.rows, said


@pytest.mark.usefixtures("float64")
def test_logs_are_those_of_one_process(two):
    (one, rows, said), (other, none, _) = two.run(everything_logged, 2)
    expected, of_one, _ = everything_logged(1, joined(2))
    assert one == other and one == pytest.approx(expected) and not none
    assert rows == [pytest.approx(row) for row in of_one]
    assert all("'total'" in text for text in said)


def logs_on_one():
    class Partial(Net):
        def microbatch_loss(self, batch):
            if self.trainer.is_global_zero:
                self.log("mine", 1.0)
            return super().microbatch_loss(batch)

    trainer().fit(Partial(gf.mean_rows()), loader(data(4 * SIZE)))


def test_a_number_of_one_rank_alone_is_refused_on_all(two):
    for said in two.errors(logs_on_one):
        assert said.startswith("Partial: expected numbers of the same names on every rank, found")
        assert "['mine'] on rank 0 alone and [] on rank 1 alone" in said


# --- Other batches ---


class Stream(torch.utils.data.IterableDataset):
    """The samples of one rank, as many as it is told."""

    def __init__(self, counts):
        self.counts = counts

    def __iter__(self):
        size, n = dist.get_world_size(), 2 * SIZE * STEPS
        x, y = data(n).tensors
        own = orders(size, n)[dist.get_rank()][: self.counts[dist.get_rank()]]
        return iter([(x[i], y[i]) for i in own])


def streamed(counts, **options):
    net = fresh("agreement")
    fit = trainer(**options)
    fit.fit(net, loader(Stream(counts)))
    return weights_of(net), fit.global_step


@pytest.mark.usefixtures("float64")
def test_streams_of_equal_length_train_and_others_are_refused(two):
    n = SIZE * STEPS
    net = fresh("agreement")
    by_hand(net, joined(2), 2 * M)
    for found, steps in two.run(streamed, (n, n)):
        torch.testing.assert_close(found, weights_of(net), rtol=1e-10, atol=1e-10)
        assert steps == STEPS
    for said in two.errors(streamed, (n, n - SIZE)):
        assert said.startswith("Net: expected as many batches in an epoch on every rank, found ")
        assert "the last one on rank 1 but not on rank 0" in said and "limit_train_batches" in said


def stream_within(limit):
    return streamed((SIZE * STEPS, SIZE * (STEPS - 1)), **limit)


@pytest.mark.parametrize("limit", [{"limit_train_batches": STEPS - 1}, {"max_steps": STEPS - 1}])
def test_a_limit_ends_streams_together(two, limit):
    assert [steps for _, steps in two.run(stream_within, limit)] == [STEPS - 1] * 2


def other_batches(how):
    rank = dist.get_rank()
    net = Net(gf.mean_rows())
    net.microbatches = None if how == "rows" else M
    net.body[1] = nn.Identity()
    size, n = (SIZE, SIZE * (2 + rank)) if how == "batches" else (2 + rank, 2 * (2 + rank))
    trainer(use_distributed_sampler=False).fit(net, loader(data(n), size))


def test_other_numbers_of_rows_or_batches_are_refused_on_all_ranks(two):
    for said in two.errors(other_batches, "batches"):
        assert "as many batches in an epoch on every rank, found 2 on rank 0 and 3 on" in said
    for said in two.errors(other_batches, "rows"):
        assert "expected as many rows on every rank, found 2 on rank 0 and 3 on rank 1" in said


class Weighted(Net):
    """Without BatchNorm; some samples do not count, and one row of rank 1 has none."""

    clean = None

    def __init__(self, transforms):
        super().__init__(transforms)
        self.body[1] = nn.Identity()

    def microbatch_loss(self, batch):
        self.log("second", batch[1].double().mean())
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def sample_weights(self, batch):
        return weights(batch)


def weights(batch):
    return (batch[0][:, 0] > 0.4).double() * batch[0][:, 1].abs()


def weighted():
    torch.manual_seed(0)
    net, logger = Weighted(gf.mean_rows()), Rows()
    trainer(logger=logger).fit(net, loader(data(2 * SIZE * STEPS)))
    return weights_of(net), logger.rows


@pytest.mark.usefixtures("float64")
def test_weights_count_over_all_ranks(two):
    torch.manual_seed(0)
    net, logger = Weighted(gf.mean_rows()), Rows()
    net.microbatches = 2 * M
    dead = [(weights(batch).view(2 * M, -1).sum(1) == 0).view(2, M).sum(1) for batch in joined(2)]
    assert any(a != b for a, b in dead)  # ranks have other numbers of rows
    trainer(1, logger=logger).fit(net, as_loader(joined(2)))
    (found, rows), (other, _) = two.run(weighted)
    torch.testing.assert_close(found, weights_of(net), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other, found, rtol=0, atol=0)
    assert rows == [pytest.approx(row, nan_ok=True) for row in logger.rows]


class Following(Net):
    """Follows clean samples, of which every rank has some."""

    def __init__(self, clean):
        super().__init__(gf.reference_filter())
        self.body[1] = nn.Identity()
        self.clean = clean

    def reference_batch(self):
        return self.clean


def following():
    torch.manual_seed(0)
    rank = dist.get_rank()
    net = Following(tuple(t[3 * rank : 3 * rank + 3] for t in data(6, 5).tensors))
    trainer().fit(net, loader(data(2 * SIZE * STEPS)))
    return weights_of(net)


@pytest.mark.usefixtures("float64")
def test_all_ranks_follow_the_samples_of_all(two):
    torch.manual_seed(0)
    net = Following(data(6, 5).tensors)
    net.microbatches = 2 * M
    trainer(1).fit(net, as_loader(joined(2)))
    for found in two.run(following):
        torch.testing.assert_close(found, weights_of(net), rtol=1e-10, atol=1e-10)


class ByUser(Net):
    """One row per user."""

    def __init__(self):
        super().__init__(gf.agree_filter(1.0))
        self.body[1] = nn.Identity()

    def sample_groups(self, batch):
        return (batch[0][:, 2] > 0).long()


def by_user():
    torch.manual_seed(0)
    net = ByUser()
    trainer().fit(net, loader(data(2 * SIZE * STEPS)))
    return weights_of(net)


@pytest.mark.usefixtures("float64")
def test_groups_are_those_of_a_rank(two):
    torch.manual_seed(0)
    net = ByUser()
    net.microbatches = 2 * M
    own = ByUser.sample_groups
    halves = lambda x: [own(net, (part,)) + M * rank for rank, part in enumerate(x.chunk(2))]
    net.sample_groups = lambda batch: torch.cat(halves(batch[0]))
    ByUser.sample_groups, kept = (lambda self, batch: net.__dict__["sample_groups"](batch)), own
    try:
        trainer(1).fit(net, as_loader(joined(2)))
    finally:
        ByUser.sample_groups = kept
    for found in two.run(by_user):
        torch.testing.assert_close(found, weights_of(net), rtol=1e-10, atol=1e-10)


def half_precision():
    net = fresh("clip + mean").float()
    trainer(precision="bf16-mixed").fit(net, loader(_floats(2 * SIZE * STEPS)))
    return weights_of(net)


def _floats(n):
    x, y = data(n).tensors
    return torch.utils.data.TensorDataset(x.float(), y)


@pytest.mark.usefixtures("float64")
def test_mixed_precision_is_autocast_on_every_rank(two):
    net = fresh("clip + mean").float()
    with torch.autocast("cpu", torch.bfloat16):
        by_hand(net, [(x.float(), y) for x, y in joined(2)], 2 * M)
    full = fresh("clip + mean")
    by_hand(full, joined(2), 2 * M)
    for found in two.run(half_precision):
        torch.testing.assert_close(found, weights_of(net), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found["head.weight"].double(), full.head.weight, atol=1e-6)


class Half(FilteredModule):
    """A perceptron that notes the scale after each batch."""

    microbatches, transforms = M, gf.mean_rows()

    def __init__(self):
        super().__init__()
        self.net, self.scales = Perceptron(), []

    def microbatch_loss(self, batch):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


# A row of the second rank, then all of its rows, then those of both: the last step is skipped.
HOT = [(1, M), *((3, M + row) for row in range(M)), *((5, row) for row in range(2 * M))]


def float16():
    torch.manual_seed(0)
    net = Half()
    data = {n: v.chunk(2, 1)[dist.get_rank()] for n, v in samples(STEPS, 2 * M, 2, HOT).items()}
    batches = [{n: v[step].flatten(0, 1) for n, v in data.items()} for step in range(STEPS)]
    half = L.pytorch.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler())
    plugins = [Started(), half]
    trainer(plugins=plugins, use_distributed_sampler=False).fit(net, as_loader(batches))
    return weights_of(net.net), net.scales


def test_in_float16_all_ranks_reject_the_rows_that_overflow_on_one(two):
    torch.manual_seed(0)
    plain = Half().net
    assert len(train_by_hand(plain, samples(STEPS, 2 * M, 2, HOT), HOT)) == STEPS - 1
    found = two.run(float16)
    for weights, scales in found:
        assert scales == scales_by_hand(STEPS, HOT)
        torch.testing.assert_close(weights, weights_of(plain), rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(weights, found[0][0], rtol=0, atol=0)


def compiled():
    net = fresh("agreement")
    net.compile_step = "graph"
    trainer(accumulate_grad_batches=2).fit(net, loader(data(4 * SIZE * STEPS)))
    return weights_of(net)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_a_compiled_step_is_the_same(two):
    net = fresh("agreement")
    by_hand(net, joined(2, 2), 4 * M)
    for found in two.run(compiled):
        torch.testing.assert_close(found, weights_of(net), rtol=1e-10, atol=1e-10)


# --- Refusals ---


def refused():
    strategy = DDPStrategy(ddp_comm_hook=lambda state, bucket: None)
    trainer(strategy=strategy).fit(Net(gf.mean_rows()), loader(data(4 * SIZE)))


def test_hooks_that_would_never_run_are_refused_on_all_ranks(two):
    for said in two.errors(refused):
        assert said.startswith("Net: expected") and "without ddp_comm_hook and" in said


def sharded():
    return FSDPStrategy.__new__(FSDPStrategy), Net(gf.mean_rows())


def another():
    return SimpleNamespace(), Net(gf.mean_rows())


def synced():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net(gf.mean_rows()))
    return DDPStrategy(), net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sharded, r"or ModelParallelStrategy, found FSDPStrategy.*fully_shard in configure_model"),
        (another, r'strategy "ddp" for 2 processes, found SimpleNamespace. Use'),
        (synced, r"found SyncBatchNorm. Use L.Trainer\(sync_batchnorm=False\)"),
    ],
)
def test_strategies_that_cannot_work_are_refused_by_name(make, message):
    strategy, net = make()
    net._trainer = SimpleNamespace(strategy=strategy, world_size=2)  # needs devices otherwise
    with pytest.raises(ValueError, match=message):
        check_strategy("Net", net)


# --- Faults ---


class Broken(Net):
    """Rank 1 breaks in the third step."""

    harm, calls = "raises", 0

    def on_train_batch_start(self, batch, batch_idx):
        self.calls = batch_idx

    def microbatch_loss(self, batch):
        if self.calls == 2 and self.global_rank == 1:
            if self.harm == "raises":
                raise ValueError("my own mistake")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().microbatch_loss(batch)


def broken():
    net = Broken(gf.agree_filter(1.0))
    net.harm = "killed"
    trainer().fit(net, loader(data(2 * SIZE * STEPS)))


@pytest.mark.slow
def test_the_others_end_with_one_error_when_a_rank_is_killed():
    world = World(2, timeout=10 * PATIENCE)
    try:
        world.start(broken)
        fine, said = world.outcome(0)
        assert not fine and "Rank 0 of 2 lost the others while" in said
    finally:
        world.close()


SCRIPT = """
import json, sys
sys.path[:0] = {paths}
import torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

import test_lightning_ranks as tests

if __name__ == "__main__":
    how, strategy, out = sys.argv[1:]
    net = tests.fresh("agreement")
    if how == "raises":
        torch.manual_seed(0)
        net = tests.Broken(tests.gf.agree_filter(1.0))
    options = dict(strategy=strategy, plugins=None, devices=2)
    n = 2 * tests.SIZE * tests.STEPS
    tests.trainer(2, **options).fit(net, tests.loader(tests.data(n)))
    if net.global_rank == 0:
        torch.save(tests.weights_of(net), out)
"""


def script(folder, launcher, *args):
    path = folder / "train.py"
    here = os.path.dirname(__file__)
    paths = [here, os.path.join(here, "..", "support")]
    path.write_text(SCRIPT.format(paths=json.dumps(paths)))
    command = [sys.executable, *launcher, str(path), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("launcher", "strategy"), [(TORCHRUN, "ddp"), ([], "ddp"), ([], "ddp_spawn")]
)
def test_processes_of_every_launcher_train_as_one(tmp_path, launcher, strategy):
    out = tmp_path / "weights.pt"
    done = script(tmp_path, launcher, "trains", strategy, str(out))
    assert done.returncode == 0, done.stderr
    net = fresh("agreement")
    by_hand(net, joined(2), 2 * M)
    found = torch.load(out, weights_only=True)
    torch.testing.assert_close(found, weights_of(net), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_run(tmp_path):
    done = script(tmp_path, TORCHRUN, "raises", "ddp", str(tmp_path / "weights.pt"))
    assert done.returncode != 0 and "ValueError: my own mistake" in done.stderr
    assert not (tmp_path / "weights.pt").exists()
