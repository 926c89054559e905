"""The sections of the page about whole steps, and about norms of Jacobians."""

from collections.abc import Sequence

from benchmarks._dots import Dots
from benchmarks._section import Json, Section, is_ours, over
from benchmarks._tables import (
    by_contender,
    by_contest,
    faster,
    label,
    markdown,
    names_of,
    panels,
)


def sharpness(part: Json) -> Section:
    contests = sorted(part["workloads"], key=lambda contest: _way(contest["title"]))
    around = [contest for contest in contests if _around(contest["title"])]
    ways = [contest for contest in contests if contest not in around]
    tables = [by_contender(around, "torch", _transforms)] if around else []
    return Section(
        "Sharpness-aware steps",
        ("sharpness",),
        "Measured: the time of a whole step. The base is a step of torch (forward, backward, SGD "
        "with momentum) for the same samples. SAM needs two gradients, so its ratio is at least "
        "about 2. `plain`, `SAM` and `GSAM` are chains of our transforms, with one row of all "
        "samples or with M rows; *in place* is `donate=True`. *Optimizers* are classes around the "
        "SGD of torch: `gradfilter.interop` and pytorch_optimizer. Before the measurement they "
        "must reach the same parameters.\n\n" + faster(around, _AROUND),
        "\n".join([*tables, by_contest(ways, "torch", _transforms)]),
        Dots(panels(contests, "torch", _transforms), 2, over("a plain step of torch")),
    )


_AROUND = [
    (ours, theirs)
    for kind, theirs in (
        ("SAM", ("torch, SAM by hand", "pytorch_optimizer: SAM")),
        ("GSAM", ("pytorch_optimizer: GSAM",)),
    )
    for ours in (f"gradfilter: {kind}", f"gradfilter.interop: {kind}")
]


def _transforms(name: str) -> bool:
    return is_ours(name) or name in ("plain", "SAM", "GSAM")


def _around(title: str) -> bool:
    return title.endswith("optimizers")


def _way(title: str) -> tuple[bool, str]:
    """Sort optimizers first, then the models of each way together."""
    _, _, way = title.partition(", N = ")
    return not _around(way), way


def update(part: Json) -> Section:
    contests = part["workloads"]
    clipping = [contest for contest in contests if "agc" in contest["title"]]
    plain = [contest for contest in contests if contest not in clipping]
    clippers = [name for name in names_of(clipping) if name.endswith(" + torch")]
    peers = [name for name in clippers if not is_ours(name)]
    alone = faster(plain, [("ours, donated", ("torch", "torch, fused", "torch, for loop"))])
    agc = faster(clipping, [("ours, donated", peers), ("gradfilter.interop.AGC + torch", peers)])
    return Section(
        "Update rules and clipping",
        ("update",),
        "Measured: the time for clipping, the update rule and the new parameters, with given "
        "gradients. The base is `torch.optim` with `foreach=True` without clipping. *Gated*: the "
        "step may be skipped. *Donated*: results are written into the old tensors, as in the "
        "optimizers of torch. timm, pytorch_optimizer and `gradfilter.interop.AGC` clip unit by "
        "unit (AGC) before the SGD of torch. Before the measurement all must reach the same "
        "parameters.\n\n"
        f"Update rules without clipping. {alone}\n\nWith AGC. {agc}",
        by_contender(contests, "torch", _steps),
        Dots(panels(contests, "torch", _steps), 2, over("torch.optim with foreach")),
    )


def _steps(name: str) -> bool:
    return is_ours(name) or name.startswith("ours")


def compiled(part: Json) -> Section:
    contests = part["workloads"]
    names = [name for name in names_of(contests) if name in contests[0]["first_call_seconds"]]
    rows = [
        [label(contest), *(f"{contest['first_call_seconds'][name]:.0f}" for name in names)]
        for contest in contests
    ]
    return Section(
        "Compiled steps",
        ("compiled",),
        "Measured: the time of a whole step with M rows, the agreement filter and SGD with "
        "momentum, in place. The base is a whole step of torch with the same optimizer, not "
        "compiled. `eager` is a step of `train_step`, `graph` its trace without a compiler, and "
        "`compiled` is `gradfilter.compile`. `torch, compiled` is the step of torch under "
        "`torch.compile`; it has one gradient, and ours has M.\n\n"
        + faster(contests, [("compiled", ("eager", "graph"))]),
        by_contest(contests, "torch", lambda name: name in ("eager", "graph", "compiled")),
        Dots(panels(contests, "torch", lambda name: name == "compiled"), 2, over("torch")),
        more="Seconds of the first call, which traces and compiles (no cache):\n\n"
        + markdown(["", *names], rows),
    )


def rows_along(part: Json) -> Section:
    contests, ours = part["workloads"], "products"
    ways = (ours, "products, compiled")
    others = [name for name in names_of(contests) if name not in ("plain", *ways)]
    return Section(
        "SAM per row",
        ("rows_along",),
        "Measured: the time of the mean gradient of rows that are each perturbed along their own "
        "gradient. The base is one plain forward and backward pass of torch for the same samples. "
        "`products` is `sam_perturb(per_microbatch=True)`; compiled, it is a whole step with "
        "`sgd`. The other ways compute M sets of parameters, or one row after the other.\n\n"
        + faster(contests, [(ours, others)]),
        by_contest(contests, "plain", lambda name: name in ways),
        Dots(panels(contests, "plain", lambda name: name in ways), 2, over("plain")),
    )


def distributed(part: Json) -> Section:
    contests = sorted(part["workloads"], key=lambda contest: contest["ranks"])
    names = [name for name in names_of(contests) if name != "DDP"]
    mean = names[0]
    sent = ["bytes that a rank sends", "", *(_bytes(contests, name) for name in names)]
    table = by_contest(contests, "DDP", lambda name: True)
    lines = table.split("\n")
    rows = 2 + len(contests)  # the failures are after them
    sent_line = "| " + " | ".join(sent) + " |"
    return Section(
        "On several ranks",
        ("distributed",),
        "Measured: the time of a training step on W processes of this machine. The base is a step "
        "of DistributedDataParallel with the same samples. The M rows of every rank are joined in "
        "one stack. Then their mean is taken, or they are filtered by agreement or consensus.\n\n"
        "DDP does the same work as one row per rank with the mean. "
        f"{faster(contests, [(mean, ('DDP',))])}",
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
        "Measured: the time for the Frobenius norm, or the largest singular value, of the Jacobian "
        "of C logits with respect to the input, for N images. The base is the published loop with "
        "one backward pass per class. All contenders store the Jacobian, except the functions of "
        "`gradfilter.diagnostics`, which need not store it.\n\n" + faster(contests, pairs),
        by_contender(contests, base, _function),
        Dots(panels(contests, base, _function), 2, over("the published loop")),
    )


def _function(name: str) -> bool:
    return name.startswith(("jacobian_norm", "operator_norm"))
