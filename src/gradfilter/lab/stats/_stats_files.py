"""The files of a measurement: names, origin, records, and finished batches for a restart."""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

import gradfilter as gf
from gradfilter.distributed._ranks import Ranks
from gradfilter.lab._run_files import (
    ForeignError,
    content_of,
    json_of,
    open_own,
    read_json,
    reading,
    refuse_link,
    write_bytes,
)
from gradfilter.lab._usage import UsageError
from gradfilter.lab.stats._stats_config import METRICS, StatsConfig
from gradfilter.lab.train._restore import Restored

# --- File names: they contain all settings that the numbers depend on ---


LONGEST = 240
"""Largest number of bytes in a name; file systems allow 255, and temporary names are longer."""


def relevant(config: StatsConfig) -> dict[str, Any]:
    """Return the settings that the numbers of this metric depend on, also defaults."""
    metric = METRICS[config.metric]
    names = ["metric", "dataset_split", "gen_strategy", *metric.takes, "restored_targets"]
    if config.gen_strategy != "none":
        names += ["num_directions", "cumulative", "raw_path"]
    if metric.draws:
        names.append("mc_sample_seed")
    return {name: getattr(config, name) for name in names}


def stem(config: StatsConfig, checkpoint: int) -> str:
    """Return ``[OUTNAME-]METRIC-SPLIT[-STRATEGY][-SETTING...]-checkpoint-ID``.

    Settings that differ from their defaults are part of it: a switch by its name,
    ``target-logit-only``, a word by itself, ``softmax``, a number with its name,
    ``num-directions-4``.

    Raises:
        UsageError: The name would be too long.

    Examples:
        >>> stem(StatsConfig(metric="jacobian", gen_strategy="svd-path", num_directions=4), 3)
        'jacobian-train-svd-path-num-directions-4-checkpoint-3'
    """
    defaults = {field.name: field.default for field in fields(StatsConfig)}
    parts = [config.outname] if config.outname else []
    parts += [config.metric, config.dataset_split]
    for name, value in relevant(config).items():
        if name in ("metric", "dataset_split") or value == defaults[name]:
            continue
        said = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(said)
        elif isinstance(value, str):
            parts.append(value)
        else:
            parts.append(f"{said}-{value}")
    whole = "-".join([*parts, "checkpoint", str(checkpoint)])
    if len(whole.encode()) > LONGEST:
        raise UsageError(
            f"--outname: the file's name would have {len(whole.encode())} bytes, more than "
            f"{LONGEST}. Choose a shorter one."
        )
    return whole


def with_range(stem: str, start: int, stop: int, total: int) -> str:
    """Return ``STEM``, or ``STEM-id-START-STOP`` if not all samples of the split are measured.

    Examples:
        >>> with_range("accuracy-test-checkpoint-0", 100, 200, 540)
        'accuracy-test-checkpoint-0-id-100-200'
    """
    return stem if (start, stop) == (0, total) else f"{stem}-id-{start}-{stop}"


# --- Origin: everything that the numbers depend on, written next to them ---


OLD_AXES = ["sample", "column"]


def origin(config: StatsConfig, restored: Restored) -> dict[str, Any]:
    """Return everything that the numbers depend on, except the samples themselves.

    Processes, batches and devices are not part of it: they change only the last digits.
    """
    trained = restored.config
    facts = {
        "command": "stats",
        "settings": relevant(config),
        "columns": list(METRICS[config.metric].columns) or [config.metric],
        "axes": axes(config),
        "data": trained.data,
        "model": trained.model,
        "label_noise": trained.label_noise,
        "seed": trained.seed,
        "checkpoint": asdict(restored.checkpoint),
        "weights": fingerprint(restored.model),
        "versions": {"gradfilter": gf.__version__, "torch": torch.__version__},
    }
    read: dict[str, Any] = json.loads(json.dumps(facts))  # as JSON will return it
    return read


def axes(config: StatsConfig) -> list[str]:
    """Return the axes of the nested lists of numbers, from the outermost on."""
    if METRICS[config.metric].per_batch:
        return ["batch", "column"]
    if config.raw_path:
        return ["sample", "direction", "anchor"]
    return ["sample", "anchor"] if config.cumulative else ["sample"]


def modern(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the metadata of an older version, which had a list of one number per sample."""
    return {**facts, "axes": ["sample"]} if facts.get("axes") == OLD_AXES else dict(facts)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- The folder, and errors where it cannot be written ---


@contextmanager
def locked(path: Path, ranks: Ranks) -> Iterator[None]:
    """Lock a file of numbers against other commands; the lock ends with the process.

    Args:
        path: The file to write.
        ranks: The processes that write it together.

    Raises:
        UsageError: Another command holds the lock, or the folder cannot be written to.
    """
    lock_path = path.with_name(f".{path.stem}.lock")
    lock = FileLock(lock_path, timeout=0)
    refusal = ""
    if ranks.is_first:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_link(lock_path)  # older versions of filelock empty the target of a link
            lock.acquire()
        except Timeout:
            refusal = "another process is measuring the same. Wait for it, or give --outname"
        except OSError as error:
            refusal = f"it cannot be written: {error.strerror or error}. Fix that, and repeat"
    try:
        # Only the first process knows the reason, and only its message is printed.
        if ranks.on_any(lambda: bool(refusal))():
            raise UsageError(f"{str(path)!r}: {refusal}.")
        yield
    finally:
        if lock.is_locked:
            # A leftover lock file would puzzle users. A process that opened it sees it is gone.
            with suppress(OSError):
                lock_path.unlink()
        lock.release()


@contextmanager
def stats_errors_as_usage(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a message of one line.

    Raises:
        UsageError: A file could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{str(path)!r} cannot be written: {error.strerror or error}. The batches that were "
            "finished are kept; fix that, and repeat the command to continue."
        ) from None


# --- Records of a range of samples, and their aggregates ---


Nested = Any
"""A number, None, or a list of these, as in JSON."""


@dataclass(frozen=True)
class StatsRecord:
    """The numbers of the samples start .. stop − 1 of a split.

    Attributes:
        start: Position of the first sample in the split, not its id.
        stop: Position after the last sample.
        sample_ids: Indices of the samples in the original data set.
        targets: Labels that the numbers were computed with.
        ground_truths: True labels.
        stats: A number or a list per sample, or one list for all of them.
        path_distances: Distances, nested like `stats`; None without a path.
        residual: Largest remaining error of an iteration, or None.
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
        """Return the record as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, found: Any) -> StatsRecord:
        """Read the JSON values that `plain` returned.

        Raises:
            ForeignError: They are not a record.
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
"""Larger than the number of samples of any data set."""


def _are_integers(found: Any) -> bool:
    return isinstance(found, list) and all(type(value) is int for value in found)


def shape_of(numbers: Nested) -> tuple[int, ...]:
    """Return the lengths of nested lists, from the outermost on; () for a number or None.

    Raises:
        ForeignError: Lists of one level differ in length, or an entry is not a number.

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
    """Replace a list of one number per sample by the number.

    Examples:
        >>> flat([[1.0], [None]])
        [1.0, None]
    """
    return [number for (number,) in numbers] if shape_of(numbers)[1:] == (1,) else numbers


def without_nan(numbers: Nested) -> Nested:
    """Replace numbers that JSON does not have, NaN and infinities, by None.

    Examples:
        >>> without_nan([[1.0, float("nan")], [2.0, 3.0]])
        [[1.0, None], [2.0, 3.0]]
    """
    if isinstance(numbers, list):
        return [without_nan(number) for number in numbers]
    return numbers if math.isfinite(numbers) else None


def count_missing(numbers: Nested) -> int:
    """Return how many of the numbers are None.

    Examples:
        >>> count_missing([[1.0, None], [None]])
        2
    """
    return sum(map(count_missing, numbers)) if isinstance(numbers, list) else int(numbers is None)


def join_records(records: Iterable[StatsRecord], start: int, stop: int) -> list[StatsRecord]:
    """Sort records, and check that they cover the samples start .. stop − 1 exactly once.

    Raises:
        UsageError: A sample is missing or occurs twice.
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
    """Compute the mean over rows of every entry; None is omitted.

    Args:
        rows: Nested lists of one shape.
        square: Compute the root of the mean square instead.

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


# --- The output file ---


Document = dict[str, Any]

OF_RECORDS = ("samples", "aggregate", "nulls", "largest_residual")
"""Metadata about the numbers; the other metadata are their origin."""


def document(records: Sequence[StatsRecord], origin: Mapping[str, Any]) -> Document:
    """Build ``{sample_ids, targets, ground_truths, stats, path_distances?, metadata}``.

    Args:
        records: Records in order, without gaps.
        origin: Everything that the numbers depend on: metric, settings, checkpoint, ...
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
            "nulls": count_missing(stats),
            "largest_residual": max(residuals, default=None),
        }
    }


def _noise_scale(settings: Mapping[str, Any], mean: Sequence[float | None]) -> float | None:
    """Compute B · trΣ / ‖G‖² of the means: far less noisy than the mean of the quotients."""
    trace, sq_norm = mean[-2:]
    if trace is None or sq_norm is None or sq_norm <= 0:
        return None
    return float(settings["batch_size"] // settings["microbatches"] * trace / sq_norm)


def records_of(found: Document) -> list[StatsRecord]:
    """Return the records that `document` was made of, as one record.

    Raises:
        ForeignError: The content is not such a document.
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
    return [StatsRecord.of(plain)]


def origin_of(found: Document) -> dict[str, Any]:
    """Return the metadata that are the origin of the numbers."""
    return {name: value for name, value in found["metadata"].items() if name not in OF_RECORDS}


def write(path: Path, content: Document) -> None:
    """Write a document completely or not at all, one entry per line."""
    lines = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in content.items()]
    write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read(path: Path) -> Document:
    """Read a file that `write` wrote.

    Raises:
        UsageError: The file has other content.
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
    aggregate = {name: _single_number(value) for name, value in metadata["aggregate"].items()}
    metadata = {**modern(metadata), "aggregate": aggregate}
    return {**found, "stats": flat(found["stats"]), "metadata": metadata}


def _single_number(numbers: Any) -> Any:
    """Return the number of a list of one."""
    return numbers[0] if shape_of(numbers) == (1,) else numbers


def join_ranges(folder: Path, stem: str, total: int) -> Path | None:
    """Join the files of --skip and --num-samples, once they cover the split.

    Args:
        folder: Folder of the run's numbers.
        stem: Name of the whole file without suffix; the parts append ``-id-START-STOP``.
        total: Number of samples in the split.

    Returns:
        The whole file if it was made now: all parts exist and have one origin.
    """
    reach: dict[int, tuple[int, Path]] = {}
    for path in sorted(folder.glob(f"{glob.escape(stem)}-id-*.json")):
        start, _, stop = path.stem.removeprefix(f"{stem}-id-").partition("-")
        # A part that does not end after its start would cause an endless loop.
        if start.isdecimal() and stop.isdecimal() and int(start) < int(stop):
            # Of several parts with one start, use the longest.
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
    records = join_records((r for part in chosen for r in records_of(part)), 0, total)
    write(whole, document(records, origin_of(chosen[0])))
    return whole


# --- Finished batches on disk, one line each, so that a killed measurement resumes ---


def part_path(folder: Path, stem: str, rank: int) -> Path:
    """Return the path of the file of a process's finished batches."""
    return folder / f"{stem}-id-{rank}.jsonl"


def parts(folder: Path, stem: str) -> list[Path]:
    """Return the existing parts, also those of more processes than there are now."""
    return sorted(
        path
        for path in folder.glob(f"{glob.escape(stem)}-id-*.jsonl")
        if path.name.removeprefix(f"{stem}-id-").removesuffix(".jsonl").isdecimal()
    )


def finished(path: Path, origin: Mapping[str, Any]) -> list[StatsRecord]:
    """Read the batches in a part.

    A killed process may leave an incomplete last line, which is ignored.

    Args:
        path: The file of the part.
        origin: Everything that the numbers depend on.

    Raises:
        UsageError: The part has another origin.
    """
    with reading(path, "the part of a measurement", "Remove it, and measure again."):
        whole = _whole(path)
        if not whole:
            return []
        head, *rest = map(json_of, whole.removesuffix(b"\n").split(b"\n"))
        if not isinstance(head, dict):
            raise ForeignError("its first line does not say what was measured")
        before = modern(head)
        records = [StatsRecord.of(line) for line in rest]
    if before.get("axes") == ["sample"]:
        records = [replace(record, stats=flat(record.stats)) for record in records]
    if before != origin:
        differing = sorted(
            name for name in {*before, *origin} if before.get(name) != origin.get(name)
        )
        raise UsageError(
            f"{str(path)!r} is part of a measurement with other {', '.join(differing)}. Finish "
            "that one, remove the file, or give --outname."
        )
    return records


def _whole(path: Path) -> bytes:
    """Return the file up to its last end of line."""
    content = content_of(path)
    return content[: content.rfind(b"\n") + 1]


@contextmanager
def appending(path: Path, origin: Mapping[str, Any]) -> Iterator[Callable[[StatsRecord], None]]:
    """Open a part, and yield the function that appends a finished batch.

    Raises:
        UsageError: The file cannot be written; that function raises it as well.
    """
    with ExitStack() as stack:
        with stats_errors_as_usage(path):
            keep = len(_whole(path)) if path.exists() else 0
            file = stack.enter_context(open_own(path, "ab", buffering=0))
            file.truncate(keep)

        def line(value: Mapping[str, Any]) -> None:
            rest = (json.dumps(value, allow_nan=False) + "\n").encode()
            with stats_errors_as_usage(path):
                while rest:  # a nearly full disk writes a part of the bytes before it fails
                    rest = rest[file.write(rest) :]

        if not keep:
            line(origin)
        yield lambda record: line(record.plain())
