"""Add notes to errors of torch: the likely cause and the fix, if the message has neither."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params

METHODS = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "half",
}
BATCH_NORM = "Expected more than 1 value per channel when training"
UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def add_notes(error: Exception, params: Params, batch: Any) -> None:
    """Add a note to an error that names its likely cause in the batch.

    It is only a note, because batches that mix dtypes can be intended, and many losses take them.
    """
    text = str(error)
    tensors = _tensors(batch)
    if isinstance(error, (RuntimeError, ValueError)) and re.search(r"\b(data|d)?types?\b", text):
        _note_dtypes(error, params, batch)
    if BATCH_NORM in text and tensors and all(t.shape[:1] == (1,) for t in tensors):
        error.add_note(
            "Rows of one sample: BatchNorm has nothing to average. Use fewer microbatches (M < N), "
            "GroupNorm or model.eval()."
        )
    found = UNEXPECTED.search(text)
    if isinstance(error, TypeError) and isinstance(batch, Mapping) and found and found[1] in batch:
        error.add_note(
            "A dict batch is given to the model as keyword arguments; for "
            '{"x", "y"} pass (batch["x"], batch["y"]).'
        )


def note_anomaly(error: Exception) -> None:
    """Add a note about anomaly mode, which refuses rows that a filter would reject."""
    if torch.is_anomaly_enabled() and "returned nan values" in str(error):
        error.add_note(
            "Anomaly mode raises at a NaN in any row, before finite_filter or another filter can "
            "take the row out. Turn it off, or only its check: "
            "torch.autograd.set_detect_anomaly(True, check_nan=False)."
        )


def asks_for_memory(error: Exception) -> bool:
    """Return whether torch refuses the memory of a tensor that holds all rows.

    Torch has several texts for it: of storages, of data pointers, and of the kind of tensor.
    """
    texts = ("BatchedTensorImpl", "Cannot access storage", "Cannot access data pointer")
    return any(text in str(error) for text in texts)


def _checkpoint_refusal(error: Exception, plan: str) -> str | None:
    """Return a refusal of activation checkpoints in words of ours; torch's name its internals."""
    text = str(error)
    if "saved tensor hooks" in text or "_NoopSaveInputs" in text:  # of newer and older torch
        return (
            "The model uses activation checkpointing (torch.utils.checkpoint), which "
            f'plan="{plan}" cannot run. Use plan="auto", "fused" or "loop".'
        )
    homes: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        homes.append(str(trace.tb_frame.f_globals.get("__name__")))
        trace = trace.tb_next
    if "setup_context" in text and "torch.utils.checkpoint" in homes[-3:]:
        return (
            "The model uses activation checkpointing with use_reentrant=True, which only the loop "
            'can run; other plans run it with use_reentrant=False. Use plan="loop".'
        )
    return None


def raise_with_plan(error: Exception, plan: str) -> NoReturn:
    """Raise an error of a plan; if the plan runs all rows at once, name plan "loop" as the fix.

    Torch's texts about the memory of a tensor and about checkpoints name classes of its own, so
    they are replaced. Any other error of torch and of the loss, and a refusal of the fused plan,
    gets a note, unless it has one or names the plan itself.
    """
    if plan not in ("fused", "vmap"):
        raise error
    if asks_for_memory(error):
        raise RuntimeError(
            "The loss asks for the memory of a tensor (copy.deepcopy, numpy() and data_ptr() do), "
            'which holds all rows. Use plan="loop".'
        ) from error
    refused = _checkpoint_refusal(error, plan)
    if refused is not None:
        raise RuntimeError(refused) from error
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    refusal = isinstance(error, RuntimeError) and place.startswith("gradfilter.grads.fused.")
    clear = place.startswith("gradfilter.") and not refusal
    if not (clear or bool(getattr(error, "__notes__", [])) or 'plan="loop"' in str(error)):
        error.add_note(
            f'Raised under plan="{plan}", which runs all rows at once. plan="loop" runs them one '
            'after the other, as torch does; plan="auto" does so where it has to.'
        )
    raise error


def _note_dtypes(error: Exception, params: Params, batch: Any) -> None:
    own = [p.dtype for p in params.values() if p.dtype in METHODS]
    strangers = _other_dtypes(str(error), own, batch)
    if own and strangers:
        fix = f"x.{METHODS[own[0]]}()"
        if strangers[0] in METHODS:
            fix += f", or model.{METHODS[strangers[0]]}() before extract"
        error.add_note(f"The batch holds {strangers[0]}, the parameters {own[0]}: {fix}.")


def _other_dtypes(text: str, own: list[torch.dtype], batch: Any) -> list[torch.dtype]:
    """Return the dtypes of the batch that an error about dtypes may refer to."""
    floating = [t.dtype for t in _tensors(batch) if t.is_floating_point() and t.dtype not in own]
    # An operation that expects integers (an embedding, class labels) does not need another float.
    if floating and not re.search(r"\bLong\b|\bint(32|64)\b", text):
        return floating
    inputs = _tensors(batch if isinstance(batch, Mapping) else batch[:1])
    named = re.search(r"float|double|half|datatype", text, re.IGNORECASE)
    if named and "target" not in text and not any(t.is_floating_point() for t in inputs):
        return [t.dtype for t in inputs]
    return []


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in _tree.leaves(batch) if isinstance(leaf, Tensor)]


def stacklevel() -> int:
    """Return the ``stacklevel`` of a warning at the first line outside of gradfilter."""
    ours = ("gradfilter.", "torch._dynamo.")  # its frames surround functions that are not compiled
    level, frame = 0, cast(FrameType | None, sys._getframe(1))
    while frame is not None and frame.f_globals.get("__name__", "").startswith(ours):
        level, frame = level + 1, frame.f_back
    return level + 1


def reason_of(refusal: Exception) -> str:
    """Return the first line of a refusal, without a full stop and without advice."""
    reason = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
    return reason.rstrip(".").removesuffix('. Use plan="loop"')
