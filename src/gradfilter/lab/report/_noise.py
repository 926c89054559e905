"""Accuracy against the part of the labels that is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from gradfilter.lab.report._accuracy import last
from gradfilter.lab.report._facets import facets
from gradfilter.lab.report._figure import Axis, Curve, plot
from gradfilter.lab.report._groups import Group, apart_from, differing, finished
from gradfilter.lab.report._parts import Plot, Section, Table
from gradfilter.lab.report._spread import points
from gradfilter.lab.report._table import Column, Row, table

NOISE = "label_noise"


def noise(groups: Sequence[Group]) -> Section:
    """A line per rule and a column per noise."""
    name, title = "label-noise", "Label noise"
    lead = "Final test accuracy, by the part of the training labels that is wrong."
    rules = [r for r in apart_from(finished(groups), NOISE) if len(r) > 1]
    if not rules:
        why = "Needs finished runs that differ in --label-noise alone."
        return Section(name, title, lead, left_out=[why])
    return Section(name, title, lead, [_table(rules), *_figures(rules)])


def _table(rules: Sequence[Sequence[Group]]) -> Table:
    levels = sorted({group.settings[NOISE] for rule in rules for group in rule})
    names = _names(rules)
    rows = []
    for rule in rules:
        at = {group.settings[NOISE]: group.runs for group in rule}
        values = [[run.last("test_accuracy") for run in at.get(level, ())] for level in levels]
        settings = {name: rule[0].settings[name] for name in names}
        rows.append(Row(rule[0].label(names), settings, values))
    columns = [Column(f"noise_{level:g}", f"{100 * level:g} % wrong") for level in levels]
    return table(
        "label-noise", "Final test accuracy (%)", columns, rows, first="rule", note="Mean ± sd."
    )


def _figures(rules: Sequence[Sequence[Group]]) -> list[Plot]:
    names = _names(rules)
    settings = [{name: rule[0].settings[name] for name in names} for rule in rules]
    found = []
    for facet in facets(settings):
        lines = [
            Curve(
                rules[member][0].label(facet.names),
                points(rules[member], lambda g: g.settings[NOISE], last("test_accuracy")),
                settings[member],
                place,
            )
            for place, member in enumerate(facet.members)
        ]
        found.append(
            plot(
                f"accuracy-by-noise{facet.suffix}",
                facet.titled("Test accuracy against label noise"),
                lines,
                Axis("wrong training labels (%)", NOISE, 100),
                Axis("final test accuracy (%)", "test_accuracy", 100),
                points=True,
            )
        )
    return found


def _names(rules: Sequence[Sequence[Group]]) -> list[str]:
    return [name for name in differing([rule[0] for rule in rules]) if name != NOISE]
