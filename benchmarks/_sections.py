"""The sections of the page about time and memory, each made of one part of a device's results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import _tables
from benchmarks._dots import Chart, Dot, Dots, Panel, Value, short
from benchmarks._tables import (
    bold,
    by_contender,
    by_contest,
    faster,
    label,
    names_of,
    panels,
    ratio,
    reach,
    spread,
)

Json = dict[str, Any]
PLAIN = "one plain forward and backward pass"


@dataclass(frozen=True)
class Section:
    """A question, what was measured to answer it, the answer, and its numbers.

    Attributes:
        parts: Whose results these are: files to link to, and names for the command line.
    """

    title: str
    parts: tuple[str, ...]
    text: str
    table: str
    chart: Chart | None = None
    more: str = ""


def over(base: str) -> str:
    """The label of an axis."""
    return f"time over {base}: median and quartiles, logarithmic"


def fused_vs_looped(part: Json) -> Section:
    contests = part["workloads"]
    said = {name: reach(contests, name) for name in ("fused", "loop", "vmap")}
    return Section(
        "Which plan computes the rows?",
        ("fused_vs_looped",),
        f"Timed: the gradients of M microbatches of B samples, their Gram, the agreement filter on "
        f"it and the combination of all rows, over {PLAIN} of torch over the same M·B samples. "
        "`loop` is M ordinary backward passes, `vmap` is `torch.func.vmap(grad)`, `fused` is what "
        '`plan="auto"` takes. `fused step` and `step_GAF` are whole steps with SGD; the latter is '
        "of the package gradient-agreement-filtering, which halves where ours takes the mean, "
        "needs classes and more than one sample per row, and in every step gathers its samples one "
        "by one from a data set and counts the hits.\n\n"
        "Medians over all models: fused **{fused}**, loop {loop}, vmap {vmap}. ".format(**said)
        + faster(contests, [("fused", ("loop", "vmap")), ("fused step", ("step_GAF",))]),
        by_contest(contests, "plain", _fused),
        Dots(panels(contests, "plain", _fused, aligned=True), 2, over("plain")),
    )


def growth(part: Json) -> Section:
    contests = part["workloads"]
    base = "M = 2"
    return Section(
        "How does the time grow with M?",
        ("growth",),
        "Timed: rows, Gram, agreement filter and combination under plan `fused`, the same samples "
        f"cut into M microbatches, over the same with {base}.",
        by_contender(contests, base, _rows),
        Dots(panels(contests, base, _rows, aligned=True), 2, over(base)),
    )


def _fused(name: str) -> bool:
    return name.startswith("fused")


def _rows(name: str) -> bool:
    return name.startswith("M = ")


def memory(part: Json) -> Section:
    contests = part["workloads"]
    names = names_of(contests)
    rows, drawn = [], []
    for contest in contests:
        results = contest["results"]
        plain = results["plain"]["peak_bytes"]
        held = 4 * contest["microbatches"] * contest["parameters"]
        cells = [_memory(name, results.get(name), plain) for name in names]
        rows.append([label(contest), f"{short(held / plain)} ({held / 1e6:.0f} MB)", *cells])
        drawn.append(Panel(label(contest), [
            Dot(name, _peak(results.get(name), plain), _fused(name))
            for name in names if name != "plain"
        ]))  # fmt: skip
    return Section(
        "How much memory?",
        ("memory",),
        "Counted: the most new storage that is held at one time, from the first row to the "
        f"combined gradient, over {PLAIN}; in brackets megabytes and the time over plain, of few "
        "rounds. M·P is what M rows of all parameters take. `fused, 2 P` may keep two gradients "
        "(`memory_budget=`), `fused, nothing` none at all.",
        _tables.markdown(["", "M·P", *names], rows) + _tables.failures(contests),
        Dots(drawn, 2, "peak memory over plain, logarithmic"),
    )


def _peak(cell: Json | None, plain: int) -> Value | None:
    if not cell or "peak_bytes" not in cell:
        return None
    return (cell["peak_bytes"] / plain,) * 3


def _memory(name: str, cell: Json | None, plain: int) -> str:
    if not cell or "peak_bytes" not in cell:
        return "none"
    over_plain = short(cell["peak_bytes"] / plain)
    time = f", time {ratio(cell, False)}" if spread(cell) and name != "plain" else ""
    return f"{bold(over_plain, _fused(name))} ({cell['peak_bytes'] / 1e6:.0f} MB{time})"


def rules(part: Json) -> Section:
    contests, base = part["workloads"], "all rules"
    dots = [_tables.dot(c["title"], c["results"]["without"], False) for c in contests]
    return Section(
        "What does every rule of the fused plan save?",
        ("rules",),
        "A rule runs one kernel for all rows, where vmap would take the operation apart or could "
        "not run it. Timed: a small model that leans on the operation, without its rule, over the "
        f"same with all rules. Without: {reach(contests, 'without')}.",
        by_contest(contests, base, lambda name: False),
        Dots([Panel("without the rule", dots)], 1, over("the same with all rules")),
    )


def per_sample(part: Json) -> Section:
    contests = part["workloads"]
    others = [name for name in names_of(contests) if ": " in name and not _ours(name)]
    pairs = [
        (f"gradfilter: {asked}", [name for name in others if name.endswith(f": {asked}")])
        for asked in ("norms", "consensus", "rows")
    ]
    return Section(
        "Per-sample gradients: ours and other libraries'",
        ("per_sample",),
        f"Timed: three questions about the gradients of N single samples, over {PLAIN}. *Norms*: "
        "the squared norm of every row. *Consensus*: norms, cosines and the weighted sum of "
        "`consensus_filter`. *Rows*: the gradients themselves. opacus has hooks and ghost "
        "clipping, ExpandedWeights and `vmap(grad)` are torch's own, torchjd is autogram. Nothing "
        f"is timed before all answers agree with a float64 loop.\n\n{faster(contests, pairs)}",
        by_contender(contests, "plain", _ours),
        Dots([_by_question(contest) for contest in contests], 2, over("plain")),
    )


def _by_question(contest: Json) -> Panel:
    """Questions one after the other, libraries under each."""
    names = [name for name in contest["results"] if name != "plain"]
    questions = list(dict.fromkeys(name.split(": ")[1] for name in names))
    ordered = [name for q in questions for name in names if name.endswith(f": {q}")]
    return _tables.panel(contest, ordered, _ours)


def _ours(name: str) -> bool:
    return name.startswith("gradfilter")


def sharpness(part: Json) -> Section:
    contests = sorted(part["workloads"], key=lambda contest: _way(contest["title"]))
    around = [contest for contest in contests if _around(contest["title"])]
    ways = [contest for contest in contests if contest not in around]
    tables = [by_contender(around, "torch", _links)] if around else []
    return Section(
        "Sharpness-aware steps",
        ("sharpness",),
        "Timed: whole steps over one of torch (forward, backward, SGD with momentum) on the same "
        "samples. SAM needs two gradients, so 2 is the floor. `plain`, `SAM` and `GSAM` are our "
        "links, with one row of all samples or with M rows; *in place* is `donate=True`. "
        "*Optimizers* are put around torch's SGD: `gradfilter.interop` and pytorch_optimizer, "
        "which must end at the same parameters before they are timed.\n\n"
        + faster(around, _AROUND),
        "\n".join([*tables, by_contest(ways, "torch", _links)]),
        Dots(panels(contests, "torch", _links), 2, over("a plain step of torch")),
    )


_AROUND = [
    (ours, theirs)
    for kind, theirs in (
        ("SAM", ("torch, SAM by hand", "pytorch_optimizer: SAM")),
        ("GSAM", ("pytorch_optimizer: GSAM",)),
    )
    for ours in (f"gradfilter: {kind}", f"gradfilter.interop: {kind}")
]


def _links(name: str) -> bool:
    return _ours(name) or name in ("plain", "SAM", "GSAM")


def _around(title: str) -> bool:
    return title.endswith("optimizers")


def _way(title: str) -> tuple[bool, str]:
    """Optimizers first, then each way with its models side by side."""
    _, _, way = title.partition(", N = ")
    return not _around(way), way


def update(part: Json) -> Section:
    contests = part["workloads"]
    clipping = [contest for contest in contests if "agc" in contest["title"]]
    plain = [contest for contest in contests if contest not in clipping]
    clippers = [name for name in names_of(clipping) if name.endswith(" + torch")]
    peers = [name for name in clippers if not _ours(name)]
    alone = faster(plain, [("ours, donated", ("torch", "torch, fused", "torch, for loop"))])
    agc = faster(clipping, [("ours, donated", peers), ("gradfilter.interop.AGC + torch", peers)])
    return Section(
        "Update rules and clipping",
        ("update",),
        "Timed: clipping, the update rule and the new parameters, with gradients that are there "
        "already, over `torch.optim` with `foreach=True` without clipping. *Gated* means that the "
        "step may be skipped, *donated* that results are written into the old tensors, as torch's "
        "optimizers do. timm and pytorch_optimizer clip unit by unit (AGC) in front of torch's "
        "SGD, and so does `gradfilter.interop.AGC`; before anything is timed, all must end at the "
        "same parameters.\n\n"
        f"Rules without clipping. {alone}\n\nWith AGC. {agc}",
        by_contender(contests, "torch", _steps),
        Dots(panels(contests, "torch", _steps), 2, over("torch.optim with foreach")),
    )


def _steps(name: str) -> bool:
    return _ours(name) or name.startswith("ours")


def distributed(part: Json) -> Section:
    contests = sorted(part["workloads"], key=lambda contest: contest["ranks"])
    names = [name for name in names_of(contests) if name != "DDP"]
    mean = names[0]
    sent = ["bytes that a rank sends", "", *(_bytes(contests, name) for name in names)]
    table = by_contest(contests, "DDP", lambda name: True)
    lines = table.split("\n")
    rows = 2 + len(contests)  # behind them stand the failures
    sent_line = "| " + " | ".join(sent) + " |"
    return Section(
        "On several ranks",
        ("distributed",),
        "Timed: a training step on W processes of this machine, over one of "
        "DistributedDataParallel with the same samples. M rows per rank become one stack, whose "
        "mean is taken, or which is filtered by agreement or consensus.\n\n"
        f"One row per rank and the mean is what DDP does. {faster(contests, [(mean, ('DDP',))])}",
        "\n".join([*lines[:rows], sent_line, *lines[rows:]]),
        Dots(panels(contests, "DDP", lambda name: True, aligned=True), 2, over("a step of DDP")),
    )


def _bytes(contests: Sequence[Json], name: str) -> str:
    ratios = [c["counted_bytes"][name] / c["counted_bytes"]["DDP"] for c in contests]
    low, high = (f"{value:.2f}" for value in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


def stats(part: Json) -> Section:
    contests, base = part["workloads"], "loop, as published"
    others = [name for name in names_of(contests) if not _function(name)]
    pairs = [(name, others) for name in names_of(contests) if _function(name)]
    return Section(
        "Norms of Jacobians",
        ("stats",),
        "Timed: the Frobenius norm or the largest singular value of the Jacobian of C logits in "
        "the input, of N images, over the published loop of a backward pass per class. The others "
        "hold the Jacobian; the functions of `gradfilter.diagnostics` need not.\n\n"
        + faster(contests, pairs),
        by_contender(contests, base, _function),
        Dots(panels(contests, base, _function), 2, over("the published loop")),
    )


def _function(name: str) -> bool:
    return name.startswith(("jacobian_norm", "operator_norm"))


SECTIONS: dict[str, Callable[[Json], Section]] = {
    part.__name__: part
    for part in (
        fused_vs_looped, per_sample, memory, growth, rules, sharpness, update, distributed, stats,
    )
}  # fmt: skip
