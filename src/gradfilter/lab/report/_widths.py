"""Double descent: error and Lipschitz constant against the width of one family of models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from gradfilter.lab.report._facets import facets
from gradfilter.lab.report._figure import MOST, Axis, Curve, Mark, plot
from gradfilter.lab.report._groups import Group, apart_from, finished
from gradfilter.lab.report._parts import Plot, Section
from gradfilter.lab.report._runs import Run, usual_variant
from gradfilter.lab.report._spread import points

FEWEST = 3
"""Widths that make a curve."""
SPLITS = {"train": "--", "test": "-", "val": ":"}
LEAD = (
    "The interpolation threshold is the first width whose training error, by the labels trained "
    "on, is 0 in every run."
)


@dataclass(frozen=True)
class Family:
    """Models of one kind in several widths, the same in all other settings.

    Attributes:
        name: Without the width.
        groups: In the order of the widths.
    """

    name: str
    groups: tuple[Group, ...]

    @property
    def threshold(self) -> Group | None:
        """The first width that fits all of its training labels."""
        fits = (g for g in self.groups if all(r.last("train_accuracy") == 1 for r in g.runs))
        return next(fits, None)


def widths(groups: Sequence[Group]) -> Section:
    """Errors, Lipschitz constants and Jacobians against width and parameters."""
    title, parts, left_out = "Width and double descent", [], []
    by_name: dict[str, list[Family]] = {}
    for family in families(finished(groups)):
        by_name.setdefault(family.name, []).append(family)
    if not by_name:
        left_out.append(
            f"Needs finished runs of one model in {FEWEST} or more widths (mlp_H, cnn_K, "
            "resnet18_K), the same in all other settings."
        )
    for name, members in by_name.items():
        for quantity in (_errors, _lipschitz, _jacobians):
            drawn = [p for x in (_width, _parameters) for p in quantity(name, members, x)]
            parts += drawn
            if not drawn:
                left_out.append(f"{name}: {_MISSING[quantity]}")
    return Section("width", title, LEAD, parts, left_out)


def families(groups: Sequence[Group]) -> Iterator[Family]:
    """Families of models with at least `FEWEST` widths."""
    for alike in apart_from(groups, "model"):
        by_name: dict[str, list[Group]] = {}
        for group in alike:
            if name := family_and_width(group.runs[0].settings["model"])[0]:
                by_name.setdefault(name, []).append(group)
        for name, members in by_name.items():
            if len(members) >= FEWEST:
                yield Family(name, tuple(sorted(members, key=_width)))


def family_and_width(model: str) -> tuple[str, int]:
    """What a model is called without its width, and the width; no name if it has none.

    Examples:
        >>> family_and_width("resnet18_16"), family_and_width("vgg11")
        (('resnet18', 16), ('', 0))
    """
    found = re.fullmatch(r"(\w+)_(\d+)", model)
    return (found[1], int(found[2])) if found else ("", 0)


def _width(group: Group) -> float:
    return family_and_width(group.runs[0].settings["model"])[1]


def _parameters(group: Group) -> float:
    return group.runs[0].parameters


Place = Callable[[Group], float]
Line = tuple[str, Callable[[Run], float], str]
"""What to call it, the number, and its dashes."""


def _errors(name: str, members: Sequence[Family], place: Place) -> list[Plot]:
    lines: list[Line] = [
        (f"{split} error", _error(split), SPLITS[split]) for split in ("test", "train")
    ]
    return _figures(name, members, place, lines, "error", Axis("error (%)", "error", 100))


def _error(split: str) -> Callable[[Run], float]:
    return lambda run: 1 - run.last(f"{split}_accuracy")


def _lipschitz(name: str, members: Sequence[Family], place: Place) -> list[Plot]:
    lines = _measured(members, "jacobian_operator_norm", "lipschitz")
    axis = Axis("√(mean σ²) of input Jacobians", "lipschitz")
    return _figures(name, members, place, lines, "empirical Lipschitz constant", axis)


def _jacobians(name: str, members: Sequence[Family], place: Place) -> list[Plot]:
    axis = Axis("mean Frobenius norm", "jacobian")
    lines = _measured(members, "jacobian", "mean")
    return _figures(name, members, place, lines, "input Jacobian", axis)


def _measured(members: Sequence[Family], metric: str, number: str) -> list[Line]:
    runs = [run for family in members for group in family.groups for run in group.runs]
    ways = {split: usual_variant(runs, metric, split) for split in SPLITS}
    return [
        (f"{split} images", partial(Run.at_end, variant=ways[split], number=number), dashes)
        for split, dashes in SPLITS.items()
    ]


_MISSING = {
    _errors: "no error was measured.",
    _lipschitz: "empirical Lipschitz constant: needs gradfilter stats --metric "
    "jacobian_operator_norm --last on these runs.",
    _jacobians: "input Jacobian: needs gradfilter stats --metric jacobian --last on these runs.",
}


def _figures(
    name: str, members: Sequence[Family], place: Place, lines: Sequence[Line], what: str, y: Axis
) -> list[Plot]:
    settings = [{n: v for n, v in f.groups[0].settings.items() if n != "model"} for f in members]
    by = "width" if place is _width else "parameters"
    found = []
    for facet in facets(settings, most=MOST // 2):
        drawn: list[Curve] = []
        marks: dict[str, Mark] = {}
        never = []
        several = len(facet.members) > 1
        for colour, member in enumerate(facet.members):
            family = members[member]
            setting = family.groups[0].label(facet.names) if facet.names else ""
            for called, number, dashes in lines:
                data = points(family.groups, place, number)
                if len(data) > 1:
                    label = _joined(called, setting)
                    style = colour if several else len(drawn)
                    drawn.append(Curve(label, data, settings[member], style, dashes))
            mark = _joined("interpolation threshold", setting)
            if family.threshold is None:
                never.append(mark)
            elif math.isfinite(at := place(family.threshold)):
                marks[mark] = Mark(at, colour if several else None)
        if drawn:
            found.append(
                plot(
                    f"{by}-{name}-{y.name}{facet.suffix}",
                    facet.titled(f"{name}: {what} against {by}"),
                    drawn,
                    Axis(by, by, log=_base(by, drawn)),
                    y,
                    note="".join(f"No width reaches the {mark}. " for mark in never).strip(),
                    marks=marks,
                    points=True,
                )
            )
    return found


def _base(by: str, curves: Sequence[Curve]) -> int | None:
    places = [x for curve in curves for x in curve.data["x"]]
    if max(places) < 8 * min(places):
        return None
    return 2 if by == "width" else 10


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
