"""A rank that fails or differs, in every host: all other ranks end with an error, none updates."""

import contextlib
import copy
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _world import PATIENCE, World
from gradfilter import interop
from gradfilter.distributed import across_ranks
from gradfilter.interop import Filtered

STEPS, SIZE, M, BAD = 5, 6, 2, 3  # BAD is the step in which the last rank fails
# The private name is that of older releases.
set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def is_victim():
    return dist.get_rank() == dist.get_world_size() - 1


class Job:
    """What the ranks train, and what happens to one of them.

    Args:
        harm: The name of the fault.
    """

    def __init__(self, harm):
        self.harm, self.step, self.before = harm, 0, None
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.rows = 3 if harm == "rows" and is_victim() else M
        if harm == "dtype" and is_victim():
            self.model.float()
        self.dtype = self.model[0].weight.dtype
        self.note()

    def chain(self):
        harmed = self.harm == "chain" and is_victim()
        return gf.chain(across_ranks(), gf.agree_filter(0.5 if harmed else 1.9))

    def samples(self):
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(STEPS * SIZE, 4, generator=generator).to(self.dtype)
        return x, (x[:, 0] > 0).long()

    def optimizer(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def loss(self, x, y):
        if self.step == BAD and is_victim():
            self.fail()
        return F.cross_entropy(self.model(x), y)

    def fail(self):
        if self.harm == "raises":
            raise ArithmeticError("my own mistake")
        if self.harm == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.harm == "stalls":
            signal.pause()  # until the test is over

    def note(self):
        """Remember the parameters at the end of a step."""
        self.before = copy.deepcopy(self.model.state_dict())
        self.step += 1
        if self.step == BAD:
            dist.barrier()  # impatient from here on, however long a busy machine took to get here
            set_timeout(timedelta(seconds=2))


def with_filtered(job, folder):
    """Train with `Filtered`."""
    x, y = job.samples()

    def criterion(output, labels):
        if job.step == BAD and is_victim():
            job.fail()
        return F.cross_entropy(output, labels)

    filtered = Filtered(job.model, criterion, job.chain(), job.optimizer(), job.rows)
    for batch in zip(x.split(SIZE), y.split(SIZE), strict=True):
        filtered.step(*batch)
        job.note()


def with_trainer(job, folder):
    """Train with a `FilteredTrainer`."""
    import transformers as hf

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

    class Trainer(interop.FilteredTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return JOB[0].loss(inputs["x"], inputs["labels"])

    class Noting(hf.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            job.note()

    JOB[:] = [job]
    x, y = job.samples()
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True) for _ in range(int(size))]
    settings = {"max_steps": STEPS, "per_device_train_batch_size": SIZE, "report_to": []}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = hf.TrainingArguments(str(folder), remove_unused_columns=False, **settings)
    optimizer = job.optimizer()
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(
        job.model, args, train_dataset=data, transforms=job.chain(), microbatches=job.rows,
        optimizers=(optimizer, constant), callbacks=[Noting()],
    )  # fmt: skip
    trainer.train()


JOB = []


def with_lightning(job, folder):
    """Train with a `FilteredModule`."""
    import lightning as L
    from lightning.fabric.plugins.environments import LightningEnvironment

    class Started(LightningEnvironment):
        creates_processes_externally = True
        local_rank = global_rank = lambda self: dist.get_rank()
        world_size = lambda self: dist.get_world_size()
        set_global_rank = set_world_size = lambda self, number: None

    class Net(interop.FilteredModule):
        transforms, microbatches = job.chain(), job.rows

        def __init__(self):
            super().__init__()
            self.net = job.model

        def microbatch_loss(self, batch):
            return JOB[0].loss(*batch)

        def configure_optimizers(self):
            return job.optimizer()

        def on_train_batch_end(self, *args):
            job.note()

    JOB[:] = [job]
    warnings.filterwarnings("ignore", module="lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu", strategy="ddp", devices=dist.get_world_size(), plugins=[Started()],
        max_epochs=1, enable_checkpointing=False, use_distributed_sampler=False, **quiet,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(*job.samples())
    trainer.fit(Net(), torch.utils.data.DataLoader(data, SIZE))


HOSTS = {"Filtered": with_filtered, "Trainer": with_trainer, "Lightning": with_lightning}


def harmed(host, harm, folder):
    """Return how a rank ends: its step, whether its parameters are those before, and the error."""
    job = Job(harm)
    try:
        HOSTS[host](job, folder)
    except Exception as error:  # the test asks what it is
        torch.set_num_threads(1)
        now = job.model.state_dict()
        unchanged = all(torch.equal(now[name], job.before[name]) for name in now)
        return job.step, unchanged, type(error).__name__, str(error)
    return job.step, None, "", ""


@pytest.fixture
def fresh_ranks(request):
    world = World(request.param, timeout=10 * PATIENCE)  # a test waits for no rank that long
    yield world
    processes = world.processes
    world.close()
    assert not any(process.is_alive() for process in processes)


HARMS = ("killed", "stalls", "raises")
NEEDS = {"Filtered": None, "Trainer": "transformers", "Lightning": "lightning"}


def skip_without(host):
    if NEEDS[host]:
        pytest.importorskip(NEEDS[host])


QUICK = (2, "Filtered", "killed")
GONE = [
    pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow)
    for case in itertools.product((2, 3), HOSTS, HARMS)
]


@pytest.mark.parametrize(("fresh_ranks", "host", "harm"), GONE, indirect=["fresh_ranks"])
def test_the_others_end_within_the_timeout_when_a_rank_is_gone(fresh_ranks, tmp_path, host, harm):
    skip_without(host)
    size, victim = fresh_ranks.size, fresh_ranks.size - 1
    fresh_ranks.start(harmed, host, harm, tmp_path)
    for rank in range(size - 1):
        fine, said = fresh_ranks.outcome(rank)
        assert fine, said
        step, unchanged, kind, message = said
        assert step == BAD and unchanged and kind == "LostRanksError"
        assert f"Rank {rank} of {size} lost the others while" in message
        assert "Nothing was updated in this step" in message
        silent = re.search(r"No word within 3 s from ranks? ([\d, ]+)\. ", message)
        assert silent is not None and str(victim) in silent[1].split(", "), message
    if harm == "raises":
        assert fresh_ranks.outcome(victim)[1] == (BAD, True, "ArithmeticError", "my own mistake")


DIFFERENCES = {
    "rows": "expected as many rows on every rank, found 2 on rank 0 and 3 on rank 2",
    "chain": "agree_filter(threshold=1.9) on rank 0 and agree_filter(threshold=0.5) on rank 2",
    "dtype": "torch.float64 on rank 0 and",
}


@pytest.mark.slow
@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("host", HOSTS)
def test_all_ranks_name_the_one_that_differs_before_the_first_update(
    three, tmp_path, host, difference
):
    skip_without(host)
    for step, unchanged, kind, message in three.run(harmed, host, difference, tmp_path):
        assert step == 1 and unchanged and kind == "ValueError", message
        assert DIFFERENCES[difference] in message and "on rank 2" in message


# --- torchrun: restarts, and other numbers of processes ---


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import torch
torch.set_num_threads(1)
import ddp
calls, step = [], ddp.Filtered.step

def failing(self, *args):
    calls.append(1)
    if {victim} and len(calls) == 15 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if {node}:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)

ddp.Filtered.step = failing
ddp.main(sys.argv[1:])
"""
EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = [sys.executable, "-m", "torch.distributed.run"]


def script(folder, victim, node=False):
    path = folder / "train.py"
    path.write_text(SCRIPT.format(examples=str(EXAMPLES), victim=victim, node=node))
    return path


def torchrun(*line, **options):
    line = [*RUN, *map(str, line)]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=PATIENCE, check=False, **options
    )


def orphans(path):
    """Return the processes that still run a script."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(path).encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


def weights(path):
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_a_rank_that_is_lost_and_restarted_goes_on_from_the_last_checkpoint(tmp_path):
    pytest.importorskip("sklearn")
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    two = ["--standalone", "--nproc-per-node", 2]
    done = torchrun(*two, EXAMPLES / "ddp.py", "--epochs", 3, "--save", whole)
    assert done.returncode == 0, done.stderr
    path, file = script(tmp_path, 'os.environ["RANK"] == "1"'), tmp_path / "last.pt"
    options = ["--epochs", 3, "--checkpoint", file, "--save", cut]
    failed = torchrun(*two, "--max-restarts", 0, path, *options)
    assert failed.returncode != 0 and weights(file)[-1] == 1 and not cut.exists()
    assert "Rank 0 of 2 lost the others while" in failed.stderr or "SIGKILL" in failed.stderr
    assert not orphans(path)
    file.unlink()
    done = torchrun(*two, "--max-restarts", 2, path, *options)
    assert done.returncode == 0, done.stderr
    epochs = [line.split(":")[0] for line in done.stdout.splitlines() if "epoch" in line]
    assert epochs == ["epoch 1", "epoch 2", "epoch 3"]
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=0)
    assert not orphans(path)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_resumed_by_three(tmp_path):
    pytest.importorskip("sklearn")
    file = tmp_path / "last.pt"
    for ranks, last in ((2, 2), (3, 4)):
        line = ["--standalone", "--nproc-per-node", ranks, EXAMPLES / "ddp.py"]
        done = torchrun(*line, "--epochs", last, "--checkpoint", file)
        assert done.returncode == 0, done.stderr
        epochs = [line.split(":")[0] for line in done.stdout.splitlines() if "epoch" in line]
        assert epochs == [f"epoch {last - 1}", f"epoch {last}"]
        assert f"{ranks} processes, equal parameters: True" in done.stdout


@pytest.mark.slow
def test_a_run_goes_on_without_a_node_that_is_lost(tmp_path):
    """`--nnodes 1:2`: the other node starts again alone, from the last checkpoint."""
    pytest.importorskip("sklearn")
    path = script(tmp_path, '"VICTIM" in os.environ', node=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    conf = "join_timeout=120,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    line = [
        *RUN, "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-id", "a",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", conf,
    ]  # fmt: skip
    line += [str(path), "--epochs", "3", "--checkpoint", str(tmp_path / "last.pt")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = []
    for extra, host in (({}, "true"), ({"VICTIM": "1"}, "false")):
        own = [f"{conf},is_host={host}" if word == conf else word for word in line]
        nodes.append(subprocess.Popen(own, env=os.environ | extra, **pipes))
    try:
        printed, _ = nodes[0].communicate(timeout=PATIENCE)
        assert nodes[0].returncode == 0, printed
        epochs = [line.split(":")[0] for line in printed.splitlines() if line.startswith("epoch")]
        assert epochs[-2:] == ["epoch 2", "epoch 3"]
        assert "1 processes, equal parameters: True" in printed
        assert nodes[1].wait(PATIENCE) == -signal.SIGKILL
    finally:
        for node in nodes:
            node.kill()
            node.communicate()
    assert not orphans(path)
