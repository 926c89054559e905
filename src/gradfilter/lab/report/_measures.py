"""What ``gradfilter stats`` found out about the checkpoints of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradfilter.lab._reading import ForeignError, printable, reading
from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._output import Document, read
from gradfilter.lab.stats._records import MOST

FOLDER = "stats"
PLAIN = {"gen_strategy": "none", "normalization": "none", "target_logit_only": False}


@dataclass(frozen=True)
class Measure:
    """One column of one file of numbers.

    Attributes:
        metric: What was measured.
        column: Which of its numbers, where there are several.
        split: On which samples.
        variant: The file's name without checkpoint and range: it names the settings.
        plain: Of the images themselves, differentiating the logits.
        checkpoint: Its id.
        step: Where the training stood.
        samples: How many there are.
        mean: Over them.
        lipschitz: √(mean m²) for operator norms; otherwise NaN.
        wrong: The mean over the samples with wrong labels; NaN if there are none.
        right: The mean over the others.
    """

    metric: str
    column: str
    split: str
    variant: str
    plain: bool
    checkpoint: int
    step: int
    samples: int
    mean: float
    lipschitz: float
    wrong: float
    right: float


def read_measures(run: Path) -> tuple[tuple[Measure, ...], list[str]]:
    """The measurements of a run, and why others cannot be read.

    Of files that measure parts of a split the largest counts.
    """
    chosen: dict[tuple[str, str, int], Measure] = {}
    unreadable = []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            with reading(path, "the file of numbers", "Remove it, or measure again."):
                found = _measures(path, read(path))
        except UsageError as error:
            unreadable.append(str(error))
            continue
        for measure in found:
            key = (measure.variant, measure.column, measure.checkpoint)
            if key not in chosen or measure.samples > chosen[key].samples:
                chosen[key] = measure
    return tuple(chosen.values()), unreadable


def _measures(path: Path, document: Document) -> list[Measure]:
    facts = document["metadata"]
    settings: Mapping[str, Any] = facts["settings"]
    if facts["axes"][-1] not in ("sample", "column"):
        return []  # running values along a path, which have no one mean
    words = (settings["metric"], settings["dataset_split"], *facts["columns"])
    if not all(isinstance(word, str) for word in words):
        raise ForeignError("it does not say what was measured")
    at = facts["checkpoint"]
    if not all(type(at[name]) is int and 0 <= at[name] <= MOST for name in ("id", "step")):
        raise ForeignError("it does not say at which checkpoint")
    values = np.array(document["stats"], dtype=float)  # null becomes NaN
    values = values.reshape(len(values), -1)  # (samples, columns)
    start, stop = facts["samples"]
    per_sample = len(values) == len(document["targets"])
    wrong = np.array(document["targets"]) != np.array(document["ground_truths"])
    lipschitz = np.ravel(facts["aggregate"].get("lipschitz", math.nan)).astype(float)
    return [
        Measure(
            printable(settings["metric"]),
            printable(column),
            printable(settings["dataset_split"]),
            printable(path.stem.rsplit("-checkpoint-", 1)[0]),
            all(settings.get(name, value) == value for name, value in PLAIN.items()),
            at["id"],
            at["step"],
            stop - start,
            _of_all(facts, column, numbers),
            float(lipschitz[0]),
            _mean(numbers[wrong]) if per_sample and wrong.any() else math.nan,
            _mean(numbers[~wrong]) if per_sample else math.nan,
        )
        for column, numbers in zip(facts["columns"], values.T, strict=True)
    ]


def _of_all(facts: Mapping[str, Any], column: str, values: np.ndarray) -> float:
    """The mean; of noise scales, which may be infinite, the quotient of means that stats wrote."""
    whole = facts["aggregate"].get(column)
    return float(whole) if isinstance(whole, int | float) else _mean(values)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
