"""The notebooks run from top to bottom, and are committed with their pictures."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from notebooks.execute import executed

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def images(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_there_are_notebooks():
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456789")


# The kernel is another process, so what is ignored here is only the plumbing's own notices; which
# of them appear depends on the versions of these packages, not on the notebook.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(jupyter_|nbclient|traitlets|zmq)")
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom_and_draws(path, tmp_path):
    notebook = executed(path, tmp_path)
    assert len(images(notebook)) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_its_pictures_and_nothing_of_the_machine(path):
    text = path.read_text()
    assert len(images(nbformat.reads(text, as_version=4))) >= 2
    assert len(text) < 400_000
    assert 'execution": {' not in text  # time stamps, which change with every run
    folders = "/home/", "/Users/", str(Path.home()), tempfile.gettempdir()
    readable = re.sub(r'"image/png": "[^"]*"', "", text)  # base64 may contain "/tmp" by chance
    assert not any(folder in readable for folder in folders)
