"""The sections of the page about whole steps, and about norms of Jacobians."""

from collections.abc import Sequence

from benchmarks._dots import Dots
from benchmarks._section import Json, Section, is_ours, over
from benchmarks._tables import (
    by_contender,
    by_contest,
    faster,
    names_of,
    panels,
)


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
    return is_ours(name) or name in ("plain", "SAM", "GSAM")


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
    peers = [name for name in clippers if not is_ours(name)]
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
    return is_ours(name) or name.startswith("ours")


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
