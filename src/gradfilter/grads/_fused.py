"""Plan "fused": one forward pass over all rows, hot operations in one kernel for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._autocast import under_autocast
from gradfilter.grads._batch import Batch
from gradfilter.grads._buffer_watch import BufferWatch
from gradfilter.grads._by_row import ByRow
from gradfilter.grads._check_loss import check_reaches
from gradfilter.grads._lift import Level, repeated
from gradfilter.grads._loop import PureLoss
from gradfilter.grads._masked_lookups import MASKED_BY_HAND, refuse_masked_lookups
from gradfilter.grads._rules._host import Host
from gradfilter.grads._rules._table import RULES
from gradfilter.grads._rules._values import VALUES
from gradfilter.grads._rules._vmap_faults import refuse_nested
from gradfilter.grads._running_updates import RunningUpdates
from gradfilter.grads._tape import Tape

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
        inside: Runs a backward pass in the surroundings it needs.
        groups: The rows of each pass, where rows that answer the host differently have their own.
        by_row: The classes of the modules that ran row by row.
    """

    losses: Tensor
    tape: Tape
    buffers: Tree
    aux: Any
    inside: Callable[[Callable[[], None]], None] = lambda run: run()
    groups: tuple[tuple[int, ...], ...] = ()
    by_row: tuple[str, ...] = ()


class Overrides(TorchFunctionMode):
    """Hands functions that have a rule to it."""

    def __init__(self, host: Host) -> None:
        """For one host."""
        super().__init__()
        self._host = host

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Try the rule, else run the function as it is."""
        kwargs = kwargs or {}
        rule = RULES.get(func) or VALUES.get(func)
        if rule is not None:
            if self._host.level.is_innermost():
                result = rule(self._host, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            elif self._host.level.is_left():
                func = MASKED_BY_HAND.get(func, func)
            else:
                refuse_nested(func)
        self._host.running.watch.note(func, args, kwargs)
        try:
            return under_autocast(func)(*args, **kwargs)
        except RuntimeError as error:
            if _is_checkpoint(*args):
                raise RuntimeError(CHECKPOINTS) from error
            name = getattr(func, "__name__", str(func))
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RuntimeError(f"{name} cannot run over all rows at once: {reason}") from error


def _is_checkpoint(function: Any = None, *_: Any) -> bool:
    # In torch 2.11 checkpointing shows vmap a Function of its own before it hooks on anything.
    return isinstance(function, type) and function.__module__ == "torch.utils.checkpoint"


def forward(
    loss: PureLoss,
    params: Params,
    batch: Batch,
    per_row: bool,
    cumulative: set[str],
    by_row: ByRow,
) -> Forward:
    """Evaluate the loss of every row at once; arguments as in `vmap_rows`.

    The modules of ``by_row`` run row by row.
    """
    count = len(batch)
    leaves = {
        name: (p if per_row else repeated(p, count)).detach().requires_grad_()
        for name, p in params.items()
    }
    tape = Tape(leaves)
    own = {name: b.clone() for name, b in batch.buffers.items()}
    watch = BufferWatch(own)
    running = RunningUpdates(watch, own, cumulative)
    with (
        torch.enable_grad(),
        disable_saved_tensors_hooks(CHECKPOINTS),
        Level.entered(count) as level,
    ):
        inside = {name: level.raised(leaf) for name, leaf in leaves.items()}
        row = batch.rebuild(level.raised(t) for t in batch.tensors)
        host = Host(level, tape, running)
        with by_row.entered(host) as handed, Overrides(host):
            value, after, aux = loss(inside, row, own)
        watch.check(after, set(running.updated), handed.buffers)
        losses = level.lower(value)
        aux = None if aux is None else _tree.tree_map(level.lower, aux)
    check_reaches(losses, leaves.values())
    refuse_masked_lookups(losses)
    for name, counter in after.items():
        if (
            name.endswith("num_batches_tracked") and name not in handed.buffers
        ):  # counted once, for all rows
            before = batch.buffers[name]
            after[name] = before + count * (counter - before)
    after |= {**running.finish(), **handed.buffers}
    aux = None if aux is None else _tree.tree_map(torch.Tensor.detach, aux)
    looped = tuple(sorted({type(module).__name__ for module in handed.modules}))
    return Forward(losses, tape, after, aux, by_row=looped)
