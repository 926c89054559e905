"""Who measures what, and in which batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gradfilter.lab.stats._records import Record

Batch = tuple[int, int]
"""Places in the split, from the first to the one after the last."""


def missing(start: int, stop: int, done: Iterable[Record], batch_size: int) -> list[Batch]:
    """The batches that are still to be measured.

    Batches are cut from ``start`` on, whatever is done already and however many processes there
    are, so that every sample is measured in the same company as in an uninterrupted run.

    Args:
        start: First sample.
        stop: After the last.
        done: What is there.
        batch_size: Of every batch but the last.

    Examples:
        >>> missing(0, 10, [Record(4, 8, [], [], [], [])], 4)
        [(0, 4), (8, 10)]
    """
    batches = []
    place = start
    edges = [*sorted((record.start, record.stop) for record in done), (stop, stop)]
    for begin, end in edges:
        while place < begin:
            cut = place + batch_size - (place - start) % batch_size
            batches.append((place, min(cut, begin)))
            place = batches[-1][1]
        place = max(place, end)
    return batches


def share(batches: Sequence[Batch], rank: int, size: int) -> Sequence[Batch]:
    """One process's slice: as many whole batches as anyone's, one more or less.

    Examples:
        >>> [share([(0, 4), (4, 8), (8, 10)], rank, 2) for rank in range(2)]
        [[(0, 4)], [(4, 8), (8, 10)]]
    """
    return batches[len(batches) * rank // size : len(batches) * (rank + 1) // size]
