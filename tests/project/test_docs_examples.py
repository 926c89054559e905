"""The examples of the documentation run, page by page, from top to bottom."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


def examples(page):
    """The blocks that are run: other packages' code is fenced as `py`, that of ranks says so."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if not block.startswith("# torchrun")]


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if examples(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {"__name__": __name__}  # of this project: their warnings are errors
    for block in examples(page):
        exec(compile(block, str(page.relative_to(DOCS)), "exec"), scope)


def test_pages_of_ideas_and_migrations_have_examples():
    with_examples = {page.relative_to(DOCS) for page in PAGES}
    wanted = {
        page.relative_to(DOCS)
        for folder in ("ideas", "migration")
        for page in (DOCS / folder).glob("*.md")
    }
    assert wanted - with_examples <= {Path("ideas/lab.md"), Path("migration/double_descent.md")}
