"""Tables of the page, in Markdown, and the dots of its charts: both of the same contests."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._dots import Dot, Panel, Value, short

Json = dict[str, Any]
IsOurs = Callable[[str], bool]


def label(contest: Json) -> str:
    """The title of a contest, with the size (M, B) if it has one."""
    if "microbatches" not in contest:
        return str(contest["title"])
    return "{title}, ({microbatches}, {samples_per_microbatch})".format(**contest)


def names_of(contests: Sequence[Json]) -> list[str]:
    """All contenders, in their order."""
    return list(dict.fromkeys(name for contest in contests for name in contest["results"]))


def spread(cell: Json | None, of: str = "ratio") -> Value | None:
    """Quartiles and median of a cell, in their order on the axis."""
    found = (cell or {}).get(of)
    return found and (found["lower_quartile"], found["median"], found["upper_quartile"])


def ratio(cell: Json | None, ours: bool) -> str:
    """1.68 [1.65, 1.71]."""
    if cell is None:
        return "–"
    value = spread(cell)
    if value is None:
        return "none" if "failure" in cell else "–"
    low, middle, high = map(short, value)
    return f"{bold(middle, ours)} [{low}, {high}]"


def bold(text: str, ours: bool) -> str:
    """Numbers of gradfilter stand out."""
    return f"**{text}**" if ours else text


def milliseconds(cell: Json | None) -> str:
    """Of a base, which has no ratio worth writing: 7.92 ms [7.81, 8.1]."""
    value = spread(cell, "seconds")
    if value is None:
        return "none"
    low, middle, high = (f"{v:.3g}" if v < 999.5 else f"{v:.0f}" for v in (1e3 * s for s in value))
    return f"{middle} ms [{low}, {high}]"


def cell_of(contest: Json, name: str, base: str, ours: IsOurs) -> str:
    """The ratio of a contender, or the time of the base."""
    cell = contest["results"].get(name)
    return milliseconds(cell) if name == base else ratio(cell, ours(name))


def by_contest(contests: Sequence[Json], base: str, ours: IsOurs) -> str:
    """One row per contest, one column per contender."""
    names = [base, *(name for name in names_of(contests) if name != base)]
    rows = [[label(c), *(cell_of(c, name, base, ours) for name in names)] for c in contests]
    return markdown(["", *names], rows) + failures(contests)


def by_contender(contests: Sequence[Json], base: str, ours: IsOurs) -> str:
    """One row per contender, one column per contest."""
    names = names_of(contests)
    rows = [[name, *(cell_of(c, name, base, ours) for c in contests)] for name in names]
    return markdown(["", *map(label, contests)], rows) + failures(contests)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is left-aligned, numbers are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def failures(contests: Sequence[Json]) -> str:
    """Why some contenders have no number."""
    found = [
        f"- none for {name} ({label(contest)}): `{cell['failure']}`"
        for contest in contests
        for name, cell in contest["results"].items()
        if "failure" in cell
    ]
    return "\n" + "\n".join(found) + "\n" if found else ""


def panel(contest: Json, names: Sequence[str], ours: IsOurs) -> Panel:
    """The ratios of one contest as dots."""
    results = contest["results"]
    return Panel(label(contest), [dot(name, results.get(name), ours(name)) for name in names])


def dot(name: str, cell: Json | None, ours: bool) -> Dot:
    """One ratio; a contender that took no part has an empty line."""
    return Dot(name, spread(cell), ours, "none, see the table" if cell else "")


def panels(
    contests: Sequence[Json], base: str, ours: IsOurs, *, aligned: bool = False
) -> list[Panel]:
    """Everybody but the base, which is the line at 1; aligned: the same names in all panels."""
    return [
        panel(c, [name for name in names_of(contests if aligned else [c]) if name != base], ours)
        for c in contests
    ]


def faster(contests: Sequence[Json], pairs: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Who is ahead of ours at the same work, by the medians as they are written.

    Args:
        contests: What was measured.
        pairs: A contender of ours, and others that do what it does.
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
    return "\n".join(["Ahead of ours:\n", *lines]) if lines else "Nobody is ahead of ours."


def reach(contests: Sequence[Json], name: str) -> str:
    """From the lowest to the highest median of a contender: 1.09 to 2.62."""
    values = [spread(c["results"].get(name)) for c in contests]
    medians = sorted(value[1] for value in values if value)
    if not medians:
        return "none"
    low, high = short(medians[0]), short(medians[-1])
    return low if low == high else f"{low} to {high}"
