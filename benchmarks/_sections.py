"""The sections of the page about time and memory; each uses the results of one part."""

from collections.abc import Callable

from benchmarks._row_sections import (
    fused_vs_looped,
    growth,
    layers,
    memory,
    padded,
    per_sample,
    rules,
)
from benchmarks._section import Json, Section
from benchmarks._step_sections import (
    compiled,
    distributed,
    rows_along,
    sharpness,
    stats,
    update,
)

SECTIONS: dict[str, Callable[[Json], Section]] = {
    part.__name__: part
    for part in (
        fused_vs_looped, per_sample, padded, memory, growth, rules, layers, sharpness, rows_along,
        update, compiled, distributed, stats,
    )
}  # fmt: skip
