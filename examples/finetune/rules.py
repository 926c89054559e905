"""The rules that are compared: what happens to the gradients before the optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import gradfilter as gf


@dataclass(frozen=True)
class Rule:
    """Transforms from rows to one gradient.

    Attributes:
        about: What the rule does.
        transforms: The transforms.
        microbatches: Rows per process and step; None for one row per sequence.
        reference: True if the rule follows the gradient of the clean sequences.
    """

    about: str
    transforms: Sequence[gf.Transform]
    microbatches: int | None = None
    reference: bool = False


RULES = {
    "plain": Rule("the mean of all sequences", [gf.mean_rows()], 1),
    "spike": Rule("shorten a mean that stands out", [gf.mean_rows(), gf.spike_clip()], 1),
    "clip": Rule(
        "clip the gradient of every sequence to norm 1", [gf.clip_per_row(1.0), gf.mean_rows()]
    ),
    "consensus": Rule(
        "the same clip; weights by the cosine with the other sequences",
        [gf.clip_per_row(1.0), gf.consensus_filter()],
    ),
    "reference": Rule(
        "weights by the product with the gradient of the clean sequences",
        [gf.reference_filter()],
        reference=True,
    ),
}


def accepted(info: dict[str, Any], bad: Tensor) -> dict[str, float]:
    """Return the fractions of bad and of good sequences that got a weight, if the rule says so."""
    found = [values for name, values in info.items() if name.endswith("/accepted")]
    if not found:
        return {}
    rows = found[-1].double()
    return {"accepted_bad": float(rows[bad].mean()), "accepted_good": float(rows[~bad].mean())}
