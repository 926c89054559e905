"""The results of a benchmark as data; table, chart and JSON are made from them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._timing import Spread

SAME = ("benchmark", "device_name", "threads", "torch", "python", "quick")
"""Facts that must be equal for two runs, if their numbers are in one file."""


@dataclass(frozen=True)
class Result:
    """The time and memory of a contender, or the reason why it failed."""

    seconds: Spread | None = None
    ratio: Spread | None = None
    peak_bytes: int | None = None
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One model on some samples, with the result of every contender by name."""

    model: str
    title: str
    parameters: int
    results: dict[str, Result]
    ratios: dict[str, Spread] = field(default_factory=dict)  # "a / b", not to the base

    @property
    def label(self) -> str:
        return self.title


@dataclass(frozen=True, kw_only=True)
class Workload(Contest):
    """One model at one size: M microbatches of B samples."""

    microbatches: int
    samples_per_microbatch: int

    @property
    def label(self) -> str:
        return f"{self.title} ({self.microbatches}, {self.samples_per_microbatch})"


def save(path: Path, facts: dict[str, Any], contests: list[Contest]) -> None:
    """Write the contests; keep those of other models, if the same machine measured them.

    So the models can be measured one at a time.
    """
    measured = {contest.model for contest in contests}
    old = [w for w in earlier(path, facts).get("workloads", []) if w["model"] not in measured]
    when = {key: facts[key] for key in ("date", "rounds")}
    write(path, {**facts, "workloads": [*old, *({**asdict(c), **when} for c in contests)]})


def earlier(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of the file if they are comparable, and otherwise an empty dict."""
    contents = json.loads(path.read_text()) if path.exists() else {}
    return contents if all(contents.get(key) == facts[key] for key in SAME) else {}


def write(path: Path, contents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1) + "\n")


def load(path: Path) -> list[Workload]:
    """Return the workloads that `save` wrote, also those of earlier runs."""
    workloads = json.loads(path.read_text())["workloads"]
    fields = Workload.__dataclass_fields__
    return [
        Workload(
            **{key: value for key, value in workload.items() if key in fields}
            | {"results": {name: _result(r) for name, r in workload["results"].items()}}
            | {"ratios": {name: Spread(**r) for name, r in workload.get("ratios", {}).items()}}
        )
        for workload in workloads
    ]


def _result(cell: dict[str, Any]) -> Result:
    spreads = {key: cell[key] and Spread(**cell[key]) for key in ("seconds", "ratio")}
    return Result(**{**cell, **spreads})
