"""Hold the batches that a compiled host accumulates, from the graph of each to that of the step.

One graph computes what is held of a batch: its rows, or what the reducer has made of them. It runs
once per batch, and its results are tensors. The graph of the step takes those of all batches. If it
makes another pass over the batches (the second pass of SAM), it computes them again from what is
held for it: the batch, the buffers before it, and the random numbers that its first pass drew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradfilter import _tree
from gradfilter.grads._call_context import Versions
from gradfilter.grads._recorded_draws import present_draws
from gradfilter.grads._row_parts import RunningSum, as_tensors, dense_rows, from_tensors
from gradfilter.grads._stack import ComputedStack, DenseStack, GradStack, StackOrigin
from gradfilter.transforms._compile import Moment, Parts
from gradfilter.transforms._streaming import PartResult, ReducedPart, ReducedRows

# --- What the graph of a batch returns, and what that of the step makes of it ---

NUMBERS = ("outs", "divisor", "losses", "live", "aux")
"""The fields of a `PartResult` that are numbers, and are held in every case."""


def held_of(rows: ComputedStack, factors: Tensor | None, reduced: ReducedRows | None) -> Any:
    """Return what is held of a batch, as a tree of tensors; runs in the graph of the batch.

    Args:
        rows: The rows of the batch.
        factors: The factors that remove a loss scale from them, or None.
        reduced: Reduces them; None to hold the rows.
    """
    if reduced is None:
        dense = dense_rows(rows, factors)
        found: dict[str, Any] = {"rows": dense.rows, "losses": dense.losses, "aux": dense.aux}
        return {**found, "scale": factors, "drawn": present_draws().results}
    part = reduced.reduce(rows if factors is None else rows.scaled(factors))
    found = {"grads": part.grads, **{name: getattr(part.result, name) for name in NUMBERS}}
    if part.result.rows is None:
        return found
    again = {"stack": as_tensors(part.result.rows, rows.origin), "drawn": present_draws().results}
    return {**found, **again}


@dataclass(frozen=True, eq=False)
class EarlierBatch:
    """A batch whose rows were accumulated, as the graph of the step needs it.

    Attributes:
        tensors: What it reads: the batch and its own tensors, and what `held_of` returned.
        moment: What the graph of the batch depended on.
        params: The parameters, to see whether they are written.
    """

    tensors: dict[str, Any]
    moment: Moment
    params: Versions
    _read: Versions = field(init=False)

    def __post_init__(self) -> None:
        """Record the versions of the tensors that another pass reads."""
        places = {
            "batch": _tree.leaves(self.tensors["given"]["batch"]),
            "tensor that the loss reads": self.moment.outside,
        }
        read = [(n, t) for n, found in places.items() for t in found if isinstance(t, Tensor)]
        object.__setattr__(self, "_read", Versions(read))

    def changes(self, parts: Parts) -> tuple[str | None, str | None]:
        """Return what has changed since its first pass: of what it reads, and of the parameters."""
        written = self._read.written()
        if written is not None:
            return f"the {written} written in place since", self.params.written()
        same = self.moment.is_present(parts)
        return None if same else "another mode or Python state", self.params.written()


class EarlierBatches:
    """The batches accumulated since the last step.

    Attributes:
        reduced: The sum of the reduced rows; None if no batch was reduced.
        batches: The batches that another pass may read, or whose rows are held.
    """

    def __init__(self) -> None:
        """Begin without batches."""
        self.reduced: ReducedRows | None = None
        self.batches: list[EarlierBatch] = []

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches) if self.reduced is None else len(self.reduced)

    def add(
        self, reduced: ReducedRows | None, given: dict[str, Any], held: Any, moment: Moment
    ) -> None:
        """Add a batch.

        Args:
            reduced: The sum of the batches before; None to hold the rows of all.
            given: The tensors from which the graph has computed it.
            held: What the graph returned: see `held_of`.
            moment: What the graph depended on.

        Raises:
            ValueError: Its rows do not fit to those of the batches before.
        """
        if reduced is not None:
            result = PartResult(**{name: held.pop(name) for name in NUMBERS}, rows=None)
            reduced.append(ReducedPart(held.pop("grads"), result, {}, {}))
            self.reduced = reduced
        if held:
            # The module's own buffers are about to be written.
            buffers = {name: buffer.clone() for name, buffer in given["buffers"].items()}
            own = {"batch": given["batch"], "buffers": buffers, "scale": given["scale"]}
            params = Versions(given["params"].items(), "parameter {!r}")
            self.batches.append(EarlierBatch({"given": own, **held}, moment, params))

    def tensors(self) -> dict[str, Any]:
        """Return what the graph of the step takes; empty without batches."""
        found: dict[str, Any] = {}
        if self.batches:
            found["batches"] = [batch.tensors for batch in self.batches]
        if self.reduced is not None:
            found["total"] = self.reduced.total.total
            found["results"] = [
                {name: getattr(result, name) for name in NUMBERS} for result in self.reduced.results
            ]
        return found

    def constants(self, parts: Parts) -> tuple[Constants, ...]:
        """Return for each batch what its tensors do not show, and the graph has to know."""
        return tuple((batch.moment.calls, *batch.changes(parts)) for batch in self.batches)


Constants = tuple[tuple[Any, ...], str | None, str | None]
"""The draws of a batch, and what has changed since: see `EarlierBatch.changes`."""


def earlier_rows(
    tensors: Mapping[str, Any],
    constants: Sequence[Constants],
    origin_of: Callable[[dict[str, Any]], StackOrigin],
    begun: ReducedRows | None,
) -> ReducedRows | list[DenseStack]:
    """Return the rows of the batches; runs in the graph of the step, before its own batch.

    Args:
        tensors: What `EarlierBatches.tensors` gives.
        constants: What `EarlierBatches.constants` gives.
        origin_of: Returns the way to compute the rows again, given the batch and its own tensors.
        begun: A sum without parts, for a chain that reduces the rows of each batch.
    """
    batches = tensors.get("batches", [])
    origins = []
    for own, (calls, read, params) in zip(batches, constants, strict=True):
        origins.append(_guarded(origin_of(own["given"]), read, params))
        present_draws().take(calls, own["drawn"])
    if begun is None or "results" not in tensors:  # rows were held, or there are none
        pairs = zip(batches, origins, strict=True)
        return [
            DenseStack(own["rows"], own["losses"], {}, own["aux"], own["scale"], origin)
            for own, origin in pairs
        ]
    stacks: list[GradStack | None] = [None] * len(tensors["results"])
    if batches:
        pairs = zip(batches, origins, strict=True)
        stacks = [from_tensors(own["stack"], origin) for own, origin in pairs]
    begun.total = RunningSum(tensors["total"])
    begun.results = [
        PartResult(**numbers, rows=stack)
        for numbers, stack in zip(tensors["results"], stacks, strict=True)
    ]
    return begun


@dataclass(frozen=True, eq=False)
class _Guard:
    """Refuses another pass over a batch if what it reads has changed since the first.

    Attributes:
        origin: The way to compute the rows of the batch.
        read: What has changed of what the pass reads, or None.
        params: What has changed of the parameters, or None.
    """

    origin: StackOrigin
    read: str | None
    params: str | None

    def check(self, names: Collection[str]) -> None:
        """Refuse a pass that needs some of the parameters as they were."""
        if names and self.params is not None:
            raise _changed(self.params)

    def evaluate(
        self, given: Mapping[str, Tensor], per_row: bool, kept: Collection[str]
    ) -> GradStack:
        """Compute the rows at other parameters."""
        if self.read is not None:
            raise _changed(self.read)
        self.check(kept)
        return self.origin.evaluate(given, per_row, kept)


def _guarded(origin: StackOrigin, read: str | None, params: str | None) -> StackOrigin:
    guard = _Guard(origin, read, params)
    return StackOrigin(origin.rows, origin.params, guard.evaluate, origin.per_row, guard.check)


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        "Expected accumulated batches as they were when their rows were computed, because this "
        f"step makes another pass over them, found {what}. Change it after step(), or accumulate "
        "copies."
    )
