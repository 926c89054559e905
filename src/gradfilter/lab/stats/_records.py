"""Numbers of a stretch of samples, and what a file says about many of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

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
        stats: A list per sample, or one for all of them.
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
