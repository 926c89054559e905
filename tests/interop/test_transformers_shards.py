"""`FilteredTrainer` with FSDP2 of accelerate: shards train as one whole model does."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_transformers_ranks as hosts
import torch
import torch.distributed as dist
from test_transformers_ranks import SIZE, STEPS, as_one, close, column, identical
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradfilter as gf
from gradfilter import interop
from gradfilter.distributed import across_ranks

hf = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
FilteredTrainer = interop.FilteredTrainer

pytestmark = pytest.mark.usefixtures("float64")


# --- accelerate shards only on accelerators: here it is told that a CPU is one ---


@contextmanager
def sharding_on_cpu():
    """Let accelerate's state say FSDP; all that follows from it is accelerate's own code."""
    state = accelerate.state.AcceleratorState
    before = state.__init__

    def start(self, *args, fsdp_plugin=None, **kwargs):
        before(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = accelerate.DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            shared = accelerate.state.PartialState._shared_state
            shared["distributed_type"] = self.distributed_type  # which later states take over

    state.__init__ = start
    try:
        yield
    finally:
        state.__init__ = before


class Sharded(FilteredTrainer):
    """Made from the same parameters on all ranks, because accelerate sends none to shard them."""

    def create_accelerator_and_postprocess(self):
        accelerate.state.AcceleratorState._reset_state()
        with sharding_on_cpu():
            super().create_accelerator_and_postprocess()

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        if self.lr_scheduler is None:
            factor = lambda step: 0.9**step
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        return self.lr_scheduler


LAYERS = {"language": ["GPT2Block"], "classes": ["BertLayer"], "normed": ["Embedding"]}


def rejecting():
    """Skips the steps in which the first row has a larger loss than the last."""

    def update(rows, state, params, /, **extra):
        keep = rows.losses[-1] > rows.losses[0]
        return rows, {"kept": state["kept"] + 1}, {"keep": keep}

    start = lambda params: {"kept": torch.zeros((), dtype=torch.int64)}
    return gf.link("rejecting", "rows -> rows", update, init=start, publishes=("keep",))


hosts.CHAINS |= {
    "skips": lambda: gf.chain(*front(), rejecting(), gf.clip_per_row(0.5), gf.mean_rows()),
    "sam of agreement": lambda: gf.chain(gf.agree_filter(1.0), gf.sam_perturb(0.05)),
    "average": lambda: gf.chain(gf.reference_filter("average"), gf.spike_clip(warmup=2)),
}


def front():
    return [across_ranks()] if dist.is_initialized() else []


def options_of(chain, model="language", args=None, fsdp=None, **options):
    layers = {"version": 2, "transformer_layer_cls_to_wrap": LAYERS[model]} | (fsdp or {})
    args = {"fsdp": True, "fsdp_config": layers} | (args or {})
    return {"chain": chain, "model": model, "n": 400, "args": args} | options


SHARDS = {"cls": Sharded, "sharded": True}


def alone(folder, options, size, resume=None):
    """Train in one process with whole parameters."""
    args = {name: value for name, value in options["args"].items() if "fsdp" not in name}
    return hosts.job(folder, as_one(options | {"args": args}, size), resume)


def kinds(trainer):
    return {name: type(p) is not torch.nn.Parameter for name, p in trainer.model.named_parameters()}


STATISTICS = ("norm.running", "norm.num_batches")


def compare(world, folder, options):
    """Train the shards on all ranks and the whole in one process; return the results of both."""
    ranks = world.run(hosts.job, folder / "ranks", options | SHARDS, None, None, kinds)
    one = alone(folder / "one", options, world.size)
    identical(ranks)
    for name in [name for name in one.state if name.startswith(STATISTICS)]:
        del one.state[name]  # those of the first rank
    close(ranks[0], one)
    for found in ranks:
        assert all(found.extra.values())
        for name in ("loss", "learning_rate", "grad_norm", "keep"):
            expected = column(one, name)
            assert column(found, name) == pytest.approx(expected, rel=1e-5, abs=1e-10)
    return ranks, one


PARITY = {
    "agreement": options_of("agreement", "classes"),
    "consensus": options_of("consensus", "classes"),
    "clip": options_of("clip"),
    "sharpness": options_of("sharpness", "classes"),
    "skips": options_of("skips"),
    "sam of agreement": options_of("sam of agreement"),
    "reference": options_of("average"),
    "clipped": options_of("clip", args={"max_grad_norm": 0.05}),
    "buffers": options_of("mean", "normed"),
    "checkpointed activations": options_of("agreement", fsdp={"activation_checkpointing": True}),
    "loaded on one rank": options_of("agreement", fsdp={"cpu_ram_efficient_loading": True}),
    "size of layers": options_of("agreement", fsdp={"auto_wrap_policy": "SIZE_BASED_WRAP"}),
}


def parity(world, folder, case):
    ranks, one = compare(world, folder, PARITY[case])
    assert ranks[0].steps == STEPS
    if case == "skips":
        assert 0 < sum(column(one, "keep")) < STEPS
    if case == "agreement":
        skips = 0 < sum(column(one, "keep")) < STEPS
        assert skips or min(column(one, "agree_filter/accepted")) < 1
    if case == "clipped":
        assert min(column(one, "grad_norm")) > 0.05


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "agreement" else pytest.mark.slow) for c in PARITY]
)
def test_shards_train_as_one_process_with_the_rows_of_all(two, tmp_path, case):
    parity(two, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["agreement", "consensus", "clip", "sharpness", "skips"])
def test_shards_on_three_ranks(three, tmp_path, case):
    parity(three, tmp_path, case)


# --- Checkpoints ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_resumed_run_is_the_uninterrupted_one(two, tmp_path, kind):
    options = options_of("average", args=hosts.SAVED, n=3 * 2 * SIZE) | SHARDS
    options["args"]["fsdp_config"]["state_dict_type"] = kind
    whole = two.run(hosts.job, tmp_path, options)
    folder = tmp_path / "checkpoint-2"
    rest = two.run(hosts.job, tmp_path / "rest", options, str(folder))
    identical(whole + rest)
    for one, other in zip(rest, whole, strict=True):
        for name in ("keep", "loss", "learning_rate", "grad_norm"):
            assert column(one, name) == column(other, name)
    assert [file.name for file in folder.glob("transforms*")] == ["transforms.pt"]
    saved = torch.load(folder / "transforms.pt", weights_only=True)
    assert any(type(leaf) is torch.Tensor and leaf.ndim == 2 for leaf in saved.values())


def started(trainer):
    """Note the state that the first step starts from."""
    found = {}

    class Notes(hf.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            found.update(trainer._host().state_dict())

    trainer.add_callback(Notes())
    return found


@pytest.mark.slow
def test_a_run_is_resumed_with_other_ranks(two, three, tmp_path):
    options = options_of("average", args=hosts.SAVED) | SHARDS
    two.run(hosts.job, tmp_path, options)
    folder = tmp_path / "checkpoint-2"
    saved = torch.load(folder / "transforms.pt", weights_only=True)
    for found in three.run(hosts.job, tmp_path / "rest", options, str(folder), started):
        torch.testing.assert_close(found.extra, saved, rtol=0, atol=0)


# --- Evaluation and a second training ---


def again(trainer):
    """Predict, train once more, and predict: a forward pass leaves parameters whole."""
    data = hosts.samples(16, False)
    first = trainer.predict(data).predictions
    trainer.train()
    return first, trainer.predict(data).predictions


@pytest.mark.slow
def test_predictions_and_a_second_training(two, tmp_path):
    options = options_of("agreement", "classes", args={"max_steps": 3})
    ranks = two.run(hosts.job, tmp_path / "ranks", options | SHARDS, None, None, again)
    one = as_one(options | {"args": {"max_steps": 3}})
    one = hosts.job(tmp_path / "one", one, None, None, again)
    for found in ranks:
        np.testing.assert_allclose(found.extra, one.extra, rtol=1e-8, atol=1e-8)
    assert not np.allclose(*one.extra, atol=1e-4)


# --- Refusals ---


REFUSED = {
    "accumulation": ({"args": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps=2"),
    "uneven": ({"uneven": True}, "uneven=True"),
    "weights": ({"sample_weights": "weight"}, "the columns ['weight'] for sample_weights"),
    "groups": ({"groups": "user_id", "m": 4}, "the columns ['user_id'] for sample_weights"),
    "reference": ({"chain": "reference", "reference": True}, "reference_batch"),
    "a graph": ({"compile": True}, "compile=True"),
    "plan": ({"plan": "vmap"}, "plan='vmap'"),
    "offload": ({"fsdp": {"cpu_offload": True}}, "offload_params (cpu_offload)"),
    "compiled": ({"args": {"torch_compile": True}}, "torch_compile"),
}


def made(folder, options):
    with hosts.process():
        hosts.make(folder, **options)


def refused(world, folder, change):
    options = options_of("mean") | SHARDS
    change = dict(change)
    options["args"]["fsdp_config"] |= change.pop("fsdp", {})
    options["args"] |= change.pop("args", {})
    return world.errors(made, folder, options | change)


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_whole_parameters_is_refused_at_once(two, tmp_path, case):
    change, found = REFUSED[case]
    for said in refused(two, tmp_path, change):
        assert said.startswith("FilteredTrainer: expected parameters that are whole in every pro")
        assert f"with {found}" in said and ", found sharded ones (FSDP2). " in said


def test_mixed_precision_is_refused_at_once(two, tmp_path):
    for said in refused(two, tmp_path, {"args": {"bf16": True}}):
        assert said.startswith("FilteredTrainer: expected no mixed precision with FSDP2, found")
        assert "mixed_precision=bf16" in said and "dtype=torch.bfloat16" in said


def sharded_before():
    from gradfilter.interop._transformers import check_fsdp2

    other = SimpleNamespace(is_fsdp2=False)
    check_fsdp2(other, torch.nn.Linear(2, 2))
    model = fully_shard(torch.nn.Linear(2, 2), mesh=init_device_mesh("cpu", (2,)))
    with torch.no_grad():
        model(torch.ones(1, 2))  # leaves its parameters whole
    check_fsdp2(other, model)


def test_a_model_that_was_sharded_when_it_was_loaded_is_refused(two):
    for said in two.errors(sharded_before):
        assert said.startswith("FilteredTrainer: expected a whole model, or one that accelerate")
        assert "Load it without a distributed_config or tp_plan" in said


# --- Real launchers ---


class OnDevices(Sharded):
    """Sharded by accelerate without help, which needs devices."""

    create_accelerator_and_postprocess = FilteredTrainer.create_accelerator_and_postprocess


SCRIPT = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import test_transformers_shards as tests
made = tests.hosts.make({folder!r}, cls=tests.{cls}, sharded=True, **{options!r})
made.train()
assert all(tests.kinds(made).values())
found = tests.hosts.outcome(made)
if made.args.should_save:
    state = {{name: torch.as_tensor(value) for name, value in found.state.items()}}
    torch.save((state, found.logs), {result!r})
"""


def launched(folder, cls, count, options):
    """Train by torchrun, and compare with one process on the CPU."""
    result, script = folder / "result.pt", folder / "train.py"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    given = {"folder": str(folder), "result": str(result), "options": options}
    script.write_text(SCRIPT.format(paths=paths, cls=cls, **given))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    line = [sys.executable, *start, str(script)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    state, logs = torch.load(result, weights_only=True)
    options = options | {"args": options["args"] | {"use_cpu": True}}
    one = alone(folder / "one", options, count)
    found = SimpleNamespace(state={k: v.numpy() for k, v in state.items()}, logs=logs)
    close(found, one)
    for name in ("keep", "agree_filter/accepted", "loss"):
        assert column(found, name) == pytest.approx(column(one, name), rel=1e-5)


@pytest.mark.slow
def test_started_by_torchrun(tmp_path):
    launched(tmp_path, "Sharded", 2, options_of("agreement"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fsdp2_of_accelerate_on_a_gpu_or_more(tmp_path):
    options = options_of("agreement", args={"use_cpu": False})
    launched(tmp_path, "OnDevices", torch.cuda.device_count(), options)
