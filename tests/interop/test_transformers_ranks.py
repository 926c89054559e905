"""`FilteredTrainer` in several processes: its steps are those of one process with all the rows."""

import copy
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradfilter as gf
from _float16 import Perceptron, TrainerInHalf, scales_by_hand, train_by_hand
from _float16 import samples as samples16
from _world import World
from gradfilter import interop
from gradfilter.distributed import across_ranks

hf = pytest.importorskip("transformers")
FilteredTrainer = interop.FilteredTrainer

WORDS, LENGTH = 13, 6
STEPS, SIZE, M = 6, 4, 2  # of one rank

pytestmark = pytest.mark.usefixtures("float64")


# --- The job of a process ---


def language_model():
    """A model that computes nothing in float32."""
    config = hf.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config).to(torch.float64)
    model.loss_type = "ForCausalLM"  # Trainer counts the labels behind the first
    return model


def token_loss(outputs, labels, num_items_in_batch=None):
    """The model's own loss, without its float32."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def classifier(dropout=0.0):
    config = hf.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=LENGTH,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config).to(torch.float64)


class Normed(nn.Module):
    """A classifier with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(WORDS, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 2)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.norm(self.table(input_ids).mean(1)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


MODELS = {
    "language": language_model,
    "classes": classifier,
    "dropout": partial(classifier, 0.5),
    "normed": Normed,
}


def samples(n, language):
    """Sentences whose beginning has labels, or classes; with weights, some of them 0, and users."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))
    rows = []
    for i in range(n):
        words = torch.randint(WORDS, (LENGTH,), generator=generator)
        labels = (words[0] > WORDS // 2).long()
        if language:
            labels = words.clone()
            labels[draw(3, LENGTH + 1) :] = -100
        weight = 0.0 if i % 5 == 3 else draw(1, 9) / 4
        extra = {"weight": weight, "user_id": 10**6 + draw(0, 3)}
        rows.append({"input_ids": words, "labels": labels} | extra)
    return rows


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def counting(kind="tree -> tree"):
    """A transform with a state, which makes later gradients larger."""

    def update(grads, state, params, **extra):
        count = state["count"] + 1
        if kind == "tree -> tree":
            return {k: g * (1 + 0.1 * count) for k, g in grads.items()}, {"count": count}, {}
        seen = state["seen"] + grads.losses.mean()  # those of the rows of this rank
        factors = (1 + 0.1 * seen).expand(len(grads))
        return grads.scaled(factors), {"count": count, "seen": seen}, {"seen": seen}

    def init(params):
        zero = {"count": torch.zeros((), dtype=torch.int64)}
        return zero if kind == "tree -> tree" else {**zero, "seen": torch.zeros(())}

    publishes = () if kind == "tree -> tree" else ("seen",)
    return gf.link("counting", kind, update, init=init, publishes=publishes)


PICKY = 0.85  # skips some steps, and accepts some rows
CLIP = 0.5
CHAINS = {
    "mean": gf.mean_rows,
    "agreement": lambda: gf.agree_filter(PICKY),
    "consensus": gf.consensus_filter,
    "clip": lambda: gf.chain(gf.clip_per_row(CLIP), gf.mean_rows()),
    "sharpness": lambda: gf.chain(gf.sam_perturb(0.1), gf.mean_rows()),
    "watch": lambda: gf.chain(gf.agree_filter(PICKY), gf.watch()),
    "counting": lambda: gf.chain(gf.agree_filter(PICKY), counting()),
    "own state": lambda: gf.chain(counting("rows -> rows"), across_ranks(), gf.mean_rows()),
    "spikes": lambda: gf.chain(
        gf.mean_rows(), gf.spike_skip(2, sigmas=1e-3, max_consecutive=1, of="norm")
    ),
    "reference": gf.reference_filter,
}


class Scored(FilteredTrainer):
    """Logs an accuracy, and on the first rank one number more."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        right = outputs["logits"].argmax(-1) == inputs["labels"]
        self.log({"accuracy": right.double().mean()})
        if self.is_world_process_zero():
            self.log({"first": loss.detach() * 0 + 7})
        return (loss, outputs) if return_outputs else loss


# The private name is that of older releases.
set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


class Failing(FilteredTrainer):
    """A job that ends in the middle of a step on the last rank."""

    def compute_loss(self, *args, **options):
        if self.state.global_step == 2:
            set_timeout(timedelta(seconds=2))  # the process of the other rank does not end
            if self.args.process_index == 1:
                if self.args.run_name == "killed":
                    os.kill(os.getpid(), 9)
                raise ArithmeticError("my own mistake")
        return super().compute_loss(*args, **options)


class Reporter(hf.TrainerCallback):
    """Writes what is logged, as the integrations of Trainer do: in one process."""

    def __init__(self, file):
        self.file = file

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Recorded:
    """A collator that remembers its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        batch = hf.default_data_collator(rows)
        self.batches.append({name: value.clone() for name, value in batch.items()})
        return batch


@contextmanager
def process():
    """Set the environment that torchrun would, if there are ranks."""
    before = dict(os.environ)
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def make(
    folder, chain="mean", model="language", *, n=200, m=M, args=None, cls=FilteredTrainer,
    stream=False, reference=False, order=(1, 1), sharded=False, **options,
):  # fmt: skip
    """Make a trainer; the model has other parameters on each rank until it is wrapped.

    Args:
        sharded: True for the same parameters on all ranks, and an optimizer that the class makes.
        order: The accumulated batches and the ranks whose order of rows one process imitates: those
            of the first rank are first.
    """
    torch.manual_seed(7 + (dist.get_rank() if dist.is_initialized() and not sharded else 0))
    data = samples(n, model == "language")
    if order[0] > 1:
        batches = [data[i : i + SIZE] for i in range(0, n, SIZE)]
        steps = [batches[i : i + prod(order)] for i in range(0, len(batches), prod(order))]
        data = [
            row for step in steps for r in range(order[1]) for b in step[r :: order[1]] for row in b
        ]
    if model == "language":
        options["compute_loss_func"] = token_loss
    module = MODELS[model]()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": SIZE, "logging_steps": 1,
        "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    arguments = hf.TrainingArguments(str(folder), **settings | (args or {}))
    if reference:
        rows = samples(3, model == "language")
        kept = [{"input_ids": s["input_ids"], "labels": s["labels"]} for s in rows]
        options["reference_batch"] = hf.default_data_collator(kept)
    if not sharded:
        options["optimizers"] = optimizer, scheduler
    made = cls(
        module, arguments, train_dataset=Stream(data) if stream else data,
        transforms=CHAINS[chain](), microbatches=m, data_collator=Recorded(), **options,
    )  # fmt: skip
    made.remove_callback(hf.PrinterCallback)
    made.add_callback(Reporter(Path(folder, "reported.jsonl")))
    return made


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def outcome(trainer):
    state = {name: whole(value).numpy() for name, value in trainer.model.state_dict().items()}
    return SimpleNamespace(
        state=state,
        logs=trainer.state.log_history,
        batches=trainer.data_collator.batches,
        steps=trainer.state.global_step,
    )


def job(folder, options, resume=None, before=None, after=None):
    """Train, and return what came of it. Other processes have the same folder."""
    with process():
        made = make(folder, **options)
        extra = None if before is None else before(made)
        try:
            made.train(resume_from_checkpoint=resume)
        finally:
            if dist.is_initialized():
                torch.set_num_threads(1)
        found = outcome(made)
        found.extra = extra if after is None else after(made)
        return found


def as_one(options, size=2):
    """Return the options of one process with the rows of several."""
    args = options.get("args", {})
    batch = args.get("per_device_train_batch_size", SIZE)
    m = options.get("m", M)
    return options | {
        "args": args | {"per_device_train_batch_size": size * batch},
        "m": None if m is None else size * m,
        "order": (args.get("gradient_accumulation_steps", 1), size),
    }


def close(a, b, tolerance=1e-10):
    for name, value in b.state.items():
        np.testing.assert_allclose(
            a.state[name], value, rtol=tolerance, atol=tolerance, err_msg=name
        )


def identical(results):
    for other in results[1:]:
        close(other, results[0], tolerance=0)


def column(found, name):
    return [row[name] for row in found.logs if name in row]


def compare(world, tmp_path, options, tolerance=1e-10, one=None, before=None):
    """Train on all ranks and in one process; return the results of both."""
    ranks = world.run(job, tmp_path / "ranks", options, None, before)
    alone = job(tmp_path / "one", one or as_one(options, world.size), None, before)
    identical(ranks)
    close(ranks[0], alone, tolerance)
    for found in ranks:
        for name in ("loss", "learning_rate", "grad_norm", "keep"):
            expected = column(alone, name)
            assert column(found, name) == pytest.approx(expected, rel=1e-5, abs=tolerance)
    return ranks, alone


# --- One process with all the rows ---


PARITY = {
    "agreement": ("agreement", "classes", 1),
    "consensus": ("consensus", "classes", 1),
    "clip": ("clip", "language", 1),
    "sharpness": ("sharpness", "classes", 1),
    "agreement of accumulated rows": ("agreement", "classes", 3),
    "accumulated sums": ("clip", "language", 2),
    "accumulated sharpness": ("sharpness", "language", 2),
}


def parity(world, tmp_path, case):
    chain, model, accumulate = PARITY[case]
    args = {"gradient_accumulation_steps": accumulate, "weight_decay": 0.1}
    options = {"chain": chain, "model": model, "args": args, "n": 400}
    ranks, alone = compare(world, tmp_path, options)
    assert ranks[0].steps == STEPS
    if chain == "agreement":
        skips = 0 < sum(column(alone, "keep")) < STEPS
        assert skips or min(column(alone, "agree_filter/accepted")) < 1
        mean = pytest.approx(column(alone, "agree_filter/accepted"))
        assert column(ranks[0], "agree_filter/accepted") == mean
    return ranks, alone


QUICK = ("agreement", "consensus", "agreement of accumulated rows", "accumulated sharpness")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in PARITY]
)
def test_two_ranks_are_one_process_with_the_rows_of_both(two, tmp_path, case):
    parity(two, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", PARITY)
def test_three_ranks_are_one_process_with_the_rows_of_all(three, tmp_path, case):
    parity(three, tmp_path, case)


# --- A plain loop ---


def of_sample(model, batch, n, language):
    """Return the sum of the losses of a sample's items, and their number."""
    logits = model(input_ids=batch["input_ids"][n : n + 1]).logits
    if not language:
        return F.cross_entropy(logits, batch["labels"][n : n + 1]), 1
    labels = batch["labels"][n, 1:]
    return F.cross_entropy(logits[0, :-1], labels, reduction="sum"), int((labels != -100).sum())


def members(batch, m, groups):
    """Return the samples of each row."""
    size = len(batch["labels"])
    if groups:
        users = batch["user_id"].tolist()
        return [[n for n in range(size) if users[n] == user] for user in dict.fromkeys(users)]
    return [part.tolist() for part in torch.tensor_split(torch.arange(size), m or size)]


def by_hand(
    model, steps, m, *, weighted=False, groups=False, limit=np.inf, language=True, losses=None
):
    """Train a plain module with ordinary backward passes.

    Args:
        model: The module.
        steps: For every step the batches of all ranks.
        m: The number of rows of a batch.
        weighted: True for samples with weights.
        groups: True for rows of users.
        limit: The largest norm of a row.
        language: True if the model predicts words.
        losses: A list that gets the mean loss of the rows of every step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    params = list(model.parameters())
    for batches in steps:
        rows = []
        for batch in batches:
            weights = batch["weight"].tolist() if weighted else [1.0] * len(batch["labels"])
            for row in members(batch, m, groups):
                parts = [(weights[n], *of_sample(model, batch, n, language)) for n in row]
                if sum(w for w, _, _ in parts) > 0:
                    total = sum(w * loss for w, loss, _ in parts)
                    rows.append((total, sum(w * items for w, _, items in parts)))
        mean = sum(items for _, items in rows) / len(rows)
        if losses is not None:
            losses.append(sum(total.item() / mean for total, _ in rows) / len(rows))
        whole = [torch.zeros_like(p) for p in params]
        for total, items in rows:
            optimizer.zero_grad()
            (total / (items if groups else mean)).backward()
            norm = torch.cat([p.grad.flatten() for p in params]).norm().item()
            for kept, p in zip(whole, params, strict=True):
                kept += p.grad * min(1.0, limit / norm) / len(rows)
        for p, kept in zip(params, whole, strict=True):
            p.grad = kept
        optimizer.step()
        scheduler.step()
    return SimpleNamespace(state={k: v.numpy() for k, v in model.state_dict().items()})


def steps_of(ranks, accumulate=1, used=None):
    """Return for every step the batches of all ranks."""
    count = STEPS * accumulate if used is None else used
    of_rank = [found.batches[:count] for found in ranks]
    together = list(zip(*of_rank, strict=True))
    return [
        [batch for batches in together[i : i + accumulate] for batch in batches]
        for i in range(0, count, accumulate)
    ]


def initial(model):
    torch.manual_seed(7)
    return MODELS[model]()


PLAIN = {
    "mean": ("mean", {}, {}),
    "clip and mean": ("clip", {}, {"limit": CLIP}),
    "weights": ("clip", {"sample_weights": "weight"}, {"weighted": True, "limit": CLIP}),
    "users": ("clip", {"groups": "user_id", "m": 4}, {"groups": True, "limit": CLIP}),
    "uneven": ("clip", {"uneven": True, "m": 3}, {"limit": CLIP}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_rows_of_all_ranks_are_those_of_a_plain_loop(two, tmp_path, case):
    """Two epochs of batches, of which the last ones are completed by accelerate."""
    chain, options, hand = PLAIN[case]
    args = {"gradient_accumulation_steps": 2}
    options = {"chain": chain, "n": 3 * 2 * SIZE + 5, "args": args, **options}
    ranks = two.run(job, tmp_path, options)
    identical(ranks)
    plain = initial("language")
    assert [len(batch["labels"]) for found in ranks for batch in found.batches] == [SIZE] * 24
    hand = by_hand(plain, steps_of(ranks, 2), options.get("m", M), **hand)
    close(ranks[0], hand)


UNEVEN = {
    # samples behind the full batches, options, of the plain loop, of ranks 0, 1, 2
    "one sample on the last rank": (5, {}, {}, [4, 1]),
    "none on the last rank": (3, {}, {}, [3, 0]),
    "one row per sample": (6, {"m": None}, {}, [4, 2]),
    "accumulated": (
        3,
        {"n": 3 * 2 * SIZE + 3, "args": {"gradient_accumulation_steps": 2}},
        {},
        [3, 0],
    ),
    "weights": (5, {"sample_weights": "weight"}, {"weighted": True}, [4, 1]),
    "users": (5, {"groups": "user_id", "m": 4}, {"groups": True}, [4, 1]),
    "split batches": (6, {"split": True}, {}, [4, 2]),
    "a graph": (5, {"compile": "graph", "n": 13, "args": {"max_steps": 2}}, {}, [4, 1]),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c == "a graph" else ()) for c in UNEVEN]
)
def test_ranks_with_fewer_samples_than_others_have_fewer_rows(two, tmp_path, case):
    """Two epochs; the mean is over the rows that have samples, and so is what is logged."""
    rest, options, hand, last = UNEVEN[case]
    options = {"n": 2 * 2 * SIZE + rest, "m": M, **options}
    args = {"accelerator_config": {"even_batches": False}, **options.pop("args", {})}
    if options.pop("split", False):
        args["accelerator_config"]["split_batches"] = True
        args["per_device_train_batch_size"] = 2 * SIZE
    accumulate = args.get("gradient_accumulation_steps", 1)
    steps = args.get("max_steps", STEPS if accumulate == 1 else 4)
    options = {"chain": "clip", "uneven": True, **options, "args": args | {"max_steps": steps}}
    ranks = two.run(job, tmp_path, options)
    identical(ranks)
    epoch = -(-options["n"] // (2 * SIZE))  # batches of a rank
    real = [
        [cut(b, last[rank] if (i + 1) % epoch == 0 else SIZE) for i, b in enumerate(found.batches)]
        for rank, found in enumerate(ranks)
    ]
    together = list(zip(*real, strict=True))
    by_epoch = [together[i : i + epoch] for i in range(0, len(together), epoch)]
    of_steps = [
        [batch for of_ranks in batches[i : i + accumulate] for batch in of_ranks]
        for batches in by_epoch
        for i in range(0, len(batches), accumulate)
    ][:steps]
    losses = []
    plain = by_hand(initial("language"), of_steps, options["m"], limit=CLIP, losses=losses, **hand)
    close(ranks[0], plain)
    for found in ranks:
        if case not in ("weights", "users"):
            assert column(found, "loss") == pytest.approx(losses, rel=1e-5)
        assert column(found, "keep") == [1.0] * steps


def cut(batch, size):
    return {name: value[:size] for name, value in batch.items()}


@pytest.mark.parametrize("dispatch", [True, False])
def test_a_stream_whose_end_is_not_full(two, tmp_path, dispatch):
    """21 samples: accelerate gives both ranks as many, the first of the stream once more."""
    args = {"accelerator_config": {"dispatch_batches": dispatch}}
    options = {"chain": "agreement", "m": None, "stream": True, "n": 21, "args": args}
    rest = 1 if dispatch else 3
    one = as_one(options) | {"n": 21, "stream": True}
    ranks = two.run(job, tmp_path / "ranks", options)
    identical(ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "__iter__", lambda self: iter(self.rows + self.rows[:rest]))
        alone = job(tmp_path / "one", one | {"args": {"per_device_train_batch_size": 2 * SIZE}})
    close(ranks[0], alone)
    assert ranks[0].steps == STEPS and column(ranks[1], "loss") == pytest.approx(
        column(alone, "loss")
    )


# --- Checkpoints ---


SAVED = {"save_strategy": "steps", "save_steps": 2}


def resumed(world, tmp_path, options):
    """Compare a run with one that resumes after its second step; return the checkpoint."""
    options = options | {"n": 3 * 2 * SIZE, "args": SAVED}
    whole = world.run(job, tmp_path, options)
    folder = tmp_path / "checkpoint-2"
    rest = world.run(job, tmp_path / "rest", options, str(folder))
    identical(whole)
    identical(rest)
    close(rest[0], whole[0], tolerance=0)
    for one, other in zip(rest, whole, strict=True):
        for name in ("keep", "loss", "learning_rate"):
            assert column(one, name) == column(other, name)
    return folder, whole, options


def test_a_resumed_run_is_the_uninterrupted_one(two, tmp_path):
    folder, whole, options = resumed(two, tmp_path, {"chain": "counting"})
    assert [file.name for file in folder.glob("transforms*")] == ["transforms.pt"]
    saved = torch.load(folder / "transforms.pt", weights_only=True)
    assert saved["counting.count"] == sum(column(whole[0], "keep")[:2])
    alone = job(tmp_path / "one", as_one(options), str(folder))  # with another number of ranks
    close(alone, whole[0])


def test_states_of_single_ranks_are_resumed(two, tmp_path):
    folder, _, options = resumed(two, tmp_path, {"chain": "own state"})
    names = ["transforms-0-of-2.pt", "transforms-1-of-2.pt", "transforms.pt"]
    assert sorted(file.name for file in folder.glob("transforms*")) == names
    first, second, _ = (torch.load(folder / name, weights_only=True) for name in names)
    assert first["counting.seen"] != second["counting.seen"]
    with pytest.raises(ValueError, match=r"expected transforms-0-of-1\.pt in .*as many processes"):
        job(tmp_path / "one", as_one(options) | {"chain": "counting"}, str(folder))


# --- What is logged ---


def reported(folder):
    return [json.loads(line) for line in (folder / "reported.jsonl").read_text().splitlines()]


def test_metrics_are_logged_once_and_alike_on_all_ranks(two, tmp_path):
    options = {"chain": "watch", "model": "classes", "cls": Scored, "args": {"logging_steps": 2}}
    ranks, alone = compare(two, tmp_path, options)
    names = {"accuracy", "first", "keep", "agree_filter/accepted", "watch/noise_scale"}
    kept = lambda row: {name: row[name] for name in names}
    for found in ranks:
        for row, expected in zip(found.logs[:-1], alone.logs[:-1], strict=True):
            assert row.keys() == expected.keys() and names <= row.keys()
            assert kept(row) == pytest.approx(kept(expected), nan_ok=True)
    assert [row["step"] for row in reported(tmp_path / "ranks")] == [2, 4, 6, 6]
    first = ranks[0].logs[0]
    assert 0 < first["agree_filter/accepted"] < 1 and first["first"] == 7.0


def test_metrics_of_transforms_before_across_ranks_are_averaged(two, tmp_path):
    ours, theirs = two.run(job, tmp_path, {"chain": "own state"})
    seen = column(ours, "counting/seen")
    assert len(seen) == STEPS and seen == column(theirs, "counting/seen")
    assert seen == pytest.approx(np.cumsum(column(ours, "loss")), rel=1e-5)


# --- Buffers and evaluation ---


def test_all_ranks_have_the_buffers_of_the_first(two, tmp_path):
    """As in DistributedDataParallel: the statistics are those of the first rank's batches."""

    def by_rank(found):
        return {name: found.state[f"norm.{name}"] for name in ("running_mean", "running_var")}

    ranks = two.run(job, tmp_path, {"chain": "mean", "model": "normed"}, None, None, evaluated)
    identical(ranks)
    assert ranks[0].extra == ranks[1].extra
    plain, statistics = initial("normed"), None
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for step in zip(*(found.batches[:STEPS] for found in ranks), strict=True):
        optimizer.zero_grad()
        for rank, batch in enumerate(step):
            for row in members(batch, M, False):
                inputs = {name: batch[name][row] for name in ("input_ids", "labels")}
                (plain(**inputs)["loss"] / (2 * M)).backward()
            if rank == 0:
                statistics = copy.deepcopy(plain.norm.state_dict())
        plain.norm.load_state_dict(
            statistics | {n: p.detach() for n, p in plain.norm.named_parameters()}
        )
        optimizer.step()
        scheduler.step()
    close(ranks[0], SimpleNamespace(state={k: v.numpy() for k, v in plain.state_dict().items()}))
    args = {"ddp_broadcast_buffers": False}
    ours, theirs = two.run(job, tmp_path, {"model": "normed", "args": args})
    same = [np.array_equal(by_rank(ours)[n], by_rank(theirs)[n]) for n in by_rank(ours)]
    assert same == [False, False]
    np.testing.assert_array_equal(ours.state["head.weight"], theirs.state["head.weight"])


def evaluated(trainer):
    """Return the loss of an evaluation by this trainer and by one of transformers."""
    data, options = samples(11, trainer.compute_loss_func is not None), {}
    if trainer.compute_loss_func is not None:
        options["compute_loss_func"] = token_loss
    usual = hf.Trainer(trainer.model, trainer.args, data_collator=Recorded(), **options)
    usual.remove_callback(hf.PrinterCallback)
    return trainer.evaluate(data)["eval_loss"], usual.evaluate(data)["eval_loss"]


@pytest.mark.parametrize("model", ["classes", "language"])
def test_an_evaluation_is_that_of_a_trainer(two, tmp_path, model):
    options = {"chain": "clip", "model": model, "args": {"max_steps": 2}}
    ranks = two.run(job, tmp_path / "ranks", options, None, None, evaluated)
    assert ranks[0].extra == ranks[1].extra
    assert ranks[0].extra[0] == ranks[0].extra[1] > 0


# --- Other options ---


def halve(trainer):
    """Halve some filtered gradients by hooks on the parameters, one of each kind."""
    first, last = (list(trainer.model.parameters())[i] for i in (0, -1))
    first.register_hook(lambda g: g / 2)

    def later(p):
        p.grad.mul_(0.5)

    last.register_post_accumulate_grad_hook(later)


OPTIONS = {
    "bf16": ({"args": {"bf16": True}}, 2e-2, None),
    "hooks of parameters": ({}, 1e-10, halve),
    "a graph": ({"compile": "graph", "args": {"max_steps": 2}}, 1e-10, None),
    "a reference batch": ({"chain": "reference", "reference": True}, 1e-10, None),
    "clipped": ({"args": {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2}}, 1e-10, None),
    "items of a rank": ({"args": {"average_tokens_across_devices": False}}, None, None),
    "split batches": ({"args": {"accelerator_config": {"split_batches": True}}}, None, None),
}


SLOW = {"a graph", "split batches", "items of a rank"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in OPTIONS]
)
def test_options_of_the_trainer(two, tmp_path, case):
    change, tolerance, before = OPTIONS[case]
    options = {"chain": "clip", **change}
    if tolerance is not None:
        compare(two, tmp_path, options, tolerance, before=before)
        return
    ranks = two.run(job, tmp_path, options)
    identical(ranks)
    assert column(ranks[0], "loss") == column(ranks[1], "loss")


# --- Float16 ---


class Averaging(hf.TrainerCallback):
    def on_train_begin(self, *args, model, **kwargs):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    def on_step_end(self, *args, model, **kwargs):
        self.average.update_parameters(model)


def with_average(trainer):
    averaging = Averaging()
    trainer.add_callback(averaging)
    return averaging


def averages(trainer):
    callbacks = trainer.callback_handler.callbacks
    average = next(c for c in callbacks if isinstance(c, Averaging)).average.module
    return {name: value.numpy() for name, value in average.state_dict().items()}


def test_averaged_weights_are_those_of_one_process(two, tmp_path):
    options = {"chain": "agreement", "model": "classes"}
    ranks = two.run(job, tmp_path / "ranks", options, None, with_average, averages)
    alone = job(tmp_path / "one", as_one(options), None, with_average, averages)
    for found in ranks:
        close(SimpleNamespace(state=found.extra), SimpleNamespace(state=alone.extra))


class Half(TrainerInHalf, FilteredTrainer):
    """A trainer in float16 that logs its scale."""

    def training_step(self, *args):
        loss = super().training_step(*args)
        self.log({"scale": self.accelerator.scaler.get_scale()})
        return loss


# Some rows of the second rank, then all of them, then those of both: the last step is skipped.
HOT = [(1, M), *((3, M + row) for row in range(M)), *((5, row) for row in range(2 * M))]


def halved(folder, chain):
    flat = {name: v.flatten(0, 2) for name, v in samples16(STEPS, 2 * M, 2, HOT).items()}
    data = [{n: v[i] for n, v in flat.items()} for i in range(len(flat["labels"]))]
    settings = {"fp16": True, "per_device_train_batch_size": 2 * M, "max_steps": STEPS}
    settings |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    settings |= {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "logging_steps": 1}
    with process():
        args = hf.TrainingArguments(str(folder), **settings)
        torch.manual_seed(0)
        model = Perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        made = Half(
            model, args, train_dataset=data, optimizers=(optimizer, constant), microbatches=M,
            transforms=HALF_CHAINS[chain](),
        )  # fmt: skip
        made.remove_callback(hf.PrinterCallback)
        made.train()
    torch.set_num_threads(1)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return SimpleNamespace(state=state, logs=made.state.log_history)


HALF_CHAINS = {
    "no guard": gf.mean_rows,
    "guard of all": lambda: gf.chain(across_ranks(), gf.finite_filter(), gf.mean_rows()),
    "guard of each": lambda: gf.chain(gf.finite_filter(), across_ranks(), gf.mean_rows()),
}


@pytest.mark.parametrize("chain", HALF_CHAINS)
def test_in_float16_all_ranks_reject_the_rows_that_overflow_on_one(two, tmp_path, chain):
    ranks = two.run(halved, tmp_path, chain)
    identical(ranks)
    for found in ranks:
        assert column(found, "scale") == scales_by_hand(STEPS, HOT)
    torch.manual_seed(0)
    plain = Perceptron()
    # A guard of each rank skips a step in which one rank has no row left.
    skips = [(3, row) for row in range(M)] if chain == "guard of each" else []
    norms = train_by_hand(plain, samples16(STEPS, 2 * M, 2, HOT), [*HOT, *skips])
    assert len(norms) == sum(column(ranks[0], "keep")) == STEPS - 1 - bool(skips)
    state = {name: value.numpy() for name, value in plain.state_dict().items()}
    close(ranks[0], SimpleNamespace(state=state), 5e-3)


def dropping(folder):
    """A reference batch whose dropout differs between ranks."""
    with process():
        made = make(folder, "reference", "dropout", reference=True)
        torch.manual_seed(dist.get_rank())
        made.train()
        return outcome(made)


def test_ranks_with_dropout_of_their_own_stay_alike(two, tmp_path):
    identical(two.run(dropping, tmp_path))


# --- Faults ---


def test_ranks_that_give_up_do_so_together(two, tmp_path):
    for said in two.errors(job, tmp_path, {"chain": "spikes", "args": {"max_steps": 40}}):
        assert "spike_skip gave up" in said


def test_a_batch_that_does_not_divide_is_refused_before_the_first_step(two, tmp_path):
    for said in two.errors(job, tmp_path, {"m": 3}):
        assert "expected per_device_train_batch_size to be a multiple of microbatches=3" in said
    for dispatch, n in ((True, 3 * 2 * SIZE + 5), (False, 3 * 2 * SIZE + 4)):
        config = {"dispatch_batches": dispatch}
        options = {"m": 4, "n": n, "args": {"accelerator_config": config}}
        if dispatch:  # the last batches have 3 samples
            for said in two.errors(job, tmp_path, options):
                assert "found a last one of 3 samples" in said
        else:
            two.run(job, tmp_path, options)


def test_batches_of_unknown_sizes_are_refused_where_they_may_differ():
    from gradfilter.interop._transformers import check_sizes_known

    check_sizes_known(torch.utils.data.BatchSampler(range(5), 2, False))
    with pytest.raises(ValueError, match=r"known sizes with even_batches=False .* found list"):
        check_sizes_known([[0, 1], [2]])


def accelerator(kind="MULTI_CPU", even=True, config=None):
    return SimpleNamespace(
        distributed_type=kind, num_processes=2, even_batches=even, parallelism_config=config
    )


def test_other_kinds_of_parallelism_are_refused():
    from gradfilter.interop._transformers import check_processes

    check_processes(accelerator(), False, False)
    check_processes(accelerator(even=False), True, False)
    check_processes(accelerator(even=False), False, True)
    with pytest.raises(ValueError, match=r"as many rows on every rank, found even_batches=False"):
        check_processes(accelerator(even=False), False, False)
    kinds = {"FSDP": "joins parameters", "DEEPSPEED": "runs the b", "MEGATRON_LM": "runs the b"}
    for kind, what in kinds.items():
        with pytest.raises(ValueError, match=rf"found {kind}, which {what}.*{{\"version\": 2}}"):
            check_processes(accelerator(kind), False, False)
    with pytest.raises(ValueError, match="found a parallelism_config, which splits"):
        check_processes(accelerator(config=object()), False, False)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["killed", "raises"])
def test_the_other_rank_fails_when_one_is_gone(tmp_path, harm):
    world = World(2)
    try:
        world.start(job, tmp_path, {"cls": Failing, "args": {"run_name": harm}})
        fine, said = world.outcome(0)
        assert not fine and "Rank 0 of 2 lost the others while" in said
        if harm == "raises":
            fine, said = world.outcome(1)
            assert not fine and said.startswith("my own mistake")
    finally:
        world.close()


# --- Real launchers ---


SCRIPT = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import test_transformers_ranks as tests
made = tests.make({folder!r}, **{options!r})
made.train()
if made.args.should_save:
    torch.save((made.model.state_dict(), made.state.log_history), {result!r})
"""

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # With --cpu it starts one process, unless there is mpirun.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_started_by(tmp_path, launcher):
    options = {"chain": "agreement", "args": {"gradient_accumulation_steps": 2}, "n": 400}
    result, script = tmp_path / "result.pt", tmp_path / "train.py"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    folder = str(tmp_path)
    text = SCRIPT.format(paths=paths, folder=folder, options=options, result=str(result))
    script.write_text(text)
    line = [sys.executable, "-m", *LAUNCHERS[launcher], str(script)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    state, logs = torch.load(result, weights_only=True)
    alone = job(tmp_path / "one", as_one(options))
    close(SimpleNamespace(state={k: v.numpy() for k, v in state.items()}), alone)
    names = ("keep", "agree_filter/accepted", "loss")
    found = SimpleNamespace(logs=logs)
    for name in names:
        assert column(found, name) == pytest.approx(column(alone, name), rel=1e-5)
    assert [row["step"] for row in reported(tmp_path)] == [*range(1, STEPS + 1), STEPS]
