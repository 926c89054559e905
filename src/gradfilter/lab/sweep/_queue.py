"""Who trains what: every change of a study is made in turn, and can be cut short by a kill.

A kill may leave a trial that runs without a worker, a grid that is half there, or a trial that was
given up and not put into the queue again. Whoever has the next turn sees it and mends it, so
nothing has to happen at once. A given-up trial (FAIL without a reason) is replaced by one that
names it; trainings themselves go on from the run directory, which belongs to the settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from gradfilter.lab.sweep._outcome import Outcome
from gradfilter.lab.sweep._plan import Params, Plan, key_of
from gradfilter.lab.sweep._storage import Storage

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
