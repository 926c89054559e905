"""Train a rule on digits with wrong labels, once or many times in several processes."""

import json
import math
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import gradfilter as gf
from benchmarks._noise_rules import STEPS, Rule, rule_of
from gradfilter.lab.train._accuracies import accuracies
from gradfilter.lab.train._build_training import build_training, update_of
from gradfilter.lab.train._training import Training, advance

EVERY = 50
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """One training of a rule.

    Attributes:
        rule: The name of the rule.
        learning_rate: The constant learning rate.
        noise: The fraction of wrong training labels.
        seed: The seed for split, wrong labels, parameters and batches.
        validate: Whether a fifth of the training part, with right labels, is a validation split.
    """

    rule: str
    learning_rate: float
    noise: float
    seed: int
    validate: bool


def build_run(rule: Rule, task: Task) -> Training:
    """Build a training before its first step."""
    seeds = {"seed": task.seed, "data_split_seed": task.seed, "label_seed": task.seed}
    config = rule.config(
        learning_rate=task.learning_rate,
        label_noise=task.noise,
        val_split=0.2 if task.validate else None,
        **seeds,
    )
    run = build_training(config, CPU)
    if rule.reducer is not None or rule.ema is not None:
        chain = update_of(config, STEPS, 1.0)
        transforms = [*chain.parts] if rule.reducer is None else [rule.reducer, chain.parts[-1]]
        if rule.ema is not None:
            transforms.append(gf.ema_params(rule.ema))
        loss = gf.model_loss(run.model, torch.nn.CrossEntropyLoss())
        rows = None if config.per_sample else config.microbatches
        run.step = gf.train_step(loss, gf.chain(*transforms), microbatches=rows)
        run.state = run.step.init(run.model, seed=task.seed)
    return run


def train(task: Task) -> dict[str, Any]:
    """Train; return the task with the seconds and a curve of accuracies."""
    torch.set_num_threads(1)
    rule = rule_of(task.rule)
    run = build_run(rule, task)
    curve, start = [], time.perf_counter()
    for until in range(EVERY, STEPS + 1, EVERY):
        advance(run, until)
        state = run.state
        if rule.ema is not None:
            state = {**state, "params": gf.ema_of(state)}
        found = accuracies(run.model, state, run.data)
        names = ("test_accuracy", "val_accuracy", "memorised", "train_clean_accuracy")
        curve.append({n: None if math.isnan(found[n]) else round(found[n], 5) for n in names})
    return {**asdict(task), "seconds": time.perf_counter() - start, "curve": curve}


class Done:
    """The finished trainings; each is saved at once as one line of JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {_key(line): line for line in map(json.loads, lines)}

    def __getitem__(self, task: Task) -> dict[str, Any]:
        return self.found[_key(asdict(task))]

    def all_of(self, tasks: Iterable[Task], jobs: int, label: str) -> None:
        """Run the tasks that are not finished yet."""
        missing = [task for task in tasks if _key(asdict(task)) not in self.found]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(train, task) for task in missing]
            for future in track(as_completed(futures), total=len(futures), description=label):
                line = future.result()
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                self.found[_key(line)] = line


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in Task.__dataclass_fields__)
