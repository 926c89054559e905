"""Run notebooks from top to bottom in an empty folder, and save them with their outputs.

python notebooks/execute.py                       # all
python notebooks/execute.py notebooks/3_agreement.ipynb
"""

import os
import sys
import tempfile
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent


def executed(path: Path, folder: Path) -> NotebookNode:
    """Return the notebook with new outputs, without anything that would change with every run."""
    notebook = nbformat.read(path, as_version=4)
    # With a backend from the environment, matplotlib would not draw into the notebook.
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    client = NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # otherwise the split of a text into outputs depends on timing
        resources={"metadata": {"path": folder}},
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        # Warnings of libraries name folders of this machine.
        shown = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
        if "outputs" in cell:
            cell.outputs = shown
        for output in shown:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = reduced(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def reduced(picture: str) -> str:
    """Reduce a base64 PNG to 256 colours, so that the repository stays small."""
    image = Image.open(BytesIO(b64decode(picture))).convert("RGB")
    file = BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode() + "\n"


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all, and write them back."""
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
