"""The point from which a run goes on: everything that the next step depends on, in one file.

The point before it is kept, for the day on which the last one turns out to be damaged.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

import gradfilter as gf
from gradfilter.lab._reading import content_of, reading, why
from gradfilter.lab._rundir import write_bytes
from gradfilter.lab._usage import UsageError
from gradfilter.lab.train._archive import tensor_bytes, tensors_of
from gradfilter.lab.train._evaluations import read_evaluations
from gradfilter.lab.train._run import Run

NAME = "resume.pt"
BEFORE = "resume.before.pt"
ROOM = 2**20
"""Bytes of a point beside its tensors, at most."""
NUMBERS = ("done", "seconds", "epoch_seconds", "peak_memory")


def write_point(place: Path, run: Run) -> None:
    """Write the point where a run stands, as a whole or not at all."""
    report = math.nan if run.report is None else run.report
    numbers = {name: getattr(run, name) for name in NUMBERS}
    numbers |= {"reports": run.report is not None, "report": report}
    flat = {
        **_prefixed("state.", gf.state_dict(run.state)),
        **_prefixed("totals.", run.totals),
        "skipped": run.skipped,
        "finite_until": run.finite_until,
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()},
    }
    write_bytes(place / NAME, tensor_bytes(flat), before=place / BEFORE)


def newest_point(place: Path) -> Path | None:
    """The file of the last point; that of the one before where that is gone."""
    return next((path for name in (NAME, BEFORE) if (path := place / name).exists()), None)


def go_on(place: Path, run: Run) -> None:
    """Put a run that has just begun where the newest point says.

    Raises:
        UsageError: There is no point, or it is damaged or one of another run.
    """
    path = newest_point(place)
    if path is None:
        raise UsageError(
            f"--resume: {str(place)!r} has no {NAME}. Start anew under another --name."
        )
    most = ROOM + 2 * sum(tensor.nbytes for tensor in gf.state_dict(run.state).values())
    try:
        flat = _read(path, most)
    except UsageError as error:
        raise UsageError(f"--resume: {error} {_instead(path, most)}") from None
    try:
        state = gf.load_state_dict(run.state, _without("state.", flat))
        totals = {n: _like(zero, flat[f"totals.{n}"]) for n, zero in run.totals.items()}
        numbers = {name: flat[name].item() for name in (*NUMBERS, "reports", "report")}
        done = _step(numbers["done"], run.total_steps)
        skipped = _like(run.skipped, flat["skipped"])
        finite_until = _like(run.finite_until, flat.get("finite_until", torch.tensor(done)))
    except Exception as error:  # what is wrong with a foreign point has no common type
        said = str(error) if isinstance(error, ValueError) else f"{why(error)}."
        raise UsageError(
            f"--resume: {str(path)!r} does not fit this run: {said} "
            "Start anew under another --name."
        ) from None
    run.state, run.totals, run.skipped = state, totals, skipped
    run.finite_until = finite_until
    run.done = done
    run.seconds, run.epoch_seconds = numbers["seconds"], numbers["epoch_seconds"]
    run.peak_memory = numbers["peak_memory"]
    run.report = numbers["report"] if numbers["reports"] else None


def _like(expected: Tensor, found: Tensor) -> Tensor:
    """A tensor in the place of another, of its kind, dtype and device."""
    kind = (found.shape, found.is_floating_point(), found.is_complex())
    if kind != (expected.shape, expected.is_floating_point(), False):
        raise ValueError(f"it has {found.dtype} {tuple(found.shape)} where a number was.")
    return found.to(expected)


def _step(done: float, last: int) -> int:
    if not (done.is_integer() and 0 <= done <= last):
        raise ValueError(f"it stands after step {done} of {last}.")
    return int(done)


def _read(path: Path, most: int) -> dict[str, Tensor]:
    """The tensors of a point that has at most so many bytes."""
    with reading(path, "the point", ""):
        return tensors_of(content_of(path, most), repr(str(path)), "")


def _instead(path: Path, most: int) -> str:
    """What to go on from where the newest point is damaged, as a sentence."""
    before = path.with_name(BEFORE)
    try:
        step = None if path == before else int(_read(before, most)["done"].item())
    except Exception:  # that one is damaged or foreign, too
        step = None
    if step is None:
        return "No other point is whole: start anew under another --name."
    return (
        f"The point before it, {BEFORE}, is whole: remove {NAME}, and the same command resumes "
        f"after step {step}."
    )


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the evaluations after a step: a run that is resumed there makes them again."""
    kept = [line for line in read_evaluations(path)[0] if line["step"] <= step]
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _prefixed(prefix: str, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in flat.items()}


def _without(prefix: str, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in flat.items() if n.startswith(prefix)}
