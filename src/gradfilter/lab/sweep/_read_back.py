"""What a study says of its trainings, checked once when it is joined."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from gradfilter.lab._reading import ForeignError, reading, why
from gradfilter.lab.sweep._axes import Axis
from gradfilter.lab.sweep._plan import Plan
from gradfilter.lab.sweep._storage import AGAIN

CLOSED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
FACTS = {"worker": str, "run": str, "reason": str, "evaluation": dict, "replaces": int}
"""What is recorded beside state and value, where it is not None."""


def reading_study(shown: str) -> AbstractContextManager[None]:
    """Turn whatever is wrong with a study into one line: optuna has no list of what it raises.

    Args:
        shown: What people may see of the storage's name.
    """
    return reading(shown, "--storage: the study in", AGAIN)


def check_trials(study: optuna.Study, plan: Plan) -> None:
    """Refuse trials that this command did not record.

    Raises:
        ForeignError: There is one.
    """
    for trial in study.get_trials(deepcopy=False):
        try:
            _check_facts(trial, plan)
            for axis in plan.axes:
                if axis.name in trial.params:
                    _check_choice(axis, trial.params[axis.name])
        except (ValueError, TypeError) as error:
            raise ForeignError(f"trial {trial.number}: {why(error)}") from None


def _check_facts(trial: FrozenTrial, plan: Plan) -> None:
    names, facts = {axis.name for axis in plan.axes}, trial.user_attrs
    for name, kind in FACTS.items():
        if not isinstance(facts.get(name), kind | None):
            raise ForeignError(f"its {name} is {facts[name]!r:.80}")
    done = trial.state in CLOSED and (trial.state != TrialState.FAIL or facts.get("reason"))
    if not {*trial.params} <= names or (done and {*trial.params} != names):
        raise ForeignError("it does not have the settings of the study")
    evaluation = facts.get("evaluation") or {}
    for name, value in evaluation.items():
        if value is not None and not isinstance(value, int | float):
            raise ForeignError(f"its {name} is {value!r:.80}")
    if trial.state == TrialState.COMPLETE and not _same(trial.value, evaluation.get(plan.metric)):
        raise ForeignError(f"its value is not its {plan.metric}")


def _check_choice(axis: Axis, chosen: Any) -> None:
    if isinstance(axis.distribution, CategoricalDistribution):
        axis.distribution.choices.index(chosen)
    elif not axis.distribution.low <= chosen <= axis.distribution.high:
        raise ForeignError(f"its {axis.name} is {chosen}")


def _same(value: float | None, recorded: Any) -> bool:
    if value is None or not isinstance(recorded, int | float):
        return False
    return math.isclose(value, recorded, rel_tol=1e-12)  # databases may round the last digit
