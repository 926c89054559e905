"""Mean and standard deviation over seeds: of numbers, and of curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from gradfilter.lab.report._groups import Group
from gradfilter.lab.report._runs import Run


class Spread(NamedTuple):
    """Of the numbers that there are.

    Attributes:
        mean: NaN if there are none.
        sd: Sample standard deviation; NaN if there are fewer than two.
        runs: How many there are.
    """

    mean: float
    sd: float
    runs: int

    def shown(self, factor: float = 1.0, digits: int | None = 1) -> str:
        """For people.

        Args:
            factor: From the number to the unit.
            digits: Behind the point; None for four that count, however small the number is.

        Examples:
            >>> spread([0.91, 0.93]).shown(100), spread([0.5]).shown(), spread([]).shown()
            ('92.0 ± 1.4', '0.5', '–')
        """
        if math.isnan(self.mean):
            return "–"
        most, least = (".4g", ".2g") if digits is None else (f".{digits}f",) * 2
        mean = f"{factor * self.mean:{most}}"
        return mean if math.isnan(self.sd) else f"{mean} ± {factor * self.sd:{least}}"


def spread(values: Iterable[float]) -> Spread:
    """Mean, sample standard deviation and number of what is finite."""
    known = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(known) if known else math.nan
    return Spread(mean, statistics.stdev(known) if len(known) > 1 else math.nan, len(known))


def band(runs: Sequence[Run], x: str, y: str) -> pd.DataFrame:
    """Mean and standard deviation of a curve over runs, where all of them have it.

    Between its evaluations a run is interpolated linearly, because times differ from seed to seed;
    at equal numbers of samples nothing is interpolated. Where a run was evaluated and had no such
    number, there is a gap.

    Args:
        runs: Those that have no such number at all do not count.
        x: A column of the metrics that grows.
        y: Another.

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


def _curve(run: Run, x: str, y: str) -> pd.DataFrame:
    known = run.metrics[[x, y]].replace([math.inf, -math.inf], math.nan).dropna(subset=[x])
    return known.sort_values(x).drop_duplicates(x, keep="last")


def _at(places: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A curve at these places; NaN outside, and next to a point that has no number."""
    right = np.searchsorted(x, places).clip(max=len(x) - 1)
    exact = x[right] == places
    left = np.where(exact, right, right - 1).clip(min=0)
    width = np.where(right > left, x[right] - x[left], 1.0)
    found = y[left] + (y[right] - y[left]) * (places - x[left]) / width
    return np.where((places < x[0]) | (places > x[-1]), math.nan, found)


def at_time(run: Run, seconds: float, name: str) -> float:
    """A number of the last evaluation within so many seconds of training; NaN before the first."""
    until = run.metrics[run.metrics["seconds"] <= seconds]
    return float(until[name].iloc[-1]) if len(until) else math.nan


def points(
    groups: Iterable[Group], place: Callable[[Group], float], number: Callable[[Run], float]
) -> pd.DataFrame:
    """Mean and standard deviation of one number per run, at a place for every group.

    Returns:
        As `band`, in the order of the places; groups without the number are left out.
    """
    found = [(place(group), *spread(map(number, group.runs))) for group in groups]
    data = pd.DataFrame(found, columns=["x", "mean", "sd", "runs"])
    return data.dropna(subset=["x", "mean"]).sort_values("x", ignore_index=True)
