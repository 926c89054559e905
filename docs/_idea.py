"""Draw the idea of the library from computed gradients: rows, their mean, and a filtered gradient.

python docs/_idea.py        # writes docs/pictures/idea.svg

The rows are the gradients of a logistic regression with two weights, one per sample, so that an
arrow in the plane is the whole gradient. Two samples have wrong labels.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

import gradfilter as gf

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "pictures" / "idea.svg"

SAMPLES = [  # x, and the label, 1 or -1
    *[((1.7, -0.6), 1), ((0.3, 1.6), 1), ((1.3, 1.1), 1), ((1.9, 0.4), 1)],
    *[((-1.1, 0.1), -1), ((-0.6, -1.0), -1), ((-1.7, -1.0), -1)],
    *[((1.6, 0.5), -1), ((-0.4, -1.3), 1)],  # the wrong ones
]
WRONG = 2
WEIGHTS = (0.4, 0.2)

WIDTH, HEIGHT, TOP, RADIUS = 860, 396, 76, 134
STYLE = """
text { font-family: sans-serif; fill: #222 }
.card { fill: #fff } .plot { fill: #f4f6fb }
.title { font-size: 16px; font-weight: bold } .note { font-size: 13px }
line { stroke-width: 2.5; stroke-linecap: round }
.right { stroke: #3f6fd1; fill: #3f6fd1 } .wrong { stroke: #d1495b; fill: #d1495b }
.out { stroke: #aab; fill: #aab } .mean { stroke: #111; fill: #111 }
line.mean { stroke-width: 5 } .cone { fill: #3f6fd1; fill-opacity: 0.13 }
@media (prefers-color-scheme: dark) {
text { fill: #e6e6ea } .card { fill: #1c1e26 } .plot { fill: #262a36 }
.right { stroke: #7ea6ff; fill: #7ea6ff } .wrong { stroke: #ff8a98; fill: #ff8a98 }
.out { stroke: #667; fill: #667 } .mean { stroke: #fff; fill: #fff }
.cone { fill: #7ea6ff; fill-opacity: 0.16 }
}
"""


def logistic(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean logistic loss of the samples."""
    x, label = batch
    return torch.nn.functional.softplus(-label * (x @ params["w"])).mean()


def computed() -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Compute everything that the picture shows.

    Returns:
        The steps along the rows (M, 2), the step of plain training (2,), the weights of
        ``consensus_filter`` (M,), its step (2,), and the half-angle of its cone in radians.
    """
    params = {"w": torch.tensor(WEIGHTS, dtype=torch.float64)}
    points, labels = zip(*SAMPLES, strict=True)
    batch = torch.tensor(points).double(), torch.tensor(labels).double()
    rows = gf.per_sample_grads(logistic)(params, batch)
    plain, _, _ = gf.mean_rows().update(rows, {}, params)
    chosen, _, out = gf.consensus_filter().update(rows, {}, params)
    steps = -rows.stacked()["w"]
    # A unit row u has a weight if it points the same way as the sum of the others, S - u:
    # <u, S - u> > 0. So its angle to the sum S of all unit rows is less than arccos(1 / |S|).
    total = (steps / steps.norm(dim=1, keepdim=True)).sum(0)
    return steps, -plain["w"], out["weights"], -chosen["w"], math.acos(1 / total.norm().item())


def drawn() -> str:
    """Return the picture: all rows with their mean, and the rows that agree with theirs."""
    steps, plain, weights, chosen, half = computed()
    scale = RADIUS * 0.93 / steps.norm(dim=1).max().item()
    kinds = ["right"] * (len(steps) - WRONG) + ["wrong"] * WRONG
    left, right, middle = WIDTH * 0.25, WIDTH * 0.75, TOP + RADIUS
    unit = steps / steps.norm(dim=1, keepdim=True)
    axis = math.atan2(*unit.sum(0).flip(0).tolist())
    shapes = [
        *_panel(left, "One gradient per sample", "plain training follows the mean of all rows"),
        *(_arrow(left, middle, scale * v, kind) for v, kind in zip(steps, kinds, strict=True)),
        _arrow(left, middle, scale * plain, "mean"),
        *_panel(right, "consensus_filter()", "it follows the rows that agree with the others"),
        _cone(right, middle, axis, half),
        *(
            _arrow(right, middle, scale * v, kind if w > 0 else "out")
            for v, kind, w in zip(steps, kinds, weights.tolist(), strict=True)
        ),
        _arrow(right, middle, scale * chosen, "mean"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'aria-label="Rows as arrows, their mean, and the mean of the rows that agree">',
            f"<style>{STYLE}</style>",
            f'<rect class="card" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
            *shapes,
            *_legend(),
            "</svg>\n",
        ]
    )


def _panel(x: float, title: str, note: str) -> list[str]:
    return [
        f'<text class="title" x="{x:g}" y="30" text-anchor="middle">{title}</text>',
        f'<text class="note" x="{x:g}" y="54" text-anchor="middle">{note}</text>',
        f'<circle class="plot" cx="{x:g}" cy="{TOP + RADIUS}" r="{RADIUS}"/>',
    ]


def _arrow(x: float, y: float, vector: Tensor, kind: str) -> str:
    """Draw an arrow from a point; the second coordinate of the vector points up."""
    dx, dy = vector.tolist()
    length = math.hypot(dx, dy)
    head = min(15 if kind == "mean" else 11, 0.6 * length)
    ux, uy = dx / length, -dy / length
    tip = (x + dx, y - dy)
    base = (tip[0] - ux * head, tip[1] - uy * head)
    side = (-uy * head * 0.45, ux * head * 0.45)
    corners = [tip, (base[0] + side[0], base[1] + side[1]), (base[0] - side[0], base[1] - side[1])]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return (
        f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{base[0]:.1f}" y2="{base[1]:.1f}"/>'
        f'<polygon class="{kind}" stroke="none" points="{points}"/>'
    )


def _cone(x: float, y: float, axis: float, half: float) -> str:
    """Draw the directions in which a row has a weight."""
    ends = [
        (x + RADIUS * math.cos(a), y - RADIUS * math.sin(a)) for a in (axis - half, axis + half)
    ]
    (ax, ay), (bx, by) = ends
    return (
        f'<path class="cone" d="M{x:.1f} {y:.1f}L{ax:.1f} {ay:.1f}'
        f'A{RADIUS} {RADIUS} 0 {int(half > math.pi / 2)} 0 {bx:.1f} {by:.1f}z"/>'
    )


def _legend() -> list[str]:
    entries = [
        ("right", "row, right label"),
        ("wrong", "row, wrong label"),
        ("out", "row of weight 0"),
        ("mean", "the gradient that is followed"),
    ]
    shapes, x, y = [], 60.0, HEIGHT - 18
    for kind, text in entries:
        shapes.append(
            f'<line class="{kind}" x1="{x:g}" y1="{y - 4}" x2="{x + 26:g}" y2="{y - 4}"/>'
        )
        shapes.append(f'<text class="note" x="{x + 34:g}" y="{y}">{text}</text>')
        x += 64 + 7.2 * len(text)
    return shapes


if __name__ == "__main__":
    TARGET.write_text(drawn())
