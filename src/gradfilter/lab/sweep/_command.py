"""The command ``gradfilter sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._options import arguments, read_settings, value_of
from gradfilter.lab._parse import parse
from gradfilter.lab._processes import started_processes
from gradfilter.lab._reading import printable
from gradfilter.lab._usage import UsageError, usable_device
from gradfilter.lab.sweep._axes import as_typed, gathered
from gradfilter.lab.sweep._config import SweepConfig
from gradfilter.lab.sweep._corners import check_there, refuse_unused
from gradfilter.lab.sweep._jobs import run_workers, split
from gradfilter.lab.sweep._join import folder_of, joined
from gradfilter.lab.sweep._plan import MOST_CORNERS, Plan, plan_of
from gradfilter.lab.sweep._queue import OPEN, Queue, enqueue
from gradfilter.lab.sweep._read_back import reading_study
from gradfilter.lab.sweep._results import STATES, groups_of, settings_of, write_results
from gradfilter.lab.sweep._storage import explained
from gradfilter.lab.sweep._table import table_of
from gradfilter.lab.sweep._worker import work
from gradfilter.lab.train._command import parse_train
from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._place import explained as explained_place
from gradfilter.lab.train._trackers import check_trackers

PROGRAM = "gradfilter sweep"
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
        explained(),
        explained_place(folder),
        joined(plan, config.storage, config.heartbeat) as queue,
    ):
        with reading_study(queue.storage.shown):
            enqueue(queue, retry_failed=config.retry_failed)
        print(f"study {plan.base.name!r}: {plan.trials} trainings in {printable(folder)}")
        if queue.heartbeat != config.heartbeat:
            print(f"--heartbeat {queue.heartbeat} counts, which the study was begun with")
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
    """The options of sweep and the study that they ask for, checked as a whole.

    Raises:
        UsageError: An option, a file, a preset or one of the trainings is wrong.
    """
    own, rest = split(options)
    preset, file = value_of("--preset", own), value_of("--config", own)
    given = read_settings(preset, None if file is None else Path(file), "sweep")
    typed: list[str] = []
    for key in ("grid", "sample"):
        if key in given:
            typed += [f"--{key}", *as_typed(given.pop(key), key)]
    try:
        config = parse(SweepConfig, PROGRAM, [*arguments(given), *typed, *gathered(own)])
    except UsageError as error:
        raise UsageError(f"{error} Options of train come after a lone --.") from None
    recipe = {"preset": config.preset, "config": config.config}
    shared = [
        *("--log-level", "warning"),  # a line per training is enough, unless asked for
        *arguments({name: value for name, value in recipe.items() if value is not None}),
        *rest,
    ]

    def read(more: Sequence[str]) -> TrainConfig:
        command = parse_train([*shared, *more])
        if command.print_config:
            raise UsageError("--print-config: a sweep prints none. Use gradfilter train.")
        return command.settings

    given_twice = {option.partition("=")[0] for option in rest}
    if "--resume" in given_twice or "--no-resume" in given_twice:
        raise UsageError("--resume: a sweep always goes on with what was begun. Leave it away.")
    if config.name and "--name" in given_twice:
        raise UsageError("--name: it is given before and after the lone --. Give it once.")
    base = read(())
    named = replace(base, name=config.name or base.name or NAME)
    plan = plan_of(config, named, read)
    corners = plan.corners()
    if plan.points is not None or len(corners) < MOST_CORNERS:  # else some are not among them
        refuse_unused(corners, plan.axes, rest, "--sample" if plan.points is None else "--grid")
    return config, plan


def _summed_up(queue: Queue, folder: Path, over: bool) -> int:
    """Say what has come of the study; the exit code if nobody stopped it."""
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
        print(f"{why}{left} trainings are left; the same command goes on")
    failed = [trial for trial in without if STATES[trial.state] == "failed"]
    if failed:
        print(f"{len(failed)} failed; --retry-failed trains them again")
    print(f"wrote {printable(folder / 'study.csv')}")
    return 1 if failed or left else 0
