"""The command ``gradfilter report``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradfilter.lab._reading import printable, read_json
from gradfilter.lab._rundir import write_bytes
from gradfilter.lab._usage import UsageError
from gradfilter.lab.report._accuracy import accuracy
from gradfilter.lab.report._agreement import agreement
from gradfilter.lab.report._batches import batches
from gradfilter.lab.report._config import ReportConfig
from gradfilter.lab.report._curves import curves
from gradfilter.lab.report._groups import groups_of
from gradfilter.lab.report._measurements import measurements, overview
from gradfilter.lab.report._noise import noise
from gradfilter.lab.report._page import counted, csv, page
from gradfilter.lab.report._parts import Plot, Section
from gradfilter.lab.report._runs import read_runs
from gradfilter.lab.report._sharpness import sharpness
from gradfilter.lab.report._widths import widths
from gradfilter.lab.train._progress import progress_bar, speaking

PAGE = "index.html"
MANIFEST = "report.json"
"""Which files are a report's, so that the next one can replace them."""
KINDS = (".html", ".png", ".csv")
SECTIONS = (accuracy, curves, noise, widths, batches, sharpness, agreement, measurements, overview)

log = logging.getLogger("gradfilter.report")


def report(config: ReportConfig) -> int:
    """Write tables, figures and the page.

    Returns:
        The exit code.

    Raises:
        UsageError: There is no training, or the report cannot be written.
    """
    if not config.dirs:
        raise UsageError("DIR: expected a directory with trainings, found none. Name one.")
    out = config.dirs[0] / "report" if config.out is None else config.out
    with speaking("info") as console:
        runs, skipped = read_runs(config.dirs)
        if not runs:
            raise UsageError(
                f"no training that can be read below {', '.join(map(str, config.dirs))}"
                f"{_because(skipped)}. gradfilter train makes some."
            )
        groups, doubles = groups_of(runs)
        for line in doubles:
            log.warning("skipped: %s", line)
        sections = []
        with progress_bar(console, "drawing", len(SECTIONS), 0) as tick:
            for section in SECTIONS:
                sections.append(section(groups))
                tick()
        content = page(config, out, groups, sections, [*skipped, *doubles])
        files = {PAGE: content.encode(), **_files(sections)}
        _write(out, files)
    what = f"{counted(len(runs), 'run')} in {counted(len(groups), 'setting')}"
    print(f"{what}: {printable(out / PAGE)}")
    return 0


def _because(skipped: Sequence[str]) -> str:
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


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """Replace an earlier report; the page comes last, when all that it names is there.

    Raises:
        UsageError: There is something else, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = _earlier(out)
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
    """The files that a report says are its own, as far as one writes such files."""
    names = [Path(name).name for name in found["files"] if found["command"] == "report"]
    return [name for name in names if Path(name).suffix in KINDS]


def _earlier(out: Path) -> list[str]:
    """The files of the report that is there."""
    names: list[str] = []
    with suppress(UsageError):  # no list of files is that of an earlier report
        names = read_json(out / MANIFEST, "the list of a report's files", "", _names)
    # A report that was killed in its first moment leaves half a file, which is nobody's.
    others = [p for p in out.iterdir() if not (p.name.startswith(".") and p.suffix == ".part")]
    if not names and others:
        raise UsageError(
            f"--out: expected a new or empty directory, or that of an earlier report, found files "
            f"in {str(out)!r}. Name another."
        )
    return names
