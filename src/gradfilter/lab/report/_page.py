"""One HTML page that needs nothing else: images and numbers are in it."""

from __future__ import annotations

import base64
import itertools
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from gradfilter.lab._reading import printable
from gradfilter.lab.report._config import ReportConfig
from gradfilter.lab.report._groups import STATED, Group, wording
from gradfilter.lab.report._parts import Plot, Section, Table
from gradfilter.lab.report._runs import DEFAULTS
from gradfilter.lab.train._config import PLACE, WATCHING

TEMPLATE = "page.html"
MADE_WITH = ("gradfilter", "matplotlib", "pandas")


def page(
    config: ReportConfig,
    out: Path,
    groups: Sequence[Group],
    sections: Sequence[Section],
    skipped: Sequence[str],
) -> str:
    """The page.

    Args:
        config: What was asked for.
        out: Where it is going to be.
        groups: At least one.
        sections: In their order.
        skipped: Which files could not be read, and why.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["embedded"] = embedded
    environment.tests["plot"] = lambda part: isinstance(part, Plot)
    template = (resources.files(__package__ or "") / TEMPLATE).read_text(encoding="utf-8")
    runs = [run for group in groups for run in group.runs]
    unfinished = sum(not run.finished for run in runs)
    typed = ["gradfilter", "report", *map(str, config.dirs), "--out", str(out)]
    return environment.from_string(template).render(
        command=printable(shlex.join(typed)),
        title=f"Report of {', '.join(map(printable, config.dirs))}",
        runs=counted(len(runs), "run"),
        state=f"; {unfinished} unfinished, on lines of their own" if unfinished else "",
        settings=counted(len(groups), "setting"),
        common=_common(groups),
        differing=[name.replace("_", " ") for name in groups[0].settings],
        sections=[section for section in sections if section.parts],
        left_out=[(section.title, why) for section in sections for why in section.left_out],
        skipped=skipped,
        made_with=[f"{name} {metadata.version(name)}" for name in MADE_WITH]
        + [f"Python {platform.python_version()}"],
        trained_with=sorted(
            {", ".join(f"{name} {number}" for name, number in r.versions.items()) for r in runs}
        ),
        csv=csv,
        alike=_alike,
    )


def csv(part: Plot | Table) -> bytes:
    """The numbers of a figure or table; what was not measured is empty."""
    content: str = part.data.to_csv(index=False, lineterminator="\n")
    return content.encode()


def counted(number: int, what: str) -> str:
    """A number of things.

    Examples:
        >>> counted(1, "run"), counted(2, "run")
        ('1 run', '2 runs')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def embedded(content: bytes, kind: str) -> str:
    """As a URL that contains what it points to.

    Examples:
        >>> embedded(b"a,b", "text/csv")
        'data:text/csv;base64,YSxi'
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _alike(parts: Sequence[Plot | Table]) -> list[list[Plot | Table]]:
    """Neighbours of one kind together: figures stand side by side."""
    return [list(members) for _, members in itertools.groupby(parts, type)]


def _common(groups: Sequence[Group]) -> str:
    """What all runs have in common, as far as it is worth saying."""
    settings = groups[0].runs[0].settings
    names = [name for name in STATED if name not in groups[0].settings]
    everywhere = [
        name
        for name in DEFAULTS
        if name not in STATED
        and name not in (*PLACE, *WATCHING)
        and len({run.settings[name] for group in groups for run in group.runs}) == 1
    ]
    return ", ".join(w for name in [*names, *everywhere] if (w := wording(name, settings[name])))
