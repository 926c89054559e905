"""Trainings that differ in nothing but chance, and what tells the others apart."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradfilter.lab.report._runs import DEFAULTS, Run
from gradfilter.lab.train._config import PLACE, WATCHING

CHANCE = ("seed", "label_seed", "data_split_seed")
"""Settings that only draw again."""
FIRST = ("data", "model")
"""Settings that are said before the others."""
STATED = ("data", "model", "label_noise", "optimizer", "learning_rate", "batch_size", "epochs")
"""Settings that are said also where they are the defaults."""
WORDS = {"agc": "AGC", "sam": "SAM", "gsam": "GSAM"}
"""What settings are called, where that is not their name."""
BARE = ("data", "model", "optimizer")
"""Settings whose values say what they are."""


@dataclass(frozen=True)
class Group:
    """The trainings of one setting; finished ones and others are never one group.

    Attributes:
        settings: Those in which the groups differ.
        runs: At least one.
        finished: Whether they are.
    """

    settings: Mapping[str, Any]
    runs: tuple[Run, ...]
    finished: bool

    def label(self, names: Iterable[str] | None = None) -> str:
        """What it is called among others, by the settings in which they differ.

        Args:
            names: These settings; None for all.
        """
        chosen = self.settings if names is None else names
        said = ", ".join(said for n in chosen if (said := wording(n, self.settings[n])))
        return (said or "plain") + ("" if self.finished else " (unfinished)")


def groups_of(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Runs by their settings, in an order that people expect, and which runs were left out.

    A kind of device counts as a setting because it changes the seconds; --name counts only for
    settings of which two runs differ in nothing else. Of runs that are the same in everything the
    first counts.
    """
    unimportant = {*CHANCE, *PLACE, *WATCHING, "save_checkpoint"} - {"device"}
    names = [*FIRST, *(name for name in DEFAULTS if name not in {*unimportant, *FIRST})]
    same = Counter((_key(run, names), _key(run, CHANCE), run.finished) for run in runs)
    named = {(setting, done) for (setting, _, done), count in same.items() if count > 1}
    by_setting: dict[tuple[Any, ...], dict[tuple[Any, ...], Run]] = {}
    doubles = []
    for run in runs:
        setting = _key(run, names)
        name = run.settings["name"] if (setting, run.finished) in named else ""
        of_setting = by_setting.setdefault((*setting, name, run.finished), {})
        first = of_setting.setdefault(_key(run, CHANCE), run)
        if first is not run:
            doubles.append(f"{str(run.path)!r} has the settings and seeds of {str(first.path)!r}.")
    found = [dict(zip((*names, "name"), key, strict=False)) for key in by_setting]
    differing = [n for n in (*names, "name") if len({settings[n] for settings in found}) > 1]
    groups = [
        Group({n: settings[n] for n in differing}, tuple(members.values()), bool(key[-1]))
        for settings, (key, members) in zip(found, by_setting.items(), strict=True)
    ]
    return sorted(groups, key=lambda g: (*map(order, g.settings.values()), not g.finished)), doubles


def finished(groups: Iterable[Group]) -> list[Group]:
    """Those that were trained to their end."""
    return [group for group in groups if group.finished]


def differing(groups: Sequence[Group]) -> list[str]:
    """The settings in which these groups differ."""
    names = groups[0].settings if groups else ()
    return [n for n in names if len({group.settings[n] for group in groups}) > 1]


def apart_from(groups: Iterable[Group], *names: str) -> list[list[Group]]:
    """Groups that are the same in all other settings, together."""
    found: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        key = tuple(value for name, value in group.settings.items() if name not in names)
        found.setdefault(key, []).append(group)
    return list(found.values())


def wording(name: str, value: Any) -> str:
    """A setting in a few words; nothing if it is off, or what it usually is.

    Examples:
        >>> wording("model", "mlp_8"), wording("agree", 0.9), wording("agree", None)
        ('mlp_8', 'agree 0.9', '')
        >>> wording("nesterov", True), wording("label_noise", 0.0)
        ('nesterov', 'label noise 0')
    """
    said = WORDS.get(name, name.replace("_", " "))
    if value == (None if name in STATED else DEFAULTS.get(name)):
        return ""
    if isinstance(value, bool) or value is None or value == ():
        return said if value is True else f"{said} off"
    text = " ".join(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
    return text if name in BARE else f"{said} {text}"


def order(value: Any) -> tuple[Any, ...]:
    """A key that sorts what is unset first, numbers by size, also those inside of names.

    Examples:
        >>> sorted(["mlp_16", "mlp_8", None, "cnn_32"], key=order)
        [None, 'cnn_32', 'mlp_8', 'mlp_16']
    """
    if value is None:
        return (0,)
    if isinstance(value, bool | int | float):
        return (1, value)
    parts = re.split(r"(\d+)", str(value))
    return (2, *((0, "", int(p)) if p.isdigit() else (1, p, 0) for p in parts))


def _key(run: Run, names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(run.settings[name] for name in names)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
