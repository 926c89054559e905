"""Start or join a study, and check its recorded trainings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from gradfilter.lab._run_files import ForeignError, error_text, reading, refuse_link
from gradfilter.lab._usage import UsageError
from gradfilter.lab.sweep._axes import Axis
from gradfilter.lab.sweep._plan import Plan
from gradfilter.lab.sweep._queue import Queue
from gradfilter.lab.sweep._storage import AGAIN, Storage, opened
from gradfilter.lab.train._run_place import plain_settings
from gradfilter.lab.train._train_config import TrainConfig

# --- Check the recorded trainings of a study once, when it is joined ---


CLOSED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
FACTS = {"worker": str, "run": str, "reason": str, "evaluation": dict, "replaces": int}
"""Facts recorded in addition to state and value, with their types unless None."""


def reading_study(shown: str) -> AbstractContextManager[None]:
    """Turn any error of reading a study into one line: optuna documents no list of errors.

    Args:
        shown: Name of the storage, without the password.
    """
    return reading(shown, "--storage: the study in", AGAIN)


def check_trials(study: optuna.Study, plan: Plan) -> None:
    """Refuse trials that this command did not record.

    Raises:
        ForeignError: The study has such a trial.
    """
    for trial in study.get_trials(deepcopy=False):
        try:
            _check_facts(trial, plan)
            for axis in plan.axes:
                if axis.name in trial.params:
                    _check_choice(axis, trial.params[axis.name])
        except (ValueError, TypeError) as error:
            raise ForeignError(f"trial {trial.number}: {error_text(error)}") from None


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
    if trial.state == TrialState.COMPLETE and not _is_same_number(
        trial.value, evaluation.get(plan.metric)
    ):
        raise ForeignError(f"its value is not its {plan.metric}")


def _check_choice(axis: Axis, chosen: Any) -> None:
    if isinstance(axis.distribution, CategoricalDistribution):
        axis.distribution.choices.index(chosen)
    elif not axis.distribution.low <= chosen <= axis.distribution.high:
        raise ForeignError(f"its {axis.name} is {chosen}")


def _is_same_number(value: float | None, recorded: Any) -> bool:
    if value is None or not isinstance(recorded, int | float):
        return False
    return math.isclose(value, recorded, rel_tol=1e-12)  # databases may round the last digit


# --- Start or join ---


KEY = "gradfilter"
"""Attribute with the definition of a study."""
HEARTBEAT = "gradfilter heartbeat"
"""Attribute with the heartbeat interval of its workers."""


def folder_of(plan: Plan) -> Path:
    """Return the folder of runs, tables and, by default, the study."""
    return plan.base.save_dir / plan.base.name


def _own_file(folder: Path) -> Path:
    """Return the file of a folder's study, used without --storage.

    Raises:
        UsageError: It is a link, or a file that the database keeps next to it is one.
    """
    file = folder / "study.db"
    for ending in ("", "-journal", "-wal", "-shm"):
        refuse_link(file.with_name(file.name + ending))
    return file


@contextmanager
def joined_study(plan: Plan, storage: str | None, heartbeat: int) -> Iterator[Queue]:
    """Join the study of the plan's name, or start it.

    Args:
        plan: Definition of the study; its name is that of the runs.
        storage: A file or a URL; None for a file in the study's folder.
        heartbeat: Interval in seconds, for a new study.

    Raises:
        UsageError: The storage cannot be used, or has a study of that name with another
            definition.
    """
    # Warnings of optuna repeat values from the storage, on any number of lines.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opening = opened(storage or str(_own_file(folder_of(plan))), heartbeat)
    with closing(opening):
        with reading_study(opening.shown):
            study = _study(opening, plan, heartbeat)
        yield Queue(study, opening, plan)


def _study(storage: Storage, plan: Plan, heartbeat: int) -> optuna.Study:
    with storage.locked():
        study = optuna.create_study(
            storage=storage.rdb,
            study_name=plan.base.name,
            direction=plan.direction,
            load_if_exists=True,
        )
        own = plan.definition()
        found = _filled_in(study.user_attrs.get(KEY), own)
        if found is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(KEY, own)
        elif found != own:
            raise UsageError(
                f"a study {plan.base.name!r} exists in {storage.shown!r} with "
                f"{_differences(found, own)}. Join it with the options of its start, or "
                "give this one another --name."
            )
        check_trials(study, plan)
        # A worker with a longer interval than the others expect would look killed.
        agreed = study.user_attrs.get(HEARTBEAT)
        if agreed is None:
            study.set_user_attr(HEARTBEAT, agreed := heartbeat)
        if type(agreed) is not int or agreed < 1:
            raise ForeignError(f"its heartbeat is {agreed!r:.80}")
        storage.rdb.heartbeat_interval = agreed
    return study


def _filled_in(found: Any, own: dict[str, Any]) -> Any:
    """Return a study's definition, completed by settings that train did not have then."""
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        return found
    defaults = plain_settings(TrainConfig())
    new = {name: defaults[name] for name in own["settings"] if name not in found["settings"]}
    return {**found, "settings": {**new, **found["settings"]}}


def _differences(found: Any, own: dict[str, Any]) -> str:
    """Describe how a study differs from the requested one."""
    if not isinstance(found, dict):
        return "trials that this command did not make"
    names = [
        f"--{name}" if name != "settings" else _settings(found, own)
        for name in sorted({*found, *own})
        if found.get(name) != own.get(name)
    ]
    return f"another {', '.join(names)}"


def _settings(found: dict[str, Any], own: dict[str, Any]) -> str:
    theirs, ours = found.get("settings", {}), own["settings"]
    return ", ".join(n for n in sorted({*theirs, *ours}) if theirs.get(n) != ours.get(n))
