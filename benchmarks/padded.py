"""Measure per-sample gradients of padded text, with a model that checks texts for padding.

A collator pads a batch to its longest text, and the model checks whether there is padding. For
single texts the results of this check differ. The benchmark counts the batches (of 20) in which
plan "auto" uses the fused plan, and the steps of `FilteredTrainer` with one row per text in which
it does. It measures, per batch, the time of rows, agreement filter and weighted sum for both plans;
the base is one forward and backward pass. It also measures eight training steps; the base is the
Trainer of transformers.

    python benchmarks/padded.py
"""

import copy
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._race import race
from benchmarks._report import by_contender
from benchmarks._results import Contest, save
from benchmarks._setting import THRESHOLD
from benchmarks._timing import Contender

NAME = Path(__file__).stem
BATCHES, STEPS, LENGTH, VOCABULARY, CLASSES = 20, 8, 32, 2000, 3
TEXTS, FEW = 16, 4  # the second with --quick
WIDTHS = {"bert-32": 32, "bert-128": 128}

Batch = dict[str, Tensor]


def bert(width: int, device: torch.device) -> nn.Module:
    """Return a small BERT that classifies texts."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=2 * LENGTH,
        num_labels=CLASSES,
    )
    return transformers.BertForSequenceClassification(config).to(device).train()


def texts(count: int) -> list[dict[str, Any]]:
    """Return texts with lengths from a quarter of the maximum to the maximum."""
    lengths = torch.randint(LENGTH // 4, LENGTH + 1, (count,))
    words = [torch.randint(3, VOCABULARY, (int(length),)) for length in lengths]
    return [{"input_ids": w, "labels": torch.randint(CLASSES, ())} for w in words]


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Pad all texts to the longest one."""
    words = [row["input_ids"] for row in rows]
    masks = [torch.ones_like(w) for w in words]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(words, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


def filtered(model: nn.Module, plan: str) -> Callable[[Batch], gf.GradStack]:
    """Return a function that computes rows, agreement filter and weighted sum of a batch."""
    params, buffers = gf.extract(model)
    grads_of = gf.per_sample_grads(gf.model_loss(model), plan=plan)
    filter_ = gf.agree_filter(THRESHOLD)
    state = filter_.init(params)

    def compute(batch: Batch) -> gf.GradStack:
        rows = grads_of(params, batch, buffers=buffers)
        filter_.update(rows, state, params)
        return rows

    return compute


def fell_back(run: Callable[[], object]) -> int:
    """Count how often the plan fell back to the loop."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return sum("Fell back" in str(warning.message) for warning in caught)


def trained(model: nn.Module, data: list[Any], size: int, *, ours: bool, on_cpu: bool) -> None:
    """Run eight training steps with FilteredTrainer or with Trainer."""
    import transformers

    from gradfilter.interop import FilteredTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=size,
            logging_steps=STEPS,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=on_cpu,
        )
        model = copy.deepcopy(model)
        options = {"train_dataset": data, "data_collator": collate}
        trainer = (
            FilteredTrainer(
                model, args, transforms=gf.agree_filter(THRESHOLD), microbatches=None, **options
            )
            if ours
            else transformers.Trainer(model, args, **options)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def contenders(model: nn.Module, batches: list[Batch]) -> dict[str, Contender]:
    """Return contenders that use the next batch: a plain pass, and the rows with each plan."""

    def plain(batch: Batch) -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def each(run: Callable[[Batch], object], full: bool = False) -> Contender:
        ahead = itertools.cycle(batches)

        def next_one() -> None:
            batch = next(ahead)
            ones = torch.ones_like(batch["attention_mask"])
            run({**batch, "attention_mask": ones} if full else batch)

        return next_one

    return {
        "plain": each(plain),
        "loop": each(filtered(model, "loop")),
        "fused": each(filtered(model, "fused")),
        "fused, no padding": each(filtered(model, "fused"), full=True),
    }


def measure(
    name: str, size: int, rounds: int, device: torch.device
) -> tuple[list[Contest], dict[str, int]]:
    """Measure all contenders on one model, and count the fused batches and steps."""
    model, title = bert(WIDTHS[name], device), f"BERT 4 x {WIDTHS[name]}, {size} texts"
    parameters = sum(p.numel() for p in model.parameters())
    batches = [
        {key: t.to(device) for key, t in collate(texts(size)).items()} for _ in range(BATCHES)
    ]
    auto = filtered(model, "auto")
    data = texts(STEPS * size)
    on_cpu = device.type == "cpu"
    counts = {
        "batches": BATCHES,
        "fused_batches": BATCHES - sum(fell_back(lambda b=b: auto(b)) for b in batches),
        "steps": STEPS,
        "fused_steps": STEPS
        - fell_back(lambda: trained(model, data, size, ours=True, on_cpu=on_cpu)),
    }
    rows, _ = race(contenders(model, batches), rounds, device, base="plain")
    training = {
        "Trainer": lambda: trained(model, data, size, ours=False, on_cpu=on_cpu),
        "FilteredTrainer": lambda: trained(model, data, size, ours=True, on_cpu=on_cpu),
    }
    steps, _ = race(training, max(rounds // 2, 1), device, base="Trainer")
    of = f"{title}, {STEPS} steps"
    return [
        Contest(model=name, title=title, parameters=parameters, results=rows),
        Contest(model=f"{name}-training", title=of, parameters=parameters, results=steps),
    ], counts


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, WIDTHS, rounds=10).parse_args(arguments)
    device = torch.device(options.device)
    size = FEW if options.quick else TEXTS
    contests: list[Contest] = []
    counts: dict[str, dict[str, int]] = {}
    for name in track(options.models, "Measuring", console=Console(stderr=True)):
        measured, counts[name] = measure(name, size, rounds_of(options), device)
        contests += measured
    head = facts(NAME, options)
    target = options.out / f"{NAME}-{device.type}.json"
    save(target, {**head, "fused": counts}, contests)
    by_contender(contests[::2], caption(head))
    by_contender(contests[1::2], caption(head), base="Trainer", title="Over training with Trainer")
    for name, found in counts.items():
        Console().print(
            f"{name}: {found['fused_batches']} of {found['batches']} batches fused, "
            f"{found['fused_steps']} of {found['steps']} steps"
        )


if __name__ == "__main__":
    main()
