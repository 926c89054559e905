"""``gradfilter sweep``: run a study, and write its results and its table."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradfilter.lab._device import usable_device
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._options import arguments
from gradfilter.lab._processes import started_processes
from gradfilter.lab._run_files import printable, write_bytes
from gradfilter.lab._usage import UsageError, typed_names
from gradfilter.lab.sweep._join import folder_of, joined_study, reading_study
from gradfilter.lab.sweep._plan import (
    METRICS,
    MOST_CORNERS,
    Plan,
    check_there,
    plan_of,
    refuse_unused,
)
from gradfilter.lab.sweep._queue import OPEN, Queue, enqueue
from gradfilter.lab.sweep._storage import storage_errors_as_usage
from gradfilter.lab.sweep._sweep_config import SweepConfig, parse_own, split
from gradfilter.lab.sweep._workers import run_workers, work
from gradfilter.lab.train._run_place import run_errors_as_usage as explained_place
from gradfilter.lab.train._train import check_trackers
from gradfilter.lab.train._train_command import parse_train
from gradfilter.lab.train._train_config import TrainConfig

# --- Results as rows: for ``study.csv``, ``study.json`` and the table ---


STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "diverged",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class TrialGroup:
    """Trainings that differ only in the seed.

    Attributes:
        settings: Settings that they share.
        values: Values of the metric, of the complete trainings.
        tested: Test accuracies of the complete trainings.
        trainings: Number of trainings.
    """

    settings: dict[str, Any]
    values: tuple[float, ...]
    tested: tuple[float, ...]
    trainings: int

    @property
    def mean(self) -> float:
        """Return the mean of the metric."""
        return statistics.mean(self.values) if self.values else math.nan


def settings_of(plan: Plan, trial: FrozenTrial) -> dict[str, Any]:
    """Return the settings that distinguish a training; {} while they are being chosen."""
    return {
        axis.name: axis.value(trial.params[axis.name])
        for axis in plan.axes
        if axis.name in trial.params
    }


def rows_of(plan: Plan, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """Return one row per training: number, state, value, settings, evaluation, run and reason."""
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


def groups_of(plan: Plan, trials: Sequence[FrozenTrial]) -> list[TrialGroup]:
    """Group trainings by their settings without the seed, best first, without a value last.

    A run counts once, even if a search proposed it several times.
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
            TrialGroup(
                shared,
                tuple(t.value for t in complete if t.value is not None),
                tuple(accuracy for accuracy in tested if accuracy is not None),
                len(members),
            )
        )
    sign = -1 if plan.direction == "maximize" else 1
    return sorted(groups, key=lambda g: (not g.values, sign * g.mean if g.values else 0.0))


def write_results(queue: Queue, folder: Path) -> None:
    """Write ``study.csv`` and ``study.json`` atomically, with a line per training."""
    with queue.storage.locked():  # several workers may end at the same time
        rows = rows_of(queue.plan, queue.trials())
        names = [axis.name for axis in queue.plan.axes]
        text = io.StringIO()
        columns = [*dict.fromkeys([*("trial", "state", "value"), *names, *_columns(rows)])]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: _cell_text(value) for n, value in row.items()} for row in rows)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "study.csv", text.getvalue().encode())
        facts = {"command": "sweep", "name": queue.study.study_name, **queue.plan.definition()}
        whole = json.dumps({**facts, "trials": rows}, indent=2)
        write_bytes(folder / "study.json", f"{whole}\n".encode())


def _cell_text(value: Any) -> Any:
    """Convert a value for a file in UTF-8, where names of files may be other bytes."""
    return printable(value) if isinstance(value, str) else value


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for row in rows for name in row]


# --- The table ---


MOST_ROWS = 20


def table_of(plan: Plan, groups: Sequence[TrialGroup]) -> Table:
    """Build a table, best setting first, with mean ± sd over seeds if there are several.

    Args:
        plan: Plan of the study.
        groups: Groups, best first.
    """
    seeds = any(axis.name == "seed" for axis in plan.axes)
    shown = groups[:MOST_ROWS]
    tested = plan.metric != "test_accuracy" and any(group.tested for group in shown)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    names = [axis.name for axis in plan.axes if axis.name != "seed"]
    for name in names:
        table.add_column(name, overflow="fold")
    table.add_column(f"{plan.evaluation} {plan.metric}", justify="right")
    if tested:
        table.add_column("test_accuracy", justify="right")
    if seeds:
        table.add_column("seeds", justify="right")
    for group in shown:
        cells = [_column_text(group.settings[name]) for name in names]
        cells.append(_mean_sd_text(group.values))
        if tested:
            cells.append(_mean_sd_text(group.tested))
        if seeds:
            missing = group.trainings - len(group.values)
            cells.append(f"{len(group.values)}" + (f" of {group.trainings}" if missing else ""))
        table.add_row(*cells)
    better = "highest" if plan.direction == "maximize" else "lowest"
    few = f"The best {len(shown)} of {len(groups)}, " if len(groups) > len(shown) else ""
    table.caption = f"{few}{better} {plan.metric} first" + (
        "; mean ± standard deviation over seeds." if seeds else "."
    )
    return table


def _mean_sd_text(values: Sequence[float]) -> str:
    """Return ``mean ± sd``; the sample deviation needs two values.

    Examples:
        >>> _mean_sd_text([0.9, 0.92]), _mean_sd_text([0.9]), _mean_sd_text([])
        ('0.9100 ± 0.0141', '0.9000', '-')
    """
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _column_text(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return escape(printable(text))


# --- The command ---


NAME = "sweep"
MOST_REASONS = 5


def sweep_command(options: Sequence[str]) -> int:
    """Run ``gradfilter sweep``.

    Returns:
        The exit code: 0, 1 if a training failed or is left, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UsageError: An option is wrong; nothing has been started then.
    """
    config, plan = parse_sweep(options)
    if started_processes() > 1:
        raise UsageError("torchrun: a sweep starts its workers itself. Give --jobs 2.")
    usable_device(plan.base.device)
    check_trackers(plan.base)
    check_there(plan.corners(), "--sample" if plan.points is None else "--grid")
    folder = folder_of(plan)
    with (
        storage_errors_as_usage(),
        explained_place(folder),
        joined_study(plan, config.storage, config.heartbeat) as queue,
    ):
        with reading_study(queue.storage.shown):
            enqueue(queue, retry_failed=config.retry_failed)
        jobs = "1 job" if config.jobs == 1 else f"{config.jobs} jobs"
        what = f"study {plan.base.name!r}: {plan.trials} trainings in {printable(folder)}"
        print(f"{what}, {jobs}", flush=True)
        if queue.heartbeat != config.heartbeat:
            print(f"--heartbeat {queue.heartbeat} is used: the study has it")
        with interruptible() as stop:
            try:
                if config.jobs == 1:
                    over = work(queue, partial(print, flush=True))
                else:
                    over = run_workers(queue, options, config.jobs, folder / "workers")
            finally:
                write_results(queue, folder)
        code = _summed_up(queue, folder, over)
        return code if over else stop.exit_code


def parse_sweep(options: Sequence[str]) -> tuple[SweepConfig, Plan]:
    """Parse the options of sweep, and plan and check the study.

    Raises:
        UsageError: An option, a file, a preset or one of the trainings is wrong.
    """
    config, (_, rest) = parse_own(options), split(options)
    recipe = {"preset": config.preset, "config": config.config}
    shared = [
        *("--log-level", "warning"),  # by default, one line per training is enough
        *arguments({name: value for name, value in recipe.items() if value is not None}),
        *rest,
    ]

    def read(more: Sequence[str]) -> TrainConfig:
        command = parse_train([*shared, *more])
        if command.print_config:
            raise UsageError("--print-config: a sweep does not print it. Use gradfilter train.")
        return command.settings

    typed = typed_names(rest)
    if "--resume" in typed or "--no-resume" in typed:
        raise UsageError("--resume: a sweep always resumes its trainings. Omit it.")
    if config.name and "--name" in typed:
        raise UsageError("--name: it is given before and after the lone --. Give it once.")
    base = read(())
    named = replace(base, name=config.name or base.name or NAME)
    plan = plan_of(config, named, read)
    corners = plan.corners()
    if (
        plan.points is not None or len(corners) < MOST_CORNERS
    ):  # otherwise some corners were not computed
        refuse_unused(corners, plan.axes, rest, "--sample" if plan.points is None else "--grid")
    return config, plan


def _summed_up(queue: Queue, folder: Path, over: bool) -> int:
    """Print the results of the study; return the exit code of a study that was not stopped."""
    plan, trials = queue.plan, queue.trials()
    groups = groups_of(plan, trials)
    if groups:
        Console().print(table_of(plan, groups))
    closed = [trial for trial in trials if trial.state not in OPEN]
    without = [trial for trial in closed if trial.user_attrs.get("reason") is not None]
    for trial in without[:MOST_REASONS]:
        settings = " ".join(f"{k}={v}" for k, v in settings_of(plan, trial).items())
        print(printable(f"{STATES[trial.state]}: {settings}: {trial.user_attrs['reason']}"))
    if len(without) > MOST_REASONS:
        print(f"{len(without) - MOST_REASONS} more without a value: see study.csv")
    left = sum(trial.state in OPEN for trial in trials) + max(0, plan.trials - len(trials))
    if left:
        why = "" if over else "interrupted; "
        print(f"{why}{left} trainings are left; the same command continues")
    failed = [trial for trial in without if STATES[trial.state] == "failed"]
    if failed:
        print(f"{len(failed)} failed; --retry-failed trains them again")
    print(f"wrote {printable(folder / 'study.csv')}")
    return 1 if failed or left else 0
