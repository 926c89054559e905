"""Make tables in Markdown and dots of charts, both from the same contests."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._dots import Dot, Panel, Value, short

Json = dict[str, Any]
IsOurs = Callable[[str], bool]


def label(contest: Json) -> str:
    """Return the title of a contest, with the size (M, B) if it has one."""
    if "microbatches" not in contest:
        return str(contest["title"])
    return "{title}, ({microbatches}, {samples_per_microbatch})".format(**contest)


def names_of(contests: Sequence[Json]) -> list[str]:
    """Return the names of all contenders, in their order."""
    return list(dict.fromkeys(name for contest in contests for name in contest["results"]))


def spread(cell: Json | None, of: str = "ratio") -> Value | None:
    """Return lower quartile, median and upper quartile of a cell."""
    found = (cell or {}).get(of)
    return found and (found["lower_quartile"], found["median"], found["upper_quartile"])


def ratio(cell: Json | None, ours: bool) -> str:
    """Format a ratio with its quartiles: 1.68 [1.65, 1.71]."""
    if cell is None:
        return "–"
    value = spread(cell)
    if value is None:
        return "none" if "failure" in cell else "–"
    low, middle, high = map(short, value)
    return f"{bold(middle, ours)} [{low}, {high}]"


def bold(text: str, ours: bool) -> str:
    """Make numbers of gradfilter bold."""
    return f"**{text}**" if ours else text


def milliseconds(cell: Json | None) -> str:
    """Format the time of a base, whose ratio is always 1: 7.92 ms [7.81, 8.1]."""
    value = spread(cell, "seconds")
    if value is None:
        return "none"
    low, middle, high = (f"{v:.3g}" if v < 999.5 else f"{v:.0f}" for v in (1e3 * s for s in value))
    return f"{middle} ms [{low}, {high}]"


def cell_of(contest: Json, name: str, base: str, ours: IsOurs) -> str:
    """Return the ratio of a contender, or the time of the base."""
    cell = contest["results"].get(name)
    return milliseconds(cell) if name == base else ratio(cell, ours(name))


def by_contest(contests: Sequence[Json], base: str, ours: IsOurs) -> str:
    """Make a table with one row per contest and one column per contender."""
    names = [base, *(name for name in names_of(contests) if name != base)]
    rows = [[label(c), *(cell_of(c, name, base, ours) for name in names)] for c in contests]
    return markdown(["", *names], rows) + failures(contests)


def by_contender(contests: Sequence[Json], base: str, ours: IsOurs) -> str:
    """Make a table with one row per contender and one column per contest."""
    names = names_of(contests)
    rows = [[name, *(cell_of(c, name, base, ours) for c in contests)] for name in names]
    return markdown(["", *map(label, contests)], rows) + failures(contests)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table; the first column is left-aligned, numbers are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def failures(contests: Sequence[Json]) -> str:
    """List the contenders without a number, and the reason."""
    found = [
        f"- none for {name} ({label(contest)}): `{cell['failure']}`"
        for contest in contests
        for name, cell in contest["results"].items()
        if "failure" in cell
    ]
    return "\n" + "\n".join(found) + "\n" if found else ""


def panel(contest: Json, names: Sequence[str], ours: IsOurs) -> Panel:
    """Make dots of the ratios of one contest."""
    results = contest["results"]
    return Panel(label(contest), [dot(name, results.get(name), ours(name)) for name in names])


def dot(name: str, cell: Json | None, ours: bool) -> Dot:
    """Make a dot of one ratio; a contender that did not take part has an empty line."""
    return Dot(name, spread(cell), ours, "none, see the table" if cell else "")


def panels(
    contests: Sequence[Json], base: str, ours: IsOurs, *, aligned: bool = False
) -> list[Panel]:
    """Make panels of all contenders except the base, which is the line at 1.

    ``aligned`` gives all panels the same names.
    """
    return [
        panel(c, [name for name in names_of(contests if aligned else [c]) if name != base], ours)
        for c in contests
    ]


def faster(contests: Sequence[Json], pairs: Sequence[tuple[str, Sequence[str]]]) -> str:
    """List contenders that are faster than ours at the same work, by the printed medians.

    Args:
        contests: The measurements.
        pairs: A contender of ours, and others that do the same work.
    """
    lines = []
    for contest in contests:
        medians = {name: value[1] for name, cell in contest["results"].items()
                   if (value := spread(cell))}  # fmt: skip
        for ours, others in pairs:
            own = medians.get(ours, 0.0)
            ahead = [
                f"`{name}` {short(medians[name])}"
                for name in others
                if medians.get(name, own) < own and short(medians[name]) != short(own)
            ]
            if ahead:
                lines.append(f"- {label(contest)}: {', '.join(ahead)}; `{ours}` {short(own)}")
    return "\n".join(["Faster than ours:\n", *lines]) if lines else "No other contender is faster."


def reach(contests: Sequence[Json], name: str) -> str:
    """Return the lowest and the highest median of a contender: 1.09 to 2.62."""
    values = [spread(c["results"].get(name)) for c in contests]
    medians = sorted(value[1] for value in values if value)
    if not medians:
        return "none"
    low, high = short(medians[0]), short(medians[-1])
    return low if low == high else f"{low} to {high}"
