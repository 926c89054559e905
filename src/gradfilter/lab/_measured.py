"""One evaluation of one of several trainings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gradfilter.lab.train._evaluation import Evaluation


@dataclass(frozen=True)
class Measured:
    """An evaluation and whose it is.

    Attributes:
        run: Name of the method.
        seed: Of split, noise, initial parameters and batches.
        evaluation: What was measured; of steps since the evaluation before.
    """

    run: str
    seed: int
    evaluation: Evaluation


def as_line(measured: Measured) -> dict[str, Any]:
    """What a line of the metrics says."""
    return {"run": measured.run, "seed": measured.seed, **asdict(measured.evaluation)}
