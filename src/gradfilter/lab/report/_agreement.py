"""How far the rows of a batch agree, and how many of them are followed."""

from __future__ import annotations

from collections.abc import Sequence

from gradfilter.lab.report._curves import SAMPLES, over
from gradfilter.lab.report._figure import Axis
from gradfilter.lab.report._groups import Group
from gradfilter.lab.report._most import shortlist
from gradfilter.lab.report._parts import Plot, Section

LEAD = (
    "Of one batch per evaluation. The noise scale is the batch size at which the gradient's noise "
    "equals the gradient; where its estimate is not positive there is no point."
)


def agreement(groups: Sequence[Group]) -> Section:
    """Cosine, noise scale and accepted rows over the training."""
    several, left_out = shortlist([group for group in groups if _has_rows(group)])
    filtering = [group for group in several if _filters(group)]
    if not several:
        why = "Needs runs with several rows per batch (--microbatches or --per-sample)."
        return Section("agreement", "Agreement of the rows", LEAD, left_out=[why])
    parts: list[Plot] = []
    for name, title, axis, chosen, why in (
        ("cosine", "Cosine of the rows", Axis("mean pairwise cosine", "cosine"), several, ""),
        (
            "accepted",
            "Accepted rows",
            Axis("rows accepted (%)", "accepted", 100),
            filtering,
            "needs runs with a filter (--agree or --consensus)",
        ),
        (
            "noise_scale",
            "Noise scale",
            Axis("simple noise scale (samples)", "noise_scale", log=10),
            several,
            "",
        ),
    ):
        drawn = over(chosen, name, title, axis, SAMPLES, "by-samples", "over the training")
        parts += drawn
        if not drawn:
            left_out.append(f"{title}: {why or 'not measured in these runs'}.")
    return Section("agreement", "Agreement of the rows", LEAD, parts, left_out)


def _has_rows(group: Group) -> bool:
    settings = group.runs[0].settings
    return bool(settings["microbatches"] > 1 or settings["per_sample"])


def _filters(group: Group) -> bool:
    settings = group.runs[0].settings
    return settings["agree"] is not None or settings["consensus"] is not None
