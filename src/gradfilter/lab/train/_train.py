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

from gradfilter.lab._connect import connected
from gradfilter.lab._device import own_device, usable_device
from gradfilter.lab._interrupt import interruptible
from gradfilter.lab._processes import is_first_process
from gradfilter.lab._run_files import printable
from gradfilter.lab._usage import UsageError
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
    """Return since when the loss is not finite, and a likely cause; None while it is finite.

    A batch without a finite loss does not count if a filter skipped it. The loss of the resulting
    parameters counts.

    Args:
        run: The training at the evaluation.
        evaluation: The evaluation.
    """
    if run.done == 0 or math.isfinite(evaluation.train_loss):
        return None
    since = int(run.finite_until) + 1
    if since == 0:
        return "the loss is not finite from the start: look at the data and the initial parameters"
    return f"the loss is not finite since step {since}; is --learning-rate too large?"


def why_all_skipped(run: Training) -> str | None:
    """Return why no step was applied; None if one was applied, or none has been done."""
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
    return f"no rows agreed at --{name} {distance:g}; a larger distance, up to 2, accepts more"


# --- Metrics for TensorBoard and for Weights & Biases, in addition to ``metrics.jsonl`` ---


Track = Callable[[int, Mapping[str, float]], None]
"""A function of (step, numbers by name) that records the finite numbers."""


def check_trackers(config: TrainConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UsageError: The package is missing.
    """
    for option, package in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if getattr(config, option) and not is_installed(package):
            raise UsageError(
                f"--{option}: the package {package!r} is not installed. Run pip install {package}."
            )


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


@contextmanager
def trackers(
    config: TrainConfig, place: Path, settings: Mapping[str, Any], first: int
) -> Iterator[Track]:
    """Open the trackers that the settings name, as one function.

    Args:
        config: Settings of the training; `tensorboard` and `wandb` are read.
        place: The run directory.
        settings: Settings to show next to the metrics.
        first: The first step that is recorded now.
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

    # A resumed run records the steps after its last point again.
    writer = stack.enter_context(SummaryWriter(str(place / "tensorboard"), purge_step=first))

    def track(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return track


def _wandb(place: Path, settings: Mapping[str, Any], stack: ExitStack) -> Track:
    import wandb  # pyright: ignore[reportMissingImports]  # an optional package

    # The same directory is the same run of Weights & Biases, also after --resume.
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


# --- Marks: steps at which something is due, by epochs counted in samples ---


def next_mark(run: Training) -> int:
    """Return the next step at which something is due: the end of an epoch, an evaluation, ..."""
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
    """Return whether an epoch of samples has just ended."""
    return _is_multiple(run, 1.0)


def evaluation_is_due(run: Training) -> bool:
    """Return True at the start, every ``eval_every`` epochs, and at the end."""
    return run.done in (0, run.total_steps) or _is_multiple(run, run.config.eval_every)


def checkpoint_is_due(run: Training) -> bool:
    """Return True at the start, at the epochs of ``save_checkpoint``, and at the end."""
    epochs: Sequence[float] = run.config.save_checkpoint
    if run.done in (0, run.total_steps):
        return True
    if len(epochs) == 1:
        return _is_multiple(run, epochs[0])
    return run.done in {run.steps_at(epoch) for epoch in epochs}


def _is_multiple(run: Training, every: float) -> bool:
    return run.done > 0 and _next_multiple(run, run.done - 1, every) == run.done


def _next_multiple(run: Training, done: int, every: float) -> int:
    """Return the first step after ``done`` that completes a multiple of ``every`` epochs."""
    interval = Fraction(str(every))  # the decimal number that was typed, not its binary rounding
    count = Fraction(done * run.batch_size, len(run.data.train)) // interval + 1
    while (step := run.steps_at(float(count * interval))) <= done:
        count += 1
    return step


# --- The loop: from mark to mark ---


def _ignore(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """Functions that are called during a training; by default they do nothing.

    Attributes:
        evaluated: Called with each evaluation.
        checkpoint: Called when a checkpoint is due.
        point: Called at each step that a killed run may resume from.
        tick: Called after each step.
    """

    evaluated: Callable[[Evaluation], None] = _ignore
    checkpoint: Callable[[Training], None] = _ignore
    point: Callable[[Training], None] = _ignore
    tick: Callable[[], None] = _ignore


def train_to_the_end(run: Training, watch: Watch, stopped: Callable[[], bool]) -> bool:
    """Train until the last step, or until ``stopped()``.

    Args:
        run: A new training, or one that was set to its last point.
        watch: Functions to call during the training.
        stopped: Called before each step; True stops the training.

    Returns:
        Whether the training is over; otherwise it can be resumed.
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
    """Do everything that is due at the current step.

    Returns:
        Whether the training is over.

    Raises:
        UsageError: --spike-skip has given up.
    """
    ended = is_epoch_end(run)
    exits = ended and _may_exit_early(run.config.early_exit_accuracy, run.config.early_exit_loss)
    watches = ended and run.config.schedule == "plateau"
    due = evaluation_is_due(run)
    measured = evaluation(run) if due or exits or watches else None
    over = run.done == run.total_steps
    if measured is not None:
        # A plateau schedule never sees the test split: that would be training on it.
        watched = measured.loss if math.isnan(measured.val_loss) else measured.val_loss
        good, watched = run.ranks.first_numbers([exits and _is_good_enough(run, measured), watched])
        over = over or bool(good)
        if watches:
            run.report = watched
        if due or over:
            watch.evaluated(measured)
    if run.has_given_up:
        raise UsageError(
            f"--spike-skip: gave up before step {run.done}, after many steps in a row with a norm "
            "or a loss far above the earlier ones. Start anew under another --name with a smaller "
            "--learning-rate."
        )
    if over or checkpoint_is_due(run):
        watch.checkpoint(run)
    if ended:
        run.totals = no_totals(run.device)
        run.epoch_seconds = 0.0
    # No point after an early exit: a killed run would train on from there.
    if not over or run.done == run.total_steps:
        watch.point(run)
    return over


def _may_exit_early(accuracy: float | None, loss: float | None) -> bool:
    return accuracy is not None or loss is not None


def _is_good_enough(run: Training, measured: Evaluation) -> bool:
    accuracy, loss = run.config.early_exit_accuracy, run.config.early_exit_loss
    return (accuracy is not None and measured.train_accuracy >= accuracy) or (
        loss is not None and measured.train_loss <= loss
    )


# --- The command ---


log = logging.getLogger("gradfilter.train")


def train(config: TrainConfig) -> int:
    """Run ``gradfilter train``: start a training, or resume it.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 143 after SIGTERM.

    Raises:
        UsageError: A value is wrong, or the run already exists. No file has been changed then.
    """
    check_values(config)
    check_trackers(config)
    device = own_device(usable_device(config.device))
    place = place_of(config)
    refuse_what_is_there(config, place)
    begun = (place / "config.json").exists()
    if config.resume and not begun and config.log_level in ("debug", "info") and is_first_process():
        # A mistyped setting names another directory. A sweep mistypes none, and logs less.
        print(f"--resume: no run in {printable(place)} yet, a new one starts", file=sys.stderr)
    if is_finished(place):
        if is_first_process():
            print(f"finished already: {printable(place)}")
        return 0
    with ExitStack() as stack:
        if is_first_process():
            stack.enter_context(run_errors_as_usage(place))
            stack.enter_context(locked_run(place))
        ranks = stack.enter_context(connected(device))
        stop = stack.enter_context(interruptible())
        stopped = ranks.on_any(stop)
        run = build_training(config, device, ranks)
        resumes = config.resume and newest_point(place) is not None
        if resumes:
            resume(place, run)
        ranks.wait_for_all()  # no process writes before all have looked
        if ranks.is_first:
            return 0 if recorded(run, place, resumes, stopped) else stop.exit_code
        # The other ranks only compute; messages are printed once.
        return 0 if train_to_the_end(run, Watch(), stopped) else stop.exit_code


@dataclass
class _Evaluations:
    """Record and log the evaluations of a training, with one warning if the loss is not finite.

    Attributes:
        run: The training.
        record: The files of the run.
        track: Records the numbers for the trackers.
        last: The last evaluation, or None before the first.
        warned: Whether the warning was given.
    """

    run: Training
    record: RunRecord
    track: Track
    last: Evaluation | None = None
    warned: bool = False

    def add(self, evaluation: Evaluation) -> None:
        """Record and log the next evaluation."""
        self.record.write_evaluation(evaluation)
        self.track(evaluation.step, asdict(evaluation))
        log.info(shown(evaluation))
        self.last = evaluation
        if not self.warned and (why := why_not_finite(self.run, evaluation)):
            log.warning(why)
            self.warned = True


def recorded(run: Training, place: Path, resumes: bool, stopped: Callable[[], bool]) -> bool:
    """Train, write the files of the run, and print the result.

    Args:
        run: The training before its next step.
        place: The run directory, locked by this process.
        resumes: Whether the run was set to a point in the directory.
        stopped: Called before each step; True stops the training.

    Returns:
        Whether the training is over.
    """
    config, facts = run.config, facts_of(run)
    with ExitStack() as stack:
        console = stack.enter_context(logging_to(config.log_level))
        record = RunRecord(place, facts)
        if resumes:
            record.resume(run)
            log.info("resuming after step %d: %s", run.done, printable(place))
        else:
            record.begin()
            log.info("writing to %s", printable(place))
        record.write_status("running")
        record.start(run)
        first = run.done + 1 if run.done else 0
        track = stack.enter_context(trackers(config, place, facts["settings"], first))
        evaluations = _Evaluations(run, record, track)
        status = "failed"
        try:
            with progress_bar(console, config.model, run.total_steps, run.done) as tick:
                watch = Watch(evaluations.add, record.write_checkpoint, record.save_point, tick)
                over = train_to_the_end(run, watch, stopped)
                status = "finished" if over else "interrupted"
        except KeyboardInterrupt:
            status = "interrupted"  # after a second Ctrl-C, which does not wait for the step
            raise
        finally:
            record.write_status(status)
    if not over:
        where = f"continue with --resume: {printable(place)}"
        print(f"interrupted after step {run.done} of {run.total_steps}; {where}")
    elif evaluations.last is not None:
        # The log ends with the same numbers, and may be on the same screen.
        print(f"last: {shown(evaluations.last)}\nwrote {printable(place)}")
    if why := why_all_skipped(run):
        print(why, file=sys.stderr)
    return over
