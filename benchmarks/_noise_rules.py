"""The rules that are compared on wrong labels: all but learning rate and seed."""

from dataclasses import dataclass, field, replace
from typing import Any

import gradfilter as gf
from gradfilter.lab.train._train_config import TrainConfig

STEPS = 1500
BASE = TrainConfig(data="digits", model="mlp_256", steps=STEPS, momentum=0.9, samples_per_class=8)
"""Every rule sees the same 80 samples in a step, eight of every class."""
THRESHOLDS = (0.9, 0.95, 0.97, 1.0)
CLIP = 1.0
PER_SAMPLE: dict[str, Any] = {"per_sample": True}


@dataclass(frozen=True)
class Rule:
    """What is done to the rows of a batch.

    Attributes:
        name: In tables and files.
        settings: Of `TrainConfig`.
        ema: Decay of the averaged parameters that are measured instead of the last ones.
        reducer: Instead of the one that the settings name, for rules that are no options.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    ema: float | None = None
    reducer: gf.Transform | None = None

    def config(self, **others: Any) -> TrainConfig:
        return replace(BASE, **self.settings, **others)


def _clipped(rule: Rule) -> Rule:
    return Rule(f"{rule.name}, clip {CLIP:g}", {**rule.settings, "clip_per_row": CLIP})


def _rows(microbatches: int) -> dict[str, Any]:
    return {"microbatches": microbatches, "samples_per_class": 8 // microbatches}


def rules() -> list[Rule]:
    """Plain training, every filter with and without clipped rows, and the sharp ones."""
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
    """The best of `rule_search.py` for clean and noisy labels, and what they are measured by."""
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


def _budget(power: float) -> dict[str, Any]:
    return {"budget_clip": 0.3, "budget_power": power}


def _averaged(rule: Rule) -> Rule:
    return replace(rule, name=f"{rule.name}, averaged", ema=0.99)


def rule_of(name: str) -> Rule:
    """The rule of this name; processes tell each other names, for functions cannot be sent."""
    return next(rule for rule in (*rules(), *candidates()) if rule.name == name)
