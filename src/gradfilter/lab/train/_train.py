"""The command ``gradfilter train``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from gradfilter.lab._crew import connected, own_device
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._processes import is_first_process
from gradfilter.lab._reading import printable
from gradfilter.lab._usage import usable_device
from gradfilter.lab.train._advice import why_all_skipped, why_not_finite
from gradfilter.lab.train._begin import begin
from gradfilter.lab.train._check import check_values
from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._loop import Watch, train_to_the_end
from gradfilter.lab.train._place import (
    explained,
    is_finished,
    owned,
    place_of,
    refuse_what_is_there,
)
from gradfilter.lab.train._progress import progress_bar, shown, speaking
from gradfilter.lab.train._record import Record, facts_of
from gradfilter.lab.train._resume import go_on, newest_point
from gradfilter.lab.train._run import Run
from gradfilter.lab.train._trackers import check_trackers, trackers

log = logging.getLogger("gradfilter.train")


def train(config: TrainConfig) -> int:
    """Train, or go on training.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 143 after SIGTERM.

    Raises:
        UsageError: A value is wrong, or the run is there already. Nothing has been changed then.
    """
    check_values(config)
    check_trackers(config)
    device = own_device(usable_device(config.device))
    place = place_of(config)
    refuse_what_is_there(config, place)
    begun = (place / "config.json").exists()
    if config.resume and not begun and config.log_level in ("debug", "info") and is_first_process():
        # A mistyped setting names another directory; a sweep, which says less, has typed none.
        print(f"--resume: no run in {printable(place)} yet, one is begun", file=sys.stderr)
    if is_finished(place):
        if is_first_process():
            print(f"finished already: {printable(place)}")
        return 0
    with ExitStack() as stack:
        if is_first_process():
            stack.enter_context(explained(place))
            stack.enter_context(owned(place))
        crew = stack.enter_context(connected(device))
        stop = stack.enter_context(interruptible())
        stopped = crew.together(stop)
        run = begin(config, device, crew)
        goes_on = config.resume and newest_point(place) is not None
        if goes_on:
            go_on(place, run)
        crew.meet()  # nobody writes before everybody has looked
        if crew.is_first:
            return 0 if recorded(run, place, goes_on, stopped) else stop.exit_code
        # The others compute; what there is to say is said once.
        return 0 if train_to_the_end(run, Watch(), stopped) else stop.exit_code


def recorded(run: Run, place: Path, goes_on: bool, stopped: Callable[[], bool]) -> bool:
    """Train, and write and say what comes of it.

    Args:
        run: Before its next step.
        place: Its directory, owned by this process.
        goes_on: Whether it was left at a point there, and has been put to it.
        stopped: Asked before every step.

    Returns:
        Whether the training is over.
    """
    config, facts = run.config, facts_of(run)
    last: list[Evaluation] = []
    warned = False
    with ExitStack() as stack:
        console = stack.enter_context(speaking(config.log_level))
        record = Record(place, facts)
        if goes_on:
            record.go_on(run)
            log.info("going on after step %d: %s", run.done, printable(place))
        else:
            record.begin()
            log.info("writing to %s", printable(place))
        record.say("running")
        record.start(run)
        first = run.done + 1 if run.done else 0
        track = stack.enter_context(trackers(config, place, facts["settings"], first))
        status = "failed"
        try:
            with progress_bar(console, config.model, run.total_steps, run.done) as tick:

                def evaluated(evaluation: Evaluation) -> None:
                    nonlocal warned
                    record.write_evaluation(evaluation)
                    track(evaluation.step, asdict(evaluation))
                    log.info(shown(evaluation))
                    last[:] = [evaluation]
                    if not warned and (why := why_not_finite(run, evaluation)):
                        log.warning(why)
                        warned = True

                watch = Watch(evaluated, record.write_checkpoint, record.save_point, tick)
                over = train_to_the_end(run, watch, stopped)
                status = "finished" if over else "interrupted"
        except KeyboardInterrupt:
            status = "interrupted"  # a second Ctrl-C, which does not wait for the step
            raise
        finally:
            record.say(status)
    if not over:
        where = f"--resume goes on: {printable(place)}"
        print(f"interrupted after step {run.done} of {run.total_steps}; {where}")
    elif last:
        # The log, which may be on the same screen, ends with the same numbers.
        print(f"last: {shown(last[0])}\nwrote {printable(place)}")
    if why := why_all_skipped(run):
        print(why, file=sys.stderr)
    return over
