"""When something is due: after every so many epochs, counted by samples."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from gradfilter.lab.train._run import Run


def next_mark(run: Run) -> int:
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


def is_epoch_end(run: Run) -> bool:
    """Whether an epoch of samples has just been seen."""
    return _is_multiple(run, 1.0)


def evaluation_is_due(run: Run) -> bool:
    """At the start, every ``eval_every`` epochs, and at the end."""
    return run.done in (0, run.total_steps) or _is_multiple(run, run.config.eval_every)


def checkpoint_is_due(run: Run) -> bool:
    """At the start, as ``save_checkpoint`` says, and at the end."""
    epochs: Sequence[float] = run.config.save_checkpoint
    if run.done in (0, run.total_steps):
        return True
    if len(epochs) == 1:
        return _is_multiple(run, epochs[0])
    return run.done in {run.steps_at(epoch) for epoch in epochs}


def _is_multiple(run: Run, every: float) -> bool:
    return run.done > 0 and _next_multiple(run, run.done - 1, every) == run.done


def _next_multiple(run: Run, done: int, every: float) -> int:
    """The first step after ``done`` at which a multiple of ``every`` epochs is complete."""
    interval = Fraction(str(every))  # the number that the user wrote, not its binary neighbour
    count = Fraction(done * run.batch_size, len(run.data.train)) // interval + 1
    while (step := run.steps_at(float(count * interval))) <= done:
        count += 1
    return step
