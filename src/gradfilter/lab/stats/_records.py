"""Numbers of a stretch of samples, and what a file says about many of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from gradfilter.lab._reading import ForeignError
from gradfilter.lab._usage import UsageError

Nested = Any
"""A number, None, or a list of those, as JSON has it."""


@dataclass(frozen=True)
class Record:
    """What is known of the samples start .. stop − 1 of a split.

    Attributes:
        start: Place of the first one in the split, not its id.
        stop: Place after the last one.
        sample_ids: Their indices in the original data set.
        targets: The labels that the numbers are about.
        ground_truths: The true labels.
        stats: A number or a list per sample, or one list for all of them.
        path_distances: As stats, or None where there is no path.
        residual: The largest error that an iteration left, or None.
    """

    start: int
    stop: int
    sample_ids: list[int]
    targets: list[int]
    ground_truths: list[int]
    stats: list[Nested]
    path_distances: list[Nested] | None = None
    residual: float | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def of(cls, found: Any) -> Record:
        """Read what `plain` wrote.

        Raises:
            ForeignError: It is something else.
        """
        if not isinstance(found, dict) or not {*found} <= {field.name for field in fields(cls)}:
            raise ForeignError("it is not a record of measured samples")
        record = cls(**found)
        start, stop = record.start, record.stop
        if not (_are_integers([start, stop]) and 0 <= start < stop <= MOST):
            raise ForeignError(f"it has no samples {start!r:.40} to {stop!r:.40}")
        for name in ("sample_ids", "targets", "ground_truths"):
            column = getattr(record, name)
            if not _are_integers(column) or len(column) != stop - start:
                raise ForeignError(f"its {name} are not those of {stop - start} samples")
        for numbers in (record.stats, record.path_distances):
            if numbers is not None and not isinstance(numbers, list):
                raise ForeignError("its numbers are not a list")
            shape_of(numbers or None)
        if not record.stats:
            raise ForeignError("it has no numbers")
        if shape_of(record.residual):
            raise ForeignError("its residual is not a number")
        return record


MOST = 2**53
"""More than any data set has samples."""


def _are_integers(found: Any) -> bool:
    return isinstance(found, list) and all(type(value) is int for value in found)


def shape_of(numbers: Nested) -> tuple[int, ...]:
    """The lengths of nested lists, from the outermost on; () for a number or None.

    Raises:
        ForeignError: Lists of one level differ, or there is something else than numbers.

    Examples:
        >>> shape_of([[1.0, None], [2.0, 3.0]])
        (2, 2)
    """
    if isinstance(numbers, list):
        shapes = {shape_of(number) for number in numbers}
        if len(shapes) > 1:
            raise ForeignError("its lists have different lengths")
        return (len(numbers), *(shapes.pop() if shapes else ()))
    number = isinstance(numbers, int | float) and not isinstance(numbers, bool)
    if numbers is not None and not (number and math.isfinite(numbers)):
        raise ForeignError(f"{numbers!r:.40} is not a number")
    return ()


def flat(numbers: Nested) -> Nested:
    """A number per sample where there was a list of one.

    Examples:
        >>> flat([[1.0], [None]])
        [1.0, None]
    """
    return [number for (number,) in numbers] if shape_of(numbers)[1:] == (1,) else numbers


def without_nan(numbers: Nested) -> Nested:
    """Nested lists with None in place of what JSON does not know: NaN and infinities.

    Examples:
        >>> without_nan([[1.0, float("nan")], [2.0, 3.0]])
        [[1.0, None], [2.0, 3.0]]
    """
    if isinstance(numbers, list):
        return [without_nan(number) for number in numbers]
    return numbers if math.isfinite(numbers) else None


def nulls(numbers: Nested) -> int:
    """How many of the numbers are None.

    Examples:
        >>> nulls([[1.0, None], [None]])
        2
    """
    return sum(map(nulls, numbers)) if isinstance(numbers, list) else int(numbers is None)


def joined(records: Iterable[Record], start: int, stop: int) -> list[Record]:
    """Records in the order of the split, which together are exactly its samples start .. stop − 1.

    Raises:
        UsageError: A sample is missing, or is there twice.
    """
    ordered = sorted(records, key=lambda record: record.start)
    edges = [(start, start), *((r.start, r.stop) for r in ordered), (stop, stop)]
    for (_, end), (begin, _) in pairwise(edges):
        if end != begin:
            what = f"{end} to {begin - 1} are missing" if end < begin else f"{begin} is there twice"
            raise UsageError(
                f"the parts do not fit together: in the samples {start} to {stop - 1}, {what}. "
                "Remove the parts in the run's stats/ folder, and measure again."
            )
    if len({shape_of(record.stats)[1:] for record in ordered}) > 1:
        raise UsageError(
            "the parts do not fit together: they have different numbers of a sample. "
            "Remove the parts in the run's stats/ folder, and measure again."
        )
    ids = [sample for record in ordered for sample in record.sample_ids]
    if len(set(ids)) != len(ids):
        raise UsageError(
            "the parts do not fit together: a sample id is there twice. "
            "Remove the parts in the run's stats/ folder, and measure again."
        )
    return ordered


def means(rows: Sequence[Nested], square: bool = False) -> Nested:
    """The mean over rows of every entry, over the numbers that there are.

    Args:
        rows: Nested lists of one shape.
        square: Take the root of the mean square instead.

    Examples:
        >>> means([[1.0, None], [3.0, 4.0]])
        [2.0, 4.0]
    """
    if not rows:
        return None
    if isinstance(rows[0], list):
        return [means(column, square) for column in zip(*rows, strict=True)]
    known = [row for row in rows if row is not None]
    if not known:
        return None
    if square:
        return math.sqrt(math.fsum(number * number for number in known) / len(known))
    return math.fsum(known) / len(known)
