"""One training of a rule on noisy digits, and many of them in several processes."""

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
    """One training: a rule, and what it is tried with.

    Attributes:
        rule: Its name.
        learning_rate: Constant.
        noise: Fraction of the training labels that are wrong.
        seed: Of split, wrong labels, parameters and batches.
        validate: Hold a fifth of the training part back to choose by, its labels clean.
    """

    rule: str
    learning_rate: float
    noise: float
    seed: int
    validate: bool


def begun(rule: Rule, task: Task) -> Training:
    """The training before its first step."""
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
        links = [*chain.links] if rule.reducer is None else [rule.reducer, chain.links[-1]]
        if rule.ema is not None:
            links.append(gf.ema_params(rule.ema))
        loss = gf.model_loss(run.model, torch.nn.CrossEntropyLoss())
        rows = None if config.per_sample else config.microbatches
        run.step = gf.train_step(loss, gf.chain(*links), microbatches=rows)
        run.state = run.step.init(run.model, seed=task.seed)
    return run


def train(task: Task) -> dict[str, Any]:
    """Train, and what came of it: a curve, and the numbers at its end."""
    torch.set_num_threads(1)
    rule = rule_of(task.rule)
    run = begun(rule, task)
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
    """The trainings that are finished, one line of JSON each, kept whatever happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {_key(line): line for line in map(json.loads, lines)}

    def __getitem__(self, task: Task) -> dict[str, Any]:
        return self.found[_key(asdict(task))]

    def all_of(self, tasks: Iterable[Task], jobs: int, label: str) -> None:
        """Do those of the tasks that have not been done yet."""
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
