"""Compute the gradient of every microbatch or every sample: `microbatch_grads`, `per_sample_grads`.

The file chooses the plan, falls back where the fused plan is refused, and evaluates a stack again
at other parameters.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradfilter import _tree
from gradfilter._readable import followed, readable
from gradfilter._shards import any_sharded, is_sharded, refuse_sharding_options
from gradfilter._types import Params, Tree
from gradfilter.grads._batch import (
    Batch,
    MarkedBatch,
    check_device,
    check_params,
    even_parts,
    mark_samples,
    more_than_a_batch,
    split,
)
from gradfilter.grads._call_context import (
    CallContext,
    Versions,
    is_recorded,
    random_state,
    random_state_restored,
    same_random_state,
    set_random_state,
)
from gradfilter.grads._error_notes import note_anomaly, raise_with_plan, reason_of, stacklevel
from gradfilter.grads._hidden_state import PROBED, Probes, hidden_state, nearly_equal
from gradfilter.grads._loop import Rows, loop_rows, written_attribute
from gradfilter.grads._loss import ModelLoss, RefusedByAll
from gradfilter.grads._module_attributes import remove
from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.grads._remembered_attributes import check_remembered, is_count
from gradfilter.grads._row_parts import dense_rows, join_stacks
from gradfilter.grads._sample_groups import group_samples, refuse_batch_statistics
from gradfilter.grads._seeds import SeedsInLoss, draw_once
from gradfilter.grads._stack import (
    ComputedDenseStack,
    ComputedStack,
    DenseStack,
    GradStack,
    StackOrigin,
)
from gradfilter.grads._vmap import vmap_rows
from gradfilter.grads._writes import WriteWatch
from gradfilter.grads.fused._along import Bypassed, ParamsAlong, detached, held
from gradfilter.grads.fused._forward import Forward, forward_single
from gradfilter.grads.fused._fused_stack import FusedStack, LazyRows, PassSource, SinglePass
from gradfilter.grads.fused._lift import quiet_fallbacks, untraced
from gradfilter.grads.fused._modules_by_row import ByRow
from gradfilter.grads.fused._row_groups import Grouping, forward_in_groups

# --- The memory budget ---


DEFAULT_BUDGET = 0.25
"""The fraction of the device's memory that is the budget of a loss without checkpoints."""


def check_budget(budget: int | float | None) -> None:
    """Refuse a budget that is neither a number of bytes nor a fraction of the memory."""
    if budget is None:
        return
    fraction = isinstance(budget, float)
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or not 0 <= budget <= (1 if fraction else math.inf):  # also refuses nan
        raise ValueError(
            "Expected memory_budget as bytes (int >= 0) or as a fraction of the device's memory "
            f"(float from 0 to 1), found {budget!r}. Write 10**9 for a gigabyte, "
            f"or pass nothing: the default is {DEFAULT_BUDGET}, and 0 for a loss with activation "
            "checkpoints."
        )


def bytes_of(budget: int | float | None, device: torch.device, *, checkpointed: bool) -> int:
    """Return a budget in bytes.

    Args:
        budget: Bytes (int), a fraction of the device's memory (float), or None for the default.
        device: The device whose memory it is.
        checkpointed: True if the loss uses activation checkpoints. By default nothing is held
            then: factors are among the activations that a checkpoint is there to forget.
    """
    if budget is None:
        budget = 0 if checkpointed else DEFAULT_BUDGET
    if not isinstance(budget, float):
        return budget
    if device.type == "cuda":
        return int(budget * torch.cuda.get_device_properties(device).total_memory)
    return int(budget * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


Pass = TypeVar("Pass")
"""The result of a pass over all rows."""

# --- The function of parameters and batch: checks, choice of plan, evaluation elsewhere ---


Plan = Literal["auto", "loop", "vmap", "fused"]
"""How rows are computed: the argument `plan` of `microbatch_grads` and `per_sample_grads`."""


@dataclass(frozen=True, eq=False)
class GradFunction:
    """The gradients of a loss: ``(params, batch, **options) -> ComputedStack``.

    Made by `microbatch_grads` and `per_sample_grads`, whose checked arguments are its fields.

    Attributes:
        loss: The loss.
        microbatches: M, or None for one row per sample.
        has_aux: True if the loss returns ``(scalar, aux)``.
        plan: The way the rows are computed.
        chunk_size: The number of rows per call of torch.vmap, or None for all.
        memory_budget: The bytes (int) or a fraction of the memory of the device (float); None for
            the default.
        uneven: True if the rows may differ by one sample.
        by_row: The modules that plan "fused" runs row by row, learned from refused passes.
        probes: Decides which passes run twice, to find a state of the loss that is hidden.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, batch: (params["w"] * batch).mean()
        >>> grads_of = gf.microbatch_grads(loss, 2)
        >>> isinstance(grads_of, gf.GradFunction), grads_of.microbatches
        (True, 2)
        >>> grads_of({"w": torch.ones(())}, torch.arange(4.0)).stacked()
        {'w': tensor([0.5000, 2.5000])}
    """

    loss: Callable[..., Any]
    microbatches: int | None
    has_aux: bool
    plan: Plan
    chunk_size: int | None
    memory_budget: int | float | None
    uneven: bool = False
    by_row: ByRow = field(default_factory=ByRow, repr=False)
    probes: Probes = field(default_factory=Probes, repr=False)

    def __call__(
        self,
        params: Params,
        batch: Any,
        *more: Any,
        buffers: Tree | None = None,
        sample_weights: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> ComputedStack:
        """Return the gradients of one batch.

        Args:
            params: ``dict[str, Tensor]``, floating point, the parameters to differentiate.
            batch: Any tree of tensors with leading axis N.
            *more: Not allowed; for the error message.
            buffers: The module's buffers before the first row; the stack's ``buffers`` are those
                after the last row. None takes the module's own, at every call.
            sample_weights: One weight w_n >= 0 per sample, (N,). The loss of a row is then
                Σ w_n l_n / Σ w_n over its samples, so the loss must return l_n, (B,), one number
                per sample. A weight of 0 removes a sample (padding, which must be finite), and a
                row without weights is empty. BatchNorm still sees all samples.
            groups: The row of each sample, (N,) int64 from 0 to M − 1, in place of microbatches of
                equal sizes: row m is the (weighted) mean of the gradients of its samples, each
                computed alone, and a row without samples is empty. Not with BatchNorm in training
                mode.

        Raises:
            ValueError: Weights or groups have another shape than (N,) or values out of range; a
                loss returns one number for several samples with weights; BatchNorm in training
                mode with groups.
        """
        if more:
            raise more_than_a_batch("grads_of(params, batch)", "grads_of(params, (x, y))", more)
        batch = mark_samples(batch, sample_weights, groups, self.microbatches)
        return untraced(self._stack_of)(params, batch, buffers)

    def with_rows(self, count: int) -> GradFunction:
        """Return the same function for another number of rows; of samples, it is any number."""
        if self.microbatches in (None, count):
            return self
        return replace(self, microbatches=count)

    def origin(self, params: Params, batch: Any, buffers: Tree | None) -> StackOrigin:
        """Return the way to compute the rows of a batch again, without a pass over it now.

        The arguments are those of a call; random numbers are those that a call would draw now.
        """
        if self._is_grouped(batch) or len(self.parts(batch)) > 1:
            assert self.microbatches is not None
            return StackOrigin(self.microbatches, params, _refuse_pass)
        passes: BatchPasses = untraced(self._passes)(params, batch, buffers)
        passes.loss.first = False
        plan = "fused" if self.plan == "auto" else self.plan
        return passes.origin(plan, detached(passes.params), False)

    def parts(self, batch: Any) -> list[tuple[Any, int]]:
        """Return the batches of one pass each, whose rows have equal sizes, and their rows."""
        count = self.microbatches or 0
        return even_parts(batch, self.microbatches) if self.uneven else [(batch, count)]

    @staticmethod
    def _is_grouped(batch: Any) -> bool:
        return isinstance(batch, MarkedBatch) and batch.groups is not None

    def _stack_of(self, params: Params, batch: Any, buffers: Tree | None) -> ComputedStack:
        if self._is_grouped(batch):
            if any_sharded(params.values()):
                raise ValueError(
                    "Expected microbatches of equal sizes with parameters that are sharded over "
                    "ranks (DTensor), found groups=. Sort the samples into microbatches."
                )
            return self._grouped(params, batch, buffers)
        parts = self.parts(batch)
        if len(parts) == 1:
            return self._passes(params, batch, buffers).first()
        held: list[DenseStack] = []
        plan, fallback = "fused", ""
        for part, count in parts:
            rows = self.with_rows(count)._passes(params, part, buffers).first()
            held.append(dense_rows(rows))
            buffers = rows.buffers or buffers
            if isinstance(rows, ComputedDenseStack):
                plan, fallback = rows.plan, rows.fallback
        joined = join_stacks(held)
        assert joined.losses is not None and joined.origin is not None  # rows of a batch have both
        return ComputedDenseStack(
            joined.rows,
            losses=joined.losses,
            buffers=joined.buffers,
            aux=joined.aux,
            origin=joined.origin,
            plan=plan,
            fallback=fallback,
        )

    def _grouped(self, params: Params, batch: MarkedBatch, buffers: Tree | None) -> ComputedStack:
        assert batch.groups is not None and self.microbatches is not None
        each = replace(self, microbatches=None, uneven=False)
        passes = each._passes(params, batch.batch, buffers)
        refuse_batch_statistics(passes.loss.modules)
        return group_samples(passes.first(), batch.groups, batch.weights, self.microbatches)

    def _passes(self, params: Params, batch: Any, buffers: Tree | None) -> BatchPasses:
        check_params(params)
        self._check_sharded(params)
        loss = NormalizedLoss.of(self.loss, self.has_aux)
        loss.check_params(params)
        tensors, rebuild = split(batch, self.microbatches)
        check_device(params, tensors)
        rows = Batch(tensors, rebuild, loss.incoming(buffers))
        context = CallContext.now(
            _tree.device_of(params),
            loss.modules,
            _read(loss, rows),
            loss.attributes,
            everywhere=loss.may_draw_on_host,
        )
        weights = batch.weights if isinstance(batch, MarkedBatch) else None
        absent = None if weights is None else (weights.view(rows.count, -1) == 0).all(1)
        return BatchPasses(self, loss, rows, context, params, absent)

    def _check_sharded(self, params: Params) -> None:
        """Refuse what is not possible with parameters that are sharded over ranks."""
        if not any_sharded(params.values()):
            return
        name = next(name for name, p in params.items() if is_sharded(p))
        if self.plan not in ("auto", "fused"):
            raise TypeError(
                f'Expected plan "fused" with sharded parameters, found plan {self.plan!r} and '
                f"{name!r} sharded over ranks (DTensor): the other plans need all parameters whole "
                "at once. Leave the plan out, or take rows that are means over ranks from "
                "gradfilter.distributed.sharded_rows."
            )
        if is_recorded():
            raise TypeError(
                f"Expected whole parameters in a step of gradfilter.compile, found {name!r} "
                "sharded over ranks (DTensor). Run the step without compiling it."
            )
        if isinstance(self.loss, ModelLoss):
            refuse_sharding_options(self.loss.model)


def _refuse_pass(*_: Any) -> GradStack:
    """Refuse another pass over groups or an uneven batch, of which a graph holds the rows only."""
    raise ValueError(
        "Expected rows of equal sizes for another pass over accumulated batches in a compiled "
        "step, found groups or an uneven batch. Do not compile, or take batches of M·B samples."
    )


@dataclass(eq=False)
class BatchPasses:
    """One batch, its loss and the context of the call, shared by all passes over the batch.

    Attributes:
        settings: The settings of the function that was called.
        loss: The loss.
        batch: The rows.
        context: The context of the call.
        params: The parameters as they were given.
        absent: The rows whose samples all have the weight 0, (M,) bool; None without weights.
        grouping: The way the rows run in plan "fused".
        random_after: The random state after the first pass over all rows; None before it.
        random_backward: The random state before the first backward pass in which hooks may draw.
    """

    settings: GradFunction
    loss: NormalizedLoss
    batch: Batch
    context: CallContext
    params: Params
    absent: Tensor | None = None
    grouping: Grouping = field(init=False)
    random_after: dict[str, Any] | None = None
    random_backward: dict[str, Any] | None = None
    _fallback: str = ""

    def __post_init__(self) -> None:
        """Record the versions of the parameters."""
        self.grouping = Grouping(ByRow(self.settings.by_row))
        self._given = Versions(self.params.items(), "parameter {!r}")

    def first(self) -> ComputedStack:
        """Return the stack of the call."""
        plan = "fused" if self.is_sharded else self.settings.plan
        try:
            if plan == "auto":
                return self._fused_or_loop(self.params, False)
            return self._stack(plan, self.params, False)
        finally:
            self.loss.first = False

    def _stack_at(
        self, plan: Plan, params: Mapping[str, Tensor], per_row: bool, kept: Collection[str]
    ) -> Any:
        """Return the stack at other parameters; those in ``kept`` are as they were given."""
        return untraced(self._pass_at)(plan, params, per_row, kept)

    def _pass_at(
        self, plan: Plan, params: Mapping[str, Tensor], per_row: bool, kept: Collection[str]
    ) -> ComputedStack:
        self._check_kept(kept)
        with self.context.restored():
            try:
                return self._chosen(plan, params, per_row)
            except Bypassed:
                # The loss uses a parameter where only its values can be replaced.
                self.give_up()
                return self._chosen(plan, dict(params), per_row)

    def _chosen(self, plan: Plan, params: Mapping[str, Tensor], per_row: bool) -> ComputedStack:
        if plan == "fused" and self.settings.plan == "auto":
            return self._fused_or_loop(params, per_row)
        return self._stack(plan, params, per_row)

    def _check_kept(self, names: Collection[str]) -> None:
        if names:
            self._given.check(names)

    @property
    def is_sharded(self) -> bool:
        """Whether some parameters are sharded over ranks, so that the loop cannot run."""
        return any_sharded(self.params.values())

    def _fused_or_loop(self, params: Mapping[str, Tensor], per_row: bool) -> ComputedStack:
        if self.is_sharded:
            return self._stack("fused", params, per_row)
        try:
            return self._stack("fused", params, per_row)
        except (Bypassed, RefusedByAll):
            self.give_up()  # discard the state that the failed pass left in the modules
            raise
        except Exception as refusal:
            self._check_undrawn(refusal)
            # The loop shows whether the loss or only vmap fails, with the same random numbers.
            self.give_up()
            self._fallback = reason_of(refusal)
            try:
                result = self._stack("loop", params, per_row)
            except Exception as fault:
                raise fault from None
            _warn(refusal)
            return result

    def _stack(self, plan: Plan, params: Mapping[str, Tensor], per_row: bool) -> ComputedStack:
        """Compute the rows by one plan, in the present random state and settings."""
        at = detached(params)
        origin = self.origin(plan, params if per_row else at, per_row)
        try:
            if plan == "fused":
                return self._fused(at, per_row, origin)
            grads, losses, after, aux = self._rows(plan, dict(at), per_row)
        except Bypassed:
            raise
        except Exception as error:
            raise_with_plan(error, plan)
        why = self._fallback if plan == "loop" else ""
        return ComputedDenseStack(
            grads, losses=losses, buffers=after, aux=aux, origin=origin, plan=plan, fallback=why
        )

    def origin(self, plan: Plan, params: Mapping[str, Tensor], per_row: bool) -> StackOrigin:
        """Return the way to compute the rows at these parameters again, and at others."""
        return StackOrigin(
            self.batch.count, params, partial(self._stack_at, plan), per_row, self._check_kept
        )

    def _rows(self, plan: Plan, params: Params, per_row: bool) -> Rows:
        try:
            if plan == "loop":
                return loop_rows(self.loss, params, self.batch, per_row)
            size, used = self.settings.chunk_size, set[str]()
            run = partial(
                vmap_rows, self.loss, params, self.batch, per_row, chunk_size=size, used=used
            )
            rows = self.first_pass(per_row, run, lambda rows: rows[1])
        except RuntimeError as error:
            note_anomaly(error)
            raise
        if not per_row:
            check_remembered(self.loss, params, self.batch, self.context, used)
        return rows

    def first_pass(
        self, per_row: bool, run: Callable[[], Pass], losses: Callable[[Pass], Tensor]
    ) -> Pass:
        """Run a pass over all rows; now and then twice, to find a hidden state of the loss.

        What the first of the two changes is reset. Its entries in logs are removed after the
        second, because a loss may read the length of a list.

        Args:
            per_row: True if every row has its own parameters.
            run: Runs the pass.
            losses: Takes the losses (M,) from its result.

        Raises:
            RefusedByAll: The loss keeps a state where it is not found.
        """
        if per_row or not self._may_hide_a_state() or not self.settings.probes.due():
            return run()
        self._probe_row()
        self._probe_seeds(run)
        probed = losses(run()).detach()
        self.context.rewind()  # refills the lists that attributes hold
        logs = self.context.attributes.added()
        found = run()
        remove(logs)
        if not nearly_equal(probed, losses(found).detach(), PROBED):
            raise hidden_state()
        return found

    def _may_hide_a_state(self) -> bool:
        """Return whether a state could be hidden in the loss, and comparing waits for nothing.

        torch's own modules and functions have none, and one row at a time sees it as it is.
        """
        quiet = self.context.device.type == "cpu" and not (followed() or is_recorded())
        usual = self.loss.first and self.batch.count > 1 and not self.is_sharded
        return usual and quiet and self.loss.may_draw_on_host

    def _probe_row(self) -> None:
        """Refuse a hidden state: evaluate a row twice, and compare losses and gradients."""
        if next(self.loss.criterion_buffers(), None) is not None:
            return  # kernels such as batch_norm write into them, which cannot be taken back
        row = replace(self.batch, tensors=[t[:1] for t in self.batch.tensors])
        at = {name: p.detach() for name, p in self.params.items()}
        found = list[tuple[Tensor, list[Tensor]]]()
        for _ in range(2):
            try:
                with WriteWatch(self.loss.attribute_tensors(), written_attribute):
                    grads, losses, *_ = loop_rows(self.loss, at, row, False)
            except Exception:
                return  # the pass itself, or the loop after it, raises
            finally:
                self.give_up()
            found.append((losses, list(grads.values())))
        if not all(nearly_equal(a, b, PROBED) for a, b in zip(*found, strict=True)):
            raise hidden_state()

    def _probe_seeds(self, run: Callable[[], Any]) -> None:
        """Refuse a loss that seeds a generator which has not drawn yet, with the seed that it has.

        Raises:
            SeedsInLoss: It does.
        """
        if not draw_once(generator for _, generator in self.context.attributes.generators):
            return
        try:
            run()
        except SeedsInLoss:
            raise
        except Exception:
            pass  # the pass itself raises it, from the recorded random state
        finally:
            self.give_up()

    @contextmanager
    def same_backward_draws(self) -> Iterator[None]:
        """Draw in every backward pass what the first one draws."""
        device = self.context.device
        if self.random_backward is None:
            self.random_backward = random_state(device)
            yield
            return
        with random_state_restored(device):
            set_random_state(self.random_backward, device)
            yield

    def give_up(self) -> None:
        """Reset what passes have changed, also their entries in logs."""
        self.context.undo()
        remove(self.context.attributes.added())

    def _fused(
        self, params: Mapping[str, Tensor], per_row: bool, origin: StackOrigin
    ) -> ComputedStack:
        run = FusedPass(self, params, per_row)
        every = self.settings.chunk_size
        if per_row and every is not None and not isinstance(params, ParamsAlong):
            rows = run.in_chunks(every)
            if rows is not None:
                grads, losses, after, aux = rows
                return ComputedDenseStack(
                    grads, losses=losses, buffers=after, aux=aux, origin=origin, plan="fused"
                )
        first = run.first()
        losses = first.losses.detach()
        budget = bytes_of(
            self.settings.memory_budget, self.context.device, checkpointed=first.checkpointed
        )
        return FusedStack(
            LazyRows(
                run,
                first,
                budget,
                self.loss.hooks,
                lean=self.settings.memory_budget is None,
                absent=self.absent,
            ),
            tuple(params),
            losses.shape[0],
            losses,
            first.buffers,
            first.aux,
            origin,
        )

    def loop_instead(self, params: Params, per_row: bool, refusal: Exception) -> Tree:
        """Compute the rows by the loop, after the backward pass over all rows was refused."""
        if self.settings.plan != "auto" or self.batch.count == 1:
            raise_with_plan(refusal, self.settings.plan)
        self._check_undrawn(refusal)
        with self.context.restored():
            try:
                rows = loop_rows(self.loss, params, self.batch, per_row)[0]
            except Exception as fault:
                note_anomaly(fault)
                raise fault from None
        _warn(refusal)
        return rows

    def _check_undrawn(self, refusal: Exception) -> None:
        """Refuse the loop if it would draw other random numbers than the pass before it."""
        before, after = self.context.random, self.random_after
        if after is not None and not same_random_state(after, before):
            raise RuntimeError(
                f"{reason_of(refusal)}. The rows drew their random numbers all at once, and the "
                'loop cannot draw them again. Pass plan="loop" from the start.'
            ) from refusal


def _read(loss: NormalizedLoss, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a pass reads in addition to the parameters."""
    yield from [("batch", t) for t in batch.tensors]
    yield from [(f"buffer {name!r}", b) for name, b in batch.buffers.items()]
    yield from loss.criterion_buffers()


@dataclass(eq=False)
class FusedPass(PassSource):
    """A pass of plan "fused" at given parameters, which can run again.

    Attributes:
        passes: All passes over the batch.
        params: The parameters, detached; with ``per_row`` each with a leading axis M.
        per_row: True if every row has its own parameters.
    """

    passes: BatchPasses
    params: Mapping[str, Tensor]
    per_row: bool

    def __post_init__(self) -> None:
        """Record the versions of the parameters."""
        self._given = Versions(held(self.params).items(), "parameter {!r}")

    def first(self) -> Forward:
        """Run the forward pass, and refuse it if a loop over rows would give another result."""
        passes = self.passes
        run = partial(self._run, passes.batch, self.params, passes.grouping, check=not self.per_row)
        found = passes.first_pass(self.per_row, run, lambda found: found.losses)
        self._losses = found.losses.detach()
        if not self.per_row:
            if passes.batch.count > 1:
                rows = [group[-1] for group in found.groups] or [-1]
                check_remembered(
                    passes.loss,
                    dict(self.params),
                    passes.batch,
                    passes.context,
                    found.remembered,
                    rows,
                )
            if passes.random_after is None:
                passes.random_after = random_state(passes.context.device)
        return found

    @override
    def rerun(self) -> Forward:
        self._given.check()
        with self.passes.context.restored():
            found = self._run(self.passes.batch, self.params, self.passes.grouping)
        _check_repeated(self._losses, found.losses.detach())
        return found

    @override
    def backward_pass(self, run: Forward) -> AbstractContextManager[None]:
        return _tree.NO_CHANGE if run.tape.linear else self._watched_backward_pass()

    @contextmanager
    def _watched_backward_pass(self) -> Iterator[None]:
        """Let hooks draw the same numbers in every backward pass, and refuse what they share.

        Raises:
            RuntimeError: A hook draws on the host or changes an attribute, once for all rows.
        """
        passes = self.passes
        host, attributes = passes.context.host.present(), passes.context.attributes.present()
        with passes.same_backward_draws():
            yield
        if passes.batch.count == 1:
            return
        changes = attributes.changes()
        shared = host.moved() or next((name for name, a, b in changes if is_count(a, b)), None)
        if shared is not None:
            host.restore()
            attributes.restore()
            raise RuntimeError(
                f"a hook or a backward function draws from or changes {shared!r}, once for all rows"
            )

    @override
    def fallback(self, refusal: Exception) -> Tree:
        self._given.check()
        if self.passes.is_sharded:
            raise_with_plan(refusal, "fused")
        return self.passes.loop_instead(dict(self.params), self.per_row, refusal)

    def in_chunks(self, size: int) -> Rows | None:
        """Compute rows (M, *shape), ``size`` at a time, because M sets of parameters are large.

        Returns:
            None if the loss draws random numbers: they are drawn for all rows together, so a chunk
            alone would draw different ones.
        """
        device, batch = self.passes.context.device, self.passes.batch
        grouping = replace(self.passes.grouping, groups=None)
        before = random_state(device)
        found: list[Rows] = []
        buffers: Tree = batch.buffers
        for low in range(0, batch.count, size):
            rows = slice(low, low + size)
            some = replace(batch, tensors=[t[rows] for t in batch.tensors], buffers=buffers)
            grouping.groups = None
            part = self._run(some, {name: p[rows] for name, p in self.params.items()}, grouping)
            self.passes.grouping.copies = grouping.copies
            after = random_state(device)
            if not same_random_state(after, before):
                self.passes.context.undo()
                return None
            buffers = part.buffers
            hooks = self.passes.loss.hooks
            lazy = LazyRows(SinglePass(part), part, budget=0, hooks=hooks)
            own = lazy.rows(list(self.params))
            found.append((own, part.losses.detach(), buffers, part.aux))
        grads, losses, _, aux = zip(*found, strict=True)
        joined = None if aux[0] is None else _tree.tree_map(lambda *t: torch.cat(t), *aux)
        return _tree.tree_map(lambda *t: torch.cat(t), *grads), torch.cat(losses), buffers, joined

    def _run(
        self, batch: Batch, params: Mapping[str, Tensor], grouping: Grouping, *, check: bool = False
    ) -> Forward:
        loss, context = self.passes.loss, self.passes.context
        if batch.count == 1 and not self.passes.is_sharded:
            return forward_single(loss, params, batch, self.per_row, context)
        # Who asks for plan "fused" by name is told what vmap does not support; "auto" chooses.
        quiet = self.passes.settings.plan == "auto"
        with quiet_fallbacks() if quiet else _tree.NO_CHANGE:
            found = forward_in_groups(
                loss, params, batch, self.per_row, grouping, context, check=check
            )
        self.passes.settings.by_row.update(grouping.by_row)
        return found


def _check_repeated(losses: Tensor, again: Tensor) -> None:
    """Refuse a repeated pass with other losses: something was written unnoticed."""
    if readable(losses) and not nearly_equal(losses, again):
        raise RuntimeError(
            "Expected another pass over the batch to give the losses of the first, found others. "
            "Parameters were written in place since (fused optimizers leave no trace), or the loss "
            "depends on something outside of its arguments. Ask before writing, or compute the "
            "stack from clones."
        )


def _warn(refusal: Exception) -> None:
    """Warn at the caller's line that the loop is used, and why."""
    warnings.warn(
        f'Fell back to plan "loop": {reason_of(refusal)}. Pass plan="loop" to choose it outright.',
        stacklevel=stacklevel(),
    )


# --- The public functions ---


def microbatch_grads(
    loss: Callable[..., Any],
    microbatches: int,
    *,
    has_aux: bool = False,
    plan: Plan = "auto",
    chunk_size: int | None = None,
    memory_budget: int | float | None = None,
    uneven: bool = False,
) -> GradFunction:
    """Return a function ``(params, batch, *, buffers) -> GradStack``: one gradient per microbatch.

    Row m is ∇f over samples m·B .. (m + 1)·B − 1 of the batch, N = M·B. Rows of other sizes:
    ``uneven=True`` here, or ``groups=`` and ``sample_weights=`` in the call (see `GradFunction`).

    To carry running statistics (BatchNorm) from batch to batch, pass the buffers of the last stack:
    ``grads_of(params, batch, buffers=rows.buffers)``. Without ``buffers=``, every call starts from
    the module's own.

    Parameters may be sharded over ranks (DTensors, of FSDP2's ``fully_shard``): each rank gets the
    rows of its own samples, and `gradfilter.distributed.across_ranks` makes one stack of all.

    Args:
        loss: ``loss(params, batch) -> scalar``, a pure function, or the result of `model_loss`.
            Each row's loss should be the mean over its samples. It may return one loss per sample,
            (B,), whose mean is then taken.
        microbatches: M >= 1; must divide N, unless ``uneven`` is set.
        has_aux: True if ``loss`` returns ``(scalar, aux)``, with aux any tree of tensors.
        plan: The way the rows are computed. ``"fused"``: one forward pass over all rows, one
            backward pass when the first question is asked, and rows only if they are the cheaper
            way to the answer; for M = 1 an ordinary forward and backward pass. ``"loop"``: M
            backward passes, always possible. ``"vmap"``: all rows at once by
            ``torch.func.vmap(grad)``. ``"auto"``, the default, is ``"fused"``, and falls back
            to the loop with a warning if the loss cannot run over all rows at once. Plans
            differ by rounding, and in which random numbers a dropout layer draws.
        chunk_size: The number of rows computed at a time by plan ``"vmap"``, to limit memory. Plan
            ``"fused"`` uses it if every row has its own parameters (`GradStack.at_rows`), unless
            the loss draws random numbers.
        memory_budget: The memory that plan ``"fused"`` may hold between questions, in addition to
            an ordinary backward pass: bytes (int), or a fraction of the device's memory (float, up
            to 1). If it is too small, the plan streams rows, and at last runs a backward pass for
            every question. The default is 0.25, and 0 if the loss uses activation checkpoints,
            which would save nothing otherwise. By default rows are also streamed where they would
            take more than 8 times the memory of what they are computed from. ``explain()`` of a
            stack says what was chosen.
        uneven: True if M need not divide N, for a last batch that is not full. With N = M·B + k
            samples, the first k rows have B + 1 samples and the others B. Such a batch takes two
            passes, and its rows are held. The mean of its rows is not the mean of its samples.

    Raises:
        ValueError: M < 1; N not divisible by M (N < M with ``uneven``); tensors of the batch
            disagree on N; the batch is on another device than the parameters; the loss is neither
            a scalar nor one number per sample.
        TypeError: A parameter is not floating point.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, batch: (params["w"] * batch).sum(1).mean()
        >>> rows = gf.microbatch_grads(loss, 2)({"w": torch.ones(2)}, torch.eye(2))
        >>> rows.stacked()
        {'w': tensor([[1., 0.],
                [0., 1.]])}
    """
    if not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 1:
        raise ValueError(
            f"Expected a whole number of microbatches >= 1, found {microbatches!r}. M = 8 is a "
            "usual choice."
        )
    grads_of = _grad_function(loss, microbatches, has_aux, plan, chunk_size, memory_budget)
    return replace(grads_of, uneven=uneven)


def per_sample_grads(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    plan: Plan = "auto",
    chunk_size: int | None = None,
    memory_budget: int | float | None = None,
) -> GradFunction:
    """Return a function like that of `microbatch_grads` with M = N, B = 1: a gradient per sample.

    The loss gets batches of one sample with the leading axis. Without ``buffers=``, every call
    starts from the module's own buffers.

    Args:
        loss: See `microbatch_grads`.
        has_aux: See `microbatch_grads`.
        plan: See `microbatch_grads`.
        chunk_size: See `microbatch_grads`.
        memory_budget: See `microbatch_grads`.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, batch: (params["w"] * batch).sum(1).mean()
        >>> len(gf.per_sample_grads(loss)({"w": torch.ones(3)}, torch.eye(3)))
        3
    """
    return _grad_function(loss, None, has_aux, plan, chunk_size, memory_budget)


def _grad_function(
    loss: Callable[..., Any],
    microbatches: int | None,
    has_aux: bool,
    plan: Plan,
    chunk_size: int | None,
    memory_budget: int | float | None,
) -> GradFunction:
    if isinstance(loss, nn.Module) or not callable(loss):
        raise TypeError(
            f"Expected a function loss(params, batch), found {type(loss).__name__}. Use "
            "model_loss(model, criterion)."
        )
    if plan not in get_args(Plan):
        raise ValueError(f'Expected plan "auto", "fused", "loop" or "vmap", found {plan!r}.')
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (whole and chunk_size >= 1):
        raise ValueError(
            f"Expected chunk_size as a whole number of rows >= 1 or None, found {chunk_size!r}. "
            "None computes all rows at once."
        )
    if has_aux and isinstance(loss, ModelLoss):
        raise ValueError(
            "Expected has_aux on model_loss(model, criterion, has_aux=True), found it here."
        )
    check_budget(memory_budget)
    return GradFunction(loss, microbatches, has_aux, plan, chunk_size, memory_budget)
