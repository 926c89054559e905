"""Many curves in several figures, so that each can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradfilter.lab.report._figure import MOST
from gradfilter.lab.report._groups import order, wording

Settings = Mapping[str, Any]
FEW = 2
"""So few curves share a figure with those of the next value."""


@dataclass(frozen=True)
class Facet:
    """Curves of one figure.

    Attributes:
        common: What they have in common and others have not.
        place: ``(2 of 3)`` if there are others.
        suffix: For the name of the file.
        members: Their places in the whole sequence.
        names: The settings in which they differ.
    """

    common: str
    place: str
    suffix: str
    members: tuple[int, ...]
    names: tuple[str, ...]

    def titled(self, title: str) -> str:
        """A figure's title, and which of several it is."""
        named = ": ".join(part for part in (title, self.common) if part)
        return f"{named} {self.place}".strip()


def facets(settings: Sequence[Settings], most: int = MOST) -> list[Facet]:
    """Cut into parts of at most so many curves, along the first setting that cuts them.

    Args:
        settings: Of every curve; all have the same names.
        most: Curves that can be told apart in one figure.

    Examples:
        >>> many = [{"model": f"mlp_{w}", "agc": a} for w in (8, 16) for a in (None, 0.1)]
        >>> [(facet.titled("Loss"), facet.members) for facet in facets(many, most=3)]
        [('Loss: mlp_8 (1 of 2)', (0, 1)), ('Loss: mlp_16 (2 of 2)', (2, 3))]
    """
    if not settings:
        return []
    names = list(settings[0])
    parts = _cut(settings, list(range(len(settings))), names, most)
    found = []
    for number, part in enumerate(parts, 1):
        own = [n for n in names if len({settings[i][n] for i in part}) > 1]
        common = [n for n in names if n not in own and len({s[n] for s in settings}) > 1]
        said = ", ".join(w for n in common if (w := wording(n, settings[part[0]][n])))
        place = f"({number} of {len(parts)})" if len(parts) > 1 else ""
        suffix = f"-{number}" if place else ""
        found.append(Facet(said, place, suffix, tuple(part), tuple(own)))
    return found


def _cut(
    settings: Sequence[Settings], members: list[int], names: Sequence[str], most: int
) -> list[list[int]]:
    if len(members) <= most:
        return [members]
    name = next((n for n in names if len({settings[i][n] for i in members}) > 1), None)
    if name is None:
        return [members[i : i + most] for i in range(0, len(members), most)]
    values = sorted({settings[i][name] for i in members}, key=order)
    parts: list[list[int]] = []
    room = 0  # in the last part, for whole values only
    for value in values:
        of_value = [i for i in members if settings[i][name] == value]
        if len(of_value) <= min(FEW, room):
            parts[-1] += of_value
            room -= len(of_value)
        else:
            parts += _cut(settings, of_value, names, most)
            room = most - len(of_value) if len(of_value) <= FEW else 0
    return parts
