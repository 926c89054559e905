"""`Filtered`: filtered gradients in an ordinary loop around a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._overlap import copied_where_shared
from gradfilter._row_rules import RowRules
from gradfilter._shards import is_sharded, reshard
from gradfilter._state_rules import settled
from gradfilter._types import GLOBAL_NAMES, Out, Params, State, Transform, Tree, all_keep
from gradfilter.grads._batch import mark_samples, plain
from gradfilter.grads._call_context import random_state
from gradfilter.grads._hidden_state import Probes
from gradfilter.grads._loss import extract, insert
from gradfilter.grads._microbatch import GradFunction, Plan, microbatch_grads, per_sample_grads
from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.grads._row_parts import dense_rows, join_stacks
from gradfilter.grads._sample_groups import GroupedStack
from gradfilter.grads._stack import (
    ComputedDenseStack,
    ComputedStack,
    DenseStack,
    GradStack,
    StackOrigin,
)
from gradfilter.grads.fused._modules_by_row import ByRow
from gradfilter.interop._earlier_batches import EarlierBatches, earlier_rows, held_of
from gradfilter.interop._host_chain import (
    check_owned,
    filter_chain,
    gave_up,
    note_skip,
    overflowed,
    who_gave_up,
    write_grads,
)
from gradfilter.interop._host_loss import (
    check_criterion,
    check_module,
    check_order,
    has_compiled,
    loss_of,
    origin_with_own_losses,
    original_of,
    plan_for,
    renormalised,
    scale_of,
    update_scale,
    view_of,
    with_own_losses,
)
from gradfilter.interop._sam import check_steps_alone
from gradfilter.transforms._chain import chain, row_part
from gradfilter.transforms._compile import (
    Backend,
    Graphs,
    Parts,
    check_backend,
    counted,
    decided,
    decisions,
)
from gradfilter.transforms._state_dict import load_state_dict, state_dict
from gradfilter.transforms._streaming import ReducedRows, RowPart
from gradfilter.transforms._train_step import mean_gradient

# --- The batch ---


def batch_of(inputs: Any, targets: Any, criterion: Callable[..., Any] | None) -> Any:
    """Return the batch in the form that `model_loss` takes.

    Raises:
        TypeError: There are targets but no criterion, or no targets and the inputs are not a dict.
    """
    if targets is None and not isinstance(inputs, Mapping):
        if isinstance(inputs, (tuple, list)) and len(inputs) == 2:
            raise TypeError(
                f"Expected step(inputs, targets), found one {type(inputs).__name__} of two. "
                "Unpack it: step(*batch)."
            )
        raise TypeError(
            f"Expected step(inputs, targets), or one dict, found {type(inputs).__name__} alone. "
            "Give targets, or a dict of the model's keyword arguments."
        )
    if targets is not None and criterion is None:
        raise TypeError(
            "Expected a criterion for step(inputs, targets), found None. Give Filtered a "
            "criterion, or pass one dict to a model that returns its own .loss."
        )
    return inputs if targets is None else (inputs, targets)


# --- The wrapper ---


_Rows = tuple[ComputedStack, Tensor | None]
"""The rows of a batch, and the factors that remove a loss scale from them."""


def _fell_back(rows: ComputedStack) -> bool:
    """Return whether plan "auto" took the loop."""
    rows = rows.samples if isinstance(rows, GroupedStack) else rows
    return isinstance(rows, ComputedDenseStack) and rows.plan == "loop"


def _add_to(reduced: ReducedRows, computed: _Rows) -> None:
    """Reduce the rows of a batch together with those of the batches before."""
    rows, factors = computed
    with torch.no_grad():
        reduced.add(rows if factors is None else rows.scaled(factors))


def _with_earlier(
    computed: _Rows, earlier: ReducedRows | list[DenseStack]
) -> GradStack | ReducedRows:
    """Return the rows of a batch together with those of the batches before."""
    of_batch, factors = computed
    if isinstance(earlier, ReducedRows):
        _add_to(earlier, computed)
        return earlier
    if earlier:
        return join_stacks([*earlier, dense_rows(*computed)])
    return of_batch if factors is None else of_batch.scaled(factors)


def _check_for_shards(transforms: Transform, graphs: Graphs | None) -> None:
    """Refuse what is not possible with parameters that are sharded over ranks."""
    if "across_ranks" not in [part.name for part in chain(transforms).parts]:
        raise ValueError(
            "Filtered: expected across_ranks() first in the chain, because the parameters are "
            "sharded over ranks (DTensor), found none. Write chain(across_ranks(), ...), with the "
            "group of the ranks that have other samples; none means all."
        )
    if graphs is not None:
        raise ValueError(
            "Filtered: expected compile=False with parameters that are sharded over ranks "
            "(DTensor). Leave it out."
        )


ALL_RANKS_IN_EACH_BATCH = {"across_ranks": RowRules({})}
"""The rules of `across_ranks` where the sums of each batch are added up over the ranks.

Parameters that are whole on every rank have none: their rows are held, and sent with the step.
"""


def _row_part_over_shards(transforms: Transform) -> RowPart | None:
    """Return what reduces each batch over sharded parameters; None if the chain needs all rows."""
    found = row_part(transforms, ALL_RANKS_IN_EACH_BATCH)
    # A transform before across_ranks may skip the step on one rank, and the others must know.
    if found is None or found.rows_are_read or next(iter(found.parts)) != "across_ranks":
        return None
    return found


class FilteredBatch(NamedTuple):
    """What a chain made of the rows of a batch.

    Attributes:
        grads: The gradient by name.
        state: The new state of the chain.
        out: The values that it publishes.
        buffers: The buffers after the batch.
        losses: The losses of the rows. (M,)
        loss: Their mean. ().
        aux: The aux of the rows.
    """

    grads: Tree
    state: State
    out: Out
    buffers: Tree
    losses: Tensor
    loss: Tensor
    aux: Any


def graphs_for(
    model: nn.Module,
    criterion: Callable[..., Any] | None,
    transforms: Transform,
    compile: bool | str | Backend,
) -> Graphs | None:
    """Return the graphs of a host that compiles, or None.

    Raises:
        ValueError: The backend is unknown, or the module or the chain cannot be compiled.
    """
    if compile is False:
        return None
    backend = check_backend("inductor" if compile is True else compile)
    if has_compiled(model, criterion):
        raise ValueError(
            "Expected a module as it was before torch.compile with compile=, found a compiled one. "
            "Pass the original: the graph holds its forward pass as well."
        )
    if any(getattr(m, "max_norm", None) is not None for m in model.modules()):
        raise ValueError(
            "Expected no embedding with max_norm with compile=, whose weight the forward pass "
            "renormalises. Renormalise it after every step (w.renorm(2, 0, max_norm)), or do not "
            "compile."
        )
    return Graphs(backend)


@dataclass(frozen=True, eq=False)
class StepResult:
    """The result of one step of `Filtered`, as tensors, so that unread numbers cost no waiting.

    Attributes:
        loss: The mean loss over the rows before the step, ().
        info: ``keep`` (), true if the optimizer was called, and the metrics of the transforms.
        aux: With ``has_aux``, the second value of the criterion for each row; every leaf has a
            leading axis M (over all accumulated batches). Else None.

    Examples:
        >>> import torch, gradfilter as gf
        >>> from gradfilter.interop import Filtered
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> filtered = Filtered(model, torch.nn.MSELoss(), gf.mean_rows(), optimizer, 2)
        >>> result = filtered.step(torch.zeros(4, 2), model.bias.detach().repeat(4, 1))
        >>> result.loss, result.info["keep"]
        (tensor(0.), tensor(True))
    """

    loss: Tensor
    info: dict[str, Tensor]
    aux: Any = None


class Filtered:
    """Filter the gradients of M microbatches, in place, in front of any ``torch.optim`` optimizer.

    ``step(x, y)`` replaces ``optimizer.zero_grad(); criterion(model(x), y).backward();
    optimizer.step()``: it computes one gradient per microbatch at the module's own parameters,
    runs the chain, writes the result into ``p.grad`` and calls the optimizer. If the chain returns
    ``keep = False``, the optimizer is not called: parameters, ``p.grad``, its state and the chain's
    stay bit-identical. To read ``keep``, it waits for the device once per step, but only for a
    chain that can skip. Buffers (BatchNorm) are written back after every step, also a skipped one.

    Learning-rate schedulers, parameter groups and ``torch.autocast`` around ``step`` work as usual.
    An unused parameter has gradient zero, not None, so weight decay applies to it. Hooks on
    parameters (``p.register_hook``, ``p.register_post_accumulate_grad_hook``) run on the filtered
    gradient.

    Args:
        model: Any module. Frozen parameters are not changed. A module from ``torch.compile`` runs
            row by row, with a warning, and keeps its original names.
        criterion: See `model_loss`; a mean over samples; None for models with a ``.loss``. If it is
            a module (or a method of one), its parameters are trained with the model's, under names
            that begin with ``criterion.``, and its buffers are updated like the model's.
        transforms: A chain that takes rows and ends in a tree, without an update rule.
        optimizer: Any optimizer over parameters of the model.
        microbatches: M rows per batch; None for one row per sample.
        plan: See `microbatch_grads`. Once ``"auto"`` has fallen back to the loop, it keeps the
            loop.
        memory_budget: See `microbatch_grads`.
        uneven: True for batches whose size M need not divide: see `microbatch_grads`.
        scaler: A ``torch.amp.GradScaler``: losses are scaled, rows unscaled, and a row that
            overflowed is rejected alone (`finite_filter` is put in front of a chain without one).
            ``step`` updates the scaler: the scale falls if a row overflowed although its loss is
            finite, because no scale helps if the loss is not. Do not call its methods yourself.
        has_aux: True if the criterion returns ``(loss, aux)``, aux any tree of tensors: see
            ``aux`` of `StepResult`.
        compile: True to compute loss, rows and chain as one graph compiled by torch, or a backend
            of `gradfilter.compile`. The optimizer's step is not a part of it. The first batch of
            each shape is compiled. `accumulate` has a graph of its own, and the graph of a step is
            one for each number of accumulated batches. Not with embeddings with max_norm.

    Raises:
        TypeError: ``transforms`` does not lead from rows to a tree; an optimizer whose step needs a
            closure (LBFGS, SAM); an argument is not a module, criterion or optimizer.
        ValueError: A trainable parameter of the optimizer is neither the model's nor the
            criterion's, or one of the criterion is not in the optimizer; a compiled module with
            plan ``"fused"`` or ``"vmap"``; a DistributedDataParallel; parameters that are sharded
            over ranks, and a chain without `across_ranks` or ``compile``.

    Examples:
        >>> import torch, gradfilter as gf
        >>> from gradfilter.interop import Filtered
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        >>> criterion = torch.nn.functional.cross_entropy
        >>> filtered = Filtered(model, criterion, gf.agree_filter(2.0), optimizer, microbatches=4)
        >>> result = filtered.step(torch.randn(8, 2), torch.arange(8) % 2)
        >>> scheduler.step()
        >>> sorted(result.info)
        ['agree_filter/accepted', 'agree_filter/cosine', 'keep']
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        transforms: Transform,
        optimizer: torch.optim.Optimizer,
        microbatches: int | None,
        *,
        plan: Plan = "auto",
        memory_budget: int | float | None = None,
        uneven: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        has_aux: bool = False,
        compile: bool | str | Backend = False,
    ) -> None:
        """Check everything that can be checked without a batch."""
        check_module("Filtered", model, shards=True)
        check_order(criterion, transforms, optimizer)
        check_steps_alone("Filtered", optimizer, "For SAM, put sam_perturb into the chain.")
        if criterion is not None and not callable(criterion):
            raise TypeError(
                f"Filtered: expected a criterion to call, or None, found "
                f"{type(criterion).__name__}. Give criterion(output, targets) -> scalar."
            )
        if has_aux and criterion is None:
            raise TypeError(
                "Filtered: expected a criterion that returns (loss, aux), found None with "
                "has_aux=True. Give criterion(output, batch) -> (output.loss, aux)."
            )
        check_criterion("Filtered", original_of(model), criterion, optimizer)
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(
                f"Filtered: expected a torch.amp.GradScaler or None, found {type(scaler).__name__}."
                " Make it first: torch.amp.GradScaler(device)."
            )
        self.model: nn.Module = model
        self.criterion: Callable[..., Any] | None = criterion
        self.optimizer: torch.optim.Optimizer = optimizer
        self.scaler: torch.amp.GradScaler | None = scaler
        scales = scaler is not None and scaler.is_enabled()
        self.transforms: Transform = filter_chain(transforms, guarded=scales)
        self._module, self._has_aux = view_of(model, criterion), has_aux
        self._microbatches = microbatches
        self._graphs = graphs_for(model, criterion, self.transforms, compile)
        self._batch_graphs = None if self._graphs is None else Graphs(self._graphs.backend)
        self._plan: Plan = plan_for(model, criterion, plan)
        self._memory_budget, self._uneven = memory_budget, uneven
        self._probes, self._by_row = Probes(), ByRow()
        self._grads_of(None)
        self._sharded = any(map(is_sharded, self._module.parameters()))
        if self._sharded:
            _check_for_shards(self.transforms, self._graphs)
        check_owned(self._module, optimizer, "Filtered")
        self._state = self.transforms.init(extract(self._module)[0])
        find_row_part = _row_part_over_shards if self._sharded else row_part
        self._row_part = find_row_part(self.transforms)
        self._held: list[DenseStack] = []
        self._reduced: ReducedRows | None = None
        self._earlier = EarlierBatches()  # those of a compiled host
        self.shared: Tree = {}  # used by hosts

    def step(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        sample_weights: Tensor | None = None,
        groups: Tensor | None = None,
        reference_batch: Any = None,
        **extra: Any,
    ) -> StepResult:
        """Run one step over this batch and every batch accumulated since the last one.

        Args:
            inputs: The model's inputs: a tensor of N = M·B samples, a tuple of positional
                arguments or a dict of keyword arguments. Alone, one dict for the whole batch.
            targets: The criterion's targets; None for such a dict.
            reference_batch: A pair (inputs, targets), or such a dict, of any size: the samples
                whose mean gradient `reference_filter` follows. One more backward pass; what it
                does to buffers is discarded.
            sample_weights: See `GradFunction`.
            groups: See `GradFunction`.
            **extra: Keywords for the transforms: ``keep``, ``count``, ``value``.

        Raises:
            RuntimeError: `spike_skip` has given up. The step has ended: its state is that after it.
        """
        if self._sharded:  # an evaluation may have left parameters whole
            reshard(self._module.modules())
            if self._reduced is not None:
                self._check_for_batches_of_shards(extra)
        check_owned(self._module, self.optimizer, "Filtered")
        params = self._params()
        batch = self._batch_of(inputs, targets, sample_weights, groups)
        reference = None if reference_batch is None else self._samples(reference_batch)
        if self._graphs is None:
            computed = self._batch_rows(params, batch)
            if reference is not None:
                scale = scale_of(self.scaler, _tree.device_of(params))
                with renormalised(self._module):
                    extra["reference"] = self._reference(params, reference, None, scale)
            rows = _with_earlier(computed, self._reduced or self._held)
            self._discard_accumulated()
            found = self._filter(params, computed[0], rows, self._state, extra)
        else:
            found = self._filter_in_graph(self._graphs, params, batch, extra, reference)
            self._discard_accumulated()
        # The optimizer writes the parameters, which a state, a metric or an aux may show.
        state, out, aux = copied_where_shared((found.state, found.out, found.aux), params)
        losses = found.losses
        given = all_keep(params, out.get("keep"), extra.get("keep"))
        keep = _tree.as_bool_tensor(True if given is None else given, losses.device)
        insert(self._module, {}, found.buffers)
        # The only wait for the device, to decide whether to call the optimizer.
        if given is None or bool(keep):
            self._state = state
            write_grads(self._module, self.optimizer, found.grads)
            self.optimizer.step()
        else:
            self._state = settled(self.transforms.rules, False, state, self._state)
            note_skip(self.optimizer)
        if self.scaler is not None and self.scaler.is_enabled():
            update_scale(self.scaler, self._overflowed(out, losses))
        if names := who_gave_up(out):
            raise gave_up("Filtered", names)
        metrics = {name: value for name, value in out.items() if name not in GLOBAL_NAMES}
        return StepResult(found.loss, {"keep": keep, **metrics}, aux)

    def accumulate(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        sample_weights: Tensor | None = None,
        groups: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        """Compute the M rows of a batch; the next `step` filters them with its own.

        If every transform up to the reducer acts row by row (`finite_filter`, `clip_per_row`,
        `mean_rows`), the rows of the batch are reduced at once, and all batches together hold one
        gradient. Otherwise the rows of all batches are held until the step, because the chain
        compares them. `reference_filter` also holds them, unless the gradient ``reference=`` is
        given here as well: that of a ``reference_batch`` is known at the step only. Over sharded
        parameters rows cannot be held; those that are reduced at once are added up over the ranks
        in every batch, as FSDP2 does.

        Args:
            inputs: As in `step`.
            targets: As in `step`.
            sample_weights: As in `step`.
            groups: As in `step`.
            **extra: Keywords that transforms up to the reducer read, the same objects as in `step`.

        Returns:
            The mean loss of these rows. ().

        Raises:
            ValueError: Rows of other parameters, or keywords with other values, were accumulated;
                the parameters are sharded over ranks, and the rows would have to be held.
        """
        if self._sharded:
            self._check_for_batches_of_shards(extra)
            reshard(self._module.modules())
        params = self._params()
        batch = self._batch_of(inputs, targets, sample_weights, groups)
        if self._batch_graphs is None:
            loss, buffers = self._accumulate(params, batch, extra)
        else:
            loss, buffers = self._accumulate_in_graph(self._batch_graphs, params, batch, extra)
        insert(self._module, {}, buffers)
        return loss

    def _check_for_batches_of_shards(self, extra: Mapping[str, Any]) -> None:
        """Refuse to accumulate what would have to be held, or what one rank alone knows."""
        if self._row_part_for(extra) is None:
            raise ValueError(
                "Filtered: expected step() with every batch, found accumulate() with parameters "
                "that are sharded over ranks, whose rows are not held. It works for chains that "
                "begin with across_ranks(), act row by row up to the reducer, and do not use the "
                "rows behind it: across_ranks(), clip_per_row(c), mean_rows(). For others use more "
                "microbatches, which with memory_budget=0 hold little in addition."
            )
        if "keep" in extra:
            raise ValueError(
                "Filtered: expected no keep= with accumulate() and the step() behind it, found one "
                "with parameters sharded over ranks, which must all skip or none. Leave it out."
            )

    def _accumulate(self, params: Params, batch: Any, extra: Any) -> tuple[Tensor, Tree]:
        """Compute the rows of a batch and hold them; return the mean loss and the buffers."""
        computed = self._batch_rows(params, batch)
        rows, loss = computed[0], computed[0].mean_loss()
        row_part = self._row_part_for(extra)
        if row_part is None:
            self._held.append(dense_rows(*computed))
        else:
            reduced = self._reduced or ReducedRows(row_part, self._state, params, extra)
            reduced.check_keywords(extra)
            _add_to(reduced, computed)
            self._reduced = reduced
        return loss, rows.buffers

    def state_dict(self) -> dict[str, Any]:
        """Return the states except the module's: ``transforms`` (flat), ``optimizer``, ``scaler``.

        Raises:
            RuntimeError: Rows are accumulated; a checkpoint cannot hold them.
        """
        batches = len(self._held) if self._reduced is None else len(self._reduced)
        batches += len(self._earlier)
        if batches:
            raise RuntimeError(
                f"Expected no accumulated rows in a checkpoint, found {batches} "
                "batches of them. Take state_dict() after step()."
            )
        states = {"transforms": state_dict(self._state), "optimizer": self.optimizer.state_dict()}
        return states if self.scaler is None else {**states, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`; accumulated rows are discarded.

        Raises:
            ValueError: Parts are missing or extra, the chain differs, or the scaler was disabled.
        """
        expected = {"transforms", "optimizer"} | ({"scaler"} if self.scaler is not None else set())
        if set(states) != expected:
            raise ValueError(
                f"Expected the states {sorted(expected)}, found {sorted(states)}. Give what "
                "state_dict() of a Filtered returned, made with a scaler, or without, as this one."
            )
        if self.scaler is not None and self.scaler.is_enabled() and not states["scaler"]:
            raise ValueError(
                "Expected the state of a GradScaler that is on, found that of one that was off. "
                "Make this Filtered without a scaler, or take scaler.state_dict() for that part."
            )
        state = load_state_dict(self._state, states["transforms"])
        self.optimizer.load_state_dict(states["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(states["scaler"])
        self._state = state
        self._discard_accumulated()

    def _overflowed(self, out: Out, losses: Tensor) -> Tensor:
        """Return whether the scale was too large for a row, given what a step published. ()."""
        return overflowed(out, losses)

    def _discard_accumulated(self) -> None:
        """Forget the batches accumulated since the last step."""
        self._held, self._reduced, self._earlier = [], None, EarlierBatches()

    def _params(self) -> Params:
        named = self._module.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad}

    def _grads_of(self, scale: Tensor | None) -> GradFunction:
        loss = loss_of(self._module, self.criterion, self._has_aux, scale)
        options: dict[str, Any] = {"plan": self._plan, "memory_budget": self._memory_budget}
        grads_of = (
            per_sample_grads(loss, **options)
            if self._microbatches is None
            else microbatch_grads(loss, self._microbatches, uneven=self._uneven, **options)
        )
        return replace(grads_of, probes=self._probes, by_row=self._by_row)

    def _batch_of(self, inputs: Any, targets: Any, weights: Any, groups: Any) -> Any:
        """Return one batch as `model_loss` takes it, with the weights and groups of its samples."""
        batch = batch_of(inputs, targets, self.criterion)
        return mark_samples(batch, weights, groups, self._microbatches)

    def _batch_rows(self, params: Params, batch: Any) -> _Rows:
        """Return the rows of one batch at the module's own parameters and buffers."""
        scale = scale_of(self.scaler, _tree.device_of(params))
        with renormalised(self._module):
            return self._rows(params, batch, None, scale)

    def _rows(
        self, params: Params, batch: Any, buffers: Tree | None, scale: Tensor | None
    ) -> _Rows:
        """Return the rows of one batch, and the factors that remove the loss scale."""
        rows: ComputedStack = self._grads_of(scale)(params, batch, buffers=buffers)
        if self._plan == "auto" and _fell_back(rows):
            self._plan = "loop"  # the fused plan would be refused at every step
        if scale is None:
            return rows, None
        return with_own_losses(rows), (1 / scale.to(_tree.sum_dtype(scale))).expand(len(rows))

    def _samples(self, batch: Any) -> Any:
        """Return a reference batch as the loss takes it."""
        if self.criterion is None or isinstance(batch, Mapping):
            return batch_of(batch, None, self.criterion)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                "Filtered: expected reference_batch as a pair (inputs, targets), or a dict for a "
                f"model with a loss, found {type(batch).__name__}. Write reference_batch=(x, y)."
            )
        return batch_of(batch[0], batch[1], self.criterion)

    def _reference(
        self, params: Params, batch: Any, buffers: Tree | None, scale: Tensor | None
    ) -> Tree:
        """Return the mean gradient of a batch."""
        found = mean_gradient(self._grads_of(scale), params, batch, buffers)
        return found if scale is None else {n: g / scale.to(g.dtype) for n, g in found.items()}

    def _filter(
        self,
        params: Params,
        of_batch: ComputedStack,
        rows: GradStack | ReducedRows,
        state: State,
        extra: Any,
    ) -> FilteredBatch:
        """Run the chain on the rows of a batch, joined with those of the batches before."""
        losses, loss, aux = rows.losses, rows.mean_loss(), rows.aux
        assert losses is not None and loss is not None  # rows of a batch have their losses
        with torch.no_grad():
            grads, state, out = self.transforms.update(rows, state, params, **extra)
        of_batch.release()
        # The other global names stand for stacks, for the transforms of this chain only.
        out = {name: v for name, v in out.items() if name == "keep" or name not in GLOBAL_NAMES}
        return FilteredBatch(grads, state, out, of_batch.buffers, losses, loss, aux)

    def _filter_in_graph(
        self, graphs: Graphs, params: Params, batch: Any, extra: Any, reference: Any = None
    ) -> FilteredBatch:
        """Do the same by a graph, whose inputs are all tensors that may change."""
        given, parts, options = self._graph_arguments(params, batch, extra)
        if self._earlier.reduced is not None:
            self._earlier.reduced.check_keywords(extra)
        given["earlier"] = self._earlier.tensors()
        given["reference"] = {} if reference is None else {"batch": plain(reference)}
        constants = self._earlier.constants(parts)

        def run(tree: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            params, earlier = tree["params"], tree["earlier"]
            with self._sharing(tree["shared"]):
                no_rows = self._no_rows(self._row_part, tree)
                before = earlier_rows(earlier, constants, partial(self._origin, params), no_rows)
                computed = self._traced_rows(tree)
                rows, extra = _with_earlier(computed, before), tree["extra"]
                if tree["reference"]:
                    samples, scale = tree["reference"]["batch"], tree["scale"].get("scale")
                    of_samples = self._reference(params, samples, tree["buffers"], scale)
                    extra = {**extra, "reference": of_samples}
                found = self._filter(params, computed[0], rows, tree["transforms"], extra)
            return tuple(found), random_state(_tree.device_of(params))

        found, *_ = graphs.run(run, given, parts, options=(options, constants))
        result = FilteredBatch(*found)
        return result._replace(state=counted(self.transforms, result.state, self._state))

    def _accumulate_in_graph(
        self, graphs: Graphs, params: Params, batch: Any, extra: Any
    ) -> tuple[Tensor, Tree]:
        """Do the same as `_accumulate` by a graph."""
        given, parts, options = self._graph_arguments(params, batch, extra)
        row_part = self._row_part_for(extra)

        def run(tree: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return self._held_batch(tree, row_part), random_state(_tree.device_of(tree["params"]))

        options = options, row_part is None
        (loss, buffers, held), _, moment = graphs.run(run, given, parts, options=options)
        reduced = self._earlier.reduced
        if reduced is None and row_part is not None:
            reduced = ReducedRows(row_part, self._state, params, extra)
        if reduced is not None:
            reduced.check_keywords(extra)
        self._earlier.add(reduced, given, held, moment)
        return loss, buffers

    def _held_batch(
        self, tree: dict[str, Any], row_part: RowPart | None
    ) -> tuple[Tensor, Tree, Any]:
        """Return the mean loss of a traced batch, its buffers, and what is held of it."""
        with self._sharing(tree["shared"]):
            rows, factors = self._traced_rows(tree)
            loss, buffers = rows.mean_loss(), rows.buffers
            return loss, buffers, held_of(rows, factors, self._no_rows(row_part, tree))

    def _graph_arguments(
        self, params: Params, batch: Any, extra: Any
    ) -> tuple[dict[str, Any], Parts, Any]:
        """Return the tensors that a graph takes, what it is made of, and its other arguments."""
        scale = scale_of(self.scaler, _tree.device_of(params))
        given = {
            "params": params,
            "buffers": {name: b.detach() for name, b in self._module.named_buffers()},
            "transforms": decided(self.transforms, self._state),
            "batch": plain(batch),
            "scale": {} if scale is None else {"scale": scale},
            "shared": self.shared,
            "extra": extra,
        }
        loss = NormalizedLoss.of(self._grads_of(scale).loss, False)
        return given, Parts((loss,), (self.transforms,)), decisions(self.transforms, self._state)

    @contextmanager
    def _sharing(self, shared: Tree) -> Iterator[None]:
        """Let the losses read these tensors in place of the present ones."""
        before, self.shared = self.shared, shared
        try:
            yield
        finally:
            self.shared = before

    def _traced_rows(self, tree: dict[str, Any]) -> _Rows:
        """Return the rows of the batch of a traced step."""
        scale = tree["scale"].get("scale")
        return self._rows(tree["params"], tree["batch"], tree["buffers"], scale)

    def _row_part_for(self, extra: Mapping[str, Any]) -> RowPart | None:
        """Return what reduces an accumulated batch at once; None if its rows are held."""
        row_part = self._row_part
        if row_part is None or self._reduced is not None or self._earlier.reduced is not None:
            return row_part
        if self._held or self._earlier.batches:
            return None
        # A reference batch comes with the step.
        return None if row_part.follows_reference and "reference" not in extra else row_part

    @staticmethod
    def _no_rows(row_part: RowPart | None, tree: dict[str, Any]) -> ReducedRows | None:
        """Return what the rows of a traced step are added to; None if the chain needs all rows."""
        if row_part is None:
            return None
        return ReducedRows(row_part, tree["transforms"], tree["params"], tree["extra"])

    def _origin(self, params: Params, given: dict[str, Any]) -> StackOrigin:
        """Return the way to compute the rows of an earlier batch again."""
        scale = given["scale"].get("scale")
        origin = self._grads_of(scale).origin(params, given["batch"], given["buffers"])
        return origin if scale is None else origin_with_own_losses(origin)
