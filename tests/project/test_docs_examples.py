"""The examples of the documentation run, page by page, from top to bottom."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from _world import World

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


def on_ranks(blocks):
    """Run the script of `distributed.md` on a rank whose process group exists already."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(dist.get_rank())  # as under torchrun: another model, other samples
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
    scope = {
        "__name__": __name__,
        "model": model,
        "criterion": torch.nn.CrossEntropyLoss(),
        "loader": [(torch.randn(64, 20), torch.randint(0, 5, (64,))) for _ in range(10)],
    }
    for block in blocks:
        code = block.replace("dist.init_process_group()", "assert dist.is_initialized()")
        exec(compile(code, "distributed.md", "exec"), scope)
    return [p.detach().tolist() for p in model.parameters()], bool(scope["out"]["keep"])


def test_the_examples_of_several_ranks_run_on_two():
    page = (DOCS / "ideas" / "distributed.md").read_text()
    blocks = re.findall(r"^```python\n(# torchrun.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    world = World(2)
    try:
        ours, theirs = world.run(on_ranks, blocks)
    finally:
        world.close()
    assert ours == theirs  # parameters and decision


def test_every_example_of_several_ranks_is_one_that_runs():
    pages = {
        page.name for page in DOCS.rglob("*.md") if "```python\n# torchrun" in page.read_text()
    }
    assert pages == {"distributed.md"}


def test_pages_of_ideas_and_migrations_have_examples():
    with_examples = {page.relative_to(DOCS) for page in PAGES}
    wanted = {
        page.relative_to(DOCS)
        for folder in ("ideas", "migration")
        for page in (DOCS / folder).glob("*.md")
    }
    assert wanted - with_examples <= {Path("ideas/lab.md"), Path("migration/double_descent.md")}
