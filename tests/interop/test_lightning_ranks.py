"""`FilteredModule` in Lightning's `ddp` strategy: ranks train as one process with all their rows."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _world import World
from gradfilter import interop
from gradfilter.distributed import across_ranks
from gradfilter.interop import Filtered

L = pytest.importorskip("lightning")
from lightning.fabric.plugins.environments import LightningEnvironment  # noqa: E402

FilteredModule = interop.FilteredModule

STEPS, SIZE, M = 6, 4, 2  # batches of a rank, their samples, and the rows of one

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(scope="module")
def three():
    world = World(3)
    yield world
    world.close()


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


def sharp_rows():
    """Every rank perturbs along its own gradient, so one process has another result."""
    return gf.chain(counting_rows(), across_ranks(), gf.mean_rows())


def counting_rows():
    """Rows scaled by a state that depends on the rows of a rank."""

    def update(rows, state, params, **extra):
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
        for name, value in one["states"].items():
            if "running" not in name and "tracked" not in name:
                assert torch.equal(value, found[0]["states"][name])
    assert not any(one["rows"] for one in found[1:])
    logged = found[0]["rows"]
    assert len(logged) == STEPS
    for row, report in zip(logged, reports, strict=True):
        assert {name: row[name] for name in report} == pytest.approx(report, rel=1e-9)
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
