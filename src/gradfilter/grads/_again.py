"""Stacks that can be cut, scaled and, where they know how they came about, computed again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._checks import check_per_row, check_shapes, scale_rows
from gradfilter.grads._stack import GradStack


@dataclass(frozen=True)
class Origin:
    """How to compute a stack again.

    Attributes:
        rows: How many there are.
        params: The parameters it was computed at.
        evaluate: ``(params, per_row, kept) -> stack``, ``kept`` the names of the parameters that
            are still those of the stack, which nobody may have written since.
    """

    rows: int
    params: Params = field(repr=False)
    evaluate: Callable[[Params, bool, Collection[str]], GradStack] = field(repr=False)


class AgainStack(GradStack):
    """What stacks that are computed from a batch share.

    Attributes:
        scale: (M,) factors, applied where the rows are used, or None.
        origin: How to compute the rows again; without it `at` and `at_rows` raise.
    """

    scale: Tensor | None
    origin: Origin | None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the rows are."""

    @abstractmethod
    def _scaled(self, scale: Tensor) -> Self: ...

    @abstractmethod
    def _columns(self, names: Collection[str]) -> Self: ...

    @abstractmethod
    def _first(self, count: int) -> Self: ...

    def _empty(self) -> Tensor | None:
        """Which rows are empty, as `GradStack.live` has it; None where none is. (M,) bool."""
        return None

    @property
    def live(self) -> Tensor:
        """Which rows take part. (M,) bool."""
        scale, empty = self.scale, self._empty()
        if scale is not None:
            return scale != 0 if empty is None else (scale != 0) & ~empty
        if empty is not None:
            return ~empty
        return torch.ones(len(self), dtype=torch.bool, device=self.device)

    def scaled(self, factors: Tensor) -> Self:
        """diag(c) J, applied where the rows are used."""
        check_per_row("factor", factors, len(self))
        # A copy, which stays as it is whatever happens to the factors.
        factors = _tree.at_least_float32(factors).clone()
        return self._scaled(scale_rows(factors, self.scale))

    def columns(self, names: Collection[str]) -> Self:
        """The same rows on some of the leaves."""
        if isinstance(names, str):
            raise TypeError(
                f"Expected names of leaves, found the string {names!r}. Use [{names!r}]."
            )
        unknown = set(names) - set(self.shapes)
        if unknown or not names:
            raise ValueError(
                f"Expected names among the leaves {sorted(self.shapes)}, found "
                f"{sorted(unknown) or 'none'}. Choose at least one existing leaf."
            )
        return self._columns(set(names))

    def first(self, count: int) -> Self:
        """The first ``count`` rows."""
        if not 1 <= count <= len(self):
            raise ValueError(f"Expected 1 <= count <= M = {len(self)}, found count={count}.")
        return self._first(count)

    def at(self, params: Params) -> GradStack:
        """The same rows at other parameters."""
        origin = self._origin("at", params)
        check_shapes({name: p.shape for name, p in origin.params.items()}, params, "at")
        kept = origin.params.keys() - params.keys()
        return self.like(origin.evaluate({**origin.params, **params}, False, kept))

    def at_rows(self, params: Tree) -> GradStack:
        """The same rows, row m at its own parameters."""
        origin = self._origin("at_rows", params)
        shapes = {name: p.shape for name, p in origin.params.items()}
        check_shapes(shapes, params, "at_rows", rows=len(self))
        # A stack cut short by `first` is computed whole, so that its random numbers stay the same.
        whole = {name: p.expand(origin.rows, *p.shape) for name, p in origin.params.items()}
        given = {name: torch.cat([leaf, whole[name][len(self) :]]) for name, leaf in params.items()}
        kept = origin.params.keys() - params.keys()
        return self.like(origin.evaluate({**whole, **given}, True, kept))

    def _origin(self, question: str, params: Mapping[str, Tensor]) -> Origin:
        if self.origin is None:
            instead = ", or pass grad_fn=... to the update" if question == "at" else ""
            raise ValueError(
                f"These rows are a plain stack of tensors and cannot answer `{question}`: nothing "
                "says how to compute them at other parameters. Take them from microbatch_grads or "
                f"per_sample_grads{instead}."
            )
        unknown = set(params) - set(self.origin.params)
        if unknown:
            raise ValueError(
                f"Expected parameters among {sorted(self.origin.params)}, found unknown "
                f"{sorted(unknown)}."
            )
        return self.origin

    def like(self, stack: GradStack) -> GradStack:
        """The given stack, cut and scaled as this one was."""
        if len(self) < len(stack):
            stack = stack.first(len(self))
        if set(self.shapes) < set(stack.shapes):
            stack = stack.columns(list(self.shapes))
        return stack if self.scale is None else stack.scaled(self.scale)
