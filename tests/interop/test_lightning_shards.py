"""`FilteredModule` in Lightning's `ModelParallelStrategy`: shards train as one whole model does."""

import subprocess
import sys
from pathlib import Path

import pytest
import test_lightning_ranks as hosts
import torch
import torch.distributed as dist
from test_lightning_ranks import CHAINS, SIZE, STEPS, M, by_hand, data, joined, loader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gradfilter as gf
from gradfilter.distributed import across_ranks

L = pytest.importorskip("lightning")
ModelParallelStrategy = L.pytorch.strategies.ModelParallelStrategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.usefixtures("float64"),
]

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


# --- Modules and trainers ---


def shard(module, layout):
    """Shard the body alone and then the rest; the last layer stays whole in one layout."""
    size = dist.get_world_size()
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
    else:
        mesh = module.device_mesh["data_parallel"]
    fully_shard(module.body, mesh=mesh)
    if layout != "body":
        fully_shard(module, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Recorded:
    """Notes the norms of gradients before each step of the optimizer."""

    layout = "all"

    def configure_model(self):
        if not any(isinstance(p, DTensor) for p in self.parameters()):
            shard(self, self.layout)

    def count(self, *_):
        norms = [whole(p.grad).norm() for p in self.parameters()]
        self.norms.append(torch.stack(norms).norm().item())


class Net(Recorded, hosts.Net):
    pass


class Ordinary(Recorded, hosts.Ordinary):
    pass


def rejecting():
    """Skips the steps in which the losses of the last row and the first differ little."""

    def update(rows, state, params, /, **extra):
        keep = (rows.losses[-1] - rows.losses[0]).abs() > 0.3
        return rows, {"kept": state["kept"] + 1}, {"keep": keep}

    start = lambda params: {"kept": torch.zeros((), dtype=torch.int64)}
    some = gf.link("rejecting", "rows -> rows", update, init=start, publishes=("keep",))
    return gf.chain(across_ranks(), some, gf.clip_per_row(0.5), gf.mean_rows())


CHAINS = CHAINS | {
    "skips": rejecting,
    "average": lambda: gf.reference_filter("average"),
    "sam of agreement": lambda: gf.chain(gf.agree_filter(1.0), gf.sam_perturb(0.05)),
}


def fresh(chain, cls=Net, layout="all"):
    torch.manual_seed(0)
    net = cls(CHAINS[chain]() if isinstance(chain, str) else chain())
    net.layout = layout
    return net


def trainer(full=False, strategy=None, **options):
    parallel = ModelParallelStrategy(
        data_parallel_size=dist.get_world_size(),
        tensor_parallel_size=1,
        save_distributed_checkpoint=not full,
    )
    return hosts.trainer(strategy=strategy or parallel, **options)


def weights_of(net):
    return {name: whole(p.detach()).clone() for name, p in net.named_parameters()}


# --- Parity ---


def fitted(chain, layout="all", **options):
    net, logger = fresh(chain, layout=layout), hosts.Rows()
    fit = trainer(logger=logger, **options)
    fit.fit(net, loader(data(dist.get_world_size() * SIZE * STEPS)))
    kinds = {name: type(p).__name__ for name, p in net.named_parameters()}
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    return weights_of(net), logger.rows, metrics, (fit.global_step, net.lrs), kinds, buffers


def check_parity(world, chain, layout="all"):
    found = world.run(fitted, chain, layout)
    net = hosts.Net(CHAINS[chain]())
    net.load_state_dict(fresh(chain, hosts.Net).state_dict())
    if chain == "skips":  # `across_ranks` needs a process group
        net.transforms = gf.chain(*net.transforms.parts[1:])
    reports = by_hand(net, joined(world.size), M * world.size)
    for weights, _, metrics, (steps, lrs), kinds, buffers in found:
        torch.testing.assert_close(weights, hosts.weights_of(net), **TIGHT)
        assert steps == STEPS and lrs == found[0][3][1]
        assert metrics == found[0][2] and len(metrics) >= 3
        assert kinds["body.0.weight"] == "DTensor"
        assert (kinds["head.weight"] == "DTensor") == (layout != "body")
        for name, value in buffers.items():
            assert torch.equal(value, found[0][5][name])
    assert not any(rows for _, rows, *_ in found[1:])
    logged = found[0][1]
    assert len(logged) == STEPS
    for row, report in zip(logged, reports, strict=True):
        assert {name: row[name] for name in report} == pytest.approx(report, rel=1e-7)
    return logged


@pytest.mark.parametrize(
    "chain", [pytest.param(c, marks=pytest.mark.slow if c != "agreement" else ()) for c in CHAINS]
)
def test_shards_train_as_one_process_with_the_rows_of_all(two, chain):
    logged = check_parity(two, chain)
    if chain == "skips":
        assert 0 < sum(row["keep"] for row in logged) < STEPS
    if chain == "agreement":
        assert 0 < sum(row["agree_filter/accepted"] for row in logged) < STEPS


@pytest.mark.slow
def test_parameters_that_stay_whole_train_with_the_shards(two):
    check_parity(two, "clip + mean", "body")


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["agreement", "consensus", "clip + mean", "sam", "skips"])
def test_shards_on_three_ranks(three, chain):
    check_parity(three, chain)


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["agreement", "sam"])
def test_replicas_of_shards(four, chain):
    check_parity(four, chain, "hsdp")


# --- The host's own training ---


def beside_the_host(algorithm):
    """Two epochs with validation: one row per rank, and the host's own module."""
    results = []
    for make in (Ordinary, lambda: Net(gf.mean_rows())):
        torch.manual_seed(0)
        net, logger = make(), hosts.Rows()
        net.microbatches = 1
        n = dist.get_world_size() * SIZE * STEPS
        clip = {"gradient_clip_val": 0.5 if algorithm == "norm" else 0.1}
        options = {"max_epochs": 2, "gradient_clip_algorithm": algorithm} | clip
        fit = trainer(logger=logger, **options)
        fit.fit(net, loader(data(n)), loader(data(12, 1)))
        metrics = {k: fit.callback_metrics[k].clone() for k in ("train_loss", "val_loss")}
        logged = [row["val_loss"] for row in logger.rows if "val_loss" in row]
        results.append((weights_of(net), metrics, net.norms, net.lrs, fit.global_step, logged))
    ours, theirs = results
    # Its buffers are those of each rank, so its evaluation is, too.
    torch.testing.assert_close(ours[0], theirs[0], **TIGHT)
    torch.testing.assert_close(ours[1]["train_loss"], theirs[1]["train_loss"], **TIGHT)
    for one, other in zip(ours[2:5], theirs[2:5], strict=True):
        torch.testing.assert_close(one, other, **TIGHT)
    assert len(ours[2]) == 2 * STEPS
    return ours[2], ours[5]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_mean_of_one_row_per_rank_is_the_training_of_the_host(two, algorithm):
    (norms, evaluated), other = two.run(beside_the_host, algorithm)
    assert norms == other[0] and len(evaluated) == 2
    if algorithm == "norm":
        assert max(norms) == pytest.approx(0.5, abs=1e-5)


# --- Resuming ---


def shaped():
    """States of the shape of the parameters, a number, and steps that are skipped."""
    return gf.chain(gf.reference_filter("average"), gf.spike_clip(warmup=2))


def resumed(folder, full):
    n = dist.get_world_size() * SIZE * STEPS
    path = f"{folder}/half"
    uninterrupted = fresh(shaped)
    trainer(full, max_epochs=2).fit(uninterrupted, loader(data(n)))
    half, first = trainer(full, max_epochs=1), fresh(shaped)
    half.fit(first, loader(data(n)))
    half.save_checkpoint(path)
    rest, net = trainer(full, max_epochs=2), fresh(shaped)
    rest.fit(net, loader(data(n)), ckpt_path=path, weights_only=False)
    assert rest.global_step == 2 * STEPS and net.lrs[-1] == uninterrupted.lrs[-1]
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(whole(value), whole(net.state_dict()[name])), name
    states = net._hosted.state_dict(), uninterrupted._hosted.state_dict()
    assert any(isinstance(leaf, DTensor) for leaf in _flat(net._hosted._state))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert type(value) is torch.Tensor
    return first._hosted.state_dict()


def _flat(state):
    return gf.state_dict(state).values()


def continued(path):
    """Resume with other ranks; return the state that the first step starts from."""
    net, found = fresh(shaped), {}
    net.on_train_start = lambda: found.update(net._host().state_dict())
    n = dist.get_world_size() * SIZE * STEPS
    trainer(max_epochs=2).fit(net, loader(data(n)), ckpt_path=path, weights_only=False)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(two, three, tmp_path, full):
    saved = two.run(resumed, str(tmp_path), full)
    assert any(leaf.ndim == 2 for leaf in saved[0].values())
    for found in three.run(continued, str(tmp_path / "half")):
        torch.testing.assert_close(found, saved[0], rtol=0, atol=0)


# --- Other options ---


class Late(Net):
    """Makes its layers only when the processes have started."""

    def __init__(self, transforms):
        super().__init__(transforms)
        self.body = self.head = None

    def configure_model(self):
        if self.body is None:
            torch.manual_seed(0)
            made = hosts.Net(self.transforms)
            self.body, self.head = made.body, made.head
            shard(self, "all")


def late():
    net = fresh("agreement", Late)
    trainer().fit(net, loader(data(2 * SIZE * STEPS)))
    other = fresh("agreement")
    trainer().fit(other, loader(data(2 * SIZE * STEPS)))
    torch.testing.assert_close(weights_of(net), weights_of(other), rtol=0, atol=0)


@pytest.mark.slow
def test_layers_made_in_configure_model(two):
    two.run(late)


def mixed():
    torch.manual_seed(0)
    net = Net(gf.chain(gf.clip_per_row(0.5), gf.mean_rows())).float()
    x, y = data(2 * SIZE * STEPS).tensors
    floats = torch.utils.data.TensorDataset(x.float(), y)
    trainer(precision="bf16-mixed").fit(net, loader(floats))
    return weights_of(net)


@pytest.mark.slow
def test_mixed_precision_is_autocast(two):
    net = fresh("clip + mean", hosts.Net).float()
    with torch.autocast("cpu", torch.bfloat16):
        by_hand(net, [(x.float(), y) for x, y in joined(2)], 2 * M)
    for found in two.run(mixed):
        torch.testing.assert_close(found, hosts.weights_of(net), rtol=1e-4, atol=1e-4)


class Hooked(Net):
    """Has hooks; those from before the trainer has moved the shards would be lost."""

    def on_fit_start(self):
        super().on_fit_start()
        self.head.weight.register_hook(lambda g: 2 * g)
        self.body[0].weight.register_post_accumulate_grad_hook(hosts.tripled)


def with_hooks():
    net = fresh("clip + mean", Hooked)
    trainer().fit(net, loader(data(2 * SIZE * STEPS)))
    return weights_of(net)


@pytest.mark.slow
def test_hooks_of_parameters_run_on_the_filtered_gradient(two):
    net = fresh("clip + mean", hosts.Net)
    net.head.weight.register_hook(lambda g: 2 * g)
    net.body[0].weight.register_hook(lambda g: 3 * g)
    by_hand(net, joined(2), 2 * M)
    for found in two.run(with_hooks):
        torch.testing.assert_close(found, hosts.weights_of(net), **TIGHT)


# --- Refusals ---


class ByUser(Net):
    def sample_groups(self, batch):
        return (batch[0][:, 2] > 0).long()


class Following(Net):
    def reference_batch(self):
        return data(6, 5).tensors


REFUSED = {
    "accumulation": (Net, {}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
    "uneven": (Net, {"uneven": True}, {}, "uneven = True"),
    "compiled": (Net, {"compile_step": True}, {}, "compile_step = True"),
    "plan": (Net, {"plan": "loop"}, {}, "plan = 'loop'"),
    "groups": (ByUser, {}, {}, "sample_groups"),
    "reference": (Following, {}, {}, "reference_batch"),
}


def refused(case):
    cls, values, options, _ = REFUSED[case]
    net = fresh("agreement", cls)
    for name, value in values.items():
        setattr(net, name, value)
    trainer(**options).fit(net, loader(data(2 * SIZE * STEPS)))


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_whole_parameters_is_refused_before_the_first_step(two, case):
    cls, _, _, found = REFUSED[case]
    for said in two.errors(refused, case):
        assert f"{cls.__name__}: expected parameters that are whole in every process" in said
        assert f"with {found}, found sharded ones (FSDP2). " in said


def tensor_parallel():
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    trainer(strategy=strategy).fit(fresh("agreement"), loader(data(2 * SIZE * STEPS)))


def test_tensor_parallelism_is_refused(two):
    for said in two.errors(tensor_parallel):
        assert "Net: expected tensor_parallel_size=1, with other samples in every" in said


def other_copies(layout):
    torch.manual_seed(dist.get_rank() % 2 if layout == "body" else dist.get_rank() // 2)
    net = Net(gf.mean_rows())
    net.layout = layout
    trainer().fit(net, loader(data(2 * SIZE * STEPS)))


def test_whole_parameters_that_differ_between_ranks_are_refused(two):
    for said in two.errors(other_copies, "body"):
        assert "expected parameters that are not sharded to be equal on all ranks" in said
        assert "other values on rank 0 than on rank 1: fully_shard sends none" in said


@pytest.mark.slow
def test_replicas_that_differ_are_refused(four):
    for said in four.errors(other_copies, "hsdp"):
        assert "expected shards of a replica to be equal on all ranks" in said


def half_shards():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    class Policy(Net):
        def configure_model(self):
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            fully_shard(self, mesh=self.device_mesh["data_parallel"], mp_policy=policy)

    trainer().fit(fresh("agreement", Policy), loader(data(2 * SIZE * STEPS)))


def test_a_policy_that_changes_dtypes_is_refused(two):
    for said in two.errors(half_shards):
        assert "without a MixedPrecisionPolicy" in said and "torch.autocast" in said


# --- Real launchers ---


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import test_lightning_shards as tests

if __name__ == "__main__":
    net = tests.fresh("agreement")
    strategy = tests.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    data = tests.loader(tests.data(2 * tests.SIZE * tests.STEPS))
    tests.hosts.trainer(2, strategy=strategy, plugins=None, devices=2).fit(net, data)
    weights = tests.weights_of(net)
    if net.global_rank == 0:
        torch.save(weights, {out!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [hosts.TORCHRUN, []])
def test_processes_of_every_launcher_train_as_one(tmp_path, launcher):
    out, script = tmp_path / "weights.pt", tmp_path / "train.py"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    script.write_text(SCRIPT.format(paths=paths, out=str(out)))
    line = [sys.executable, *launcher, str(script)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    net = fresh("agreement", hosts.Net)
    by_hand(net, joined(2), 2 * M)
    found = torch.load(out, weights_only=True)
    torch.testing.assert_close(found, hosts.weights_of(net), **TIGHT)
