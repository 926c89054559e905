"""The queue of a study: which worker runs which training.

Every change is made by one worker at a time and may be cut short by a kill. A kill may leave a
trial that runs without a worker, an incomplete grid, or a failed trial that was not put into the
queue again. The next worker in turn sees it and repairs it, so nothing has to happen at once. A
given-up trial (FAIL without a reason) is replaced by one that names it; trainings themselves
resume from their run directories.
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
from gradfilter.lab.train._record import METRICS
from gradfilter.lab.train._run_place import BusyError, place_of
from gradfilter.lab.train._train import train
from gradfilter.lab.train._train_config import TrainConfig

# --- One training of a study, and its result ---


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


# --- The queue ---


OPEN = (TrialState.WAITING, TrialState.RUNNING)


@dataclass(frozen=True)
class Queue:
    """A study that was joined.

    Attributes:
        study: As optuna knows it.
        storage: Where it is kept.
        plan: What it is made of.
    """

    study: optuna.Study
    storage: Storage
    plan: Plan

    def trials(self) -> list[FrozenTrial]:
        """The trials that count, one for every training that is to be done or was."""
        everything = self.study.get_trials(deepcopy=False)
        replaced = _replaced(everything)
        return [t for t in everything if t.number not in replaced and not _given_up(t)]

    @property
    def heartbeat(self) -> int:
        """Seconds between two signs of life, the same for all workers."""
        seconds = self.storage.rdb.get_heartbeat_interval()
        assert seconds is not None
        return seconds

    def trial_id(self, number: int) -> int:
        """What the storage calls a trial."""
        rdb = self.storage.rdb
        study = rdb.get_study_id_from_name(self.study.study_name)
        return rdb.get_trial_id_from_study_id_trial_number(study, number)


def claim(queue: Queue, worker: str, avoid: Container[int] = ()) -> FrozenTrial | None:
    """Take the next trial.

    Args:
        queue: To take it from.
        worker: Whose it is.
        avoid: Numbers of trials that others should take.

    Returns:
        The trial; None if there is none to take now.
    """
    with queue.storage.turn():
        _mend(queue)
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


def left(queue: Queue) -> int:
    """How many trials are at work or wait for somebody."""
    with queue.storage.turn():
        return sum(trial.state in OPEN for trial in queue.trials())


def put_back(queue: Queue, number: int, worker: str) -> None:
    """Let a trial wait for somebody else, unless it was taken away meanwhile."""
    with queue.storage.turn():
        if _is_mine(queue, number, worker):
            trial_id = queue.trial_id(number)
            _forget_reason(queue, trial_id)
            queue.storage.rdb.set_trial_user_attr(trial_id, "worker", None)
            queue.storage.rdb.set_trial_state_values(trial_id, TrialState.WAITING)


def finish(queue: Queue, number: int, worker: str, outcome: Outcome) -> bool:
    """Record what came of a trial.

    Returns:
        False if it was taken away meanwhile: whoever has it now finds the finished run.
    """
    with queue.storage.turn():
        if not _is_mine(queue, number, worker):
            return False
        trial_id = queue.trial_id(number)
        for name, value in outcome.facts().items():
            queue.storage.rdb.set_trial_user_attr(trial_id, name, value)
        queue.study.tell(number, outcome.value, state=outcome.state)
        return True


def enqueue(queue: Queue, *, retry_failed: bool) -> None:
    """Put into the queue whatever is not there yet.

    Args:
        queue: Of a study that was joined.
        retry_failed: Also what failed.
    """
    with queue.storage.turn():
        _mend(queue)
        if retry_failed:
            for trial in queue.trials():
                if trial.state == TrialState.FAIL:
                    _add(queue, trial.params, replaces=trial.number)


def _mend(queue: Queue) -> None:
    """Take trials from workers that are gone, and put back what nobody works on."""
    study = queue.study
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # Nobody else has a turn, so whoever told a reason was stopped before it was final.
        _forget_reason(queue, queue.trial_id(trial.number))
        # Nobody else has a turn, so whoever took it and did not sign was killed in the act.
        if trial.user_attrs.get("worker") is None:
            study.tell(trial.number, state=TrialState.FAIL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        fail_stale_trials(study)
    everything = study.get_trials(deepcopy=False)
    replaced = _replaced(everything)
    complete = {axis.name for axis in queue.plan.axes}
    for trial in everything:
        if _given_up(trial) and trial.number not in replaced and {*trial.params} == complete:
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
    """A new trial where the search expects most, running."""
    # The next proposal follows from the history alone, however many workers there are and however
    # often they were started.
    name, rdb = queue.study.study_name, queue.storage.rdb
    history = len(queue.study.get_trials(deepcopy=False))
    seed = int(np.random.SeedSequence([queue.plan.seed, history]).generate_state(1)[0])
    # Several workers propose before the first of them has a result: what is at work counts as bad.
    sampler = TPESampler(seed=seed, constant_liar=True)
    study = optuna.load_study(study_name=name, storage=rdb, sampler=sampler)
    # Study.ask would take what waits, also what this worker is to avoid.
    trial = Trial(study, rdb.create_new_trial(rdb.get_study_id_from_name(name)))
    for axis in queue.plan.axes:
        axis.suggest(trial)
    return trial.number


def _is_mine(queue: Queue, number: int, worker: str) -> bool:
    trial = queue.storage.rdb.get_trial(queue.trial_id(number))
    return trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == worker


def _given_up(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and trial.user_attrs.get("reason") is None


def _forget_reason(queue: Queue, trial_id: int) -> None:
    """With a reason a stale trial would look like one that failed by itself."""
    if queue.storage.rdb.get_trial(trial_id).user_attrs.get("reason") is not None:
        queue.storage.rdb.set_trial_user_attr(trial_id, "reason", None)


def _replaced(trials: Sequence[FrozenTrial]) -> set[int | None]:
    return {trial.user_attrs.get("replaces") for trial in trials}
