"""Group trainings by setting, and compute mean and standard deviation over seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gradfilter.lab.report._runs import DEFAULTS, RecordedRun
from gradfilter.lab.train._train_config import PLACE, WATCHING

# --- Trainings that differ only by chance, and what distinguishes the others ---


CHANCE = ("seed", "label_seed", "data_split_seed")
"""Settings that only change random numbers."""
FIRST = ("data", "model")
"""Settings that come first in a label."""
STATED = ("data", "model", "label_noise", "optimizer", "learning_rate", "batch_size", "epochs")
"""Settings that are part of a label even if they are defaults."""
WORDS = {
    **{"agc": "AGC", "sam": "SAM", "gsam": "GSAM"},
    **{"friendly_sam": "Friendly-SAM", "look_sam": "LookSAM"},
}
"""Labels of settings that differ from their names."""
BARE = ("data", "model", "optimizer")
"""Settings whose values need no name in a label."""


@dataclass(frozen=True)
class Setting:
    """The trainings of one setting; finished and unfinished ones are separate groups.

    Attributes:
        settings: The settings in which groups differ.
        runs: The trainings, at least one.
        finished: Whether they are finished.
    """

    settings: Mapping[str, Any]
    runs: tuple[RecordedRun, ...]
    finished: bool

    def label(self, names: Iterable[str] | None = None) -> str:
        """Return a label from the settings in which groups differ.

        Args:
            names: Names of settings to use; None for all.
        """
        chosen = self.settings if names is None else names
        said = ", ".join(said for n in chosen if (said := wording(n, self.settings[n])))
        return (said or "plain") + ("" if self.finished else " (unfinished)")

    def full_text(self, without: Sequence[str] = ()) -> str:
        """Return all settings that are stated or not the default, without the seeds.

        Args:
            without: Settings to omit.
        """
        first = self.runs[0].settings
        left_out = {*CHANCE, *PLACE, *WATCHING} - {*self.settings}
        names = [*FIRST, *(n for n in DEFAULTS if n not in {*FIRST, *left_out})]
        chosen = [n for n in names if n not in without]
        said = [text for n in chosen if (text := wording(n, first[n]))]
        return ", ".join([*said, *([] if self.finished else ["unfinished"])])


def groups_of(runs: Sequence[RecordedRun]) -> tuple[list[Setting], list[str]]:
    """Group runs by their settings, in natural order; also return which runs were omitted.

    The kind of device is a setting because it changes the seconds. --name is a setting only where
    two runs differ in nothing else. Of equal runs, only the first is used.
    """
    unimportant = {*CHANCE, *PLACE, *WATCHING, "save_checkpoint"} - {"device"}
    names = [*FIRST, *(name for name in DEFAULTS if name not in {*unimportant, *FIRST})]
    same = Counter((_key(run, names), _key(run, CHANCE), run.finished) for run in runs)
    named = {(setting, done) for (setting, _, done), count in same.items() if count > 1}
    by_setting: dict[tuple[Any, ...], dict[tuple[Any, ...], RecordedRun]] = {}
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
        Setting({n: settings[n] for n in differing}, tuple(members.values()), bool(key[-1]))
        for settings, (key, members) in zip(found, by_setting.items(), strict=True)
    ]
    return sorted(groups, key=lambda g: (*map(order, g.settings.values()), not g.finished)), doubles


def finished(groups: Iterable[Setting]) -> list[Setting]:
    """Return the finished groups."""
    return [group for group in groups if group.finished]


def differing(groups: Sequence[Setting]) -> list[str]:
    """Return the settings in which these groups differ."""
    names = groups[0].settings if groups else ()
    return [n for n in names if len({group.settings[n] for group in groups}) > 1]


def grouped_by_all_but(groups: Iterable[Setting], *names: str) -> list[list[Setting]]:
    """Collect groups that agree in all other settings."""
    found: dict[tuple[Any, ...], list[Setting]] = {}
    for group in groups:
        key = tuple(value for name, value in group.settings.items() if name not in names)
        found.setdefault(key, []).append(group)
    return list(found.values())


def setting_name(name: str) -> str:
    """Return the name of a setting in words.

    Examples:
        >>> setting_name("batch_size"), setting_name("agc")
        ('batch size', 'AGC')
    """
    return WORDS.get(name, name.replace("_", " "))


def wording(name: str, value: Any) -> str:
    """Describe a setting in a few words; empty if it is off or usual.

    Examples:
        >>> wording("model", "mlp_8"), wording("agree", 0.9), wording("agree", None)
        ('mlp_8', 'agree 0.9', '')
        >>> wording("nesterov", True), wording("label_noise", 0.0)
        ('nesterov', 'label noise 0')
    """
    said = setting_name(name)
    if value == (None if name in STATED else DEFAULTS.get(name)):
        return ""
    if isinstance(value, bool) or value is None or value == ():
        return said if value is True else f"{said} off"
    text = (
        " ".join(map(_as_json_value, value)) if isinstance(value, tuple) else _as_json_value(value)
    )
    return text if name in BARE else f"{said} {text}"


def order(value: Any) -> tuple[Any, ...]:
    """Return a sort key: None first, numbers by size, also numbers inside names.

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


def _key(run: RecordedRun, names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(run.settings[name] for name in names)


def _as_json_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


# --- Mean and standard deviation over seeds, of numbers and of curves ---


class Spread(NamedTuple):
    """Mean and standard deviation of the finite numbers.

    Attributes:
        mean: Mean; NaN without numbers.
        sd: Sample standard deviation; NaN for fewer than two numbers.
        runs: Number of finite numbers.
    """

    mean: float
    sd: float
    runs: int

    def shown(self, factor: float = 1.0, digits: int | None = 1) -> str:
        """Return the numbers as text.

        Args:
            factor: Converts the number to the unit.
            digits: Number of decimals; None for four significant digits.

        Examples:
            >>> [mean_and_sd(v).shown(100) for v in ([0.91, 0.93], [0.5], [])]
            ['92.0 ± 1.4', '50.0', '–']
        """
        if math.isnan(self.mean):
            return "–"
        most, least = (".4g", ".2g") if digits is None else (f".{digits}f",) * 2
        mean = f"{factor * self.mean:{most}}"
        return mean if math.isnan(self.sd) else f"{mean} ± {factor * self.sd:{least}}"


def mean_and_sd(values: Iterable[float]) -> Spread:
    """Compute mean, sample standard deviation and number of the finite values."""
    known = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(known) if known else math.nan
    return Spread(mean, statistics.stdev(known) if len(known) > 1 else math.nan, len(known))


def band(runs: Sequence[RecordedRun], x: str, y: str) -> pd.DataFrame:
    """Compute mean and standard deviation of a curve over runs, where all of them have it.

    A run is interpolated linearly between its evaluations, because times differ from seed to seed;
    at equal numbers of samples nothing is interpolated. An evaluation without the number leaves a
    gap.

    Args:
        runs: The runs; those without any such number are ignored.
        x: Name of an increasing column of the metrics.
        y: Name of the column to average.

    Returns:
        Columns x, mean, sd (NaN for one run), runs. Empty if no run has such numbers.
    """
    curves = [_curve(run, x, y) for run in runs]
    curves = [curve for curve in curves if curve[y].notna().any()]
    if not curves:
        return pd.DataFrame(columns=["x", "mean", "sd", "runs"], dtype=float)
    places = np.unique(np.concatenate([curve[x] for curve in curves]))
    values = np.array([_at(places, *curve[[x, y]].to_numpy().T) for curve in curves])
    everywhere = np.isfinite(values).all(axis=0)
    places, values = places[everywhere], values[:, everywhere]
    sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(len(places), math.nan)
    return pd.DataFrame({"x": places, "mean": values.mean(axis=0), "sd": sd, "runs": len(curves)})


def _curve(run: RecordedRun, x: str, y: str) -> pd.DataFrame:
    known = run.metrics[[x, y]].replace([math.inf, -math.inf], math.nan).dropna(subset=[x])
    return known.sort_values(x).drop_duplicates(x, keep="last")


def _at(places: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate a curve at these positions; NaN outside and next to a missing number."""
    right = np.searchsorted(x, places).clip(max=len(x) - 1)
    exact = x[right] == places
    left = np.where(exact, right, right - 1).clip(min=0)
    width = np.where(right > left, x[right] - x[left], 1.0)
    found = y[left] + (y[right] - y[left]) * (places - x[left]) / width
    return np.where((places < x[0]) | (places > x[-1]), math.nan, found)


def at_time(run: RecordedRun, seconds: float, name: str) -> float:
    """Return a number of the last evaluation within `seconds` of training; NaN before the first."""
    until = run.metrics[run.metrics["seconds"] <= seconds]
    return float(until[name].iloc[-1]) if len(until) else math.nan


def points(
    groups: Iterable[Setting],
    place: Callable[[Setting], float],
    number: Callable[[RecordedRun], float],
) -> pd.DataFrame:
    """Compute mean and standard deviation of one number per run, at one position per group.

    Returns:
        Columns as of `band`, ordered by position; groups without the number are omitted.
    """
    found = [(place(group), *mean_and_sd(map(number, group.runs))) for group in groups]
    data = pd.DataFrame(found, columns=["x", "mean", "sd", "runs"])
    return data.dropna(subset=["x", "mean"]).sort_values("x", ignore_index=True)
