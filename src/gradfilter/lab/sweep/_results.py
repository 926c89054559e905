"""What has come of a study, as rows: for ``study.csv``, ``study.json`` and the table."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from gradfilter.lab._reading import printable
from gradfilter.lab._rundir import write_bytes
from gradfilter.lab.sweep._plan import METRICS, Plan
from gradfilter.lab.sweep._queue import Queue

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "diverged",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Group:
    """Trainings that differ in nothing but the seed.

    Attributes:
        settings: What they have in common.
        values: Of the metric, of those that are complete.
        tested: Their test accuracies.
        trainings: How many there are.
    """

    settings: dict[str, Any]
    values: tuple[float, ...]
    tested: tuple[float, ...]
    trainings: int

    @property
    def mean(self) -> float:
        """Mean of the metric."""
        return statistics.mean(self.values) if self.values else math.nan


def settings_of(plan: Plan, trial: FrozenTrial) -> dict[str, Any]:
    """The settings in which a training differs from the others; {} while they are being chosen."""
    return {
        axis.name: axis.value(trial.params[axis.name])
        for axis in plan.axes
        if axis.name in trial.params
    }


def rows_of(plan: Plan, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """One row per training: number, state, value, settings, evaluation, run and reason."""
    rows = []
    for trial in trials:
        evaluation = trial.user_attrs.get("evaluation") or {}
        rows.append(
            {
                "trial": trial.number,
                "state": STATES[trial.state],
                "value": trial.value,
                **{k: _jsonable(v) for k, v in settings_of(plan, trial).items()},
                **{name: evaluation.get(name) for name in ("step", "epoch", *METRICS)},
                "run": trial.user_attrs.get("run"),
                "reason": trial.user_attrs.get("reason"),
            }
        )
    return rows


def groups_of(plan: Plan, trials: Sequence[FrozenTrial]) -> list[Group]:
    """Trainings by their settings without the seed, best first; those without a value last.

    A run counts once, however often a search proposed it.
    """
    collected: dict[str, dict[str, FrozenTrial]] = {}
    for trial in trials:
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            shared = {k: v for k, v in settings_of(plan, trial).items() if k != "seed"}
            run = str(trial.user_attrs.get("run", trial.number))
            runs = collected.setdefault(repr(shared), {})
            if run not in runs or runs[run].value is None:
                runs[run] = trial
    groups = []
    for runs in collected.values():
        members = list(runs.values())
        complete = [t for t in members if t.value is not None]
        tested = [t.user_attrs["evaluation"].get("test_accuracy") for t in complete]
        shared = {k: v for k, v in settings_of(plan, members[0]).items() if k != "seed"}
        groups.append(
            Group(
                shared,
                tuple(t.value for t in complete if t.value is not None),
                tuple(accuracy for accuracy in tested if accuracy is not None),
                len(members),
            )
        )
    sign = -1 if plan.direction == "maximize" else 1
    return sorted(groups, key=lambda g: (not g.values, sign * g.mean if g.values else 0.0))


def write_results(queue: Queue, folder: Path) -> None:
    """Write ``study.csv`` and ``study.json``, each as a whole, with a line per training."""
    with queue.storage.turn():  # several workers may end at the same moment
        rows = rows_of(queue.plan, queue.trials())
        names = [axis.name for axis in queue.plan.axes]
        text = io.StringIO()
        columns = [*dict.fromkeys([*("trial", "state", "value"), *names, *_columns(rows)])]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: _text(value) for n, value in row.items()} for row in rows)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "study.csv", text.getvalue().encode())
        facts = {"command": "sweep", "name": queue.study.study_name, **queue.plan.definition()}
        whole = json.dumps({**facts, "trials": rows}, indent=2)
        write_bytes(folder / "study.json", f"{whole}\n".encode())


def _text(value: Any) -> Any:
    """What a file in UTF-8 may say, which knows no other names of files."""
    return printable(value) if isinstance(value, str) else value


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for row in rows for name in row]
