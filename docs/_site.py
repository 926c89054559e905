"""What the site shows that lies outside of this folder: notebooks and measured results.

Pages link to files of the repository, as ``../benchmarks/results/x.json``, so that the links also
lead somewhere where the pages are read as files. On the site these files are copies next to the
pages, and the links become links to those.
"""

import posixpath
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

from _notebooks import page as notebook_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gradfilter.lab._cli import COMMANDS

ROOT = Path(__file__).parents[1]
SHOWN = ("benchmarks/results/*.json", "benchmarks/results/*.png", "notebooks/*.ipynb")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the copies."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave the folder of pages into links to what is shown of it."""
    here = posixpath.dirname(page.file.src_uri)

    def copied(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, link["path"]))
        if here != "notebooks":  # a reader of the site wants the page, not the file
            target = re.sub(r"\.ipynb$", ".md", target)
        return f"]({posixpath.relpath(target, here or '.')}"

    return re.sub(r"\]\((?P<path>(?:\.\./)+(?:benchmarks|notebooks)/[^)#\s]+)", copied, markdown)


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
