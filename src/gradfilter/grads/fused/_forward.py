"""Plan "fused": the forward pass over all rows, and the special case of one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._batch import Batch
from gradfilter.grads._buffer_watch import BufferWatch, RunningUpdates
from gradfilter.grads._call_context import Versions
from gradfilter.grads._loop import untouched, written_parameter
from gradfilter.grads._normalized_loss import NormalizedLoss, as_parameter
from gradfilter.grads._one_image import STRAIGHTENED, one_image
from gradfilter.grads._writes import memory, written
from gradfilter.grads.fused._autocast import under_autocast
from gradfilter.grads.fused._host import Host
from gradfilter.grads.fused._lift import Level, repeated
from gradfilter.grads.fused._modules_by_row import ByRow
from gradfilter.grads.fused._row_questions import GRAPH, VALUES
from gradfilter.grads.fused._tape import Tape
from gradfilter.grads.fused.overrides._registry import RULES
from gradfilter.grads.fused.overrides._spellings import spellings
from gradfilter.grads.fused.overrides._vmap_faults import refuse_nested

# --- Embeddings with padding in modules that run row by row: masked here, not by torch. ---
#
# An embedding that torch itself masks is refused in the graph of a pass over all rows, where
# vmap's own rule would mask the padding of the first row only. Outside of vmap it is right, and
# nothing in the graph tells the two apart.


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """`F.embedding`, with its padding masked by hand."""
    found = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % len(weight))[..., None], found.detach(), found)


def _embedding_of(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any
) -> Tensor:
    """`torch.embedding`, with its padding masked by hand."""
    found = torch.embedding(weight, indices, -1, *args, **kwargs)
    return torch.where((indices == padding_idx)[..., None], found.detach(), found)


MASKED_BY_HAND: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    **dict.fromkeys(spellings("embedding"), _embedding_of),
}
"""For what runs row by row, outside of vmap: right without any rule, and not to be refused."""


# --- The pass over all rows ---


CHECKPOINTS = (
    "activation checkpointing (or whatever else hooks on saved tensors) inside the loss cannot "
    "run over all rows at once"
)


@dataclass(frozen=True)
class Forward:
    """One forward pass over all rows.

    Attributes:
        losses: (M,), with the graph of the pass.
        tape: Where a backward pass leaves the gradients.
        buffers: After all rows, in order.
        aux: What the loss returned beside its value, stacked.
        run_backward: Runs a backward pass in the surroundings it needs.
        groups: The rows of each pass, where rows that answer the host differently have their own.
        by_row: The classes of the modules that ran row by row.
        used: The tensors in attributes of modules that were computed with, by name.
        changed: Whether attributes of modules have changed.
    """

    losses: Tensor
    tape: Tape
    buffers: Tree
    aux: Any
    run_backward: Callable[[Callable[[], None]], None] = lambda run: run()
    groups: tuple[tuple[int, ...], ...] = ()
    by_row: tuple[str, ...] = ()
    used: set[str] = field(default_factory=set)
    changed: bool = False


BATCH = ""
"""The batch among what may not be written into."""

STATISTICS = {F.batch_norm, F.instance_norm, *spellings("batch_norm"), *spellings("instance_norm")}
"""Functions whose rules note by themselves what they do with buffers."""


class Overrides(TorchFunctionMode):
    """Hands functions that have a rule to it."""

    def __init__(self, host: Host, guarded: dict[int, str]) -> None:
        """For one host; what may not be written into, by where it lies in memory."""
        super().__init__()
        self.host, self._guarded = host, guarded

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Try the rule, else run the function as it is."""
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            self._refuse_writing(tensor)
        rule = RULES.get(func) or VALUES.get(func) or GRAPH.get(func)
        if rule is not None:
            if self.host.level.is_innermost():
                result = rule(self.host, *args, **kwargs)
                if result is not NotImplemented:
                    if func not in STATISTICS:
                        self.host.running.watch.note(func, args, kwargs)
                    return result
            elif self.host.level.is_left():
                func = MASKED_BY_HAND.get(func) or STRAIGHTENED.get(func, func)
            else:
                refuse_nested(func)
        self.host.running.watch.note(func, args, kwargs)
        try:
            return under_autocast(func)(*args, **kwargs)
        except RuntimeError as error:
            if _is_checkpoint(*args):
                raise RuntimeError(CHECKPOINTS) from error
            name = getattr(func, "__name__", str(func))
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if "BatchedTensorImpl" in reason:
                reason = "it asks for the memory of a tensor, which holds all rows"
            raise RuntimeError(f"{name} cannot run over all rows at once: {reason}") from error

    def _refuse_writing(self, tensor: Tensor) -> None:
        name = self._guarded.get(memory(tensor))
        if name == BATCH:
            raise BatchWritten
        if name in self.host.tape.leaves:
            raise written_parameter(f"parameter {name!r}")
        if name is not None:
            raise RuntimeError(
                f"the loss writes into attribute {name!r} of a module, which cannot be handed from "
                "row to row. Make it a buffer (register_buffer)"
            )


def _is_checkpoint(function: Any = None, *_: Any) -> bool:
    # In torch 2.11 checkpointing shows vmap a Function of its own before it hooks on anything.
    return isinstance(function, type) and function.__module__ == "torch.utils.checkpoint"


class BatchWritten(RuntimeError):
    """The loss is about to write into the batch: it has to be given a copy."""


def forward(
    loss: NormalizedLoss,
    params: Params,
    batch: Batch,
    per_row: bool,
    by_row: ByRow,
    *,
    own_batch: bool = False,
) -> Forward:
    """Evaluate the loss of every row at once.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis M.
        batch: The rows.
        per_row: Row m has its own parameters.
        by_row: The modules that run row by row.
        own_batch: The batch is a copy, which the loss may write into.

    Raises:
        BatchWritten: Before the loss writes into the batch.
        RuntimeError: Something cannot run over all rows at once.
    """
    _refuse_backward_hooks(loss)
    count = len(batch)
    leaves = {
        name: (p if per_row else repeated(p, count)).detach().requires_grad_()
        for name, p in params.items()
    }
    tape = Tape(leaves, linear=not loss.hooks)
    own = {name: b.clone() for name, b in batch.buffers.items()}
    watch = BufferWatch(own, loss.cumulative, loss.attribute_tensors())
    running = RunningUpdates(watch, own, loss.cumulative)
    given = Versions([] if own_batch else [("batch", t) for t in batch.tensors])
    with (
        torch.enable_grad(),
        disable_saved_tensors_hooks(CHECKPOINTS),
        Level.entered(count) as level,
    ):
        guarded = _guarded([] if own_batch else batch.tensors, leaves, loss)
        host = Host(level, tape, running, partial(_again, guarded))
        overrides = Overrides(host, guarded)
        inside = {name: as_parameter(level.wrap(leaf)) for name, leaf in leaves.items()}
        row = batch.rebuild(level.wrap(t) for t in batch.tensors)
        with by_row.entered(host) as handed, overrides:
            try:
                value, after, aux = loss.writing(inside, row, own)
            finally:
                changed = loss.settle(inside, partial(_last_row, level))
        watch.check(after, set(running.updated), handed.buffers)
        losses = level.lower(value)
        aux = None if aux is None else _tree.tree_map(level.lower, aux)
    if given.written() is not None:
        raise RuntimeError(
            "The loss writes into the batch where nobody can see it coming. Let it work on a copy "
            "(x = x.clone()), or use inplace=False"
        )
    ends = loss.check_reaches(losses, leaves.values())
    if ends.padded_lookup:
        # vmap's own rule joins the tables of all rows into one, and masks the first table alone.
        # The override does it right for every function that Python calls.
        raise RuntimeError(
            "embedding with padding_idx cannot run over all rows at once in a scripted or "
            "traced function, or inside a transform of the loss's own: vmap would mask the "
            "padding of the first row alone."
        )
    for name, counter in after.items():
        # Counted once, for all rows.
        if name.endswith("num_batches_tracked") and name not in handed.buffers:
            before = batch.buffers[name]
            after[name] = before + count * (counter - before)
    after |= {**running.finish(), **handed.buffers}
    aux = None if aux is None else _tree.tree_map(torch.Tensor.detach, aux)
    # What a module does to a gradient row by row need not be linear in it.
    tape.linear = tape.linear and not (handed.modules or ends.custom)
    looped = tuple(sorted({type(module).__name__ for module in handed.modules}))
    return Forward(
        losses, tape, after, aux, by_row=looped, used=watch.used_attributes, changed=changed
    )


def _refuse_backward_hooks(loss: NormalizedLoss) -> None:
    """Refuse hooks that torch runs by autograd functions which know nothing of rows."""
    for name, module in loss.modules.items():
        if module._backward_hooks or module._backward_pre_hooks:
            raise RuntimeError(
                f"the backward hook on module {name!r} cannot run over all rows at once. Remove "
                "it, or hook on a tensor in forward (h.register_hook)"
            )


def _again(guarded: dict[int, str], host: Host, run: Callable[[], Any]) -> Any:
    """Run something under the level and the rules of a forward pass that is over."""
    with Level.entered(host.level.rows) as level:
        if level.number != host.level.number:
            raise RuntimeError(
                "a hook cannot run over all rows at once inside another transform of torch.func"
            )
        with Overrides(host, guarded):
            return run()


def _last_row(level: Level, tensor: Tensor) -> Tensor:
    """What a module remembers after M passes in order: the tensor of the last."""
    return level.lower(tensor).detach()[-1] if level.batched(tensor) else tensor


def _guarded(batch: list[Tensor], leaves: Params, loss: NormalizedLoss) -> dict[int, str]:
    """What the loss may not write into, by where it lies in memory."""
    found = {memory(t): name for name, t in loss.attribute_tensors()}
    found |= {memory(leaf): name for name, leaf in leaves.items()}
    found |= {memory(t): BATCH for t in batch}
    found.pop(0, None)  # of tensors without elements
    return found


# --- One row: the loss as it is, and one ordinary backward pass ---


def forward_single(
    loss: NormalizedLoss,
    params: Params,
    batch: Batch,
    per_row: bool,
    modes: Callable[[], AbstractContextManager[None]],
) -> Forward:
    """Evaluate the loss of a single row, which asks for no vmap.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis of 1.
        batch: The row.
        per_row: Whether they have it.
        modes: Puts the modules into the modes of this pass.
    """
    leaves = {name: loss.leaf(name, p.squeeze(0) if per_row else p) for name, p in params.items()}
    loss.hook(leaves)
    hooked: list[str] = []
    handles = RemovableHandle.next_id
    with torch.enable_grad(), one_image(batch, loss.modules), untouched(loss, leaves, hooked):
        # A copy: a first layer that works in place would write into the batch.
        row = batch.rebuild(t.squeeze(0).clone() for t in batch.tensors)
        value, after, aux = loss.settling(leaves, row, batch.buffers)
        losses = value.unsqueeze(0)
    # A hook on a node is seen by nobody, but every hook has a handle, and every handle a number.
    hooked_nodes = RemovableHandle.next_id != handles
    ends = loss.check_reaches(value, leaves.values())
    loss.settle(leaves)
    if not per_row:
        loss.renormalised(params, leaves)
    if ends.reentrant:
        raise RuntimeError(
            "torch.utils.checkpoint(use_reentrant=True) runs in the loop only; use_reentrant=False "
            "runs in every plan"
        )

    def inside(backward: Callable[[], None]) -> None:
        with modes(), one_image(batch, loss.modules):
            loss.with_module_state(leaves, batch.buffers, backward)

    # What a hook makes of the gradient need not be linear in it.
    tape = Tape({name: leaf.detach().unsqueeze(0) for name, leaf in leaves.items()}, leaves)
    seen = hooked or hooked_nodes or loss.hooks or ends.custom or any(_backward_hooks(loss))
    tape.linear = not seen
    after = {name: b.detach() for name, b in after.items()}
    aux = None if aux is None else _tree.tree_map(lambda t: t.detach().unsqueeze(0), aux)
    return Forward(losses, tape, after, aux, inside)


def _backward_hooks(loss: NormalizedLoss) -> Iterator[bool]:
    """Whether each module has hooks that see its gradients."""
    return (bool(m._backward_hooks or m._backward_pre_hooks) for m in loss.modules.values())
