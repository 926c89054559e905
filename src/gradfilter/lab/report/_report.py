"""``gradfilter report``: write one HTML page that contains all images and numbers."""

from __future__ import annotations

import base64
import itertools
import json
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from gradfilter.lab._run_files import printable, read_json, write_bytes
from gradfilter.lab._usage import UsageError
from gradfilter.lab.report._comparisons import accuracy, batches, noise, sharpness
from gradfilter.lab.report._curves import agreement, curves
from gradfilter.lab.report._legend import Legend, legend_picture
from gradfilter.lab.report._measurements import measurements, overview, widths
from gradfilter.lab.report._parts import Plot, Section, Table
from gradfilter.lab.report._report_config import ReportConfig
from gradfilter.lab.report._runs import DEFAULTS, read_runs
from gradfilter.lab.report._settings import STATED, Setting, groups_of, wording
from gradfilter.lab.train._progress import logging_to, progress_bar
from gradfilter.lab.train._train_config import PLACE, WATCHING

# --- The page ---


TEMPLATE = "page.html"
MADE_WITH = ("gradfilter", "matplotlib", "pandas")


def page(
    config: ReportConfig,
    out: Path,
    groups: Sequence[Setting],
    sections: Sequence[Section],
    legend: Legend,
    skipped: Sequence[str],
) -> str:
    """Render the page.

    Args:
        config: Options of the report.
        out: Directory of the report.
        groups: Groups of runs, at least one.
        sections: Sections in their order.
        legend: The lines that the sections drew.
        skipped: Files that could not be read, with the reason.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["embedded"] = embedded
    environment.filters["multiply"] = lambda number, factor: round(number * factor, 2)
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
        legend=legend,
        legend_png=_legend_picture(legend).get(LEGEND),
        csv=csv,
        alike=_grouped_by_kind,
    )


def csv(part: Plot | Table) -> bytes:
    """Return the numbers of a figure or table as CSV; cells that were not measured are empty."""
    content: str = part.data.to_csv(index=False, lineterminator="\n")
    return content.encode()


def counted(number: int, what: str) -> str:
    """Return a number with a noun, in the plural if needed.

    Examples:
        >>> counted(1, "run"), counted(2, "run")
        ('1 run', '2 runs')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def embedded(content: bytes, kind: str) -> str:
    """Return a URL that contains the content itself.

    Examples:
        >>> embedded(b"a,b", "text/csv")
        'data:text/csv;base64,YSxi'
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _grouped_by_kind(parts: Sequence[Plot | Table]) -> list[list[Plot | Table]]:
    """Group neighbours of one kind: figures stand side by side."""
    return [list(members) for _, members in itertools.groupby(parts, type)]


def _common(groups: Sequence[Setting]) -> str:
    """Describe the settings that all runs share, without defaults."""
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


# --- The command ---


PAGE = "index.html"
LEGEND = "legend.png"
"""The legend for those who take a figure elsewhere; the page has it as text."""
MANIFEST = "report.json"
"""The list of a report's files, which the next report replaces."""
KINDS = (".html", ".png", ".csv")
SECTIONS = (accuracy, curves, noise, widths, batches, sharpness, agreement, measurements, overview)

log = logging.getLogger("gradfilter.report")


def report(config: ReportConfig) -> int:
    """Run ``gradfilter report``: write tables, figures and the page.

    Returns:
        The exit code.

    Raises:
        UsageError: No training was found, or the report cannot be written.
    """
    if not config.dirs:
        raise UsageError("DIR: expected a directory with trainings, found none. Name one.")
    out = config.dirs[0] / "report" if config.out is None else config.out
    with logging_to("info") as console:
        runs, skipped = read_runs(config.dirs)
        if not runs:
            raise UsageError(
                f"no training that can be read below {', '.join(map(str, config.dirs))}"
                f"{_reasons(skipped)}. Run gradfilter train first."
            )
        groups, doubles = groups_of(runs)
        for line in doubles:
            log.warning("skipped: %s", line)
        sections, legend = [], Legend()
        with progress_bar(console, "drawing", len(SECTIONS), 0) as tick:
            for section in SECTIONS:
                sections.append(section(groups, legend))
                tick()
        content = page(config, out, groups, sections, legend, [*skipped, *doubles])
        files = {PAGE: content.encode(), **_files(sections), **_legend_picture(legend)}
        _write(out, files)
    what = f"{counted(len(runs), 'run')} in {counted(len(groups), 'setting')}"
    print(f"{what}: {printable(out / PAGE)}")
    return 0


def _reasons(skipped: Sequence[str]) -> str:
    return f" ({skipped[0].rstrip('.')}{', and others' if skipped[1:] else ''})" if skipped else ""


def _files(sections: Sequence[Section]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for part in (part for section in sections for part in section.parts):
        own = {f"{part.name}.csv": csv(part)}
        if isinstance(part, Plot):
            own[f"{part.name}.png"] = part.png
        assert not own.keys() & files.keys(), part.name
        files |= own
    return files


def _legend_picture(legend: Legend) -> dict[str, bytes]:
    """Return the file of the legend, by its name; none if no figure was drawn."""
    return {LEGEND: legend_picture(legend)} if legend.by_heading() else {}


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """Replace an earlier report; the page is written last, after all files that it names.

    Raises:
        UsageError: The directory has other files, or it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = _earlier_files(out)
        known = sorted({*earlier, *files})
        write_bytes(out / MANIFEST, json.dumps({"command": "report", "files": known}).encode())
        for name in sorted(files, key=lambda name: name == PAGE):
            write_bytes(out / name, files[name])
        for name in set(earlier) - set(files):
            (out / name).unlink(missing_ok=True)
        manifest = {"command": "report", "files": sorted(files)}
        write_bytes(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    except OSError as error:
        raise UsageError(
            f"--out: cannot write to the directory {str(out)!r}: {error.strerror or error}. "
            "Name another."
        ) from None


def _names(found: Any) -> list[str]:
    """Read the list of a report's files; names that no report writes are dropped."""
    names = [Path(name).name for name in found["files"] if found["command"] == "report"]
    return [name for name in names if Path(name).suffix in KINDS]


def _earlier_files(out: Path) -> list[str]:
    """Return the files of an earlier report in the directory."""
    names: list[str] = []
    with suppress(UsageError):  # without a valid list there is no earlier report
        names = read_json(out / MANIFEST, "the list of a report's files", "", _names)
    # A report that was killed at its start leaves a temporary file, which may be removed.
    others = [p for p in out.iterdir() if not (p.name.startswith(".") and p.suffix == ".part")]
    if not names and others:
        raise UsageError(
            f"--out: expected a new or empty directory, or that of an earlier report, found files "
            f"in {str(out)!r}. Name another."
        )
    return names
