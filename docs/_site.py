"""What the site shows that lies outside of this folder: notebooks, examples, results.

Pages link to files of the repository, as ``../benchmarks/results/x.json#/key``, so that the links
also work on a code host. On the site these files are copies next to the pages. A notebook and a
file of results also have a page, and links to them lead to it: a link to a number leads to the
number in a table.
"""

import json
import posixpath
import re
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from _notebooks import page as notebook_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from _results import Place, anchors, locate
from _results import page as results_page
from gradfilter.lab._cli import COMMANDS

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
SHOWN = (
    *("benchmarks/results/*.json", "benchmarks/results/*.png"),
    *("notebooks/*.ipynb", "examples/*.py", "examples/*.yaml", "examples/finetune/*.py"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the copies, and the pages of notebooks and results."""
    _read.cache_clear()  # `mkdocs serve` builds again after a file has changed
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        name = f"{RESULTS}/{path.stem}.md"
        inclusion = InclusionLevel.NOT_IN_NAV  # pages reach it by their numbers
        files.append(File.generated(config, name, content=results_page(path), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave the folder of pages into links to what is shown of it."""
    here = posixpath.dirname(page.file.src_uri)

    def copied(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, link["path"]))
        anchor = link["walk"] or ""
        if here != "notebooks":  # a reader of the site wants the page, not the file
            target = re.sub(r"\.ipynb$", ".md", target)
        if target.startswith(RESULTS) and target.endswith(".json"):
            anchor = anchor and "#" + _anchor(target, anchor.removeprefix("#"))
            target = re.sub(r"\.json$", ".md", target)
        return f"]({posixpath.relpath(target, here or '.')}{anchor}"

    folders = "benchmarks|notebooks|examples"
    links = rf"\]\((?P<path>(?:\.\./)+(?:{folders})/[^)#\s]+)(?P<walk>#/[^)\s]*)?"
    return re.sub(links, copied, markdown)


def _anchor(results: str, walk: str) -> str:
    """Return the anchor of a number on the page of a file of results."""
    contents, names = _read(results)
    return names[locate(contents, walk)]


@cache
def _read(results: str) -> tuple[Any, dict[Place, str]]:
    contents = json.loads((ROOT / results).read_text())
    return contents, anchors(contents)


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """Put the help texts of the commands into their page."""
    if page.file.src_uri != "api/command_line.md":
        return None
    source = Path(page.file.abs_src_path or "").read_text()
    return source + "\n".join(f"## gradfilter {name}\n\n{_help(name)}" for name in COMMANDS)


def _help(command: str) -> str:
    """What ``gradfilter COMMAND --help`` prints, as a block."""
    printed = StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        COMMANDS[command](["--help"])
    return f"```text\n{printed.getvalue().strip()}\n```\n"
