"""The GradStack protocol, and the stacks that implement it: computed and dense.

A stack holds M gradients as the rows of a matrix J (M, P), which need not exist in memory. Every
question that a transform asks is one of a few products with J. `BaseStack` adds cutting,
scaling and evaluation at other parameters; `DenseStack` holds its rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._readable import readable
from gradfilter._shards import is_sharded, local
from gradfilter._types import Params, Tree

# --- Checks of per-row numbers and shapes, shared by all stacks ---


def check_per_row(what: str, values: Tensor, count: int) -> None:
    """Refuse anything but one real number per row."""
    if not isinstance(values, Tensor) or values.is_complex():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(
            f"Expected {what}s as a tensor of {count} real numbers, found {found}. Use "
            f"torch.tensor([...]) with one {what} per row."
        )
    if values.shape != (count,):
        raise ValueError(
            f"Expected {what}s of shape ({count},), found {tuple(values.shape)}. Give one {what} "
            "per row."
        )


def check_same_leaves(
    own: Mapping[str, torch.Size], given: Mapping[str, Tensor], question: str
) -> None:
    """Refuse a tree whose leaves, or their shapes, are not those of the rows."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"Expected a dict[str, Tensor] in `{question}`, found {type(given).__name__}. Name "
            "every leaf as the parameters are named."
        )
    if set(own) != set(given):
        raise ValueError(
            f"Expected the leaves {sorted(own)} in `{question}`, missing "
            f"{sorted(set(own) - set(given))}, extra {sorted(set(given) - set(own))}."
        )
    check_shapes(own, given, question)


def check_shapes(
    own: Mapping[str, torch.Size], given: Mapping[str, Tensor], question: str, rows: int = 0
) -> None:
    """Refuse leaves of other shapes: as many numbers in another order would be taken for them.

    Args:
        own: The shape of every leaf of a row.
        given: Some of the leaves.
        question: Who asks.
        rows: The leading axis that all leaves have in addition; 0 for none.
    """
    for name, leaf in given.items():
        found = leaf.shape if isinstance(leaf, Tensor) else type(leaf).__name__
        expected = (rows, *own[name]) if rows else tuple(own[name])
        if found != expected:
            each = ", one set of parameters per row," if rows else ""
            raise ValueError(
                f"Expected {name!r} of shape {expected}{each} in `{question}`, found "
                f"{tuple(found) if isinstance(leaf, Tensor) else found}. Give tensors of the "
                "parameters' shapes, not transposed or flattened."
            )


def scale_rows(values: Tensor, factors: Tensor | None) -> Tensor:
    """``factors`` (M,) times ``values`` (M, ...), exactly 0 where the factor is 0."""
    if factors is None:
        return values
    factors = factors.reshape(-1, *[1] * (values.ndim - 1))
    # In half precision small factors would round to 0 before they meet large values.
    wide = _tree.at_least_float32(values)
    return torch.where(factors == 0, 0.0, factors.to(wide.dtype) * wide).to(values.dtype)


def mean_of(losses: Tensor, live: Tensor) -> Tensor:
    """The mean of the losses of the rows that take part; NaN where none does. ()."""
    wide = _tree.at_least_float32(losses)
    return (torch.where(live, wide, 0.0).sum() / live.sum()).to(losses.dtype)


def first_rows(per_row: Any, count: int) -> Any:
    """The first rows of every tensor of a tree; None stays None."""
    return _tree.tree_map(lambda leaf: leaf if leaf is None else leaf[:count], per_row)


# --- Immutable answers. ---
#
# Losses, factors, Grams and norms are few numbers: the caller gets a copy. A copy of the rows
# would take as much memory again, so they are given as they are, and writes are detected by
# torch's version counters.


T = TypeVar("T")


def copied(*names: str) -> Callable[[type[T]], type[T]]:
    """Let whoever reads one of these attributes of a class have a copy of the tensor in it."""

    def decorated(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, name, _Copied(name))
        return cls

    return decorated


class _Copied:
    """An attribute of few numbers, of which everybody gets a copy."""

    def __init__(self, name: str) -> None:
        # Another name than that of the attribute: torch 2.11's compiler mixes up the two.
        self._place = f"_own_{name}"

    def __get__(self, stack: Any, owner: type | None = None) -> Any:
        """A copy, or None."""
        if stack is None:
            return self
        held = getattr(stack, self._place)
        return held if held is None else held.clone()

    def __set__(self, stack: Any, value: Tensor | None) -> None:
        """Take a copy, which stays as it is whatever the caller does."""
        object.__setattr__(stack, self._place, value if value is None else value.clone())


def versions(tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """How often each tensor was written to so far; None where nobody counts."""
    if torch.compiler.is_compiling():
        return None
    return {
        name: _writes(t) for name, t in tensors.items() if not (t.is_inference() or _wrapped(t))
    }


def written(tensors: Mapping[str, Tensor], before: dict[str, int] | None) -> list[str]:
    """The names of those that were written to since `versions`."""
    if before is None or torch.compiler.is_compiling():
        return []
    return [name for name, version in before.items() if _writes(tensors[name]) != version]


def _writes(tensor: Tensor) -> int:
    """How often a tensor was written to; of a sharded one by its own name or as the shard."""
    return tensor._version + (local(tensor)._version if is_sharded(tensor) else 0)


def _wrapped(tensor: Tensor) -> bool:
    """Whether a transform of ``torch.func`` wraps it, and counts for itself."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


# --- The protocol ---


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
        return None if losses is None else mean_of(losses, self.live)

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

    def explain(self) -> str:
        """Return how the rows are computed and held, as text for a person."""
        return repr(self)

    @abstractmethod
    def release(self) -> None:
        """Let go of whatever can be computed again; the stack stays answerable."""


# --- Stacks that can be cut, scaled and computed again ---


@dataclass(frozen=True)
class StackOrigin:
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


class BaseStack(GradStack):
    """What stacks that are computed from a batch share.

    Attributes:
        scale: (M,) factors, applied where the rows are used, or None.
        origin: How to compute the rows again; without it `at` and `at_rows` raise.
    """

    scale: Tensor | None
    origin: StackOrigin | None

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

    def _origin(self, question: str, params: Mapping[str, Tensor]) -> StackOrigin:
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


class ComputedStack(BaseStack):
    """The rows of `microbatch_grads` and `per_sample_grads`, by whatever plan.

    Attributes:
        losses: (M,).
        origin: How to compute the rows again, for `at` and `at_rows`.
    """

    # Stacks are immutable: nobody may set what a subclass narrows.
    losses: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    origin: StackOrigin  # pyright: ignore[reportIncompatibleVariableOverride]

    def mean_loss(self) -> Tensor:
        """The mean of the losses of the rows that take part. ()."""
        return mean_of(self.losses, self.live)


# --- The stack that holds its rows ---


@copied("losses", "scale", "empty")
@dataclass(frozen=True, eq=False, repr=False)
class DenseStack(BaseStack):
    """A stack that holds its rows.

    Args:
        rows: One tensor per leaf with leading axis M, for example the output of
            ``torch.func.vmap(torch.func.grad(f), ...)``.
        losses: (M,), if known.
        buffers: Buffers after the M microbatches.
        aux: A tree of tensors with leading axis M.
        scale: (M,) factors, applied where the rows are used.
        origin: How to compute the rows again; without it `at` and `at_rows` raise.
        empty: (M,) bool, if known; else found from losses and rows.

    Raises:
        TypeError: ``rows`` is not a dict of tensors.
        ValueError: The leaves disagree on M, or there are none.
        RuntimeError: At a question, some of the rows were written to in the meantime.

    Examples:
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
    origin: StackOrigin | None = None
    empty: Tensor | None = None

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
        object.__setattr__(self, "_versions", versions(self.rows))

    def __len__(self) -> int:
        """The number of rows, M."""
        return int(next(iter(self.rows.values())).shape[0])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every leaf of a row, by name."""
        return {name: leaf.shape[1:] for name, leaf in self.rows.items()}

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return _tree.device_of(self.rows)

    def release(self) -> None:
        """Nothing to let go of: the rows are what the stack is."""

    def explain(self) -> str:
        """Return how many rows are held, and in how many bytes."""
        size = sum(leaf.nbytes for leaf in self.rows.values())
        return f"{self!r}: all rows are held, {size / 1e6:.1f} MB"

    def _check_unwritten(self) -> None:
        """Refuse to answer from rows that are no longer what they were."""
        names = written(self.rows, self.__dict__["_versions"])
        if names:
            raise RuntimeError(
                f"Expected rows as they were when the stack was made, found {names[0]!r} written "
                "in place since. Write to a copy: stack.stacked() gives the rows themselves, "
                "{name: leaf.clone() for name, leaf in stack.stacked().items()} copies of them."
            )

    def _matrices(self) -> list[Tensor]:
        """The leaves as matrices (M, p)."""
        self._check_unwritten()
        return [leaf.reshape(len(self), -1) for leaf in self.rows.values()]

    def _empty(self) -> Tensor | None:
        """Rows with a NaN loss and gradient zero. (M,) bool."""
        known, losses = self.empty, self.losses
        if known is not None or losses is None:
            return known
        lost: Tensor = losses.isnan()
        if readable(lost) and not any(lost.tolist()):
            return None
        unscaled = self if self.scale is None else replace(self, scale=None)
        return lost & (unscaled.sq_norms() == 0)

    def _total(self, per_leaf: list[Tensor]) -> Tensor:
        """The sum over leaves."""
        return torch.stack(per_leaf).sum(0)

    def gram(self) -> Tensor:
        """K = J Jᵀ, leaf by leaf. (M, M)."""
        gram, scale = self._total([_products.inner(g, g) for g in self._matrices()]), self.scale
        return gram if scale is None else scale_rows(scale_rows(gram, scale).T, scale).T

    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """J v. (M,)."""
        check_same_leaves(self.shapes, tree, "dot")
        parts = [
            _products.inner(matrix, tree[name].reshape(1, -1))[:, 0]
            for name, matrix in zip(self.rows, self._matrices(), strict=True)
        ]
        return scale_rows(self._total(parts), self.scale)

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows. (M,)."""
        norms = self._total([_products.row_sq_norms(g) for g in self._matrices()])
        scale = self.scale
        return norms if scale is None else scale_rows(scale_rows(norms, scale), scale)

    def combine(self, weights: Tensor) -> Tree:
        """Wᵀ J, with rows of weight 0 masked."""
        check_per_row("weight", weights, len(self))
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)

        def weigh(leaf: Tensor, matrix: Tensor) -> Tensor:
            total = _products.weighted_sum(weights, matrix)
            return total.to(leaf.dtype).reshape(leaf.shape[1:])

        pairs = zip(self.rows.items(), self._matrices(), strict=True)
        return {name: weigh(leaf, matrix) for (name, leaf), matrix in pairs}

    def stacked(self) -> Tree:
        """The rows, leaf by leaf: the tensors held, or scaled copies of them."""
        self._check_unwritten()
        scale = self.scale
        return {name: scale_rows(leaf, scale) for name, leaf in self.rows.items()}

    def _scaled(self, scale: Tensor) -> DenseStack:
        self._check_unwritten()
        return replace(self, scale=scale)

    def _columns(self, names: Collection[str]) -> DenseStack:
        self._check_unwritten()
        rows = {n: leaf for n, leaf in self.rows.items() if n in names}
        # A row is empty as a whole.
        return replace(self, rows=rows, empty=self._empty())

    def _first(self, count: int) -> DenseStack:
        self._check_unwritten()
        per_row = (self.rows, self.losses, self.aux, self.scale, self.empty)
        rows, losses, aux, scale, empty = first_rows(per_row, count)
        return replace(self, rows=rows, losses=losses, aux=aux, scale=scale, empty=empty)


@dataclass(frozen=True, eq=False, repr=False)
class ComputedDenseStack(DenseStack, ComputedStack):
    """A stack of rows that `microbatch_grads` has computed and that are held.

    Args:
        plan: The plan that computed the rows.
        fallback: Why another plan was refused; empty where none was.

    The other arguments are those of `DenseStack`; ``losses`` and ``origin`` are required.
    """

    losses: Tensor = field(kw_only=True)
    origin: StackOrigin = field(kw_only=True)
    plan: str = "loop"
    fallback: str = ""

    def explain(self) -> str:
        """Return the plan, the bytes that are held, and why the loop was taken, if it was."""
        lines = [f'plan "{self.plan}"', super().explain()]
        return "\n".join([*lines, *explain_fallback(self.fallback)])


def explain_fallback(reason: str) -> list[str]:
    """Return the line that says why the loop was taken; none without a reason."""
    return [f'fell back to plan "loop": {reason}'] if reason else []


def as_stack(grads: GradStack | Tree) -> GradStack:
    """A GradStack as it is; a plain stacked dict as a `DenseStack`."""
    return grads if isinstance(grads, GradStack) else DenseStack(grads)
