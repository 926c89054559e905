"""Record a run: settings, metrics, checkpoints, and the snapshot to resume from.

The snapshot holds everything that the next step depends on, in one file. The previous snapshot is
kept in case the last one is damaged.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradfilter as gf
from gradfilter.lab._processes import started_processes
from gradfilter.lab._run_files import (
    append_json_line,
    content_of,
    error_text,
    reading,
    write_bytes,
    write_json,
)
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._samples import Data
from gradfilter.lab.models._build import parameter_count
from gradfilter.lab.train._archive import (
    ARCHIVE,
    LABELS,
    Checkpoint,
    add,
    advice_on_damage,
    checkpoints,
    damaged,
    keep_until,
    read_tensors,
    recover,
    tensor_bytes,
    tensors_of,
)
from gradfilter.lab.train._evaluation import Evaluation, read_evaluations
from gradfilter.lab.train._run_place import METRICS, plain_settings
from gradfilter.lab.train._training import Training

# --- Check that a data set is the one that a run started with ---


def check_same_data(run: Path, data: Data) -> None:
    """Refuse a data set that differs from the one that a run started with.

    Raises:
        UsageError: Its labels or samples differ.
    """
    recorded = read_tensors(run / ARCHIVE, LABELS)
    for name in ("labels", "clean", "ids"):
        found: Tensor = getattr(data.train, name).cpu()
        before = recorded.get(name, found[:0])
        if before.dtype != found.dtype or not torch.equal(found, before):
            raise UsageError(
                f"the {name} of {data.name!r} are not those that the run in {str(run)!r} was "
                "trained on. Name the directory of that data set with --data-dir."
            )


# --- The snapshot ---


POINT = "resume.pt"
POINT_BEFORE = "resume.before.pt"
ROOM = 2**20
"""Largest number of bytes of a point in addition to its tensors."""
NUMBERS = ("done", "seconds", "epoch_seconds", "peak_memory")


def write_point(place: Path, run: Training) -> None:
    """Write the current point of a run, completely or not at all."""
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
    write_bytes(place / POINT, tensor_bytes(flat), before=place / POINT_BEFORE)


def newest_point(place: Path) -> Path | None:
    """Return the file of the last point, or of the previous point if the last one is missing."""
    return next((path for name in (POINT, POINT_BEFORE) if (path := place / name).exists()), None)


def resume(place: Path, run: Training) -> None:
    """Set a new run to its newest point.

    Raises:
        UsageError: There is no point, or it is damaged or belongs to another run.
    """
    path = newest_point(place)
    if path is None:
        raise UsageError(
            f"--resume: {str(place)!r} has no {POINT}. Start anew under another --name."
        )
    most = ROOM + 2 * sum(tensor.nbytes for tensor in gf.state_dict(run.state).values())
    try:
        flat = _read(path, most)
    except UsageError as error:
        raise UsageError(f"--resume: {error} {_recovery_advice(path, most)}") from None
    try:
        state = gf.load_state_dict(run.state, _without_prefix("state.", flat))
        # Points of earlier versions have fewer totals; every step had a gap.
        flat.setdefault("totals.gaps", flat["totals.steps"])
        totals = {n: _like(zero, flat.get(f"totals.{n}", zero)) for n, zero in run.totals.items()}
        numbers = {name: flat[name].item() for name in (*NUMBERS, "reports", "report")}
        done = _step(numbers["done"], run.total_steps)
        skipped = _like(run.skipped, flat["skipped"])
        finite_until = _like(run.finite_until, flat.get("finite_until", torch.tensor(done)))
    except Exception as error:  # errors of a foreign point have no common type
        said = str(error) if isinstance(error, ValueError) else f"{error_text(error)}."
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
    """Convert a tensor to replace another one: same shape, dtype and device."""
    kind = (found.shape, found.is_floating_point(), found.is_complex())
    if kind != (expected.shape, expected.is_floating_point(), False):
        raise ValueError(f"it has {found.dtype} {tuple(found.shape)} instead of a number.")
    return found.to(expected)


def _step(done: float, last: int) -> int:
    if not (done.is_integer() and 0 <= done <= last):
        raise ValueError(f"it stands after step {done} of {last}.")
    return int(done)


def _read(path: Path, most: int) -> dict[str, Tensor]:
    """Read the tensors of a point that has at most `most` bytes."""
    with reading(path, "the point", ""):
        return tensors_of(content_of(path, most), repr(str(path)), "")


def _recovery_advice(path: Path, most: int) -> str:
    """Return advice for a damaged newest point, as a sentence."""
    before = path.with_name(POINT_BEFORE)
    try:
        step = None if path == before else int(_read(before, most)["done"].item())
    except Exception:  # the previous point is also damaged or foreign
        step = None
    if step is None:
        return "No other point is intact: start anew under another --name."
    return (
        f"The point before it, {POINT_BEFORE}, is intact: remove {POINT}, and the same command "
        f"resumes after step {step}."
    )


def keep_lines_until(path: Path, step: int) -> None:
    """Discard the evaluations after a step: a run that resumes there repeats them."""
    kept = [line for line in read_evaluations(path)[0] if line["step"] <= step]
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _prefixed(prefix: str, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in flat.items()}


def _without_prefix(prefix: str, flat: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in flat.items() if n.startswith(prefix)}


# --- The record ---


@dataclass(frozen=True)
class RunRecord:
    """The files of a run, written by the process that owns its directory.

    Attributes:
        place: The run directory.
        facts: Entries of ``config.json`` in addition to the status.
    """

    place: Path
    facts: Mapping[str, Any]

    def write_status(self, status: str) -> None:
        """Write ``config.json`` with a status: running, interrupted, failed or finished."""
        write_json(self.place / "config.json", {**self.facts, "status": status})

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Append a line to the metrics."""
        append_json_line(self.place / METRICS, asdict(evaluation))

    def write_checkpoint(self, run: Training) -> None:
        """Add parameters and buffers to the archive."""
        archive = self.place / ARCHIVE
        number = len(checkpoints(archive)) if archive.exists() else 0
        flat = gf.state_dict(run.measured)
        add(archive, Checkpoint(number, run.done, run.epoch).entry, tensor_bytes(flat))

    def begin(self) -> None:
        """Discard the files of a run that was killed before it wrote a point to resume from.

        Raises:
            UsageError: The run had written more: its record or its points are lost.
        """
        if newest_point(self.place) is not None:
            raise UsageError(
                f"there is a run without its config.json in {str(self.place)!r}. Continue it with "
                "--resume, or give this one another --name or --seed."
            )
        # A point is written after every evaluation except that of step 0.
        path = self.place / METRICS
        lines = [] if path.is_symlink() else read_evaluations(path)[0]  # a run writes no links
        steps = {line["step"] for line in lines} - {0}
        if len(steps) > 1:
            raise UsageError(
                f"the run in {str(self.place)!r} was trained for {max(steps)} steps, and {POINT} "
                "to resume from is gone. Move it away, or give this one another --name."
            )
        self.clear()

    def clear(self) -> None:
        """Delete every file except ``config.json``."""
        # The points first: without them, a run that is killed here starts again.
        for name in (POINT, POINT_BEFORE, METRICS, ARCHIVE):
            (self.place / name).unlink(missing_ok=True)
        recover(self.place / ARCHIVE)

    def start(self, run: Training) -> None:
        """Write the files that are known before the first step."""
        samples = run.data.train
        labels = {name: getattr(samples, name) for name in ("labels", "clean", "wrong", "ids")}
        add(self.place / ARCHIVE, LABELS, tensor_bytes(labels))
        add(self.place / ARCHIVE, "config.json", json.dumps(dict(self.facts)).encode())

    def resume(self, run: Training) -> None:
        """Discard what was written after the point that the run was set to.

        Raises:
            UsageError: Something is missing or damaged, or the data set has changed.
        """
        if not (self.place / ARCHIVE).exists():
            raise UsageError(
                f"--resume: the checkpoints of the run are gone: {str(self.place / ARCHIVE)!r} "
                "does not exist. Start anew under another --name."
            )
        recover(self.place / ARCHIVE)
        if lost := damaged(self.place / ARCHIVE):
            raise UsageError(
                f"--resume: {str(self.place / ARCHIVE)!r} is damaged: {', '.join(lost)}. "
                f"{advice_on_damage(self.place / ARCHIVE)} Start anew under another --name."
            )
        check_same_data(self.place, run.data)
        if run.done == 0:  # write again what is known before the first step
            self.clear()
            return
        keep_lines_until(self.place / METRICS, run.done)
        keep_until(self.place / ARCHIVE, run.done)

    def save_point(self, run: Training) -> None:
        """Write the point to resume from."""
        write_point(self.place, run)


def facts_of(run: Training) -> dict[str, Any]:
    """Return everything that the numbers of a run depend on."""
    data = run.data
    return {
        "command": "train",
        "settings": plain_settings(run.config),
        "classes": data.classes,
        "shape": list(data.shape),
        "samples": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "wrong_labels": int(data.train.wrong.sum()),
        "batch_size": run.batch_size,
        "total_steps": run.total_steps,
        "parameters": parameter_count(run.model),
        "threads": torch.get_num_threads(),
        "processes": started_processes(),
        "versions": {
            "gradfilter": gf.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
