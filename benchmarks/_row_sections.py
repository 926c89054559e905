"""The sections of the page about rows of gradients: plans, peers, memory, growth, overrides."""

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
    medians = {name: reach(contests, name) for name in ("fused", "loop", "vmap")}
    return Section(
        "Which plan computes the rows?",
        ("fused_vs_looped",),
        f"Measured: the time for the gradients of M microbatches of B samples, their Gram, the "
        f"agreement filter and the weighted sum of all rows. The base is {PLAIN} of torch for the "
        "same M·B samples. `loop` is M ordinary backward passes, `vmap` is "
        '`torch.func.vmap(grad)`, and `fused` is the choice of `plan="auto"`. `by hand` is the '
        "same for the MLP alone, written for this model in few calls of torch, without autograd "
        "and without checks: the floor. `fused step` and `step_GAF` are whole steps with SGD. "
        "`step_GAF` is from the package gradient-agreement-filtering. It halves where ours takes "
        "the mean, and it needs classes and more than one sample per row. In every step it also "
        "collects its samples one by one from a data set and counts the correct predictions.\n\n"
        "Medians over all models: fused **{fused}**, loop {loop}, vmap {vmap}. ".format(**medians)
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
        "Measured: the time for rows, Gram, agreement filter and weighted sum with plan `fused`, "
        f"for the same samples divided into M microbatches. The base is the same with {base}.",
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
        "Measured: the largest amount of new memory at any one time, from the first row to the "
        f"weighted sum. The base is {PLAIN}. In brackets are the megabytes, and the time over the "
        "base from a few rounds. M·P is the memory of M rows of all parameters. `fused, 2 P` may "
        "keep two gradients (`memory_budget=`), and `fused, nothing` may keep none.",
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
        "How much time does each operation override save?",
        ("rules",),
        "An operation override of the fused plan runs one kernel for all rows. Without it, vmap "
        "would split the operation into several, or could not run it. Measured: the time of a "
        "small model that mostly consists of the operation, without its override. The base is the "
        f"same model with all overrides. The medians are {reach(contests, 'without')}.",
        by_contest(contests, base, lambda name: False),
        Dots([Panel("without the override", dots)], 1, over("the same with all overrides")),
    )


def layers(part: Json) -> Section:
    contests = part["workloads"]
    return Section(
        "Layers for which vmap alone is slower than a loop",
        ("layers",),
        "Measured: the time for rows, Gram and weighted sum of small models that mostly consist of "
        f"one layer, one sample per row. The base is {PLAIN}. torch has no rule for vmap for some "
        "of these operations, or a slow one; `fused` has an operation override for each.\n\n"
        f"{faster(contests, [('fused', ('loop',))])}",
        by_contest(contests, "plain", _fused),
        Dots(panels(contests, "plain", _fused), 3, over("plain")),
    )


def per_sample(part: Json) -> Section:
    contests = part["workloads"]
    others = [name for name in names_of(contests) if ": " in name and not is_ours(name)]
    pairs = [
        (f"gradfilter: {asked}", [name for name in others if name.endswith(f": {asked}")])
        for asked in ("norms", "consensus", "rows")
    ]
    return Section(
        "Per-sample gradients: gradfilter and other libraries",
        ("per_sample",),
        f"Measured: the time for three computations with the gradients of N single samples. The "
        f"base is {PLAIN}. *Norms*: the squared norm of every row. *Consensus*: norms, cosines and "
        "the weighted sum of `consensus_filter`. *Rows*: the gradients themselves. opacus uses "
        "hooks and ghost clipping, ExpandedWeights and `vmap(grad)` are part of torch, and torchjd "
        "is its autogram. Before the measurement all results are compared with a float64 loop.\n\n"
        f"{faster(contests, pairs)}",
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
        "A collator pads all texts to the longest one, and BERT checks each text for padding. The "
        f"fused plan worked for {batches} batches and {steps} steps of `FilteredTrainer`. "
        "Measured: the time for rows, agreement filter and weighted sum of one batch. The base is "
        f"{PLAIN}.",
        by_contender(rows, "plain", lambda name: name == "fused"),
        more=f"The time of eight training steps; the base is the Trainer of transformers:\n\n"
        f"{over_trainer}",
    )


def _by_question(contest: Json) -> Panel:
    """List the computations, with the libraries under each."""
    names = [name for name in contest["results"] if name != "plain"]
    questions = list(dict.fromkeys(name.split(": ")[1] for name in names))
    ordered = [name for q in questions for name in names if name.endswith(f": {q}")]
    return _tables.panel(contest, ordered, is_ours)
