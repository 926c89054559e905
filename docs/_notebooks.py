"""A notebook with its outputs as a page of the site: text, code, pictures and formulas."""

import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter

# Two dollar signs around a formula of its own, one around a formula in a line of text.
FORMULA = re.compile(
    r"\$\$(?P<block>.+?)\$\$|(?<![\\$`\w])\$(?P<inline>[^$`]+?)\$(?![\w$])", re.DOTALL
)


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown, and the pictures it shows by their file names.

    Formulas become MathML, which browsers draw without a script from somewhere else.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(_mathml, cell.source)
            # The page lies one folder deeper than the notebook, and next to the other pages.
            cell.source = cell.source.replace("](../", "](../../").replace("](../../docs/", "](../")
            cell.source = re.sub(r"\]\((\d\w*)\.ipynb\)", r"](\1.md)", cell.source)
    exporter = MarkdownExporter()
    text, found = exporter.from_notebook_node(notebook)
    pictures = {f"{path.stem}_{name}": data for name, data in found["outputs"].items()}
    for name in found["outputs"]:
        text = text.replace(f"({name})", f"({path.stem}_{name})")
    note = f"[This page as a notebook](../../notebooks/{path.name})\n\n"
    title, rest = text.lstrip().split("\n", 1)
    return f"{title}\n\n{note}{rest}", pictures


def _mathml(formula: re.Match[str]) -> str:
    display = "block" if formula["block"] else "inline"
    # On one line: an empty line would end the element for the Markdown reader.
    latex = " ".join((formula["block"] or formula["inline"]).split())
    # A line that begins with a span is text; one that begins with math would be a block.
    return f"<span>{convert(latex, display=display)}</span>"
