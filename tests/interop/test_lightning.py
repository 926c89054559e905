"""`FilteredModule` in Lightning's training: the steps are those of a plain `Filtered` loop."""

import copy
import pickle
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradfilter as gf
from _float16 import GROWTH, SCALE, Perceptron, samples, scaler, scales_by_hand, train_by_hand
from gradfilter import interop
from gradfilter.interop import Filtered

L = pytest.importorskip("lightning")
FilteredModule = interop.FilteredModule

pytestmark = [
    # Lightning's own, with torch 2.15, in every fit.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    # On machines with many processors Lightning asks for workers.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

PICKY, NOTHING, ALL = 0.9, 0.0, 2.0  # PICKY skips some steps of these batches
STEPS, SIZE, M = 20, 8, 4


class Net(FilteredModule):
    """A convolution with running statistics, and a head."""

    microbatches = M

    def __init__(self, threshold=PICKY, lr=0.05, schedule=None):
        super().__init__()
        self.transforms = gf.chain(gf.agree_filter(threshold), counting())
        self.lr, self.schedule = lr, schedule
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten())
        self.head = nn.Linear(12, 2)
        self.norms, self.lrs, self.losses = [], [], []  # one per step made, one per batch

    def forward(self, x):
        return self.head(self.body(x))

    def microbatch_loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        optimizer.register_step_post_hook(self.count)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}

    def count(self, *_):
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.lrs.append(self.optimizers().param_groups[0]["lr"])
        self.losses.append(outputs["loss"].item())


def counting():
    """A link with a state, which makes later gradients larger."""

    def update(grads, state, params, **extra):
        count = state["count"] + 1
        return {k: g * (1 + 0.1 * count) for k, g in grads.items()}, {"count": count}, {}

    zero = lambda params: {"count": torch.zeros((), dtype=torch.int64)}
    return gf.link("counting", "tree -> tree", update, init=zero)


def images(n=STEPS * SIZE):
    """Images of two kinds, with noise enough for microbatches to disagree."""
    y = torch.randint(2, (n,))
    return torch.utils.data.TensorDataset(torch.randn(n, 1, 4, 4) + y.view(-1, 1, 1, 1), y)


def opposed(steps=4):
    """Batches of two microbatches whose gradients disagree."""
    x = torch.randn(steps, 1, 2, 1, 4, 4).expand(-1, 2, -1, -1, -1, -1).reshape(-1, 1, 4, 4)
    return torch.utils.data.TensorDataset(x, torch.tensor([0, 0, 1, 1] * steps))


def loader(data, size=SIZE):
    return torch.utils.data.DataLoader(data, batch_size=size)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "enable_checkpointing": False, "barebones": False} | options
    return L.Trainer(accelerator="cpu", **quiet | options)


def by_hand(net, data, *, accumulate=1, epochs=1, context=None, after_step=None):
    """The same training with `Filtered`; the numbers of steps made, of batches and the losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr, momentum=0.9)
    options = {"microbatches": net.microbatches, "plan": net.plan}
    wrapper = Filtered(net, F.cross_entropy, net.transforms, optimizer, **options)
    kept, losses = 0, []
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader(data), 1):
            with context or torch.enable_grad():
                if i % accumulate:
                    wrapper.accumulate(x, y)
                    continue
                result = wrapper.step(x, y)
            kept += int(result.info["keep"])
            losses.append(result.loss.item())
            if after_step is not None:
                after_step(optimizer)
    return kept, losses


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_twenty_steps_are_those_of_a_plain_loop(accumulate):
    net, data = Net(), images(STEPS * SIZE * accumulate)
    plain = copy.deepcopy(net)
    kept, losses = by_hand(plain, data, accumulate=accumulate)
    fit = trainer(accumulate_grad_batches=accumulate)
    fit.fit(net, loader(data))
    close(net, plain)
    assert len(net.norms) == kept and (0 < kept < STEPS) == (accumulate == 1)
    assert fit.global_step == STEPS
    # Lightning divides the loss of every batch by the number of accumulated ones.
    reported = [accumulate * loss for loss in net.losses[accumulate - 1 :: accumulate]]
    assert reported == pytest.approx(losses)


def test_the_loss_goes_down():
    net = Net(ALL, lr=0.01)
    trainer(max_epochs=2).fit(net, loader(images()))
    assert sum(net.losses[-5:]) < 0.7 * sum(net.losses[:5])


def step_lr(**config):
    return lambda optimizer: {
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        **config,
    }


SCHEDULES = {
    # lr after each batch of two epochs of four batches
    "per step": (step_lr(interval="step"), 1, [1 / 2**i for i in range(1, 9)]),
    "per epoch": (step_lr(interval="epoch"), 1, [1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 4]),
    "every other": (
        step_lr(interval="step", frequency=2),
        1,
        [1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 16],
    ),
    "per accumulated step": (
        step_lr(interval="step"),
        2,
        [1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 16],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_step_as_lightning_steps_them(schedule):
    make, accumulate, expected = SCHEDULES[schedule]
    net = Net(ALL, lr=1.0, schedule=make)
    trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(net, loader(images(4 * SIZE)))
    assert net.lrs == expected


def test_plateau_watches_a_metric_of_the_filter():
    def plateau(optimizer):
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        return {"scheduler": scheduler, "monitor": "agree_filter/accepted", "interval": "step"}

    net = Net(ALL, lr=1.0, schedule=plateau)
    trainer().fit(net, loader(images(3 * SIZE)))  # always 1.0: never better than the first
    assert net.optimizers().param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.usefixtures("float64")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    net, data = Net(schedule=step_lr(interval="step")), images(10 * SIZE)
    start = copy.deepcopy(net)
    trainer(max_epochs=2).fit(net, loader(data))
    first = copy.deepcopy(start)
    half = trainer(max_epochs=1)
    half.fit(first, loader(data))
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Net(schedule=step_lr(interval="step"))
    rest = trainer(max_epochs=2)
    rest.fit(resumed, loader(data), ckpt_path=tmp_path / "half.ckpt")
    close(resumed, net, tolerance=0)
    assert rest.global_step == STEPS and resumed.lrs[-1] == net.lrs[-1]
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["gradfilter"]
    assert saved == {"counting.count": len(first.norms)}
    plain = half.strategy.checkpoint_io.load_checkpoint(tmp_path / "half.ckpt")
    del plain["gradfilter"]
    torch.save(plain, tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="state in the checkpoint, found none: they start afresh"):
        trainer(max_epochs=2).fit(Net(), loader(data), ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.usefixtures("float64")
def test_a_new_fit_has_new_states_as_it_has_a_new_optimizer(tmp_path):
    data, net = images(4 * SIZE), Net(ALL)
    fit = trainer()
    fit.fit(net, loader(data))
    fit.save_checkpoint(tmp_path / "net.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "net.ckpt", threshold=ALL)
    for again in (net, loaded):
        fit = trainer()
        fit.fit(again, loader(data))
        fit.save_checkpoint(tmp_path / "again.ckpt")
        saved = torch.load(tmp_path / "again.ckpt", weights_only=True)
        assert saved["gradfilter"] == {"counting.count": 4}
    close(loaded, net, tolerance=0)


def test_checkpoints_between_accumulated_batches_do_not_stop_a_run(tmp_path):
    class Saving(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    net = Saving(ALL)
    trainer(accumulate_grad_batches=2).fit(net, loader(images(4 * SIZE)))
    assert len(net.norms) == 2 and len(list(tmp_path.iterdir())) == 4


class Rows(L.pytorch.loggers.logger.Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_loss_and_metrics_are_logged_once_per_step():
    net, logger, data = Net(), Rows(), images()
    plain = copy.deepcopy(net)
    kept, losses = by_hand(plain, data)
    trainer(logger=logger, log_every_n_steps=1).fit(net, loader(data))
    assert len(logger.rows) == STEPS
    assert [row["train_loss"] for row in logger.rows] == pytest.approx(losses, rel=1e-4)
    assert sum(row["keep"] for row in logger.rows) == kept
    for row in logger.rows:
        assert row["agree_filter/accepted"] * M in range(M + 1)
        assert (row["agree_filter/accepted"] * M >= 2) == row["keep"]


def test_a_filter_that_accepts_nothing_never_calls_the_optimizer():
    net = Net(NOTHING)
    net.microbatches = 2
    before = copy.deepcopy(net)
    fit = trainer()
    fit.fit(net, loader(opposed(), 4))
    close(net.head, before.head, tolerance=0)
    close(net.body[0], before.body[0], tolerance=0)
    assert not net.norms and fit.global_step == 4
    assert net.body[1].num_batches_tracked == 8  # buffers take in every microbatch
    assert fit.callback_metrics["keep"] == 0


class Rooted(Net):
    """Tensors of the module itself, in addition to those of its layers."""

    plan = "loop"

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean())
        return super().forward(self.scale * x - self.mean)


@pytest.mark.usefixtures("float64")
def test_tensors_of_the_module_itself_are_trained_and_kept():
    net, data = Rooted(), images()
    plain = copy.deepcopy(net)
    by_hand(plain, data)
    trainer().fit(net, loader(data))
    close(net, plain)
    assert net.mean != 0 and net.scale != 1


def test_what_is_frozen_on_the_way_stays_as_it_is():
    class Freezing(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 4:
                self.head.requires_grad_(False)
                self.then = copy.deepcopy(self.head.state_dict())

        def count(self, *_):
            pass

    net = Freezing(ALL)
    trainer().fit(net, loader(images()))
    assert torch.equal(net.head.weight, net.then["weight"])


def test_the_filtered_gradient_is_clipped():
    net = Net(ALL)
    trainer(gradient_clip_val=0.01).fit(net, loader(images(4 * SIZE)))
    assert net.norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_mixed_precision_is_autocast_around_the_step():
    net, data = Net(ALL), images()
    plain, full = copy.deepcopy(net), copy.deepcopy(net)
    by_hand(plain, data, context=torch.autocast("cpu", torch.bfloat16))
    by_hand(full, data)
    trainer(precision="bf16-mixed").fit(net, loader(data))
    close(net, plain, tolerance=1e-6)
    assert not torch.equal(net.head.weight, full.head.weight)
    close(net, full, tolerance=0.2)


DECAY = 0.8
average_of = partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)


@pytest.mark.usefixtures("float64")
@pytest.mark.skipif(not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"), reason="Lightning 2.5")
def test_averaged_weights_are_those_of_filtered_steps():
    """Lightning counts a skipped step, in which the average moves towards unchanged weights."""
    net, data = Net(), images()
    plain = copy.deepcopy(net)
    average = average_of(plain)
    kept, _ = by_hand(plain, data, after_step=lambda _: average.update_parameters(plain))
    averaging = L.pytorch.callbacks.EMAWeightAveraging(decay=DECAY)
    trainer(callbacks=[averaging]).fit(net, loader(data))
    assert 0 < kept < STEPS
    close(net, average.module)  # at the end of a fit Lightning takes the averages
    assert not torch.allclose(net.head.weight, plain.head.weight)


class Half(FilteredModule):
    """A perceptron that notes the scale after each batch, and the norms of steps made."""

    microbatches, transforms = M, gf.mean_rows()

    def __init__(self):
        super().__init__()
        self.net = Perceptron()
        self.scales, self.norms = [], []

    def microbatch_loss(self, batch):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer.register_step_post_hook(lambda *_: self.norms.append(self.norm()))
        return optimizer

    def norm(self):
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


def half_precision(**options):
    """A trainer in float16, which Lightning's own argument refuses on a CPU."""
    plugin = L.pytorch.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler())
    return trainer(plugins=[plugin], **options)


HOT = [(1, 2), (3, 0), (3, 3), *((5, row) for row in range(M))]  # the sixth step is skipped
HALVES = 8


class Flat(torch.utils.data.Dataset):
    """The samples of all steps, one after the other."""

    def __init__(self, columns):
        self.columns = {name: values.flatten(0, 2) for name, values in columns.items()}

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, i):
        return {name: values[i] for name, values in self.columns.items()}


@pytest.mark.parametrize("plan", ["auto", "loop"])
def test_in_float16_a_row_that_overflows_is_rejected_and_not_the_step(plan):
    net, data = Half(), samples(HALVES, M, 2, HOT)
    net.plan = plan
    plain = copy.deepcopy(net.net)
    fit = half_precision(gradient_clip_val=0.4)
    fit.fit(net, loader(Flat(data)))
    norms = train_by_hand(plain, data, HOT, limit=0.4)
    assert net.scales == scales_by_hand(HALVES, HOT)
    assert len(net.norms) == HALVES - 1 == len(norms) and min(norms) < 0.4 < max(norms)
    assert net.norms == pytest.approx([min(norm, 0.4) for norm in norms], rel=5e-3)
    close(net.net, plain, tolerance=5e-3)
    assert fit.global_step == HALVES and fit.precision_plugin.scaler is not None


def test_in_float16_rows_of_accumulated_batches_are_rejected_alone():
    net, data = Half(), samples(HALVES, 2 * M, 2, HOT)
    plain = copy.deepcopy(net.net)
    half_precision(accumulate_grad_batches=2).fit(net, loader(Flat(data)))
    train_by_hand(plain, data, HOT)
    close(net.net, plain, tolerance=5e-3)
    assert net.scales[1::2] == scales_by_hand(HALVES, HOT)
    assert len(net.norms) == HALVES  # the sixth step has M rows left


def test_a_scale_is_resumed_with_the_run(tmp_path):
    data = loader(Flat(samples(HALVES - 1, M, 2, [(1, 2)])))  # the scale is about to grow
    net = Half()
    again = copy.deepcopy(net)
    half_precision(max_epochs=2).fit(net, data)
    first = half_precision()
    first.fit(again, data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest = Half()
    half_precision(max_epochs=2).fit(rest, data, ckpt_path=tmp_path / "half.ckpt")
    close(rest, net, tolerance=0)
    expected = scales_by_hand(2 * HALVES - 2, [(1, 2), (HALVES, 2)])
    assert again.scales + rest.scales == net.scales == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_float16_on_a_gpu_a_row_that_overflows_is_rejected_alone():
    net, data = Half(), samples(HALVES, M, 2, HOT)
    plain = copy.deepcopy(net.net)
    plugin = L.pytorch.plugins.precision.MixedPrecision("16-mixed", "cuda")
    plugin.scaler = torch.amp.GradScaler("cuda", init_scale=SCALE, growth_interval=GROWTH)
    options = {"max_epochs": 1, "enable_checkpointing": False, "logger": False}
    fit = L.Trainer(accelerator="gpu", devices=1, plugins=[plugin], **options)
    fit.fit(net, loader(Flat(data)))
    train_by_hand(plain, data, HOT)
    assert net.scales == scales_by_hand(HALVES, HOT)
    close(net.net.cpu(), plain, tolerance=5e-3)


def test_a_module_that_has_a_training_step_lends_its_loss():
    class Usual(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 2)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.linear(x.flatten(1)), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Mixed(FilteredModule, Usual):
        transforms, microbatches = gf.mean_rows(), 4

        def microbatch_loss(self, batch):
            return Usual.training_step(self, batch, 0)

    usual, data = Usual(), images()
    mixed = Mixed()
    mixed.load_state_dict(usual.state_dict())
    for net in (usual, mixed):  # equal batches: the mean of the rows is the gradient
        trainer().fit(net, loader(data))
    close(mixed, usual, tolerance=1e-5)


class Plain(FilteredModule):
    transforms, microbatches = gf.chain(gf.mean_rows(), counting()), M

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 2)

    def microbatch_loss(self, batch):
        return F.cross_entropy(self.head(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trained_module_can_be_copied_and_pickled():
    net, data = Plain(), images(2 * SIZE)
    trainer().fit(net, loader(data))
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for module in (net, *copies):
        trainer().fit(module, loader(data))
        close(module, net, tolerance=0)


def changed(**attributes):
    return type("Changed", (Net,), attributes)


def own_step(self, batch, batch_idx):
    return self.microbatch_loss(batch)


def own_optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
    optimizer.step(closure=optimizer_closure)


def logging(self, batch):
    self.log("metric", nn.Identity())
    return Net.microbatch_loss(self, batch)


def logging_all(self, batch):
    self.log("logits", self(batch[0]))
    return Net.microbatch_loss(self, batch)


def lbfgs(self):
    return torch.optim.LBFGS(self.parameters())


class NotNamed(FilteredModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


class Uncut(NotNamed):
    transforms = gf.mean_rows()


def with_transforms(transforms):
    net = Net()
    net.transforms = transforms
    return net


def manual():
    net = Net()
    net.automatic_optimization = False
    return net


MISTAKES = {
    "no transforms": (
        NotNamed,
        TypeError,
        "NotNamed: expected an attribute 'transforms', found none. Give",
    ),
    "no microbatches": (Uncut, TypeError, "'microbatches', found none"),
    "an update": (
        lambda: with_transforms(gf.chain(gf.mean_rows(), gf.sgd(0.1))),
        TypeError,
        "found 'rows -> update'. Remove 'sgd'",
    ),
    "own step": (changed(training_step=own_step), TypeError, "Rename it to microbatch_loss"),
    "manual": (manual, TypeError, "expected automatic optimization"),
    "past the filter": (
        changed(optimizer_step=own_optimizer_step, count=lambda self, *_: None),
        TypeError,
        r"Call super\(\)\.optimizer_step",
    ),
    "pair": (
        changed(microbatch_loss=lambda self, batch: {"loss": Net.microbatch_loss(self, batch)}),
        TypeError,
        r"a scalar tensor, found dict\. Return the loss, and give other numbers to self\.log",
    ),
    "metric": (changed(microbatch_loss=logging), TypeError, "log as 'metric' .* found Identity"),
    "vector": (changed(microbatch_loss=logging_all), ValueError, r"found shape \(2, 2\). Reduce"),
    "lbfgs": (changed(configure_optimizers=lbfgs), TypeError, "found LBFGS, whose step needs"),
    "no loss": (
        changed(microbatch_loss=FilteredModule.microbatch_loss),
        TypeError,
        r"method microbatch_loss\(self, batch\) in Changed, found none. Return",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_message(mistake):
    make, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        trainer().fit(make(), loader(images()))


def test_a_batch_that_the_microbatches_do_not_divide_is_known_before_the_first():
    class Strict(Net):
        def microbatch_loss(self, batch):
            raise AssertionError("a batch was met")

    with pytest.raises(ValueError, match=r"found a last one of 3 samples .* drop_last=True"):
        trainer().fit(Strict(), loader(images(STEPS * SIZE + 3)))
    with pytest.raises(ValueError, match=r"batch size .* microbatches=4, found 6. Use 4, or"):
        trainer().fit(Strict(), loader(images(), 6))
    data = images(2 * SIZE + 3)
    trainer(limit_train_batches=2).fit(Net(), loader(data))
    trainer(max_steps=2).fit(Net(), loader(data))
    trainer().fit(Net(), torch.utils.data.DataLoader(data, batch_size=SIZE, drop_last=True))

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images(3))

    with pytest.raises(ValueError, match=r"found N = 3 samples and M = 4. Use a batch of"):
        trainer().fit(Net(), loader(Endless()))


class Scored(Net):
    """Says how well it does, as any LightningModule would."""

    def microbatch_loss(self, batch):
        x, y = batch
        output = self(x)
        hits = (output.argmax(1) == y).float()
        self.log("accuracy", hits.mean(), prog_bar=True, on_step=True, on_epoch=True)
        self.log_dict({"size": len(y), "keep": 7.0})
        return F.cross_entropy(output, y)


@pytest.mark.parametrize("plan", ["auto", "loop"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_the_loss_logs_is_the_mean_over_all_rows(plan, accumulate):
    net, logger, data = Scored(ALL), Rows(), images(4 * SIZE)
    net.plan = plan
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), lr=net.lr, momentum=0.9)

    def scored(output, y):
        return F.cross_entropy(output, y), (output.argmax(1) == y).float()

    wrapper = Filtered(plain, scored, net.transforms, optimizer, M, plan=plan, has_aux=True)
    expected = []
    for i, (x, y) in enumerate(loader(data), 1):
        if i % accumulate:
            wrapper.accumulate(x, y)
        else:
            expected.append(wrapper.step(x, y).aux.mean().item())
    fit = trainer(logger=logger, log_every_n_steps=1, accumulate_grad_batches=accumulate)
    fit.fit(net, loader(data))
    rows = [row for row in logger.rows if "accuracy_step" in row]
    assert [row["accuracy_step"] for row in rows] == pytest.approx(expected)
    assert {row["size"] for row in rows} == {SIZE / M} and {row["keep"] for row in rows} == {1.0}
    assert fit.callback_metrics["accuracy_epoch"] == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("options", [{}, {"prog_bar": True}, {"on_epoch": True}])
def test_a_loss_may_log_a_train_loss_of_its_own(options):
    class Logging(Net):
        def microbatch_loss(self, batch):
            loss = super().microbatch_loss(batch)
            self.log("train_loss", 10 * loss, **options)
            return loss

    net, logger, data = Logging(ALL), Rows(), images()
    plain = copy.deepcopy(net)
    _, losses = by_hand(plain, data)
    fit = trainer(logger=logger, log_every_n_steps=1)
    fit.fit(net, loader(data))
    ten = [10 * loss for loss in losses]
    if "on_epoch" in options:
        assert fit.callback_metrics["train_loss"] == pytest.approx(sum(ten) / len(ten), rel=1e-4)
    else:
        assert [row["train_loss"] for row in logger.rows] == pytest.approx(ten, rel=1e-4)


class SharpNet(Net):
    """An ordinary LightningModule's step with interop.SAM."""

    training_step = lambda self, batch, batch_idx: Net.microbatch_loss(self, batch)
    optimizer_step = L.LightningModule.optimizer_step
    optimizer_zero_grad = L.LightningModule.optimizer_zero_grad
    backward = L.LightningModule.backward
    on_before_optimizer_step = L.LightningModule.on_before_optimizer_step
    on_fit_start = on_train_start = lambda self: None

    def configure_optimizers(self):
        base = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return interop.SAM(self.parameters(), base, 0.05, model=self)


def test_sam_in_lightning_refuses_batches_that_its_closure_does_not_have():
    data = images(4 * SIZE)
    net = SharpNet()
    plain = copy.deepcopy(net)
    trainer().fit(net, loader(data))
    base = torch.optim.SGD(plain.parameters(), lr=plain.lr, momentum=0.9)
    optimizer = interop.SAM(plain.parameters(), base, 0.05, model=plain)
    for x, y in loader(data):
        optimizer.set_closure(F.cross_entropy, x, y)
        optimizer.step()
    close(net, plain, tolerance=1e-5)
    with pytest.raises(RuntimeError, match="In Lightning use accumulate_grad_batches=1, or Filter"):
        trainer(accumulate_grad_batches=2).fit(SharpNet(), loader(data))


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("world_size", 2, 'strategy "ddp" for 2 processes, found SingleDeviceStrategy'),
    ],
)
def test_what_the_trainer_must_not_be(monkeypatch, attribute, value, message):
    monkeypatch.setattr(L.Trainer, attribute, value)  # without a GPU, or a second process
    with pytest.raises(ValueError, match=message):
        trainer().fit(Net(), loader(images()))


def test_without_lightning_the_rest_is_there(monkeypatch):
    monkeypatch.delitem(sys.modules, "gradfilter.interop._lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert interop.Filtered is Filtered
    with pytest.raises(ImportError, match=r"FilteredModule is built on.*gradfilter\[interop\]"):
        _ = interop.FilteredModule
    with pytest.raises(AttributeError, match=r"'gradfilter\.interop' has no attribute 'Nothing'"):
        _ = interop.Nothing


class Following(Net):
    """Follows the gradient of two clean images."""

    def __init__(self, clean):
        super().__init__()
        self.transforms, self.clean = gf.reference_filter(), clean

    def reference_batch(self):
        return self.clean


def test_rows_follow_the_gradient_of_a_reference_batch():
    torch.manual_seed(0)
    data, clean = images(4 * SIZE), images(2).tensors
    net = Following(clean)
    plain = copy.deepcopy(net)
    trainer().fit(net, loader(data))
    optimizer = torch.optim.SGD(plain.parameters(), lr=net.lr, momentum=0.9)
    wrapper = Filtered(plain, F.cross_entropy, gf.reference_filter(), optimizer, M)
    for x, y in loader(data):
        wrapper.step(x, y, reference_batch=clean)
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
