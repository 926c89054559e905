"""Draw the architecture from the source: who imports whom, and what each part makes public.

python docs/_architecture.py        # writes docs/pictures/architecture.svg
"""

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from gradfilter.lab._cli import COMMANDS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gradfilter"
TARGET = ROOT / "docs" / "pictures" / "architecture.svg"
CORE = "core"
ABOUT = {
    "lab": "experiments on the command line: data, models, noise, studies",
    "interop": "for existing loops",
    "distributed": "rows on several ranks",
    "transforms": "change gradients: filter, clip, update",
    "testing": "checks the laws",
    "diagnostics": "measure a network",
    "schedules": "values by step",
    "grads": "gradient stacks: compute the rows",
    CORE: "trees, types, arithmetic; needs torch and einops only",
}
WIDTH, SIDE, GAP, PAD, LINE = 900, 190, 34, 14, 17
Box = tuple[float, float, float, float]  # x, y, width, height


@dataclass
class Part:
    """A folder of the package, or the modules outside the folders (`core`)."""

    name: str
    public: list[str] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)


def part_of(module: str) -> str:
    """gradfilter.grads._loss -> grads, gradfilter._tree -> core."""
    names = module.split(".")
    return names[1] if len(names) > 1 and (SOURCE / names[1]).is_dir() else CORE


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Modules of the package that a file imports from, and the names it takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradfilter"):
            yield from ((node.module or "", alias.name) for alias in node.names)


def used(path: Path) -> set[str]:
    """Public names that a file asks for: `gf.sgd` after `import gradfilter as gf`."""
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    ]
    return {
        node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "gf"
    }


def parts() -> dict[str, Part]:
    """What the source says."""
    owner = {name: part_of(origin) for origin, name in imported(SOURCE / "_public.py")}
    found: dict[str, Part] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(("gradfilter", *path.relative_to(SOURCE).with_suffix("").parts))
        part = found.setdefault(part_of(module), Part(part_of(module)))
        if path.parent == SOURCE and path.name in ("__main__.py", "_public.py"):
            continue
        if path.name == "__init__.py" and path.parent != SOURCE:
            part.public += [name for _, name in imported(path) if not name.startswith("_")]
        elif path.name != "__init__.py":
            needs = {part_of(origin) for origin, _ in imported(path)}
            part.needs |= needs | {owner[name] for name in used(path) if name in owner}
            part.needs.discard(part.name)
    for name, home in owner.items():
        found[home].public.append(name)
    found["lab"].public = [f"gradfilter {command}" for command in COMMANDS]
    return found


def floors(found: dict[str, Part]) -> dict[str, tuple[int, int]]:
    """The highest and lowest floor for each part: above what it needs, below its users."""

    def lowest(name: str) -> int:
        return 1 + max((lowest(below) for below in found[name].needs), default=-1)

    top = max(map(lowest, found))

    def highest(name: str) -> int:
        users = [user for user in found if name in found[user].needs]
        return min((highest(user) - 1 for user in users), default=max(lowest(name), top - 1))

    return {name: (top if lowest(name) == top else highest(name), lowest(name)) for name in found}


def direct(found: dict[str, Part], name: str) -> set[str]:
    """The needs that do not follow from others, so that few arrows say all."""

    def reach(start: str) -> set[str]:
        return set().union(*({n} | reach(n) for n in found[start].needs))

    needs = found[name].needs
    return {n for n in needs if not any(n in reach(other) for other in needs - {n})}


def drawn() -> str:
    """The picture: floor by floor; a part that fits on several floors stands at their side."""
    found = parts()
    shapes: list[str] = []
    boxes: dict[str, Box] = {}
    place = floors(found)
    at_side = [name for name, (high, low) in place.items() if high != low]
    side = SIDE if at_side else 0
    tops: dict[int, float] = {}
    y = float(PAD)
    for level in sorted({low for _, low in place.values()}, reverse=True):
        row = [name for name in found if place[name] == (level, level)]
        # The side is on the right: an arrow from there ends at the last box.
        row.sort(key=lambda name: any(name in found[user].needs for user in at_side))
        narrow = any(high >= level >= low for high, low in (place[name] for name in at_side))
        whole = WIDTH - PAD * 2 - narrow * (side + PAD) - PAD * (len(row) - 1)
        shares = [max(0.24, len(" ".join(found[n].public)) ** 0.5 / 20) for n in row]
        widths = [whole * share / sum(shares) for share in shares]
        texts = [_wrapped(found[n], width) for n, width in zip(row, widths, strict=True)]
        height, x = 54 + LINE * max(map(len, texts)), float(PAD)
        for name, width, text in zip(row, widths, texts, strict=True):
            boxes[name] = (x, y, width, height)
            shapes += _box(found[name], text, boxes[name])
            x += width + PAD
        tops[level] = y
        y += height + GAP
    for name in at_side:
        high, low = place[name]
        end = tops[low - 1] - GAP
        boxes[name] = (WIDTH - PAD - side, tops[high], side, end - tops[high])
        shapes += _box(found[name], _wrapped(found[name], side), boxes[name])
    for name in found:
        for below in sorted(direct(found, name)):
            shapes.append(_arrow(boxes[name], boxes[below]))
    bottom = y - GAP + PAD
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:g}" role="img" '
            'aria-label="The parts of gradfilter and which of them import which">',
            f'<rect width="{WIDTH}" height="{bottom:g}" fill="#fff"/>',
            '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#666"/></marker>',
            *shapes,
            "</svg>\n",
        ]
    )


def _wrapped(part: Part, width: float) -> list[str]:
    return textwrap.wrap("  ".join(part.public), int((width - 24) / 7.3))


def _box(part: Part, public: list[str], box: Box) -> list[str]:
    x, y, width, height = box
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="#f4f6fb" '
        'stroke="#4051b5"/>',
        f'<text x="{x + 12:g}" y="{y + 22:g}" font-family="sans-serif" font-size="14" '
        f'font-weight="bold" fill="#303f9f">{part.name}</text>',
        f'<text x="{x + 12:g}" y="{y + 40:g}" font-family="sans-serif" font-size="12" '
        f'fill="#444">{escape(ABOUT[part.name])}</text>',
        *(
            f'<text x="{x + 12:g}" y="{y + 62 + LINE * number:g}" font-family="monospace" '
            f'font-size="12" fill="#222" xml:space="preserve">{escape(line)}</text>'
            for number, line in enumerate(public)
        ),
    ]


def _arrow(upper: Box, lower: Box) -> str:
    """From the bottom of one box to the top of another, where both are."""
    left, right = max(upper[0], lower[0]), min(upper[0] + upper[2], lower[0] + lower[2])
    x = (left + right) / 2
    return (
        f'<line x1="{x:g}" y1="{upper[1] + upper[3]:g}" x2="{x:g}" y2="{lower[1]:g}" '
        'stroke="#666" stroke-width="1.5" marker-end="url(#head)"/>'
    )


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(drawn())
