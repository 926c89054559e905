"""Run notebooks from top to bottom in an empty folder and keep what they show.

python notebooks/execute.py                       # all
python notebooks/execute.py notebooks/5_agc.ipynb
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook with new outputs, and with nothing in it that every run would change."""
    notebook = nbformat.read(path, as_version=4)
    # A backend given from outside would draw into nothing.
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    client = NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # otherwise where a text is cut depends on the moment
        resources={"metadata": {"path": folder}},
    )
    client.execute(env=environment)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(names: list[str]) -> None:
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
