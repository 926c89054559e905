"""What a run leaves behind: settings, metrics, checkpoints, and the point to go on from."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gradfilter as gf
from gradfilter.lab._processes import started_processes
from gradfilter.lab._rundir import append_json_line, write_json
from gradfilter.lab._usage import UsageError
from gradfilter.lab.models._build import parameter_count
from gradfilter.lab.train._archive import (
    LABELS,
    NAME,
    Checkpoint,
    add,
    checkpoints,
    damaged,
    keep_until,
    offer,
    recover,
    tensor_bytes,
)
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._evaluations import read_evaluations
from gradfilter.lab.train._place import plain_settings
from gradfilter.lab.train._resume import BEFORE as POINT_BEFORE
from gradfilter.lab.train._resume import NAME as POINT
from gradfilter.lab.train._resume import keep_lines_until, newest_point, write_point
from gradfilter.lab.train._run import Run
from gradfilter.lab.train._same_data import check_same_data

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Record:
    """The files of a run, written by the process that owns its directory.

    Attributes:
        place: The directory.
        facts: What ``config.json`` says beside the status.
    """

    place: Path
    facts: Mapping[str, Any]

    def say(self, status: str) -> None:
        """Write ``config.json``: running, interrupted, failed or finished."""
        write_json(self.place / "config.json", {**self.facts, "status": status})

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Add a line to the metrics."""
        append_json_line(self.place / METRICS, asdict(evaluation))

    def write_checkpoint(self, run: Run) -> None:
        """Add parameters and buffers to the archive."""
        archive = self.place / NAME
        number = len(checkpoints(archive)) if archive.exists() else 0
        flat = gf.state_dict(run.measured)
        add(archive, Checkpoint(number, run.done, run.epoch).entry, tensor_bytes(flat))

    def begin(self) -> None:
        """Drop what a run wrote that was killed before there was a point to go on from.

        Raises:
            UsageError: A run wrote more than that: it has lost its record, or its points.
        """
        if newest_point(self.place) is not None:
            raise UsageError(
                f"there is a run without its config.json in {str(self.place)!r}. Go on with "
                "--resume, or give this one another --name or --seed."
            )
        # A point follows what is written at any step but the first.
        path = self.place / METRICS
        lines = [] if path.is_symlink() else read_evaluations(path)[0]  # a run writes no links
        steps = {line["step"] for line in lines} - {0}
        if len(steps) > 1:
            raise UsageError(
                f"the run in {str(self.place)!r} was trained for {max(steps)} steps, and {POINT} "
                "to go on from is gone. Move it away, or give this one another --name."
            )
        self.clear()

    def clear(self) -> None:
        """Drop everything but what ``config.json`` says."""
        # The points first: without them whoever is killed here begins again.
        for name in (POINT, POINT_BEFORE, METRICS, NAME):
            (self.place / name).unlink(missing_ok=True)
        recover(self.place / NAME)

    def start(self, run: Run) -> None:
        """Write what is known before the first step."""
        samples = run.data.train
        labels = {name: getattr(samples, name) for name in ("labels", "clean", "wrong", "ids")}
        add(self.place / NAME, LABELS, tensor_bytes(labels))
        add(self.place / NAME, "config.json", json.dumps(dict(self.facts)).encode())

    def go_on(self, run: Run) -> None:
        """Drop what was written after the point that the run was put to.

        Raises:
            UsageError: Something is missing or damaged, or the data set is not what it was.
        """
        if not (self.place / NAME).exists():
            raise UsageError(
                f"--resume: the checkpoints of the run are gone: {str(self.place / NAME)!r} does "
                "not exist. Start anew under another --name."
            )
        recover(self.place / NAME)
        if lost := damaged(self.place / NAME):
            raise UsageError(
                f"--resume: {str(self.place / NAME)!r} is damaged: {', '.join(lost)}. "
                f"{offer(self.place / NAME)} Start anew under another --name."
            )
        check_same_data(self.place, run.data)
        if run.done == 0:  # what is known before the first step is written again
            self.clear()
            return
        keep_lines_until(self.place / METRICS, run.done)
        keep_until(self.place / NAME, run.done)

    def save_point(self, run: Run) -> None:
        """Write the point to go on from."""
        write_point(self.place, run)


def facts_of(run: Run) -> dict[str, Any]:
    """Everything that the numbers of a run depend on."""
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
