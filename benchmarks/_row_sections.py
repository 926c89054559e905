"""The sections of the page about rows of gradients: plans, peers, memory, growth, rules."""

from benchmarks import _tables
from benchmarks._dots import Dot, Dots, Panel, Value, short
from benchmarks._section import Json, Section, is_ours, over
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

PLAIN = "one plain forward and backward pass"


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
    others = [name for name in names_of(contests) if ": " in name and not is_ours(name)]
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
        by_contender(contests, "plain", is_ours),
        Dots([_by_question(contest) for contest in contests], 2, over("plain")),
    )


def padded(part: Json) -> Section:
    rows, training = part["workloads"][::2], part["workloads"][1::2]
    counts = part["fused"].values()
    batches, steps = (
        f"{sum(c[f'fused_{what}'] for c in counts)} of {sum(c[what] for c in counts)}"
        for what in ("batches", "steps")
    )
    over_trainer = by_contender(training, "Trainer", lambda name: name == "FilteredTrainer")
    return Section(
        "Padded text, one row per text",
        ("padded",),
        "A collator pads to the longest text, and BERT asks each text whether it has padding. "
        f"Fused: {batches} batches, {steps} steps of `FilteredTrainer`. Timed: rows, agreement "
        f"filter and combination of one batch, over {PLAIN}.",
        by_contender(rows, "plain", lambda name: name == "fused"),
        more=f"Eight steps of training, over those of transformers' Trainer:\n\n{over_trainer}",
    )


def _by_question(contest: Json) -> Panel:
    """Questions one after the other, libraries under each."""
    names = [name for name in contest["results"] if name != "plain"]
    questions = list(dict.fromkeys(name.split(": ")[1] for name in names))
    ordered = [name for q in questions for name in names if name.endswith(f": {q}")]
    return _tables.panel(contest, ordered, is_ours)
