"""A batch of any structure, cut into M microbatches along its leading axis."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor

from gradfilter import _tree
from gradfilter._readable import readable
from gradfilter._types import Params, Tree

# --- Weights and groups of samples ---


class MarkedBatch(NamedTuple):
    """A batch, or a row of it, whose samples have weights or belong to groups.

    Attributes:
        batch: The batch as the loss takes it.
        weights: One weight per sample, (N,), or None.
        groups: The row of each sample, (N,) int64, or None.
    """

    batch: Any
    weights: Tensor | None
    groups: Tensor | None


def mark_samples(batch: Any, weights: Any, groups: Any, rows: int | None) -> Any:
    """Attach checked weights and groups of samples to a batch; without both, return it unchanged.

    Args:
        batch: See `split`.
        weights: ``sample_weights`` of the caller, or None.
        groups: ``groups`` of the caller, or None.
        rows: M, or None for one row per sample.

    Raises:
        TypeError: They are not tensors of real numbers, or of whole numbers.
        ValueError: They have another shape than (N,), or values out of range.
    """
    if weights is None and groups is None:
        return batch
    batch = plain(batch)
    size = samples_in(batch)
    if weights is not None:
        weights = _checked_weights(weights, size)
    if groups is not None:
        groups = _checked_groups(groups, size, rows)
    return MarkedBatch(batch, weights, groups)


def _checked_weights(weights: Any, size: int) -> Tensor:
    if not isinstance(weights, Tensor) or weights.is_complex():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(
            f"Expected sample_weights as a tensor of {size} real numbers, found {kind}. Use "
            "torch.tensor([...]) with one weight per sample; 0 removes a sample."
        )
    if weights.shape != (size,):
        raise ValueError(
            f"Expected sample_weights of shape ({size},), found {tuple(weights.shape)}. Give one "
            "weight per sample."
        )
    found = weights.detach()
    real: Tensor = found if found.is_floating_point() else found.to(torch.float32)
    good = (real >= 0) & real.isfinite()
    if readable(good) and not all(good.tolist()):
        bad = real[~good][0].item()
        raise ValueError(
            f"Expected finite sample_weights >= 0, found {bad}. A row is the weighted mean of its "
            "samples; use rows.scaled(factors) to change the sign of a row."
        )
    return real


def _checked_groups(groups: Any, size: int, rows: int | None) -> Tensor:
    if rows is None:
        raise ValueError(
            "Expected groups with a number of rows, found one row per sample. Write "
            "microbatch_grads(loss, M), or microbatches=M, with M the number of groups."
        )
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64:
        found = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(
            f"Expected groups as an int64 tensor, found {found}. Give the row of each sample, a "
            f"number from 0 to {rows - 1}: torch.tensor([...]), or x.long()."
        )
    if groups.shape != (size,):
        raise ValueError(
            f"Expected groups of shape ({size},), found {tuple(groups.shape)}. Give the row of "
            "each sample."
        )
    good = (groups >= 0) & (groups < rows)
    if readable(good) and not all(good.tolist()):
        raise ValueError(
            f"Expected groups from 0 to {rows - 1}, found {groups[~good][0].item()}. Number the "
            "rows from 0, and give microbatch_grads the number of all rows."
        )
    return groups


# --- Cut a batch into rows ---


Rebuild = Callable[[Iterable[Tensor]], Any]


@dataclass(frozen=True)
class Batch:
    """A batch cut into rows, and the buffers before the first row.

    Attributes:
        tensors: The cut tensors, (M, B, ...) each.
        rebuild: Puts the tensors of one microbatch into the structure the loss expects.
        buffers: The buffers before the first row.
    """

    tensors: list[Tensor]
    rebuild: Rebuild
    buffers: Tree

    @property
    def count(self) -> int:
        """M. In a trace it may be a symbol, which `len` would turn into a number."""
        return self.tensors[0].shape[0]


def split(batch: Any, microbatches: int | None) -> tuple[list[Tensor], Rebuild]:
    """Cut every tensor of a batch from (M·B, ...) into (M, B, ...).

    Args:
        batch: Any tree whose tensors share the leading axis N. Leaves that are not tensors are
            handed to every microbatch as they are.
        microbatches: M, or None for one sample per row (M = N).

    Returns:
        The cut tensors, and a function that puts one microbatch's tensors back into the batch's
        structure.
    """
    values, unflatten = _tree.flatten(plain(batch))
    for value in values:
        if hasattr(value, "__array__") and not isinstance(value, Tensor):
            raise TypeError(
                f"Expected tensors in the batch, found {type(value).__name__}, which would go "
                "whole to every microbatch. Convert it with torch.from_numpy."
            )
        if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
            raise TypeError(_not_dense(value))
        if not isinstance(value, Tensor) and _holds_tensors(value, 3):
            raise TypeError(
                f"Expected a batch of tensors in tuples, lists and dicts, found one inside of "
                f"{type(value).__name__}, which would go whole to every microbatch. Take its "
                "tensors out, or register the class with torch.utils._pytree (for a dataclass "
                "torch.export.register_dataclass does)."
            )
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    size = _leading_axis([values[i] for i in places])
    rows = size if microbatches is None else microbatches
    if size % rows:
        raise _not_divisible(size, rows)
    shape = rows, size // rows  # M and B
    tensors = [values[i].reshape(*shape, *values[i].shape[1:]) for i in places]
    return tensors, Structure(values, places, unflatten)


def even_parts(batch: Any, microbatches: int | None) -> list[tuple[Any, int]]:
    """Cut a batch of N samples into one or two batches whose rows have equal sizes, in order.

    With N = M·B + k samples, the first k rows have B + 1 samples and the others B.

    Returns:
        The parts, and the number of rows of each.

    Raises:
        ValueError: There are fewer samples than rows.
    """
    size = samples_in(batch)
    if microbatches is None or size % microbatches == 0:
        return [(batch, size if microbatches is None else microbatches)]
    each, longer = divmod(size, microbatches)
    if each == 0:
        raise _too_few(size, microbatches)
    tensors, rebuild = split(batch, None)
    place = longer * (each + 1)
    parts = ((slice(place), longer), (slice(place, None), microbatches - longer))
    return [(rebuild(t[:, 0][part] for t in tensors), count) for part, count in parts]


def rows_of_samples(size: int, microbatches: int | None, uneven: bool) -> Tensor:
    """Return the row of each sample, as `split` cuts a batch, or `even_parts`. (N,) int64.

    Args:
        size: N.
        microbatches: M, or None for one row per sample.
        uneven: True if the rows may differ by one sample.

    Raises:
        ValueError: The batch cannot be cut.
    """
    rows = size if microbatches is None else microbatches
    each, longer = divmod(size, rows)
    if longer and not uneven:
        raise _not_divisible(size, rows)
    if each == 0:
        raise _too_few(size, rows)
    sizes = torch.full((rows,), each)
    sizes[:longer] += 1
    return torch.arange(rows).repeat_interleave(sizes)


def _not_divisible(size: int, rows: int) -> ValueError:
    return ValueError(
        f"Expected N divisible by the number of microbatches, found N = {size} samples and "
        f"M = {rows}. Use a batch of {max(size // rows, 1) * rows}, or drop the last "
        "incomplete batch (DataLoader(..., drop_last=True)), or pass uneven=True for rows that "
        "differ by one sample."
    )


def _too_few(size: int, rows: int) -> ValueError:
    return ValueError(
        f"Expected at least one sample per row, found N = {size} samples and "
        f"M = {rows}. Drop such a batch (DataLoader(..., drop_last=True)), or pad it, "
        "with sample_weights= of 0 for the padding."
    )


def cut(batch: Any, microbatches: int | None, rows: int) -> list[tuple[Any, int]]:
    """Cut a batch into batches of some rows each, in order; the last may have fewer.

    Args:
        batch: See `split`.
        microbatches: See `split`.
        rows: The number of rows of a part.

    Returns:
        The parts, and the number of rows of each.
    """
    tensors, rebuild = split(batch, microbatches)
    count = len(tensors[0])
    parts = [slice(low, min(low + rows, count)) for low in range(0, count, rows)]
    return [
        (
            rebuild(rearrange(t[part], "m b ... -> (m b) ...") for t in tensors),
            part.stop - part.start,
        )
        for part in parts
    ]


@dataclass(frozen=True, eq=False)
class Structure:
    """The structure of a batch.

    Attributes:
        values: The leaves of the batch.
        places: The places of the tensors among them.
        unflatten: Puts leaves into the structure.
    """

    values: list[Any]
    places: list[int]
    unflatten: Callable[[Iterable[Any]], Any]

    def __call__(self, tensors: Iterable[Tensor]) -> Any:
        """Return the batch with other tensors."""
        filled = list(self.values)
        for place, tensor in zip(self.places, tensors, strict=True):
            filled[place] = tensor
        return self.unflatten(filled)


def _not_dense(value: Tensor) -> str:
    """Return the error text for a sparse or nested tensor in a batch."""
    if value.is_nested:
        return (
            "Expected dense tensors in the batch, found a nested one, whose samples have different "
            "lengths. Pad it: torch.nested.to_padded_tensor(x, 0.0), with a mask or lengths."
        )
    return (
        f"Expected dense tensors in the batch, found one with layout {value.layout}, which cannot "
        "be cut into microbatches. Use x.to_dense(), or give indices and values as tensors with "
        "one entry per sample."
    )


def check_constant(params: Params, tensors: list[Tensor]) -> None:
    """Refuse tensors that torch.func differentiates: detached rows would count as constants."""
    if torch.compiler.is_compiling():
        return
    for tensor in (*params.values(), *tensors):
        if is_gradtrackingtensor(tensor):
            raise ValueError(
                "Expected parameters and a batch that are not differentiated, found some inside "
                "torch.func.grad, vjp or jvp, for which these rows would be constants. Compute the "
                "rows there with torch.func.vmap(torch.func.grad(loss), ...), and give the update "
                "the stacked dict."
            )


def check_device(params: Params, tensors: list[Tensor]) -> None:
    """Refuse a batch that is on another device than the parameters."""
    check_constant(params, tensors)
    home = _tree.device_of(params)
    strangers = [t for t in tensors if t.device != home]
    if not strangers:
        return
    # Integer tensors may stay on the CPU (sequence lengths must), but not the whole batch.
    lengths_only = len(strangers) < len(tensors) and all(
        t.device.type == "cpu" and not t.is_floating_point() for t in strangers
    )
    if not lengths_only:
        raise ValueError(
            f"Expected the batch on {home}, where the parameters are, found a tensor on "
            f"{strangers[0].device}. Move the batch with .to({str(home)!r}), or the model before "
            "`extract`."
        )


def more_than_a_batch(expected: str, fix: str, more: tuple[Any, ...]) -> TypeError:
    """Return the error for inputs and targets given as two arguments."""
    found = ", ".join(type(value).__name__ for value in more)
    return TypeError(
        f"Expected {expected}, found {len(more)} more: {found}. A batch is one argument: {fix}."
    )


def check_params(params: Params) -> None:
    """Refuse parameters that are not a flat dict of real floating-point tensors, each whole."""
    if not isinstance(params, dict) or not params:
        found = "an empty one" if isinstance(params, dict) else type(params).__name__
        raise TypeError(
            f"Expected `params` as a non-empty dict[str, Tensor], found {found}. `extract(model)` "
            "gives one; is every parameter frozen?"
        )
    for name, p in params.items():
        if not isinstance(p, Tensor) or not torch.is_floating_point(p):
            kind = str(p.dtype) if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(
                f"Expected real floating-point parameters, found {name!r} of {kind}, which has "
                "no gradient. Keep it as a buffer, or freeze it with requires_grad_(False)."
            )
        if p.device.type == "meta" or p.layout != torch.strided:
            where = "on the meta device" if p.device.type == "meta" else f"with layout {p.layout}"
            raise TypeError(
                f"Expected dense parameters that have values, found {name!r} {where}. Use "
                "model.to_empty(device=...) and initialise it, or p.to_dense(), before `extract`."
            )


def plain(batch: Any) -> Any:
    """Replace all mappings in a batch by dicts: for torch a tokenizer's output is one leaf."""
    if isinstance(batch, (Tensor, MarkedBatch)):
        return batch
    if isinstance(batch, Mapping):
        return {key: plain(value) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)([plain(value) for value in batch])
    return batch


def samples_in(batch: Any) -> int:
    """Return N, the length of the leading axis of all tensors of a batch.

    Raises:
        ValueError: They disagree, or there are none.
    """
    return _leading_axis([leaf for leaf in _tree.leaves(plain(batch)) if isinstance(leaf, Tensor)])


def _leading_axis(tensors: list[Tensor]) -> int:
    sizes: list[int] = []  # symbolic sizes cannot be in a set
    for size in (t.shape[0] if t.ndim else -1 for t in tensors):
        if not any(size == other for other in sizes):
            sizes.append(size)
    sizes.sort()
    if not tensors or -1 in sizes:
        raise ValueError(
            "Expected a batch of tensors with a leading axis of N samples, found "
            f"{'a 0-d tensor' if tensors else 'no tensor at all'}. Pass constants as Python "
            "numbers, or close over them in the loss."
        )
    if len(sizes) > 1:
        raise ValueError(
            f"Expected one leading axis N on every tensor of the batch, found sizes {sizes}. "
            "Every leaf needs one entry per sample."
        )
    if sizes[0] == 0:
        raise ValueError("Expected at least one sample, found an empty batch.")
    return sizes[0]


def _holds_tensors(value: Any, depth: int) -> bool:
    """Return whether an object that is not a tree node contains tensors or arrays."""
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return depth < 3  # a leaf of the tree itself belongs to one row
    if depth == 0 or value is None or isinstance(value, (int, float, complex, str, bytes, type)):
        return False
    if isinstance(value, Mapping):
        held: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        held = value
    elif callable(value):
        return False
    else:
        slots = (s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ()))
        own = (getattr(value, name, None) for name in slots if isinstance(name, str))
        held = [*getattr(value, "__dict__", {}).values(), *own]
    return any(_holds_tensors(item, depth - 1) for item in held)
