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
from gradfilter.lab._crew import Crew
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
"""Bytes of a name; file systems allow 255, and what is written on the way has longer ones."""


def relevant(config: StatsConfig) -> dict[str, Any]:
    """The settings that the numbers of this metric depend on, whatever their values."""
    metric = METRICS[config.metric]
    names = ["metric", "dataset_split", "gen_strategy", *metric.takes, "restored_targets"]
    if config.gen_strategy != "none":
        names += ["num_directions", "cumulative", "raw_path"]
    if metric.draws:
        names.append("mc_sample_seed")
    return {name: getattr(config, name) for name in names}


def stem(config: StatsConfig, checkpoint: int) -> str:
    """``[OUTNAME-]METRIC-SPLIT[-STRATEGY][-SETTING...]-checkpoint-ID``.

    A setting is there if it is not the default: a switch by its name, ``target-logit-only``, a
    word by itself, ``softmax``, a number with its name, ``num-directions-4``.

    Raises:
        UsageError: It would be too long.

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
    """``STEM``, or ``STEM-id-START-STOP`` where not all samples of the split are measured.

    Examples:
        >>> with_range("accuracy-test-checkpoint-0", 100, 200, 540)
        'accuracy-test-checkpoint-0-id-100-200'
    """
    return stem if (start, stop) == (0, total) else f"{stem}-id-{start}-{stop}"


# --- Origin: all that the numbers depend on, written next to them ---


OLD_AXES = ["sample", "column"]


def origin(config: StatsConfig, restored: Restored) -> dict[str, Any]:
    """Everything that the numbers depend on beside the samples themselves.

    Processes, batches and devices are not among it: they change nothing but the last digits.
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
    read: dict[str, Any] = json.loads(json.dumps(facts))  # as it will be read again
    return read


def axes(config: StatsConfig) -> list[str]:
    """What the nested lists of the numbers go over, from the outermost on."""
    if METRICS[config.metric].per_batch:
        return ["batch", "column"]
    if config.raw_path:
        return ["sample", "direction", "anchor"]
    return ["sample", "anchor"] if config.cumulative else ["sample"]


def modern(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an older version wrote as it is written now: it had a list of one number per sample."""
    return {**facts, "axes": ["sample"]} if facts.get("axes") == OLD_AXES else dict(facts)


def fingerprint(model: nn.Module) -> str:
    """Two models with the same one have the same parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- The folder, and errors where it cannot be written ---


@contextmanager
def locked(path: Path, crew: Crew) -> Iterator[None]:
    """Keep other commands away from a file of numbers; a killed one leaves no lock behind.

    Args:
        path: The file that is going to be written.
        crew: Who works on it together.

    Raises:
        UsageError: Another command is at work on it, or its folder cannot be written to.
    """
    lock_path = path.with_name(f".{path.stem}.lock")
    lock = FileLock(lock_path, timeout=0)
    refusal = ""
    if crew.is_first:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_link(lock_path)  # older file locks empty what it leads to
            lock.acquire()
        except Timeout:
            refusal = "another process is measuring the same. Wait for it, or give --outname"
        except OSError as error:
            refusal = f"it cannot be written: {error.strerror or error}. Mend that, and repeat"
    try:
        # Of several processes only the first one knows why, and it is the one that is heard.
        if crew.together(lambda: bool(refusal))():
            raise UsageError(f"{str(path)!r}: {refusal}.")
        yield
    finally:
        if lock.is_locked:
            # Whoever finds it later would wonder; who opened it just now sees that it is gone.
            with suppress(OSError):
                lock_path.unlink()
        lock.release()


@contextmanager
def stats_errors_as_usage(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line.

    Raises:
        UsageError: A file could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{str(path)!r} cannot be written: {error.strerror or error}. The batches that were "
            "finished are kept; mend that, and the same command goes on."
        ) from None


# --- Records of a range of samples, and their aggregates ---


Nested = Any
"""A number, None, or a list of those, as JSON has it."""


@dataclass(frozen=True)
class StatsRecord:
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
    def of(cls, found: Any) -> StatsRecord:
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


def joined(records: Iterable[StatsRecord], start: int, stop: int) -> list[StatsRecord]:
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


# --- The output file ---


Document = dict[str, Any]

OF_RECORDS = ("samples", "aggregate", "nulls", "largest_residual")
"""What the metadata say about the numbers; the rest says where they come from."""


def document(records: Sequence[StatsRecord], origin: Mapping[str, Any]) -> Document:
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


def records_of(found: Document) -> list[StatsRecord]:
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
    return [StatsRecord.of(plain)]


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


# --- Finished batches on disk, one line each, so that a killed measurement resumes ---


def part_path(folder: Path, stem: str, rank: int) -> Path:
    """Where a process keeps its finished batches."""
    return folder / f"{stem}-id-{rank}.jsonl"


def parts(folder: Path, stem: str) -> list[Path]:
    """The parts that there are, also those of more processes than there are now."""
    return sorted(
        path
        for path in folder.glob(f"{glob.escape(stem)}-id-*.jsonl")
        if path.name.removeprefix(f"{stem}-id-").removesuffix(".jsonl").isdecimal()
    )


def finished(path: Path, origin: Mapping[str, Any]) -> list[StatsRecord]:
    """The batches in a part.

    A killed process may leave half of a last line; it does not count.

    Args:
        path: Of the part.
        origin: What the numbers depend on.

    Raises:
        UsageError: They depend on something else.
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
    """The file up to its last end of line."""
    content = content_of(path)
    return content[: content.rfind(b"\n") + 1]


@contextmanager
def appending(path: Path, origin: Mapping[str, Any]) -> Iterator[Callable[[StatsRecord], None]]:
    """Open a part, and give the function that adds a finished batch to it.

    Raises:
        UsageError: It cannot be written; also by that function.
    """
    with ExitStack() as stack:
        with stats_errors_as_usage(path):
            keep = len(_whole(path)) if path.exists() else 0
            file = stack.enter_context(open_own(path, "ab", buffering=0))
            file.truncate(keep)

        def line(value: Mapping[str, Any]) -> None:
            rest = (json.dumps(value, allow_nan=False) + "\n").encode()
            with stats_errors_as_usage(path):
                while rest:  # a disk that is nearly full takes a part, and then refuses
                    rest = rest[file.write(rest) :]

        if not keep:
            line(origin)
        yield lambda record: line(record.plain())
