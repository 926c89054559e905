"""Run the forward pass of plan "fused" over all rows, and the special case of one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._batch import Batch
from gradfilter.grads._buffer_watch import VIEWS, BufferWatch, RunningUpdates
from gradfilter.grads._call_context import (
    CallContext,
    Versions,
    random_state,
    same_random_state,
    set_modes,
)
from gradfilter.grads._error_notes import asks_for_memory
from gradfilter.grads._loop import refuse_writes, written_attribute, written_parameter
from gradfilter.grads._module_attributes import Attributes
from gradfilter.grads._normalized_loss import NormalizedLoss, as_parameters
from gradfilter.grads._one_image import STRAIGHTENED, one_image
from gradfilter.grads._seeds import DRAWS, Seeds
from gradfilter.grads._writes import may_write, memory, written_by
from gradfilter.grads.fused._along import ParamsAlong, held, refuse_bypassed
from gradfilter.grads.fused._autocast import under_autocast
from gradfilter.grads.fused._checkpoints import (
    OTHER_HOOKS,
    Checkpoints,
    leave_checkpoints,
    saves_arguments,
    top_hooks,
)
from gradfilter.grads.fused._host import Host
from gradfilter.grads.fused._lift import Level, autocast_any, repeated
from gradfilter.grads.fused._modules_by_row import ByRow
from gradfilter.grads.fused._row_questions import GRAPH, VALUES
from gradfilter.grads.fused._sharded_leaves import ShardedLeaf, ShardedLeaves, without_memory
from gradfilter.grads.fused._tape import LeafVisitor, Tape
from gradfilter.grads.fused.overrides._registry import (
    NORMS,
    OVERRIDES,
    TAKES_MOVES,
    TAKES_SHARDS,
)
from gradfilter.grads.fused.overrides._spellings import spellings
from gradfilter.grads.fused.overrides._vmap_faults import refuse_nested

# --- Embeddings with padding in modules that run row by row: masked here, not by torch. ---
#
# A pass over all rows refuses an embedding that torch itself masks: vmap would mask the padding of
# the first row only. Outside of vmap torch is correct, but the graph does not show which of the two
# ran.


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Replace `F.embedding`, and mask the padding here."""
    found = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % len(weight))[..., None], found.detach(), found)


def _embedding_of(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any
) -> Tensor:
    """Replace `torch.embedding`, and mask the padding here."""
    found = torch.embedding(weight, indices, -1, *args, **kwargs)
    return torch.where((indices == padding_idx)[..., None], found.detach(), found)


MASKED_BY_HAND: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    **dict.fromkeys(spellings("embedding"), _embedding_of),
}
"""Overrides for modules that run row by row, outside of vmap, where torch itself is correct."""


# --- The pass over all rows ---


@dataclass(frozen=True)
class Forward:
    """One forward pass over all rows.

    Attributes:
        losses: (M,), with the graph of the pass.
        tape: The tape on which a backward pass leaves the gradients.
        buffers: The buffers after all rows, in order.
        aux: The second value that the loss returned, stacked over the rows.
        state: Returns the context that a backward pass needs.
        groups: The rows of each pass, if rows that answer the host differently ran separately.
        by_row: The classes of the modules that ran row by row, and the operations.
        used: The tensors in attributes of modules that the loss used, by name.
        changed: True if attributes of modules have changed.
        moved: The leaves of `ParamsAlong` whose values in every row were computed.
        checkpointed: True if the loss uses activation checkpoints.
    """

    losses: Tensor
    tape: Tape
    buffers: Tree
    aux: Any
    state: Callable[[], AbstractContextManager[None]] | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    by_row: tuple[str, ...] = ()
    used: set[str] = field(default_factory=set)
    changed: bool = False
    moved: tuple[str, ...] = ()
    checkpointed: bool = False

    @property
    def remembered(self) -> set[str] | None:
        """The names in ``used``, or None if no attribute has changed."""
        return self.used if self.changed else None

    def backward(self, cotangent: Tensor, visitor: LeafVisitor, *, retain: bool) -> None:
        """Run one backward pass, and hand every leaf that has a gradient to the visitor."""
        with _tree.NO_CHANGE if self.state is None else self.state():
            self.tape.backward(self.losses, cotangent, visitor, retain=retain)


@dataclass(frozen=True, eq=False)
class SingleRow:
    """The state of the modules in the forward pass of a single row.

    A checkpoint runs parts of that pass again during the backward pass.
    """

    loss: NormalizedLoss
    leaves: Params
    batch: Batch
    context: CallContext

    @contextmanager
    def state(self) -> Iterator[None]:
        """Restore that state inside the context."""
        with (
            self.context.modes(),
            one_image(self.batch, self.loss.modules),
            self.loss.module_state(self.leaves, self.batch.buffers),
        ):
            yield


@dataclass(frozen=True, eq=False)
class CheckpointedRows:
    """The state of the modules at the end of a forward pass over all rows, for its checkpoints.

    Attributes:
        loss: The loss.
        host: The forward pass.
        inside: The leaves as the modules saw them.
        buffers: The buffers as the modules saw them.
        training: Every module with its mode.
        attributes: The attributes of the modules, with the tensors of the pass.
    """

    loss: NormalizedLoss
    host: Host
    inside: Params
    buffers: Tree
    training: list[tuple[nn.Module, bool]]
    attributes: Attributes

    @classmethod
    def now(cls, loss: NormalizedLoss, host: Host, inside: Params, buffers: Tree) -> Self:
        """Record the state, before the tensors of the pass are removed from the attributes."""
        modes = [(module, module.training) for module in loss.modules.values()]
        return cls(loss, host, inside, buffers, modes, loss.attributes.present())

    @contextmanager
    def state(self) -> Iterator[None]:
        """Restore that state inside the context."""
        present = self.loss.attributes.present()
        modes = [(module, module.training) for module, _ in self.training]
        try:
            self.attributes.restore()
            set_modes(self.training)
            with ExitStack() as stack:
                if self.loss.places is not None:
                    # The buffers themselves, which the pass knows by identity.
                    filled = self.loss.places.filled({**self.inside, **self.buffers})
                    with self.host.in_pass():  # a view of a leaf in an attribute is a row, too
                        stack.enter_context(filled)
                yield
        finally:
            set_modes(modes)
            present.restore()


BATCH = ""
"""The name of the batch among the guarded tensors."""

STATISTICS = {F.batch_norm, F.instance_norm, *spellings("batch_norm"), *spellings("instance_norm")}
"""Functions whose overrides record their use of buffers themselves."""


DESCRIPTIONS = {
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "__len__"),
    *("is_contiguous", "is_floating_point", "is_complex", "get_device", "storage_offset"),
    *("requires_grad_", "register_hook", "__set__"),
}
"""Methods that do not read the values of a tensor."""


SINGLE = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
"""The types of most arguments, which contain no other values."""


def _reads_values(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return func in VIEWS if name == "__get__" else name not in DESCRIPTIONS


class Overrides(TorchFunctionMode):
    """Call the operation override of every function that has one."""

    def __init__(
        self, host: Host, guarded: Callable[[], dict[int, str]], seeds: Seeds | None
    ) -> None:
        """Take the host, the names of the guarded tensors by their address, and the seeds.

        ``guarded`` is called before the first write of the loss: most losses write nothing.
        Without seeds, draws are not checked.
        """
        super().__init__()
        self.host, self._guarded, self._seeds = host, guarded, seeds
        self._guarded_names: dict[int, str] | None = None
        self._watch = host.running.watch if host.running.watch.has_tensors else None
        self._takes_leaves = TAKES_MOVES if host.moves else TAKES_SHARDS

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Try the override, else run the function as it is."""
        # This runs for every operation, and a call costs as much as a small operation.
        kwargs = kwargs or {}
        if top_hooks() is not None:
            self.host.adopt_checkpoint()
        if may_write(func) or "out" in kwargs:
            for tensor in written_by(func, args, kwargs):
                self._refuse_writing(tensor)
        if self._seeds is not None and getattr(func, "__name__", "") in DRAWS:
            self._seeds.check(func, kwargs)
        override = OVERRIDES.get(func) or VALUES.get(func) or GRAPH.get(func)
        replaces = self.host.replaces and _reads_values(func)
        if replaces:
            if not (func in self._takes_leaves and self.host.level.is_innermost()):
                args, kwargs = self._own((args, kwargs))
            elif func in NORMS and args:
                args = (self.host.own(args[0]), *args[1:])
        if override is not None:
            if self.host.level.is_innermost():
                result = override(self.host, *args, **kwargs)
                if result is NotImplemented and replaces:
                    args, kwargs = self._own((args, kwargs))
                if result is not NotImplemented:
                    if self._watch is not None and func not in STATISTICS:
                        self._watch.note(func, args, kwargs)
                    return result
            elif self.host.level.is_left():
                func = MASKED_BY_HAND.get(func) or STRAIGHTENED.get(func, func)
            else:
                refuse_nested(func)
        if self._watch is not None:
            self._watch.note(func, args, kwargs)
        if args and isinstance(args[0], type) and saves_arguments(args):
            with self.host.level.on_all_rows():
                holder: Any = args[0]
                return holder.apply(*args[1:])
        try:
            return (under_autocast(func) if autocast_any() else func)(*args, **kwargs)
        except CheckpointError:
            raise
        except RuntimeError as error:
            name = getattr(func, "__name__", str(func))
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if asks_for_memory(error):
                reason = "it asks for the memory of a tensor, which holds all rows"
            raise RuntimeError(f"{name} cannot run over all rows at once: {reason}") from error

    def _own(self, given: Any) -> Any:
        """Replace the leaves that move or are sharded by the values of all rows."""
        if isinstance(given, SINGLE):
            return self.host.own(given)
        if type(given) in (tuple, list):
            return type(given)([self._own(value) for value in given])
        return _tree.tree_map(self.host.own, given)

    def _refuse_writing(self, tensor: Tensor) -> None:
        if self._guarded_names is None:
            self._guarded_names = self._guarded()
        name = self._guarded_names.get(memory(tensor))
        if name == BATCH:
            raise BatchWritten
        if name in self.host.tape.leaves:
            raise written_parameter(f"parameter {name!r}")
        if name is not None:
            raise written_attribute(name)


class BatchWritten(RuntimeError):
    """Raised before the loss writes into the batch: the loss needs a copy."""


def forward(
    loss: NormalizedLoss,
    params: Mapping[str, Tensor],
    batch: Batch,
    per_row: bool,
    by_row: ByRow,
    *,
    own_batch: bool = False,
) -> Forward:
    """Evaluate the loss of every row at once.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis M, or `ParamsAlong`.
        batch: The rows.
        per_row: True if every row has its own parameters.
        by_row: The modules that run row by row.
        own_batch: True if the batch is a copy that the loss may write into.

    Raises:
        BatchWritten: Before the loss writes into the batch.
        RuntimeError: Something cannot run over all rows at once.
    """
    _refuse_backward_hooks(loss)
    if top_hooks() is not None:
        raise RuntimeError(OTHER_HOOKS)
    state: Callable[[], AbstractContextManager[None]] | None = None
    count = batch.count
    moves = params.moves if isinstance(params, ParamsAlong) else {}
    shared = isinstance(params, ParamsAlong) or not per_row
    sharded = ShardedLeaves.of(held(params), loss.kept_gathered)
    leaves = {
        name: (
            without_memory(p, count)
            if name in sharded.leaves
            else repeated(p, count)
            if shared
            else p
        )
        .detach()
        .requires_grad_()
        for name, p in held(params).items()
    }
    tape = Tape(leaves, linear=not loss.hooks, sharded=sharded)
    own = {name: b.clone() for name, b in batch.buffers.items()}
    watch = BufferWatch(own, loss.cumulative, loss.attribute_tensors())
    running = RunningUpdates(watch, own, loss.cumulative)
    given = Versions([] if own_batch else [("", t) for t in batch.tensors], "batch")
    with (
        torch.enable_grad(),
        Level.entered(count) as level,
    ):
        guarded = partial(_guarded, [] if own_batch else batch.tensors, leaves, loss)
        generators = [generator for _, generator in loss.attributes.generators]
        reenter = partial(_reenter, guarded, generators)
        rerun = partial(_rerun, guarded, generators, by_row)
        values: dict[str, Tensor | ShardedLeaf] = {}
        if shared:
            values = {**held(params), **sharded.leaves}
        host = Host(level, tape, running, Checkpoints(level), reenter, rerun, values, moves)
        overrides = Overrides(host, guarded, Seeds(generators))
        inside = dict(zip(leaves, as_parameters(level.wrap_all(leaves.values())), strict=True))
        row = batch.rebuild(level.wrap_all(batch.tensors))
        with by_row.entered(host) as calls, overrides:
            try:
                value, after, aux = loss.writing(inside, row, own)
            except BaseException as error:
                leave_checkpoints(error)
                raise
            finally:
                if host.checkpoints.found:
                    state = CheckpointedRows.now(loss, host, inside, own).state
                changed = loss.clean_attributes(inside, partial(_last_row, level))
        watch.check(after, set(running.updated), calls.buffers)
        losses = level.lower(value)
        aux = None if aux is None else _tree.tree_map(level.lower, aux)
    if given.written() is not None:
        raise RuntimeError(
            "The loss writes into the batch in a way that is not detected. Let it work on a copy "
            "(x = x.clone()), or use inplace=False"
        )
    ends = loss.check_reaches(losses, leaves.values())
    host.release()
    if moves or sharded.leaves:
        refuse_bypassed(losses, [leaves[name] for name in {*moves, *sharded.leaves}])
    if ends.padded_lookup:
        # vmap joins the tables of all rows into one, and masks only the first table. The override
        # is correct for every function that Python calls.
        raise RuntimeError(
            "embedding with padding_idx cannot run over all rows at once in a scripted or "
            "traced function, or inside a transform of the loss's own: vmap would mask the "
            "padding of the first row alone."
        )
    for name, counter in after.items():
        # Count the module once for all rows.
        if name.endswith("num_batches_tracked") and name not in calls.buffers:
            before = batch.buffers[name]
            after[name] = before + count * (counter - before)
    after |= {**running.finish(), **calls.buffers}
    aux = None if aux is None else _tree.tree_map(torch.Tensor.detach, aux)
    tape.closed = ends.closed
    # A module that runs row by row may change its gradient in a way that is not linear.
    tape.linear = tape.linear and not (calls.modules or ends.custom)
    looped = tuple(sorted({type(module).__name__ for module in calls.modules} | tape.looped))
    return Forward(
        losses,
        tape,
        after,
        aux,
        state,
        by_row=looped,
        used=watch.used_attributes,
        changed=changed,
        moved=tuple(sorted(host.moved)),
        checkpointed=host.checkpoints.found,
    )


def _refuse_backward_hooks(loss: NormalizedLoss) -> None:
    """Refuse module hooks that torch runs in autograd functions without support for rows."""
    for name, module in loss.modules.items():
        if module._backward_hooks or module._backward_pre_hooks:
            raise RuntimeError(
                f"the backward hook on module {name!r} cannot run over all rows at once. Remove "
                "it, or hook on a tensor in forward (h.register_hook)"
            )


@contextmanager
def _reenter(
    guarded: Callable[[], dict[int, str]], generators: list[Any], host: Host
) -> Iterator[None]:
    """Enter the level and the overrides of a forward pass that has ended."""
    with Level.entered(host.level.rows) as level:
        if level.number != host.level.number:
            raise RuntimeError(
                "a hook cannot run over all rows at once inside another transform of torch.func"
            )
        with Overrides(host, guarded, Seeds(generators)):
            yield


@contextmanager
def _rerun(
    guarded: Callable[[], dict[int, str]], generators: list[Any], by_row: ByRow, first: Host
) -> Iterator[None]:
    """Enter the level and the overrides for a part of a forward pass that runs again.

    Raises:
        RuntimeError: It draws other random numbers than the first time: torch sets its default
            generators back, unless preserve_rng_state is False, and no others.
    """
    device = _tree.device_of(first.tape.leaves)
    before = random_state(device), _states(generators)
    with Level.entered(first.level.rows) as level:
        if level.number != first.level.number:
            raise RuntimeError(
                "a checkpoint cannot run again inside another transform of torch.func"
            )
        host = first.again()
        try:
            # The first run has checked the seeds, and torch sets them back.
            with by_row.entered(host), Overrides(host, guarded, None):
                yield
        finally:
            after = random_state(device), _states(generators)
            if not all(map(same_random_state, before, after)):
                raise RuntimeError(
                    "a checkpointed function draws other random numbers when it runs again than "
                    "the first time. Draw from torch's default generators, with "
                    "preserve_rng_state=True"
                )


def _states(generators: list[Any]) -> dict[str, Any]:
    """Return the states of torch's generators among those that a loss refers to."""
    own = [generator for generator in generators if isinstance(generator, torch.Generator)]
    return {str(i): generator.get_state() for i, generator in enumerate(own)}


def _last_row(level: Level, tensor: Tensor) -> Tensor:
    """Return the tensor that a module holds after M passes in order: that of the last row."""
    return level.lower(tensor).detach()[-1] if level.batched(tensor) else tensor


def _guarded(batch: list[Tensor], leaves: Params, loss: NormalizedLoss) -> dict[int, str]:
    """Return the names of tensors that the loss must not write into, by address in memory."""
    found = {memory(t): name for name, t in loss.attribute_tensors()}
    found |= {memory(leaf): name for name, leaf in leaves.items()}
    found |= {memory(t): BATCH for t in batch}
    found.pop(0, None)  # the address of tensors without elements
    return found


# --- One row: the loss as it is, and one ordinary backward pass ---


def forward_single(
    loss: NormalizedLoss,
    params: Mapping[str, Tensor],
    batch: Batch,
    per_row: bool,
    context: CallContext,
) -> Forward:
    """Evaluate the loss of a single row, without vmap.

    Args:
        loss: The loss.
        params: The parameters; with ``per_row`` each with a leading axis of 1.
        batch: The row.
        per_row: True if the parameters have that axis.
        context: The context of the call, with the modes (training, evaluation) of the modules.
    """
    leaves = {name: loss.leaf(name, p.squeeze(0) if per_row else p) for name, p in params.items()}
    loss.hook(leaves)
    hooked_tensors: list[str] = []
    handles = RemovableHandle.next_id
    with (
        torch.enable_grad(),
        one_image(batch, loss.modules),
        refuse_writes(loss, leaves, hooked_tensors),
    ):
        # Copy, because a first layer that works in place would write into the batch.
        row = batch.rebuild(t.squeeze(0).clone() for t in batch.tensors)
        value, after, aux = loss.pure_and_clean(leaves, row, batch.buffers)
        losses = value.unsqueeze(0)
    # torch does not list the hooks of a node, but every hook takes a new number for its handle.
    hooked_nodes = RemovableHandle.next_id != handles
    ends = loss.check_reaches(value, leaves.values())
    loss.clean_attributes(leaves)
    if not per_row:
        loss.renormalised(dict(params), leaves)
    if ends.reentrant:
        raise RuntimeError(
            "torch.utils.checkpoint(use_reentrant=True) runs in the loop only; use_reentrant=False "
            "runs in every plan"
        )

    # The result of a hook need not be linear in the gradient.
    tape = Tape({name: leaf.detach().unsqueeze(0) for name, leaf in leaves.items()}, leaves)
    seen = hooked_tensors or hooked_nodes or loss.hooks or ends.custom or any(_backward_hooks(loss))
    tape.linear, tape.closed = not seen, ends.closed
    after = {name: b.detach() for name, b in after.items()}
    aux = None if aux is None else _tree.tree_map(lambda t: t.detach().unsqueeze(0), aux)
    return Forward(losses, tape, after, aux, SingleRow(loss, leaves, batch, context).state)


def _backward_hooks(loss: NormalizedLoss) -> Iterator[bool]:
    """Yield for each module whether it has hooks that see its gradients."""
    return (bool(m._backward_hooks or m._backward_pre_hooks) for m in loss.modules.values())
