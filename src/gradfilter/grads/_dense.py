"""The stack that holds its rows, and how it computes them again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._stack import GradStack


@dataclass(frozen=True)
class Origin:
    """How to compute a stack of ``rows`` rows again, and the parameters it was computed at."""

    rows: int
    params: Params
    evaluate: Callable[[Params, bool], GradStack]


@dataclass(frozen=True, eq=False)
class DenseStack(GradStack):
    """A stack that holds its rows.

    Args:
        rows: One tensor per leaf with leading axis M, for example the output of
            ``torch.func.vmap(torch.func.grad(f), ...)``.
        losses: (M,), if known.
        buffers: Buffers after the M microbatches.
        aux: A tree of tensors with leading axis M.
        scale: (M,) factors, applied where the rows are used.
        origin: How to compute the rows again; without it `at` and `at_rows` raise.

    Raises:
        TypeError: ``rows`` is not a dict of tensors.
        ValueError: The leaves disagree on M, or there are none.

    Example:
        >>> import torch, gradfilter as gf
        >>> rows = gf.DenseStack({"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
        >>> rows.gram()
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
        >>> rows.combine(torch.tensor([0.5, 0.5]))
        {'w': tensor([1.5000, 2.5000])}
    """

    rows: Tree
    losses: Tensor | None = None
    buffers: Tree = field(default_factory=dict)
    aux: Any = None
    scale: Tensor | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check that the leaves are tensors with one leading axis M."""
        if not isinstance(self.rows, dict) or not all(
            isinstance(leaf, Tensor) for leaf in self.rows.values()
        ):
            raise TypeError(
                "Expected rows as dict[str, Tensor] with leading axis M on every leaf, found "
                f"{type(self.rows).__name__}. Flatten nested trees to dotted names."
            )
        sizes = {name: leaf.shape[0] if leaf.ndim else 0 for name, leaf in self.rows.items()}
        if not sizes or len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(
                f"Expected one leading axis M >= 1 on every leaf, found sizes {sizes}. Stack the "
                "M gradients of each parameter along dim 0."
            )

    def __len__(self) -> int:
        """The number of rows, M."""
        return int(next(iter(self.rows.values())).shape[0])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every leaf of a row, by name."""
        return {name: leaf.shape[1:] for name, leaf in self.rows.items()}

    @property
    def live(self) -> Tensor:
        """Which rows take part. (M,) bool."""
        if self.scale is None:
            return torch.ones(len(self), dtype=torch.bool, device=_tree.device_of(self.rows))
        return self.scale != 0

    def _matrices(self) -> list[Tensor]:
        """The leaves as matrices (M, p)."""
        return [leaf.reshape(len(self), -1) for leaf in self.rows.values()]

    def _total(self, per_leaf: list[Tensor]) -> Tensor:
        """The sum over leaves."""
        return torch.stack(per_leaf).sum(0)

    def gram(self) -> Tensor:
        """K = J Jᵀ, leaf by leaf. (M, M)."""
        gram = self._total([_tree.inner(g, g) for g in self._matrices()])
        if self.scale is None:
            return gram
        return _scale(_scale(gram, self.scale).T, self.scale).T

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v. (M,)."""
        _same_names(self.rows, tree, "dot")
        parts = [
            _tree.inner(leaf.reshape(len(self), -1), tree[name].reshape(1, -1))[:, 0]
            for name, leaf in self.rows.items()
        ]
        return _scale(self._total(parts), self.scale)

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows. (M,)."""
        norms = self._total([_tree.row_sq_norms(g) for g in self._matrices()])
        return norms if self.scale is None else _scale(_scale(norms, self.scale), self.scale)

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J, with rows of weight 0 masked."""
        if weights.shape != (len(self),):
            raise ValueError(
                f"Expected weights of shape ({len(self)},), found {tuple(weights.shape)}. Give "
                "one weight per row."
            )
        weights = _scale(weights, self.scale)

        def weigh(leaf: Tensor) -> Tensor:
            total = _tree.weighted_sum(weights, leaf.reshape(len(self), -1))
            return total.to(leaf.dtype).reshape(leaf.shape[1:])

        return {name: weigh(leaf) for name, leaf in self.rows.items()}

    def stacked(self) -> Tree:
        """The rows, leaf by leaf."""
        return {name: _scale(leaf, self.scale) for name, leaf in self.rows.items()}

    def scaled(self, factors: Tensor) -> DenseStack:
        """diag(c) J, applied where the rows are used."""
        if factors.shape != (len(self),):
            raise ValueError(
                f"Expected factors of shape ({len(self)},), found {tuple(factors.shape)}. Give "
                "one factor per row."
            )
        return replace(self, scale=_scale(factors, self.scale))

    def columns(self, names: Collection[str]) -> DenseStack:
        """The same rows on some of the leaves."""
        unknown = set(names) - set(self.rows)
        if unknown or not names:
            raise ValueError(
                f"Expected names among the leaves {sorted(self.rows)}, found "
                f"{sorted(unknown) or 'none'}. Choose at least one existing leaf."
            )
        return replace(self, rows={n: leaf for n, leaf in self.rows.items() if n in set(names)})

    def first(self, count: int) -> DenseStack:
        """The first ``count`` rows."""
        if not 1 <= count <= len(self):
            raise ValueError(f"Expected 1 <= count <= M = {len(self)}, found count={count}.")
        per_row = (self.rows, self.losses, self.aux, self.scale)
        rows, losses, aux, scale = _tree.tree_map(
            lambda leaf: leaf if leaf is None else leaf[:count], per_row
        )
        return replace(self, rows=rows, losses=losses, aux=aux, scale=scale)

    def at(self, params: Params) -> GradStack:
        """The same rows at other parameters."""
        origin = self._origin("at", params)
        return self.like(origin.evaluate({**origin.params, **params}, False))

    def at_rows(self, params: Tree) -> GradStack:
        """The same rows, row m at its own parameters."""
        origin = self._origin("at_rows", params)
        for name, leaf in params.items():
            expected = (len(self), *origin.params[name].shape)
            if tuple(leaf.shape) != expected:
                raise ValueError(
                    f"Expected {name!r} of shape {expected}, one set of parameters per row, found "
                    f"{tuple(leaf.shape)}."
                )
        # A stack cut short by `first` is computed whole, so that its random numbers stay the same.
        whole = {name: p.expand(origin.rows, *p.shape) for name, p in origin.params.items()}
        given = {name: torch.cat([leaf, whole[name][len(self) :]]) for name, leaf in params.items()}
        return self.like(origin.evaluate({**whole, **given}, True))

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
        if set(self.rows) < set(stack.shapes):
            stack = stack.columns(list(self.rows))
        return stack if self.scale is None else stack.scaled(self.scale)


def _scale(values: Tensor, factors: Tensor | None) -> Tensor:
    """``factors`` (M,) times ``values`` (M, ...), exactly 0 where the factor is 0."""
    if factors is None:
        return values
    factors = factors.reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(factors == 0, 0.0, factors.to(values.dtype) * values).to(values.dtype)


def _same_names(rows: Mapping[str, Tensor], tree: Mapping[str, Tensor], question: str) -> None:
    if set(rows) != set(tree):
        raise ValueError(
            f"Expected the leaves {sorted(rows)} in `{question}`, missing "
            f"{sorted(set(rows) - set(tree))}, extra {sorted(set(tree) - set(rows))}."
        )


def as_stack(grads: GradStack | Tree) -> GradStack:
    """A GradStack as it is; a plain stacked dict as a `DenseStack`."""
    return grads if isinstance(grads, GradStack) else DenseStack(grads)
