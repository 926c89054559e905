"""``gradfilter train``: the training loop, its trackers, and advice after a failed training."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from gradfilter.lab._crew import connected, own_device
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._processes import is_first_process
from gradfilter.lab._run_files import printable
from gradfilter.lab._usage import UsageError, usable_device
from gradfilter.lab.train._build_training import build_training
from gradfilter.lab.train._config_checks import check_values
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._progress import logging_to, progress_bar, shown
from gradfilter.lab.train._record import RunRecord, facts_of, newest_point, resume
from gradfilter.lab.train._run_place import (
    is_finished,
    locked_run,
    place_of,
    refuse_what_is_there,
    run_errors_as_usage,
)
from gradfilter.lab.train._train_config import TrainConfig
from gradfilter.lab.train._training import Training, advance, evaluation, no_totals, sync_ranks

# --- Advice after a training that failed without an error ---


def why_not_finite(run: Training, evaluation: Evaluation) -> str | None:
    """Since when there is no loss, and what that may come from; None while there is one.

    A batch whose loss is no number does not count where a filter has skipped it: what counts is the
    loss of the parameters that were left.

    Args:
        run: Where it was evaluated.
        evaluation: Made there.
    """
    if run.done == 0 or math.isfinite(evaluation.train_loss):
        return None
    since = int(run.finite_until) + 1
    if since == 0:
        return "the loss is not finite from the start: look at the data and the initial parameters"
    return f"the loss is not finite since step {since}; is --learning-rate too large?"


def why_all_skipped(run: Training) -> str | None:
    """Why no step was applied; None where one was, or none has been done."""
    if run.done == 0 or int(run.skipped) < run.done:
        return None
    if int(run.finite_until) < 0:
        return "every step was skipped: the loss was never finite"
    return f"every step was skipped: {_about_the_filter(run.config)}"


def _about_the_filter(config: TrainConfig) -> str:
    name = "agree" if config.agree is not None else "consensus"
    distance = getattr(config, name)
    if distance is None:  # no filter of the options
        return "no gradient was accepted"
    if distance < 0.5:  # as small as a similarity is large
        return f"--{name} is a cosine distance, 1 - cos; did you mean {1 - distance:g}?"
    return f"no rows agreed at --{name} {distance:g}; a larger cosine distance, up to 2, takes more"


# --- Metrics for TensorBoard and for Weights & Biases, in addition to ``metrics.jsonl`` ---


Track = Callable[[int, Mapping[str, float]], None]
"""(step, numbers by name); what is not a number is left out."""


def check_trackers(config: TrainConfig) -> None:
    """Refuse what is asked for and not installed.

    Raises:
        UsageError: The package is missing.
    """
    for option, package in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if getattr(config, option) and not is_installed(package):
            raise UsageError(
                f"--{option}: the package {package!r} is not installed. Run pip install {package}."
            )


def is_installed(package: str) -> bool:
    """Whether a package could be imported."""
    return importlib.util.find_spec(package) is not None


@contextmanager
def trackers(
    config: TrainConfig, place: Path, settings: Mapping[str, Any], first: int
) -> Iterator[Track]:
    """Everything that was asked for, as one function.

    Args:
        config: Says what is asked for.
        place: The run directory.
        settings: Shown beside the metrics.
        first: The first step that is told now.
    """
    tracks: list[Track] = []
    with ExitStack() as stack:
        if config.tensorboard:
            tracks.append(_tensorboard(place, first, stack))
        if config.wandb:
            tracks.append(_wandb(place, settings, stack))

        def track(step: int, numbers: Mapping[str, float]) -> None:
            measured = {name: value for name, value in numbers.items() if math.isfinite(value)}
            for one in tracks:
                one(step, measured)

        yield track


def _tensorboard(place: Path, first: int, stack: ExitStack) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run said after its last point is said again.
    writer = stack.enter_context(SummaryWriter(str(place / "tensorboard"), purge_step=first))

    def track(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return track


def _wandb(place: Path, settings: Mapping[str, Any], stack: ExitStack) -> Track:
    import wandb

    # The same run of theirs for the same directory, also when it goes on.
    known = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(
        project="gradfilter",
        id=known,
        name=str(place),
        dir=place,
        config=dict(settings),
        resume="allow",
    )
    stack.callback(run.finish)

    def track(step: int, numbers: Mapping[str, float]) -> None:
        run.log(dict(numbers), step=step)

    return track


# --- Marks: something is due after every so many epochs, counted in samples ---


def next_mark(run: Training) -> int:
    """The next step after which something is due: an epoch's end, an evaluation, ..."""
    config = run.config
    marks = [
        run.total_steps,
        (run.done // config.resume_every + 1) * config.resume_every,
        _next_multiple(run, run.done, 1.0),
        _next_multiple(run, run.done, config.eval_every),
    ]
    if len(config.save_checkpoint) == 1:
        marks.append(_next_multiple(run, run.done, config.save_checkpoint[0]))
    listed = (run.steps_at(epoch) for epoch in config.save_checkpoint)
    return min([*marks, *(step for step in listed if step > run.done)])


def is_epoch_end(run: Training) -> bool:
    """Whether an epoch of samples has just been seen."""
    return _is_multiple(run, 1.0)


def evaluation_is_due(run: Training) -> bool:
    """At the start, every ``eval_every`` epochs, and at the end."""
    return run.done in (0, run.total_steps) or _is_multiple(run, run.config.eval_every)


def checkpoint_is_due(run: Training) -> bool:
    """At the start, as ``save_checkpoint`` says, and at the end."""
    epochs: Sequence[float] = run.config.save_checkpoint
    if run.done in (0, run.total_steps):
        return True
    if len(epochs) == 1:
        return _is_multiple(run, epochs[0])
    return run.done in {run.steps_at(epoch) for epoch in epochs}


def _is_multiple(run: Training, every: float) -> bool:
    return run.done > 0 and _next_multiple(run, run.done - 1, every) == run.done


def _next_multiple(run: Training, done: int, every: float) -> int:
    """The first step after ``done`` at which a multiple of ``every`` epochs is complete."""
    interval = Fraction(str(every))  # the number that the user wrote, not its binary neighbour
    count = Fraction(done * run.batch_size, len(run.data.train)) // interval + 1
    while (step := run.steps_at(float(count * interval))) <= done:
        count += 1
    return step


# --- The loop: from mark to mark ---


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """What else is done on the way; by default nothing.

    Attributes:
        evaluated: Called with every evaluation.
        checkpoint: Called when a checkpoint is due.
        point: Called where a killed run may go on from.
        tick: Called after every step.
    """

    evaluated: Callable[[Evaluation], None] = _nothing
    checkpoint: Callable[[Training], None] = _nothing
    point: Callable[[Training], None] = _nothing
    tick: Callable[[], None] = _nothing


def train_to_the_end(run: Training, watch: Watch, stopped: Callable[[], bool]) -> bool:
    """Train until the last step, or until ``stopped()``.

    Args:
        run: New, or put where it was left.
        watch: What else is done.
        stopped: Asked before every step.

    Returns:
        Whether the training is over; else it can go on later.
    """
    if run.done == 0:
        watch.evaluated(evaluation(run))
        watch.checkpoint(run)
    while run.done < run.total_steps:
        mark = next_mark(run)
        advance(run, mark, stopped=stopped, tick=watch.tick)
        sync_ranks(run)
        if run.done < mark:
            watch.point(run)
            return False
        if pass_mark(run, watch):
            return True
    return True


def pass_mark(run: Training, watch: Watch) -> bool:
    """Do what is due where a run stands.

    Returns:
        Whether the training is over.
    """
    ended = is_epoch_end(run)
    exits = ended and _exits_early(run.config.early_exit_accuracy, run.config.early_exit_loss)
    watches = ended and run.config.schedule == "plateau"
    due = evaluation_is_due(run)
    measured = evaluation(run) if due or exits or watches else None
    over = run.done == run.total_steps
    if measured is not None:
        # What is watched is not the test split, which may not steer a training.
        watched = measured.loss if math.isnan(measured.val_loss) else measured.val_loss
        good, watched = run.crew.agreed([exits and _is_good_enough(run, measured), watched])
        over = over or bool(good)
        if watches:
            run.report = watched
        if due or over:
            watch.evaluated(measured)
    if over or checkpoint_is_due(run):
        watch.checkpoint(run)
    if ended:
        run.totals = no_totals(run.device)
        run.epoch_seconds = 0.0
    # After an early exit the point would be one from which a killed run trains on.
    if not over or run.done == run.total_steps:
        watch.point(run)
    return over


def _exits_early(accuracy: float | None, loss: float | None) -> bool:
    return accuracy is not None or loss is not None


def _is_good_enough(run: Training, measured: Evaluation) -> bool:
    accuracy, loss = run.config.early_exit_accuracy, run.config.early_exit_loss
    return (accuracy is not None and measured.train_accuracy >= accuracy) or (
        loss is not None and measured.train_loss <= loss
    )


# --- The command ---


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
            stack.enter_context(run_errors_as_usage(place))
            stack.enter_context(locked_run(place))
        crew = stack.enter_context(connected(device))
        stop = stack.enter_context(interruptible())
        stopped = crew.together(stop)
        run = build_training(config, device, crew)
        goes_on = config.resume and newest_point(place) is not None
        if goes_on:
            resume(place, run)
        crew.meet()  # nobody writes before everybody has looked
        if crew.is_first:
            return 0 if recorded(run, place, goes_on, stopped) else stop.exit_code
        # The others compute; what there is to say is said once.
        return 0 if train_to_the_end(run, Watch(), stopped) else stop.exit_code


def recorded(run: Training, place: Path, goes_on: bool, stopped: Callable[[], bool]) -> bool:
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
        console = stack.enter_context(logging_to(config.log_level))
        record = RunRecord(place, facts)
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
