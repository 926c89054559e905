"""One training of a study, and what came of it."""

from __future__ import annotations

import gc
import io
import math
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from optuna.trial import TrialState

from gradfilter.lab._usage import UsageError
from gradfilter.lab.sweep._plan import Plan
from gradfilter.lab.train._begin import data_of
from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._evaluations import read_evaluations
from gradfilter.lab.train._place import BusyError, place_of
from gradfilter.lab.train._record import METRICS
from gradfilter.lab.train._train import train

MACHINE_FAULTS: tuple[type[Exception], ...] = (
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    *((torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()),
)
"""What a machine raises where another one might train."""
LATER = "The training waits for another worker; the same command goes on."


class Unfinished(Enum):
    """Why a training has no outcome yet."""

    INTERRUPTED = "interrupted by Ctrl-C"
    BUSY = "at work in another process"
    TAKEN = "taken over by another worker meanwhile, whose result counts"


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        state: COMPLETE; PRUNED if it diverged; FAIL if it raised.
        value: Of the metric, if it is complete.
        run: The directory, in --save-dir.
        reason: Why there is no value.
        evaluation: The evaluation that counts.
    """

    state: TrialState
    value: float | None
    run: str
    reason: str | None = None
    evaluation: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """What is recorded beside state and value."""
        facts = {"run": self.run, "reason": self.reason, "evaluation": self.evaluation}
        return {name: fact for name, fact in facts.items() if fact is not None}


def outcome_of(plan: Plan, config: TrainConfig) -> Outcome | Unfinished:
    """Train, or go on training.

    Args:
        plan: Says what counts.
        config: Settings of the training.

    Raises:
        UsageError: Nothing can be trained here, which is no fault of the training.
    """
    place = place_of(config)
    run = str(place.relative_to(config.save_dir))
    try:
        with redirect_stdout(io.StringIO()):  # the study says it in one line
            interrupted = train(replace(config, resume=True)) != 0
    except BusyError:
        return Unfinished.BUSY
    except UsageError as error:
        if isinstance(error.__context__, OSError) or not _has_data(config):
            raise UsageError(f"{error} {LATER}") from None
        return Outcome(TrialState.FAIL, None, run, str(error))
    except MACHINE_FAULTS as error:
        raise UsageError(f"{_line(error).rstrip('.')}. {LATER}") from None
    except Exception as error:
        # Whatever it was, it is recorded, and the other trainings go on.
        return Outcome(TrialState.FAIL, None, run, _line(error))
    finally:
        if config.device != "cpu":
            gc.collect()  # what a training leaves in cycles is a model's worth of device memory
    if interrupted:
        return Unfinished.INTERRUPTED
    return measured(plan, read_evaluations(place / METRICS)[0], run)


def measured(plan: Plan, lines: list[dict[str, Any]], run: str) -> Outcome:
    """What the evaluations of a finished training say.

    Args:
        plan: Says what counts.
        lines: The evaluations, in order.
        run: The directory.
    """
    if not lines:
        return Outcome(TrialState.FAIL, None, run, f"the run has no {METRICS}")
    best = max if plan.direction == "maximize" else min
    counting = lines[-1]
    if plan.evaluation == "best":
        numbers = [line for line in lines if _is_number(line.get(plan.metric))]
        counting = best(numbers, key=lambda line: line[plan.metric]) if numbers else lines[-1]
    value, step = counting.get(plan.metric), lines[-1].get("step")
    reason = None
    if not _is_number(lines[-1].get("train_loss")):
        # An accuracy is a number even where the parameters are none.
        reason = f"diverged: the training loss at step {step} is not a number"
    elif not _is_number(value):
        reason = f"{plan.metric} is not a number at step {step}"
    if reason is not None:
        return Outcome(TrialState.PRUNED, None, run, reason, lines[-1])
    return Outcome(TrialState.COMPLETE, float(counting[plan.metric]), run, None, counting)


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _has_data(config: TrainConfig) -> bool:
    """Whether the data set is here, whatever is made of it."""
    plain = replace(config, train_split=None, val_split=None, label_noise=0.0)
    try:
        data_of(plain, torch.device("cpu"))
    except (UsageError, OSError):
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
