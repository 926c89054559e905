"""Draw the README's badges from `pyproject.toml` and the package, so that none can be out of date.

python docs/_badges.py        # writes docs/pictures/badge-*.svg
"""

import re
import tomllib
from pathlib import Path

import gradfilter

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "pictures"
CHARACTER, PAD, HEIGHT = 6.6, 7, 20


def facts() -> dict[str, str]:
    """What the badges say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(d for d in project["dependencies"] if re.match(r"torch\b", d))
    return {
        "version": gradfilter.__version__,
        "python": _from(project["requires-python"]),
        "torch": _from(torch),
        "licence": project["license"],
        "types": "strict" if "Typing :: Typed" in project["classifiers"] else "none",
    }


def _from(bound: str) -> str:
    """torch>=2.11,<3 -> 2.11+."""
    return re.search(r">=\s*([\d.]+)", bound)[1] + "+"


def drawn(label: str, value: str) -> str:
    """One badge: a grey half and a coloured half."""
    left, right = (len(text) * CHARACTER + 2 * PAD for text in (label, value))
    font = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right:.0f}" height="{HEIGHT}" '
        f'role="img" aria-label="{label}: {value}">'
        f'<clipPath id="c"><rect width="{left + right:.0f}" height="{HEIGHT}" rx="3"/></clipPath>'
        f'<g clip-path="url(#c)"><rect width="{left:.0f}" height="{HEIGHT}" fill="#555"/>'
        f'<rect x="{left:.0f}" width="{right:.0f}" height="{HEIGHT}" fill="#4051b5"/></g>'
        f'<g {font} text-anchor="middle"><text x="{left / 2:.0f}" y="14">{label}</text>'
        f'<text x="{left + right / 2:.0f}" y="14">{value}</text></g></svg>\n'
    )


if __name__ == "__main__":
    TARGET.mkdir(exist_ok=True)
    for name, value in facts().items():
        (TARGET / f"badge-{name}.svg").write_text(drawn(name, value))
