"""Run `Filtered` inside a trainer that clips gradients and calls the optimizer itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader
from typing_extensions import override

from gradfilter import _tree
from gradfilter._info import AUX, means
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.distributed._ranks import ALONE, Ranks
from gradfilter.grads._batch import plain, samples_in
from gradfilter.grads._microbatch import Plan
from gradfilter.grads._stack import ComputedStack, GradStack
from gradfilter.grads._state_owners import Owners
from gradfilter.interop._filtered import Filtered, FilteredBatch, StepResult
from gradfilter.interop._host_chain import note_skip
from gradfilter.interop._host_loss import ModuleView
from gradfilter.interop._host_shards import cut_states, whole_states
from gradfilter.transforms._compile import Backend
from gradfilter.transforms._state_dict import load_state_dict, state_dict
from gradfilter.transforms._streaming import ReducedRows

# --- Check before the first batch that all batches divide into microbatches ---


class BatchSizes(NamedTuple):
    """The sizes of the batches of a loader.

    Attributes:
        full: The number of full batches before the last one.
        size: The size of a full batch.
        last: The size of a last batch that is not full; 0 if there is none, or if it is omitted.
    """

    full: int
    size: int
    last: int


def sizes_in(loader: Any) -> BatchSizes | None:
    """Return the sizes of the batches of a `DataLoader` of a known number of samples, or None."""
    sampler = getattr(loader, "batch_sampler", None)
    return sizes_of_sampler(sampler) if isinstance(loader, DataLoader) else None


def sizes_of_sampler(sampler: Any) -> BatchSizes | None:
    """Return the sizes of the batches of a `BatchSampler` of a known number of samples, or None."""
    if not isinstance(sampler, BatchSampler):
        return None
    samples = getattr(sampler, "sampler", None)
    if not hasattr(samples, "__len__"):
        return None
    full, last = divmod(len(cast(Sized, samples)), sampler.batch_size)
    return BatchSizes(full, sampler.batch_size, 0 if sampler.drop_last else last)


def check_division(
    caller: str,
    loader: Any,
    microbatches: int | None,
    batches: float,
    size: str,
    drop: str,
    uneven: bool,
) -> None:
    """Refuse a loader with a batch that cannot be cut into microbatches.

    Args:
        caller: The beginning of the error.
        loader: The loader, or the sizes of its batches on this process. Nothing is checked if they
            are unknown.
        microbatches: M, or None, which divides everything.
        batches: The largest number of batches used before the loader restarts or ends.
        size: The name of the batch size in the error.
        drop: The advice to omit the last batch.
        uneven: True if rows may differ by one sample.

    Raises:
        ValueError: The size of a batch, or of the last one, is not a multiple of M; with ``uneven``
            it is smaller than M.
    """
    sizes = loader if isinstance(loader, BatchSizes) else sizes_in(loader)
    if microbatches is None or sizes is None:
        return
    has_last = sizes.last > 0 and batches > sizes.full
    if uneven:
        smallest = sizes.last if has_last else sizes.size
        if smallest < microbatches:
            raise ValueError(
                f"{caller}: expected at least microbatches={microbatches} samples in every batch, "
                f"found one of {smallest}. Use fewer microbatches, increase {size}, or omit the "
                f"last batch with {drop}."
            )
        return
    if sizes.full and sizes.size % microbatches:
        raise ValueError(
            f"{caller}: expected {size} to be a multiple of microbatches={microbatches}, found "
            f"{sizes.size}. Use {max(sizes.size // microbatches, 1) * microbatches}"
            ", or other microbatches, or uneven=True for rows that differ by one sample."
        )
    if has_last and sizes.last % microbatches:
        raise ValueError(
            f"{caller}: expected every batch to be a multiple of microbatches={microbatches}, "
            f"found a last one of {sizes.last} samples in each epoch. Use {drop}, uneven=True for "
            "rows that differ by one sample, or as many samples as fill it."
        )


# --- The wrapper of a trainer ---


ROWS = "gradfilter/rows"
"""The name of the number of local rows that took part, in the info of a step of several ranks."""

LIVE = "gradfilter/live"
"""The name of the mask of rows that take part.

In ``shared`` it is that of the rows of a batch, (M,) float, of which others have no samples; in the
info of an uneven step of several ranks that of all local rows, (M,) bool.
"""


def padded(batch: Any, size: int) -> Any:
    """Repeat the first sample of a batch at its end, until it has this many samples."""
    batch = plain(batch)
    lacking = size - samples_in(batch)

    def longer(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.cat([leaf, leaf[:1].expand(lacking, *leaf.shape[1:])])

    return _tree.tree_map(longer, batch)


def samples_first(rows: int, samples: int, device: torch.device) -> Tensor:
    """Return the mask of rows that have samples, if the first ones have one each. (M,) float."""
    live = torch.arange(rows, device=device) < samples
    return live.to(_tree.sum_dtype(live))


HostLoss = Callable[[dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]
"""A host's loss of one microbatch, and the scalars that it logged, by name."""


class Hosted(Filtered):
    """A `Filtered` that writes ``p.grad`` and records whether the host should step.

    Args:
        model: The module whose parameters and buffers are swapped while ``loss`` runs.
        loss: The host's mean loss of one microbatch, which it computes by calling ``model``, and
            the scalars that it logged.
        transforms: See `Filtered`.
        optimizer: The host's optimizer. It is never called here.
        microbatches: See `Filtered`.
        plan: See `Filtered`.
        memory_budget: See `Filtered`.
        uneven: See `Filtered`.
        compile: See `Filtered`.
        scaler: The host's scaler, whose methods the host must not call, or None.
        owners: Objects other than the model whose attributes the loss may change, by name.
        ranks: The processes of the host, over which its numbers are means.

    Attributes:
        kept: True if the host should make the last step; read from the device only once.
        completes_step: True while the host runs the last batch of a step, if it says so. It is not
            an attribute of the module, where it would be a state that the loss may read.
        shared: The tensors that the losses of all rows read, other than the batch, by name. A
            compiled step takes them as inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: HostLoss,
        transforms: Transform,
        optimizer: torch.optim.Optimizer,
        microbatches: int | None,
        *,
        plan: Plan,
        memory_budget: int | float | None,
        uneven: bool = False,
        compile: bool | str | Backend = False,
        scaler: torch.amp.GradScaler | None = None,
        owners: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Check the arguments as `Filtered` does."""
        self.ranks = ranks
        self.kept, self.completes_step = False, False
        self._served = model, optimizer
        super().__init__(
            _with_loss(model, loss),
            _LossOfOutput(**(owners or {})),
            transforms,
            optimizer,
            microbatches,
            plan=plan,
            memory_budget=memory_budget,
            uneven=uneven,
            scaler=scaler,
            has_aux=True,
            compile=compile,
        )
        # A step only reads the groups of its optimizer and calls it.
        self.optimizer = cast(torch.optim.Optimizer, _StepRecorder(optimizer, self._note))

    def serves(self, model: object, optimizer: object) -> bool:
        """Return whether the host still has the model and the optimizer that this was made for."""
        return model is self._served[0] and optimizer is self._served[1]

    def begin(self) -> None:
        """Begin a step; discard the rows of an interrupted one."""
        self.kept = False
        self._discard_accumulated()

    @override
    def step(
        self, inputs: Any, targets: Any = None, *, reference_batch: Any = None, **extra: Any
    ) -> StepResult:
        """Run a step as in `Filtered`, up to the optimizer's step."""
        self.kept = False
        result = super().step(inputs, targets, reference_batch=reference_batch, **extra)
        if not self.kept:
            note_skip(self._served[1])
        return result

    @override
    def _rows(
        self, params: Params, batch: Any, buffers: Tree | None, scale: Tensor | None
    ) -> tuple[ComputedStack, Tensor | None]:
        rows, factors = super()._rows(params, batch, buffers, scale)
        if not (self._uneven and self.ranks.size > 1):
            return rows, factors
        # Accumulated batches are joined with the factors of all of them, or of none.
        if factors is None:
            factors = torch.ones_like(rows.live, dtype=_tree.sum_dtype(rows.live))
        live = self.shared.get(LIVE)
        return rows, factors if live is None else torch.where(live == 0, 0.0, factors)

    @override
    def _filter(
        self,
        params: Params,
        of_batch: ComputedStack,
        rows: GradStack | ReducedRows,
        state: State,
        extra: Any,
    ) -> FilteredBatch:
        found = super()._filter(params, of_batch, rows, state, extra)
        if self.ranks.size > 1 and isinstance(rows, GradStack):
            found.out[ROWS] = rows.live.sum()
            if self._uneven:
                found.out[LIVE] = rows.live
        return found

    @override
    def _overflowed(self, out: Out, losses: Tensor) -> Tensor:
        own = super()._overflowed(self._of_rank(out, losses), losses)
        return self.ranks.total(own.to(losses.dtype)) > 0

    def _of_rank(self, out: Out, losses: Tensor) -> Out:
        """Return values with one number per row of all ranks as those of the rows of this one."""
        rows, ranks = len(losses), self.ranks
        place = slice(rows * ranks.rank, rows * (ranks.rank + 1))
        of_all = torch.Size((rows * ranks.size,))
        return {name: v[place] if v.shape == of_all else v for name, v in out.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the transforms' state as flat tensors; the host saves the rest.

        It has no accumulated rows, just as checkpoints of a host have no accumulated gradients. If
        parameters are sharded, all ranks call this, and each gets whole tensors.
        """
        return whole_states(state_dict(self._state))

    @override
    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: The state belongs to other transforms.
        """
        present = state_dict(self._state)
        self._state = load_state_dict(self._state, cut_states(states, present))
        self._discard_accumulated()

    def resume(self, saved: Mapping[str, Any] | None, source: str) -> None:
        """Load a state, or warn if a checkpoint has no state for these transforms."""
        if saved is not None:
            self.load_state_dict(saved)
        elif state_dict(self._state):
            warnings.warn(
                f"Expected the transforms' state in {source}, found none: they start afresh. "
                "Resume from a checkpoint of a run with filtered gradients.",
                stacklevel=2,
            )

    def _note(self) -> None:
        self.kept = True


class _StepRecorder:
    """The optimizer that `Filtered` sees; its step does nothing but record that a step is due."""

    def __init__(self, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
        self._optimizer, self.step = optimizer, step

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The present groups, because a host may add or load some."""
        return self._optimizer.param_groups


def _with_loss(model: nn.Module, loss: HostLoss) -> nn.Module:
    """Return a view of a model whose output is the loss that a host computes with it."""

    def forward(**inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, logged = loss(inputs)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Expected the loss of a microbatch alone, a scalar tensor, found "
                f"{type(value).__name__}. Return the loss, and give other numbers to self.log."
            )
        return value, logged

    return ModuleView(model, forward)


class _LossOfOutput(Owners):
    """The criterion of a model that returns its loss."""

    def __call__(self, output: tuple[Tensor, dict[str, Tensor]], batch: Any) -> Any:
        return output


class LossLog:
    """The values that a loss logs while it is computed.

    It is a separate object, because attributes of a module are restored after a pass.

    Args:
        caller: The owner of the loss, for errors.
    """

    def __init__(self, caller: str) -> None:
        self._caller = caller
        self._values: dict[str, Tensor] | None = None
        self.options: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @property
    def is_open(self) -> bool:
        """True if a loss is being computed."""
        return self._values is not None

    @contextmanager
    def opened(self) -> Iterator[dict[str, Tensor]]:
        """Collect in a dict the values that a loss logs inside the context."""
        values: dict[str, Tensor] = {}
        self._values = values
        try:
            yield values
        finally:
            self._values = None

    def add(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Store a number, and the options for logging its mean over the rows.

        Raises:
            TypeError: The value is not a number, such as a metric with a state.
            ValueError: The value has several numbers.
        """
        assert self._values is not None  # asked before
        if not isinstance(value, Tensor | float | int):
            raise TypeError(
                f"{self._caller}: expected a number or a tensor to log as {name!r} in the loss of "
                f"a microbatch, found {type(value).__name__}, which would be updated once for all "
                "rows. Log a function of the outputs, or log it outside of the loss."
            )
        number = torch.as_tensor(value).detach()
        if number.numel() != 1:
            raise ValueError(
                f"{self._caller}: expected one number per microbatch to log as {name!r}, found "
                f"shape {tuple(number.shape)}. Reduce it."
            )
        self._values[name] = number.reshape(())
        self.options[name] = (args, kwargs)


WEIGHTS = "gradfilter/weights"
"""The name under which the loss of a host finds the weights of its samples, and logs them."""


def log_weights(values: dict[str, Tensor], weights: Tensor | None) -> None:
    """Log, with the values of a row, whether it takes part in their mean.

    Args:
        values: What the loss of the row has logged.
        weights: The weights of its samples, or None.
    """
    if values and weights is not None:
        values[WEIGHTS] = (weights.detach().sum() > 0).to(torch.float32)


def mark_rows(result: StepResult) -> None:
    """Log, with the values of the loss, which rows take part in their mean, if that is known."""
    live = result.info.pop(LIVE, None)
    if live is not None and result.aux and WEIGHTS not in result.aux:
        result.aux[WEIGHTS] = live.to(torch.float32)


def logged(result: StepResult) -> dict[str, Tensor]:
    """Convert a step to numbers for a logger: ``keep``, and each metric's mean over rows, () float.

    It also has the values logged in the loss, unless they have the name of one of these. Their mean
    is over the rows that take part (with groups, the samples): see `log_weights`.
    """
    dtype = torch.promote_types(result.loss.dtype, torch.float32)
    aux = dict(result.aux or {})
    if (weights := aux.pop(WEIGHTS, None)) is not None:
        part, count = weights > 0, weights.to(dtype).sum()
        aux = {n: torch.where(part, v.to(dtype), 0.0).sum() / count for n, v in aux.items()}
    own = means({AUX: aux}, dtype)
    own = {name.removeprefix(f"{AUX}/"): value for name, value in own.items()}
    return own | means(result.info, dtype)
