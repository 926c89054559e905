"""The GradStack: M gradients as the rows of a matrix J (M, P) that need not be held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree

GRAM_UP_TO = 32
"""Rows up to which the Gram of rows that are held costs less than three passes over them."""


class GradStack(ABC):
    """M microbatch (or per-sample) gradients, as a linear operator J of M rows.

    Nearly everything a filter asks of its rows is one of four questions, ``gram()`` = J Jᵀ,
    ``combine(w)`` = wᵀ J, ``dot(v)`` = J v and ``sq_norms()`` = diag(J Jᵀ), and a stack that
    answers these does not have to store J. Stacks are immutable; `scaled`, `columns`, `first`,
    `at` and `at_rows` give new ones.

    An answer is whoever asked for it to write to: the next answer is the same. `stacked` alone may
    give the tensors the stack holds, since a copy of M gradients takes as much memory again. If
    they are written to, a stack that can compute them again does, and a `DenseStack` refuses all
    further questions.

    A row is **empty** where its loss is NaN though its gradient is exactly zero. So torch's losses
    are where all labels are ignored (a mean over nothing is 0/0): there is nothing to learn from,
    and nothing has gone wrong. It takes no part, like a row with the factor 0. A row that diverged
    has NaN or Inf in its gradient. On a device that would have to be waited for, plan "fused"
    takes for empty the rows with a NaN loss all of whose class labels (in
    `torch.nn.functional.cross_entropy` or ``nll_loss``) are ignored.

    Grams, norms, dots and weights are float64 (float32 on devices without it), whatever the dtype
    of the gradients; trees come back in the dtype of the parameters.

    Attributes:
        losses: (M,), or None when the rows came without losses.
        buffers: The buffers after all M microbatches, in order. No answer depends on them.
        aux: What the loss returned beside its value, stacked along a leading axis M, or None. No
            answer depends on it.
    """

    losses: Tensor | None
    buffers: Tree
    aux: Any

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows, M."""

    def __repr__(self) -> str:
        """How many rows and leaves: the numbers may still be on their way."""
        rows, leaves = len(self), len(self.shapes)
        return (
            f"{type(self).__name__}({rows} row{'s' * (rows != 1)}, "
            f"{leaves} {'leaf' if leaves == 1 else 'leaves'})"
        )

    @property
    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every leaf of a row, by name."""

    @property
    @abstractmethod
    def live(self) -> Tensor:
        """Which rows take part: not those to which `scaled` gave the factor 0, nor empty ones.

        (M,) bool.
        """

    def mean_loss(self) -> Tensor | None:
        """The mean of the losses of the rows that take part, or None without losses. ().

        NaN where no row takes part.
        """
        losses = self.losses
        if losses is None:
            return None
        live, wide = self.live, _tree.at_least_float32(losses)
        return (torch.where(live, wide, 0.0).sum() / live.sum()).to(losses.dtype)

    @abstractmethod
    def gram(self) -> Tensor:
        """K = J Jᵀ. (M, M)."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J for ``weights`` (M,); a row of weight 0 is masked, for 0 · NaN is NaN.

        The leaves are new: nobody else holds their memory, and no two of them share any.
        """

    @abstractmethod
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v for a tree v. (M,)."""

    @abstractmethod
    def sq_norms(self) -> Tensor:
        """Squared norms of the rows, diag(J Jᵀ). (M,)."""

    @abstractmethod
    def stacked(self) -> Tree:
        """J itself, leaf by leaf with a leading axis M."""

    @abstractmethod
    def scaled(self, factors: Tensor) -> GradStack:
        """diag(c) J for ``factors`` c (M,); a factor 0 removes the row even where it is NaN."""

    @abstractmethod
    def columns(self, names: Collection[str]) -> GradStack:
        """The same rows on some of the leaves."""

    @abstractmethod
    def first(self, count: int) -> GradStack:
        """The first ``count`` rows."""

    @abstractmethod
    def like(self, stack: GradStack) -> GradStack:
        """What `scaled`, `columns` and `first` made of this stack, made of another one.

        The other one holds the same microbatches, whole, with gradients taken elsewhere.
        """

    @abstractmethod
    def at(self, params: Params) -> GradStack:
        """The same batch, random numbers and incoming buffers at other parameters.

        Leaves that ``params`` leaves out stay as they were.
        """

    @abstractmethod
    def at_rows(self, params: Tree) -> GradStack:
        """Like `at`, but row m at its own parameters: leaves of shape (M, *shape)."""

    def gram_is_cheap(self) -> bool:
        """Whether the Gram costs less than the norms, a `combine` and a `dot` together."""
        return len(self) <= GRAM_UP_TO

    @abstractmethod
    def release(self) -> None:
        """Let go of whatever can be computed again; the stack stays answerable."""
