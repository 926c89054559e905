"""So many curves that nobody would look at them all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradfilter.lab.report._groups import Group
from gradfilter.lab.report._spread import spread

MOST_SETTINGS = 42
"""Settings whose curves are drawn; tables have all of them."""


def shortlist(
    groups: Sequence[Group], most: int = MOST_SETTINGS
) -> tuple[Sequence[Group], list[str]]:
    """The settings whose curves are drawn, and a line about the others if there are any.

    Those with the highest validation accuracy; where that was not measured everywhere the first
    ones, for a choice by test accuracy would be no fair one.
    """
    if len(groups) <= most:
        return groups, []
    validation = [spread(run.last("val_accuracy") for run in g.runs).mean for g in groups]
    places = list(range(len(groups)))
    if measured := not any(map(math.isnan, validation)):
        places.sort(key=lambda place: -validation[place])
    why = "the highest validation accuracy" if measured else "the first places in the table"
    kept = [groups[place] for place in sorted(places[:most])]
    return kept, [f"Curves of {len(groups) - most} more settings; drawn are the {most} with {why}."]
