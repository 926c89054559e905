"""The rules that are compared with wrong labels, without learning rates and seeds."""

from dataclasses import dataclass, field, replace
from typing import Any

import gradfilter as gf
from gradfilter.lab.train._train_config import TrainConfig

STEPS = 1500
BASE = TrainConfig(data="digits", model="mlp_256", steps=STEPS, momentum=0.9, samples_per_class=8)
"""Every rule uses the same 80 samples in a step, eight of every class."""
THRESHOLDS = (0.9, 0.95, 0.97, 1.0)
CLIP = 1.0
PER_SAMPLE: dict[str, Any] = {"per_sample": True}


@dataclass(frozen=True)
class Rule:
    """A rule for the rows of a batch.

    Attributes:
        name: The name in tables and files.
        settings: Fields of `TrainConfig`.
        ema: The decay of the averaged parameters, which are measured instead of the last ones.
        reducer: The reducer for rules that are not options of `TrainConfig`.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    ema: float | None = None
    reducer: gf.Transform | None = None

    def config(self, **others: Any) -> TrainConfig:
        """Return the configuration of a training with this rule."""
        return replace(BASE, **self.settings, **others)


def _clipped(rule: Rule) -> Rule:
    return Rule(f"{rule.name}, clip {CLIP:g}", {**rule.settings, "clip_per_row": CLIP})


def _rows(microbatches: int) -> dict[str, Any]:
    return {"microbatches": microbatches, "samples_per_class": 8 // microbatches}


def rules() -> list[Rule]:
    """Return plain training, every filter with and without clipped rows, SAM, GSAM and AGC."""
    filters = [
        *(
            Rule(f"agree {t:g}, M = {m}", {**_rows(m), "agree": t})
            for m in (2, 8)
            for t in THRESHOLDS
        ),
        Rule("consensus, soft", {**PER_SAMPLE, "consensus": 1.0}),
        *(
            Rule(f"consensus {t:g}, hard", {**PER_SAMPLE, "consensus": t, "consensus_hard": True})
            for t in THRESHOLDS
        ),
    ]
    return [
        Rule("plain"),
        Rule(f"clip {CLIP:g} per sample", {**PER_SAMPLE, "clip_per_row": CLIP}),
        *(both for rule in filters for both in (rule, _clipped(rule))),
        Rule("SAM 0.05", {"sam": 0.05}),
        Rule("SAM 0.2", {"sam": 0.2}),
        Rule("GSAM 0.05, 0.4", {"sam": 0.05, "gsam": 0.4}),
        Rule("GSAM 0.2, 0.4", {"sam": 0.2, "gsam": 0.4}),
        Rule("AGC 0.01", {"agc": 0.01}),
        Rule("AGC 0.1", {"agc": 0.1}),
    ]


def candidates() -> list[Rule]:
    """Return the best rules of `rule_search.py`, and the rules they are compared with."""
    soft = {**PER_SAMPLE, "consensus": 1.0}
    found: list[Rule] = []
    for power in (0.0, 3.0):
        rule = Rule(f"budget 0.3, power {power:g}", {**PER_SAMPLE, **_budget(power)})
        found += [rule, _averaged(rule)]
    clipped = _clipped(Rule("consensus, soft", soft))
    return [
        Rule("plain"),
        Rule(f"clip {CLIP:g} per sample", {**PER_SAMPLE, "clip_per_row": CLIP}),
        Rule("consensus, soft", soft),
        clipped,
        _averaged(clipped),
        *found,
    ]


def one_sam() -> list[Rule]:
    """Return SAM with a perturbation for every sample, and plain training."""
    per_sample = {**PER_SAMPLE, "m_sharpness": True}
    return [
        Rule("plain"),
        *(Rule(f"1-SAM {rho:g}", {**per_sample, "sam": rho}) for rho in (0.05, 0.1)),
    ]


def _budget(power: float) -> dict[str, Any]:
    return {"budget_clip": 0.3, "budget_power": power}


def _averaged(rule: Rule) -> Rule:
    return replace(rule, name=f"{rule.name}, averaged", ema=0.99)


def rule_of(name: str) -> Rule:
    """Return the rule with a name. Processes send names, because functions cannot be sent."""
    return next(rule for rule in (*rules(), *candidates(), *one_sam()) if rule.name == name)
