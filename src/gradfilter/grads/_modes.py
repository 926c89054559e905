"""How each leaf of the fused plan answers: held, streamed, or never made at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradfilter._types import Tree
from gradfilter.grads._tape import Use

Mode = Literal["store", "stream", "ghost"]


@dataclass(frozen=True)
class Layer:
    """A leaf and how its rows are treated.

    Attributes:
        leaf: Its name.
        shape: Its shape.
        rules: The rules that used it, in order; none where autograd alone was at work.
        mode: ``"store"``: the M rows are held, for Gram and combination. ``"stream"``: rows are
            made for the Gram, some units at a time, and dropped; combinations come from inputs and
            output gradients. ``"ghost"``: the Gram, too, comes from those.
        flops: Beyond an ordinary backward pass: for the Gram, and for combining.
        bytes: Held until the stack lets go.
    """

    leaf: str
    shape: tuple[int, ...]
    rules: tuple[str, ...]
    mode: Mode
    flops: int
    bytes: int


@dataclass(frozen=True)
class Modes:
    """The choice for all leaves.

    Attributes:
        layers: Leaf by leaf.
        gram_is_cheap: Whether the Gram takes fewer flops than combining once and one `dot`.
        keeps: Whether factors and rows are kept between questions. If not, because even that takes
            more than the budget, every question takes a backward pass of its own over the graph.
    """

    layers: dict[str, Layer]
    gram_is_cheap: bool
    keeps: bool

    @property
    def bytes(self) -> int:
        """What all leaves hold together."""
        return sum(layer.bytes for layer in self.layers.values()) if self.keeps else 0

    def __str__(self) -> str:
        """A table, one line per leaf."""
        kept = f"{self.bytes / 1e6:.1f} MB kept between questions"
        how = kept if self.keeps else "nothing kept: a backward pass per question"
        lines = [("leaf", "shape", "rules", "mode", "Mflop", "kB")]
        for layer in self.layers.values():
            shape = "x".join(map(str, layer.shape)) or "()"
            rules = ", ".join(dict.fromkeys(layer.rules)) or "autograd"
            sizes = f"{layer.flops / 1e6:.1f}", f"{layer.bytes / 1e3:.0f}"
            lines.append((layer.leaf, shape, rules, layer.mode, *sizes))
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        table = [
            "  ".join(
                cell.rjust(w) if i > 3 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        total = sum(layer.flops for layer in self.layers.values())
        table.append(
            f"{len(self.layers)} leaves, {total / 1e6:.1f} Mflop beyond one backward pass, {how}"
        )
        return "\n".join(table)


def choose_modes(leaves: Tree, uses: list[Use], budget: int) -> Modes:
    """The fastest modes, and where those hold more than the budget, the leanest."""
    by_leaf: dict[str, list[Use]] = {name: [] for name in leaves}
    for use in uses:
        by_leaf[use.leaf].append(use)
    layers = {
        name: _fastest(name, leaf.shape, by_leaf[name], leaf.element_size())
        for name, leaf in leaves.items()
    }
    excess = sum(layer.bytes for layer in layers.values()) - budget
    if excess > 0:
        excess = _save(layers, leaves, by_leaf, excess)
    gram = sum(layer.flops for layer in layers.values())
    products = sum(max(2 * use.flops, 4 * leaves[use.leaf].numel()) for use in uses)
    return Modes(layers, gram <= products, keeps=excess <= 0)


def _save(
    layers: dict[str, Layer], leaves: Tree, by_leaf: dict[str, list[Use]], excess: int
) -> int:
    """Choose leaner modes until nothing is in excess; the bytes that still are."""
    leaner = {
        name: _layer(name, leaves[name].shape, by_leaf[name], leaves[name].element_size(), "stream")
        for name, layer in layers.items()
        if layer.mode == "store" and by_leaf[name] and all(use.kept for use in by_leaf[name])
    }
    savings = {name: layers[name].bytes - layer.bytes for name, layer in leaner.items()}
    for name in sorted(savings, key=lambda name: -savings[name]):
        if excess > 0 and savings[name] > 0:
            layers[name] = leaner[name]
            excess -= savings[name]
    if excess > 0:  # nothing is kept, so streaming costs no more memory than a tile
        layers |= leaner
    return excess


def _fastest(name: str, rows: tuple[int, ...], uses: list[Use], size: int) -> Layer:
    ghost = len(uses) == 1 and uses[0].ghost_flops is not None
    return _layer(name, rows, uses, size, "ghost" if ghost else "store")


def _layer(name: str, rows: tuple[int, ...], uses: list[Use], size: int, mode: Mode) -> Layer:
    count, numbers = rows[0], 1
    for extent in rows:
        numbers *= extent
    if mode == "ghost":
        flops = uses[0].ghost_flops or 0
    elif mode == "stream":
        flops = 2 * count * numbers + sum(use.flops for use in uses if use.kept)
    else:
        flops = 2 * count * numbers + 2 * numbers
    held = numbers * size if mode == "store" else sum(use.kept for use in uses)
    return Layer(name, tuple(rows[1:]), tuple(use.rule for use in uses), mode, flops, held)
