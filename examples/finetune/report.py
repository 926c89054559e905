"""Summaries of the trainings of a rule, the time of a step, and the facts about a study."""

import math
import platform
import statistics
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch

import gradfilter as gf
from data import order
from loop import step_of
from rules import RULES
from setting import Setting

Curve = dict[str, list[float]]
STUDENT = 2.776
"""Half the width of a 95 % interval of five differences, in standard errors."""


def mean_and_deviation(values: list[float]) -> dict[str, float]:
    """Return the mean and the standard deviation."""
    found = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
    return {name: round(value, 5) for name, value in found.items()}


def spread(values: list[float]) -> dict[str, Any]:
    """Return the mean, the standard deviation and the values."""
    return {**mean_and_deviation(values), "values": values}


def difference(values: list[float], others: list[float]) -> dict[str, Any]:
    """Return the mean of the differences seed by seed, and half the width of its 95 % interval."""
    found = spread([round(a - b, 5) for a, b in zip(values, others, strict=True)])
    return found | {"half_width": round(STUDENT * found["sd"] / len(values) ** 0.5, 5)}


def summary(runs: list[Curve], plain: list[Curve], ratio: float) -> dict[str, Any]:
    """Return what the trainings of a rule, one per seed, have come to.

    Args:
        runs: The numbers of each training over its steps.
        plain: Those of plain training with the same seeds.
        ratio: Time of a step over that of plain training: in equal time, fewer steps are done.
    """
    steps = runs[0]["step"]
    inside = [place for place, step in enumerate(steps) if step * ratio <= steps[-1] * 1.005]
    timed = inside[-1] if inside else 0

    def at(name: str, curves: list[Curve], place: int) -> list[float]:
        return [curve[name][place] for curve in curves]

    last = at("test_accuracy", runs, -1)
    early = at("test_accuracy", runs, timed)
    base = at("test_accuracy", plain, -1)
    numbers = [(name, of) for name, of in runs[0].items() if name != "step"]
    names = [name for name, of in numbers if not any(map(math.isnan, of))]  # NaN: none to count
    return {
        "accuracy": spread(last),
        "over_plain": difference(last, base),
        "loss": spread(at("test_loss", runs, -1)),
        "best_accuracy": spread([max(curve["test_accuracy"]) for curve in runs]),
        "equal_time": {
            "steps": steps[timed],
            "accuracy": spread(early),
            "over_plain": difference(early, base),
        },
        "curves": [
            {"step": step} | {name: mean_and_deviation(at(name, runs, place)) for name in names}
            for place, step in enumerate(steps)
        ],
    }


def milliseconds(base: Setting, rounds: int, steps: int = 5) -> dict[str, float]:
    """Return the processor's time per step: the median over rounds that run all rules in turn."""
    data = base.load()
    model = base.model(data)
    begun = {rule: step_of(replace(base, rule=rule), data, model) for rule in RULES}
    batches = order(len(data.train), base.batch, steps, 0)
    costs: dict[str, list[float]] = {rule: [] for rule in RULES}
    for _ in range(rounds + 1):  # the first is not counted
        for rule, (step, state, more) in begun.items():
            start = time.process_time()
            for batch in batches:
                state, _ = step(state, data.train[batch], donate=True, **more)
            costs[rule].append((time.process_time() - start) / steps * 1e3)
            begun[rule] = step, state, more
    return {rule: round(statistics.median(found[1:]), 3) for rule, found in costs.items()}


def facts(base: Setting) -> dict[str, Any]:
    """Return what the trainings have in common, and the machine."""
    data = base.load()
    parts = {name: len(getattr(data, name)) for name in ("train", "validation", "clean", "test")}
    parameters = sum(p.numel() for p in base.model(data).parameters())
    common = {k: v for k, v in asdict(base).items() if k not in ("rule", "lr", "seed")}
    return {
        "benchmark": "finetune",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gradfilter": gf.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "setting": {k: v for k, v in common.items() if k not in ("wrong", "corrupted")},
        "samples": {**parts, "words": data.words, "classes": data.classes},
        "parameters": parameters,
        "rules": {name: rule.about for name, rule in RULES.items()},
    }
