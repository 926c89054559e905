"""Run activation checkpoints inside a pass over all rows.

`torch.utils.checkpoint` (non-reentrant) packs the tensors that autograd saves into holders without
contents, and in the backward pass calls the function again to fill them. Autograd saves the tensors
of all rows, outside of vmap, so the holders are right as they are. Two things are not:

- The function must run again under the level and the overrides of the pass. Its frame, which
  torch makes for every call, gets a ``recompute_fn`` that enters them.
- A checkpoint inside another one saves its arguments, rows of a level of vmap, by the hooks of the
  outer one. Autograd cannot save those through hooks, so the tensors of all rows are saved instead.

Neither changes torch: the hooks on top of autograd's stack, and the frame that they refer to,
belong to this one call of a checkpoint. Other hooks on saved tensors would get the tensors of all
rows where the loss expects those of one, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd

from gradfilter.grads.fused._lift import Level, unwrapped

OTHER_HOOKS = "hooks on saved tensors inside the loss cannot run over all rows at once"

INSIDE = (
    "activation checkpointing inside a module that runs row by row, or inside a transform of the "
    "loss's own, cannot run over all rows at once"
)

TORCHS = "torch.utils.checkpoint"
SAVER = f"{TORCHS}._NoopSaveInputs"

Hooks = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""``pack(tensor) -> saved`` and ``unpack(saved) -> tensor``."""

Again = Callable[[], AbstractContextManager[None]]
"""Returns the context in which a function runs again."""


# Asked before every operation: a partial of a function of C is no call of Python.
top_hooks: Callable[[], Hooks | None] = partial(_autograd._top_saved_tensors_default_hooks, False)
"""Returns the hooks through which autograd saves a tensor now."""


def saves_arguments(args: tuple[Any, ...]) -> bool:
    """Return whether a function holds the arguments of a checkpoint (torch 2.11), as vmap sees it.

    vmap has no rule for it; it computes nothing, and may save rows.
    """
    first = args[0] if args else None
    return isinstance(first, type) and f"{first.__module__}.{first.__name__}" == SAVER


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one pass over all rows.

    Attributes:
        level: The level of the pass.
        found: True if the loss uses a checkpoint.
    """

    level: Level
    found: bool = False

    @property
    def inside(self) -> bool:
        """True inside of a checkpoint, where tensors should not be held."""
        return top_hooks() is not None

    def adopt(self, again: Again) -> None:
        """Take over the checkpoint that the loss has entered, if there is a new one.

        To be called before every function of the loss: the first one inside of a checkpoint is
        early enough, because nothing runs again before the backward pass.

        Args:
            again: Returns the context in which the checkpointed function runs again.

        Raises:
            RuntimeError: The hooks on saved tensors are others, or were set where no row is known.
        """
        hooks = top_hooks()
        if hooks is None or isinstance(hooks[0], _Pack):
            return
        if getattr(hooks[0], "__module__", None) != TORCHS:
            raise RuntimeError(OTHER_HOOKS)
        if not self.level.is_innermost():
            raise RuntimeError(INSIDE)
        # torch removes the topmost hooks at the end of the checkpoint, whichever they are.
        stack: Any = _autograd
        stack._pop_saved_tensors_default_hooks()
        try:
            frame = _closed_over(hooks[0], "frame")
            if frame is not None:  # else a function that runs again
                self.found = True
                # As torch, do not compare the arguments that an outer checkpoint computes again.
                versions = _versions(_arguments(frame)) if top_hooks() is None else None
                frame.recompute_fn = _Recompute(frame.recompute_fn, again, versions)
        finally:
            stack._push_saved_tensors_default_hooks(
                _Pack(hooks[0], self.level), _Unpack(hooks[1], self.level)
            )


def leave_checkpoints(error: BaseException) -> None:
    """Remove the hooks of the checkpoints that an error has left.

    torch 2.11 leaves this to the garbage collector, which cannot do it while the error is held.
    """
    open_ones: list[Generator[Any, Any, Any]] = []
    link: BaseException | None = error
    while link is not None:  # from the last error, which left fewer checkpoints, to the first one
        step = link.__traceback__
        while step is not None:
            frame = step.tb_frame
            run = frame.f_locals.get("gen") if frame.f_globals.get("__name__") == TORCHS else None
            if isinstance(run, GeneratorType) and not any(run is other for other in open_ones):
                open_ones.append(run)
            step = step.tb_next
        link = link.__context__
    for run in reversed(open_ones):
        run.close()


def _closed_over(function: Any, name: str) -> Any:
    """Return a variable that a function refers to, or None."""
    names = function.__code__.co_freevars
    return function.__closure__[names.index(name)].cell_contents if name in names else None


def _arguments(frame: Any) -> list[Any]:
    """Return the arguments of a checkpointed function, which torch has saved."""
    if hasattr(frame, "get_inputs"):
        return list(frame.get_inputs())
    saver = frame.input_saver.grad_fn  # torch 2.11; the first one is torch's own
    return list(saver.saved_tensors[1:])


def _versions(args: Iterable[Any]) -> list[int]:
    """Return how often each tensor was written in place; vmap does not count it for a row."""
    return [unwrapped(arg)._version for arg in args if isinstance(arg, Tensor)]


@dataclass(frozen=True, eq=False)
class _Recompute:
    """Calls a checkpointed function again, under the level and the overrides.

    Attributes:
        recompute: The function.
        again: Returns the context with the level and the overrides.
        versions: The versions of the tensors among the arguments when the function ran first; None
            if they are not compared.
    """

    recompute: Callable[..., Any]
    again: Again
    versions: list[int] | None

    def __call__(self, *args: Any) -> None:
        if self.versions is not None and _versions(args) != self.versions:
            raise RuntimeError(
                "an argument of a checkpointed function was written in place after the function "
                "had begun, so that it cannot run again. Let it work on a copy (x = x.clone())"
            )
        with self.again():
            self.recompute(*args)


@dataclass(frozen=True)
class _SavedRows:
    """A row of the level of the pass, saved as the tensor of all rows.

    Attributes:
        saved: What the checkpoint saved of the tensor of all rows.
        requires_grad: True if the tensor requires gradients.
    """

    saved: Any
    requires_grad: bool


@dataclass(frozen=True, eq=False)
class _Pack:
    """Saves a tensor as the checkpoint does.

    Attributes:
        pack: The checkpoint's own function.
        level: The level of the pass.
    """

    pack: Callable[[Any], Any]
    level: Level
    _checkpoint_internal = True  # torch then asks for the hooks of the user, which are refused
    _user_hooks = None

    def __call__(self, tensor: Tensor) -> Any:
        if not self.level.batched(tensor):
            return self.pack(tensor)
        left = nullcontext() if self.level.is_left() else self.level.on_all_rows()
        with left, torch._C.DisableTorchFunction():
            rows = self.level.lower(tensor)
            return _SavedRows(self.pack(rows), rows.requires_grad)


@dataclass(frozen=True, eq=False)
class _Unpack:
    """Returns a saved tensor as the checkpoint does, and as a row if it was one."""

    unpack: Callable[[Any], Any]
    level: Level

    def __call__(self, saved: Any) -> Any:
        if not isinstance(saved, _SavedRows):
            return self.unpack(saved)
        rows = self.unpack(saved.saved).detach().requires_grad_(saved.requires_grad)
        return self.level.wrap(rows)
