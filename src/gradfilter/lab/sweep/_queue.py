"""Manage the queue of a study: which worker runs which training.

One worker at a time changes the queue, and a kill may interrupt a change. It may leave a trial that
runs without a worker, an incomplete grid, or a failed trial that was not queued again. The next
worker that locks the queue repairs this, so changes need not be atomic. An abandoned trial (FAIL
without a reason) is replaced by one that names it; trainings resume from their run directories.
"""

from __future__ import annotations

import gc
import io
import math
import warnings
from collections.abc import Container, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from gradfilter.lab._usage import UsageError
from gradfilter.lab.sweep._plan import Params, Plan, key_of
from gradfilter.lab.sweep._storage import Storage
from gradfilter.lab.train._build_training import data_of
from gradfilter.lab.train._evaluation import read_evaluations
from gradfilter.lab.train._run_place import METRICS, BusyError, place_of
from gradfilter.lab.train._train import train
from gradfilter.lab.train._train_config import TrainConfig

# --- One training of a study, and its result ---


MACHINE_FAULTS: tuple[type[Exception], ...] = (
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
    *((torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()),
)
"""Errors of one machine; another machine may still be able to train."""
LATER = "The training waits for another worker; repeat the command to continue."


class Unfinished(Enum):
    """The reason why a training has no outcome yet."""

    INTERRUPTED = "interrupted by Ctrl-C"
    BUSY = "in use by another process"
    TAKEN = "taken over by another worker meanwhile, whose result counts"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training.

    Attributes:
        state: COMPLETE; PRUNED if it diverged; FAIL if it raised.
        value: Value of the metric, if the training is complete.
        run: The run directory, inside --save-dir.
        reason: The reason why there is no value.
        evaluation: The evaluation that counts.
    """

    state: TrialState
    value: float | None
    run: str
    reason: str | None = None
    evaluation: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """Return what is recorded in addition to state and value."""
        facts = {"run": self.run, "reason": self.reason, "evaluation": self.evaluation}
        return {name: fact for name, fact in facts.items() if fact is not None}


def outcome_of(plan: Plan, config: TrainConfig) -> Outcome | Unfinished:
    """Start or resume a training, and return its outcome.

    Args:
        plan: Plan of the study, with its metric.
        config: Settings of the training.

    Raises:
        UsageError: This machine cannot train; the training itself did not fail.
    """
    place = place_of(config)
    run = str(place.relative_to(config.save_dir))
    try:
        with redirect_stdout(io.StringIO()):  # the study prints one line itself
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
        # Any error is recorded, and the other trainings continue.
        return Outcome(TrialState.FAIL, None, run, _line(error))
    finally:
        if config.device != "cpu":
            gc.collect()  # reference cycles of a training hold the device memory of its model
    if interrupted:
        return Unfinished.INTERRUPTED
    return measured(plan, read_evaluations(place / METRICS)[0], run)


def measured(plan: Plan, lines: list[dict[str, Any]], run: str) -> Outcome:
    """Compute the outcome of a finished training from its evaluations.

    Args:
        plan: Plan of the study, with its metric.
        lines: The evaluations, in order.
        run: The run directory.
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
        # An accuracy is a number even if the parameters are NaN.
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
    """Return whether the data set is on this machine."""
    plain = replace(config, train_split=None, val_split=None, label_noise=0.0)
    try:
        data_of(plain, torch.device("cpu"))
    except (UsageError, OSError):
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- The queue ---


OPEN = (TrialState.WAITING, TrialState.RUNNING)


@dataclass(frozen=True)
class Queue:
    """A study that was joined.

    Attributes:
        study: The study in optuna.
        storage: The storage of the study.
        plan: The plan of the study.
    """

    study: optuna.Study
    storage: Storage
    plan: Plan

    def trials(self) -> list[FrozenTrial]:
        """Return the valid trials, one for every training that is planned or done."""
        everything = self.study.get_trials(deepcopy=False)
        replaced = _replaced(everything)
        return [t for t in everything if t.number not in replaced and not _is_abandoned(t)]

    @property
    def heartbeat(self) -> int:
        """Return the heartbeat interval in seconds, the same for all workers."""
        seconds = self.storage.rdb.get_heartbeat_interval()
        assert seconds is not None
        return seconds

    def trial_id(self, number: int) -> int:
        """Return the id of a trial in the storage."""
        rdb = self.storage.rdb
        study = rdb.get_study_id_from_name(self.study.study_name)
        return rdb.get_trial_id_from_study_id_trial_number(study, number)


def claim(queue: Queue, worker: str, avoid: Container[int] = ()) -> FrozenTrial | None:
    """Take the next trial.

    Args:
        queue: The queue.
        worker: Name of the worker that takes it.
        avoid: Numbers of trials to leave to other workers.

    Returns:
        The trial, or None if none is available now.
    """
    with queue.storage.locked():
        _repair(queue)
        trials = queue.trials()
        waiting = [
            t.number for t in trials if t.state == TrialState.WAITING and t.number not in avoid
        ]
        rdb = queue.storage.rdb
        if waiting:
            number = waiting[0]
            rdb.set_trial_state_values(queue.trial_id(number), TrialState.RUNNING)
        elif queue.plan.points is None and len(trials) < queue.plan.trials:
            number = _sampled(queue)
        else:
            return None
        trial_id = queue.trial_id(number)
        rdb.record_heartbeat(trial_id)
        rdb.set_trial_user_attr(trial_id, "worker", worker)
        return rdb.get_trial(trial_id)


def count_unfinished(queue: Queue) -> int:
    """Return how many trials are running or waiting."""
    with queue.storage.locked():
        return sum(trial.state in OPEN for trial in queue.trials())


def requeue(queue: Queue, number: int, worker: str) -> None:
    """Return a trial to the queue, unless another worker has taken it over."""
    with queue.storage.locked():
        if _is_held_by(queue, number, worker):
            trial_id = queue.trial_id(number)
            _forget_reason(queue, trial_id)
            queue.storage.rdb.set_trial_user_attr(trial_id, "worker", None)
            queue.storage.rdb.set_trial_state_values(trial_id, TrialState.WAITING)


def finish(queue: Queue, number: int, worker: str, outcome: Outcome) -> bool:
    """Record the outcome of a trial.

    Returns:
        False if another worker has taken it over; that worker then finds the finished run.
    """
    with queue.storage.locked():
        if not _is_held_by(queue, number, worker):
            return False
        trial_id = queue.trial_id(number)
        for name, value in outcome.facts().items():
            queue.storage.rdb.set_trial_user_attr(trial_id, name, value)
        queue.study.tell(number, outcome.value, state=outcome.state)
        return True


def enqueue(queue: Queue, *, retry_failed: bool) -> None:
    """Add the missing trials to the queue.

    Args:
        queue: Queue of a joined study.
        retry_failed: Also queue failed trials again.
    """
    with queue.storage.locked():
        _repair(queue)
        if retry_failed:
            for trial in queue.trials():
                if trial.state == TrialState.FAIL:
                    _add(queue, trial.params, replaces=trial.number)


def _repair(queue: Queue) -> None:
    """Take trials from killed workers, and queue trials without a worker again."""
    study = queue.study
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # This worker holds the lock, so the writer of the reason was killed before the state.
        _forget_reason(queue, queue.trial_id(trial.number))
        # This worker holds the lock, so a worker that took a trial unsigned was killed.
        if trial.user_attrs.get("worker") is None:
            study.tell(trial.number, state=TrialState.FAIL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        fail_stale_trials(study)
    everything = study.get_trials(deepcopy=False)
    replaced = _replaced(everything)
    complete = {axis.name for axis in queue.plan.axes}
    for trial in everything:
        if _is_abandoned(trial) and trial.number not in replaced and {*trial.params} == complete:
            _add(queue, trial.params, replaces=trial.number)
    there = {key_of(trial.params) for trial in everything}
    for point in queue.plan.points or ():
        if key_of(point) not in there:
            _add(queue, point)


def _add(queue: Queue, params: Params, **facts: Any) -> None:
    distributions: dict[str, BaseDistribution] = {
        axis.name: axis.distribution for axis in queue.plan.axes
    }
    queue.study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=dict(params),
            distributions=distributions,
            user_attrs=facts,
        )
    )


def _sampled(queue: Queue) -> int:
    """Start the trial that the search proposes, and return its number."""
    # The next proposal depends on the history alone, not on the number of workers or restarts.
    name, rdb = queue.study.study_name, queue.storage.rdb
    history = len(queue.study.get_trials(deepcopy=False))
    seed = int(np.random.SeedSequence([queue.plan.seed, history]).generate_state(1)[0])
    # Several workers propose before the first result: running trials count as bad ones.
    sampler = TPESampler(seed=seed, constant_liar=True)
    study = optuna.load_study(study_name=name, storage=rdb, sampler=sampler)
    # Study.ask would take a waiting trial, also one that this worker has to avoid.
    trial = Trial(study, rdb.create_new_trial(rdb.get_study_id_from_name(name)))
    for axis in queue.plan.axes:
        axis.suggest(trial)
    return trial.number


def _is_held_by(queue: Queue, number: int, worker: str) -> bool:
    trial = queue.storage.rdb.get_trial(queue.trial_id(number))
    return trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == worker


def _is_abandoned(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") is None


def _forget_reason(queue: Queue, trial_id: int) -> None:
    """Delete the reason; with it, a stale trial would look like a failed one."""
    if queue.storage.rdb.get_trial(trial_id).user_attrs.get("reason") is not None:
        queue.storage.rdb.set_trial_user_attr(trial_id, "reason", None)


def _replaced(trials: Sequence[FrozenTrial]) -> set[int | None]:
    return {trial.user_attrs.get("replaces") for trial in trials}
