"""What one benchmark measured, as data: the table, the chart and the JSON are made of it."""

from dataclasses import dataclass

from benchmarks._timing import Spread


@dataclass(frozen=True)
class Result:
    """One cell: what a contender took, or why it could not."""

    seconds: Spread | None = None
    ratio: Spread | None = None
    peak_bytes: int | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Workload:
    """One model at one size, and the result of every contender by name."""

    model: str
    title: str
    microbatches: int
    samples_per_microbatch: int
    parameters: int
    results: dict[str, Result]

    @property
    def label(self) -> str:
        return f"{self.title} ({self.microbatches}, {self.samples_per_microbatch})"
