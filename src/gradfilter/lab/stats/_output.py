"""The file of numbers that a measurement leaves behind."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradfilter.lab._reading import ForeignError, read_json
from gradfilter.lab._rundir import write_bytes
from gradfilter.lab.stats._catalogue import METRICS
from gradfilter.lab.stats._origin import OLD_AXES, modern
from gradfilter.lab.stats._records import Record, flat, joined, means, nulls, shape_of

Document = dict[str, Any]

OF_RECORDS = ("samples", "aggregate", "nulls", "largest_residual")
"""What the metadata say about the numbers; the rest says where they come from."""


def document(records: Sequence[Record], origin: Mapping[str, Any]) -> Document:
    """``{sample_ids, targets, ground_truths, stats, path_distances?, metadata}``.

    Args:
        records: In order, without gaps.
        origin: What the numbers depend on: the metric, its settings, the checkpoint, ...
    """
    columns: Document = {
        name: [entry for record in records for entry in getattr(record, name)]
        for name in ("sample_ids", "targets", "ground_truths", "stats")
    }
    if records[0].path_distances is not None:
        columns["path_distances"] = [d for r in records for d in r.path_distances or []]
    stats = columns["stats"]
    metric = METRICS[origin["settings"]["metric"]]
    aggregate = {"mean": means(stats)}
    if metric.lipschitz:
        aggregate["lipschitz"] = means(stats, square=True)
    if "noise_trace" in metric.columns:
        aggregate["simple_noise_scale"] = _noise_scale(origin["settings"], aggregate["mean"])
    residuals = [r.residual for r in records if r.residual is not None]
    return columns | {
        "metadata": {
            **origin,
            "samples": [records[0].start, records[-1].stop],
            "aggregate": aggregate,
            "nulls": nulls(stats),
            "largest_residual": max(residuals, default=None),
        }
    }


def _noise_scale(settings: Mapping[str, Any], mean: Sequence[float | None]) -> float | None:
    """B · trΣ / ‖G‖² of the means: far less noisy than the mean of the batches' quotients."""
    trace, sq_norm = mean[-2:]
    if trace is None or sq_norm is None or sq_norm <= 0:
        return None
    return float(settings["batch_size"] // settings["microbatches"] * trace / sq_norm)


def records_of(found: Document) -> list[Record]:
    """What `document` was made of, in one piece.

    Raises:
        ForeignError: It was made of something else.
    """
    metadata = found["metadata"]
    start, stop = metadata["samples"]
    plain = {
        "start": start,
        "stop": stop,
        **{n: found[n] for n in ("sample_ids", "targets", "ground_truths", "stats")},
        "path_distances": found.get("path_distances"),
        "residual": metadata["largest_residual"],
    }
    return [Record.of(plain)]


def origin_of(found: Document) -> dict[str, Any]:
    """The metadata that say where the numbers come from."""
    return {name: value for name, value in found["metadata"].items() if name not in OF_RECORDS}


def write(path: Path, content: Document) -> None:
    """Write a document as a whole or not at all, one entry a line."""
    lines = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in content.items()]
    write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read(path: Path) -> Document:
    """Read what `write` wrote.

    Raises:
        UsageError: It is something else.
    """
    fix = "Remove it if it is not a file of numbers, or give --outname."
    return read_json(path, "the file of numbers", fix, _document)


def _document(found: Any) -> Document:
    if not isinstance(found, dict) or not isinstance(found.get("metadata"), dict):
        raise ForeignError("it is not what gradfilter stats writes")
    records_of(found)
    metadata = found["metadata"]
    if metadata.get("axes") != OLD_AXES:
        return found
    aggregate = {name: _only(value) for name, value in metadata["aggregate"].items()}
    metadata = {**modern(metadata), "aggregate": aggregate}
    return {**found, "stats": flat(found["stats"]), "metadata": metadata}


def _only(numbers: Any) -> Any:
    """The number that a list of one has."""
    return numbers[0] if shape_of(numbers) == (1,) else numbers


def join_ranges(folder: Path, stem: str, total: int) -> Path | None:
    """Make one file of those that --skip and --num-samples made, once they cover the split.

    Args:
        folder: Of the run's numbers.
        stem: Of the whole file's name; the parts' go on with ``-id-START-STOP``.
        total: Samples in the split.

    Returns:
        The whole file if it was made now: all parts are there and were measured in one way.
    """
    reach: dict[int, tuple[int, Path]] = {}
    for path in sorted(folder.glob(f"{glob.escape(stem)}-id-*.json")):
        start, _, stop = path.stem.removeprefix(f"{stem}-id-").partition("-")
        # One that ends where it begins, or before, would lead round in circles.
        if start.isdecimal() and stop.isdecimal() and int(start) < int(stop):
            # Of several that begin at one place the longest leads on.
            reach[int(start)] = max((int(stop), path), reach.get(int(start), (0, path)))
    chosen, place = [], 0
    while place in reach and place < total:
        place, path = reach[place]
        chosen.append(read(path))
    if place != total or any(origin_of(part) != origin_of(chosen[0]) for part in chosen):
        return None
    whole = folder / f"{stem}.json"
    if whole.exists():
        return None
    records = joined((r for part in chosen for r in records_of(part)), 0, total)
    write(whole, document(records, origin_of(chosen[0])))
    return whole
