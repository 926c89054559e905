"""What the steps of one epoch add up to, kept on the device until the epoch is over."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter.lab.train._config import TrainConfig

SUMS = ("loss", "losses", "rows", "accepted", "steps", "clipped_rows", "clipped_units", "gap")
CLIPPED_ROWS = ("clip_per_row/clipped_fraction", "budget_clip/clipped_fraction")
LATEST = ("lr", "rho")

Totals = dict[str, Tensor]
"""One number per name, all of them on the device."""


def nothing(device: torch.device) -> Totals:
    """The totals before the first step of an epoch."""
    narrow = torch.zeros((), device=device)
    zero = narrow.to(_tree.wide(narrow))
    return dict.fromkeys((*SUMS, *LATEST), zero)


def plus(totals: Totals, info: Mapping[str, Tensor]) -> Totals:
    """The totals with one more step; nothing waits for the device.

    Args:
        totals: Before the step.
        info: Of the step.
    """
    found = {name.split("/")[-1]: value for name, value in info.items()}
    accepted = found.get("accepted")
    # A reducer that accepts nothing and rejects nothing takes every row.
    one = torch.ones_like(totals["steps"])
    # A loss that is no number is one of a step that a filter skipped, or the last of a training.
    finite = info["loss"].isfinite()
    new = {
        "loss": torch.where(finite, info["loss"], 0.0),
        "losses": finite,
        "rows": one if accepted is None else one * len(accepted),
        "accepted": one if accepted is None else accepted.sum(),
        "steps": one,
        "clipped_rows": next((info[n] for n in CLIPPED_ROWS if n in info), None),
        "clipped_units": info.get("agc_clip/clipped_fraction"),
        "gap": found.get("surrogate_gap"),
        "lr": found["lr"],
        "rho": found.get("rho"),
    }
    sums = {n: totals[n] + v for n in SUMS if (v := new[n]) is not None}
    latest = {n: v.to(totals[n].dtype) for n in LATEST if (v := new[n]) is not None}
    return totals | sums | latest


def means(totals: Mapping[str, float], config: TrainConfig) -> dict[str, float]:
    """The numbers of an epoch for people; NaN for what the run does not have.

    Args:
        totals: As numbers.
        config: Says what the run has.
    """
    steps = totals["steps"] or math.nan
    rho = math.nan if config.sam is None else config.sam
    if config.rho_schedule != "constant":
        rho = totals["rho"] * steps / steps  # of no step there is none
    clipped = config.clip_per_row is not None or config.budget_clip is not None
    return {
        "loss": totals["loss"] / (totals["losses"] or math.nan),
        "accepted": totals["accepted"] / (totals["rows"] or math.nan),
        "clipped_rows": _if(clipped, totals["clipped_rows"] / steps),
        "clipped_units": _if(bool(config.agc), totals["clipped_units"] / steps),
        "surrogate_gap": _if(config.sam is not None, totals["gap"] / steps),
        "lr": totals["lr"] * steps / steps,
        "rho": rho,
    }


def _if(has: bool, value: float) -> float:
    return value if has else math.nan
