"""The GradStack protocol, and the stacks that implement it: computed and dense.

A stack holds M gradients as the rows of a matrix J (M, P), which need not be in memory. A
transform asks only for a few kinds of products with J. `BaseStack` adds cutting,
scaling and evaluation at other parameters; `DenseStack` holds its rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from typing_extensions import override

from gradfilter import _products, _tree
from gradfilter._readable import followed, readable
from gradfilter._shards import is_sharded, local
from gradfilter._types import Params, Tree

# --- Checks of per-row numbers and shapes, shared by all stacks ---


def check_per_row(what: str, values: Tensor, count: int) -> None:
    """Refuse values that are not one real number per row."""
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
    """Refuse a tree whose leaves or shapes differ from those of the rows."""
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
    """Refuse leaves of other shapes; values in another order could pass unnoticed.

    Args:
        own: The shape of every leaf of a row.
        given: Some of the leaves.
        question: The name of the calling method, for the error.
        rows: The size of the leading axis that all leaves have in addition; 0 for none.
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
    """Multiply ``values`` (M, ...) by ``factors`` (M,), exactly 0 where the factor is 0."""
    if factors is None:
        return values
    factors = factors.reshape(-1, *[1] * (values.ndim - 1))
    # In half precision small factors would round to 0 before the product.
    wide = _tree.at_least_float32(values)
    return torch.where(factors == 0, 0.0, factors.to(wide.dtype) * wide).to(values.dtype)


PIECE = 2**18
"""The numbers of one piece of columns: about twelve of this size stay in the cache of a core."""


def reduce_pieces(
    function: Callable[[Tensor], Tensor], rows: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Apply a function (M, n) -> (n,) to scaled rows (M, *shape), some columns at a time."""
    shape = rows.shape[1:]
    matrix = rows.reshape(len(rows), shape.numel())
    # A compiler fuses the passes over a leaf, and would unroll a loop over its pieces.
    width = max(1, matrix.shape[1] if followed() else PIECE // len(rows))
    pieces = [function(scale_rows(piece, scale)) for piece in torch.split(matrix, width, 1)]
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return flat.to(rows.dtype).reshape(shape)


def squares_of(weights: Tensor, rows: Tensor) -> Tensor:
    """Compute Σ_m w_m rows_m² for rows (M, *shape), in float32 or wider. (*shape)."""
    found = _products.weighted_squares(
        _tree.at_least_float32(weights), rows.reshape(rows.shape[0], -1)
    )
    return found.view(rows.shape[1:])


def mean_of(losses: Tensor, live: Tensor) -> Tensor:
    """Compute the mean of the losses of the rows that take part; NaN if there are none. ()."""
    wide = _tree.at_least_float32(losses)
    return (torch.where(live, wide, 0.0).sum() / live.sum()).to(losses.dtype)


def first_rows(per_row: Any, count: int) -> Any:
    """Return the first rows of every tensor of a tree; None stays None."""
    return _tree.tree_map(lambda leaf: leaf if leaf is None else leaf[:count], per_row)


# --- Immutable answers. ---
#
# Losses, factors, Grams and norms are small: the caller gets a copy. A copy of the rows would
# double the memory, so the rows themselves are returned, and writes are detected by torch's version
# counters.


T = TypeVar("T")


def copied(*names: str) -> Callable[[type[T]], type[T]]:
    """Make the named attributes of a class return copies of their tensors."""

    def decorated(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, name, _Copied(name))
        return cls

    return decorated


class _Copied:
    """A descriptor of a small tensor; every access returns a copy."""

    def __init__(self, name: str) -> None:
        # Use another name than the attribute's, because torch 2.11's compiler confuses them.
        self._place = f"_own_{name}"

    def __get__(self, stack: Any, owner: type | None = None) -> Any:
        """Return a copy, or None."""
        if stack is None:
            return self
        held = getattr(stack, self._place)
        return held if held is None else held.clone()

    def __set__(self, stack: Any, value: Tensor | None) -> None:
        """Store a copy, which the caller cannot change."""
        object.__setattr__(stack, self._place, value if value is None else value.clone())


def versions(tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Return the version of each tensor; None if torch does not count writes."""
    if torch.compiler.is_compiling():
        return None
    return {
        name: t._version if type(t) is Tensor else _writes(t)
        for name, t in tensors.items()
        # A transform of torch.func that wraps a tensor counts separately.
        if not (t.is_inference() or is_functorch_wrapped_tensor(t))
    }


def written(tensors: Mapping[str, Tensor], before: dict[str, int] | None) -> list[str]:
    """Return the names of the tensors that were written since `versions`."""
    if before is None or torch.compiler.is_compiling():
        return []
    found = []
    for name, version in before.items():
        tensor = tensors[name]
        if (tensor._version if type(tensor) is Tensor else _writes(tensor)) != version:
            found.append(name)
    return found


def _writes(tensor: Tensor) -> int:
    """Return the version of a tensor; for a sharded one, the sum with that of its shard."""
    return tensor._version + (local(tensor)._version if is_sharded(tensor) else 0)


# --- The protocol ---


GRAM_UP_TO = 32
"""The number of rows up to which the Gram of held rows costs less than three passes."""


class GradStack(ABC):
    """M microbatch (or per-sample) gradients, as a linear operator J of M rows.

    Transforms need almost only four questions: ``gram()`` = J Jᵀ, ``combine(w)`` = wᵀ J,
    ``dot(v)`` = J v and ``sq_norms()`` = diag(J Jᵀ). A stack can answer these without storing J.
    Stacks are immutable; `scaled`, `columns`, `first`, `at`, `at_rows` and `along` return new ones.

    The caller may write into an answer: the next answer is not affected. Only `stacked` may return
    the tensors that the stack holds, because a copy of M gradients would double the memory. If they
    are written into, a stack that can compute them again does so, and a `DenseStack` refuses all
    further questions.

    A row is **empty** if its loss is NaN but its gradient is exactly zero. torch's losses return
    this if all labels are ignored (a mean over nothing is 0/0): the row has nothing to learn from,
    and this is not a fault. It takes no part, like a row with the factor 0. A row that diverged has
    NaN or Inf in its gradient. On an accelerator, where reading the gradient would wait for the
    device, plan "fused" treats a row with a NaN loss as empty if all of its class labels (in
    `torch.nn.functional.cross_entropy` or ``nll_loss``) are ignored.

    Grams, norms, dots and weights are float64 (float32 on devices without it), whatever the dtype
    of the gradients; trees have the dtype of the parameters.

    Attributes:
        losses: The losses (M,), or None if they are not known.
        buffers: The buffers after all M microbatches, in order. No answer depends on them.
        aux: The second value that the loss returned, stacked along a leading axis M, or None. No
            answer depends on it.
    """

    losses: Tensor | None
    buffers: Tree
    aux: Any

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows, M."""

    @property
    def _rows(self) -> int:
        """M. In a trace it may be a symbol, which `len` would turn into a number."""
        return len(self)

    @override
    def __repr__(self) -> str:
        """Return the numbers of rows and leaves, without computing anything."""
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
        """A mask of the rows that take part: not empty, and without a factor 0 of `scaled`.

        (M,) bool.
        """

    def mean_loss(self) -> Tensor | None:
        """Return the mean of the losses of the rows that take part, or None without losses. ().

        The mean is NaN if no row takes part.
        """
        losses = self.losses
        return None if losses is None else mean_of(losses, self.live)

    @abstractmethod
    def gram(self) -> Tensor:
        """Compute K = J Jᵀ. (M, M)."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tree:
        """Compute wᵀ J for ``weights`` (M,); rows of weight 0 are masked, because 0 · NaN is NaN.

        The leaves are new tensors that share memory with nothing else.
        """

    @abstractmethod
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Compute J v for a tree v. (M,)."""

    @abstractmethod
    def sq_norms(self) -> Tensor:
        """Compute the squared norms of the rows, diag(J Jᵀ). (M,)."""

    def sum_squares(self, weights: Tensor) -> Tree:
        """Compute Σ_m w_m g_m², coordinate by coordinate, for ``weights`` w (M,).

        Rows of weight 0 are masked, as in `combine`. The leaves are float32 or wider, because
        squares underflow in half precision. Plan "fused" takes one product for a linear layer with
        one position per row, Σ_m w_m d_m² ⊗ a_m², and computes the rows of other leaves some units
        at a time.
        """
        check_per_row("weight", weights, self._rows)
        return {name: squares_of(weights, leaf) for name, leaf in self.stacked().items()}

    @abstractmethod
    def stacked(self) -> Tree:
        """Return J itself, leaf by leaf with a leading axis M."""

    def leaf_grams(self) -> Tree:
        """Compute the Gram of every leaf; their sum is `gram`. (M, M) each."""
        return {name: self.columns([name]).gram() for name in self.shapes}

    def combine_leaves(self, weights: Mapping[str, Tensor]) -> Tree:
        """Compute wᵀ J with weights (M,) of its own for every leaf, as `combine` does."""
        return {name: self.columns([name]).combine(weights[name])[name] for name in self.shapes}

    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        """Apply a function (M, n) -> (n,) to J, without holding the rows of all leaves together.

        The function treats every column alone, as a median does, so that it may get any columns at
        a time, on any rank. It gets all M rows, scaled, also those that take no part.
        """
        return {
            name: reduce_pieces(function, self.columns([name]).stacked()[name])
            for name in self.shapes
        }

    @abstractmethod
    def scaled(self, factors: Tensor) -> GradStack:
        """Return diag(c) J for ``factors`` c (M,); a factor 0 also removes a row of NaN."""

    @abstractmethod
    def columns(self, names: Collection[str]) -> GradStack:
        """Return the same rows on some of the leaves."""

    @abstractmethod
    def first(self, count: int) -> GradStack:
        """Return the first ``count`` rows."""

    @abstractmethod
    def like(self, stack: GradStack) -> GradStack:
        """Apply the `scaled`, `columns` and `first` of this stack to another one.

        The other stack holds the same microbatches, complete, with other gradients.
        """

    @abstractmethod
    def at(self, params: Params) -> GradStack:
        """Return a stack of the same batch, random numbers and buffers at other parameters.

        Leaves that ``params`` omits keep their values.
        """

    @abstractmethod
    def at_rows(self, params: Tree) -> GradStack:
        """Return a stack like `at`, with row m at its own parameters: leaves (M, *shape)."""

    def along(self, factors: Tensor) -> GradStack:
        """Return a stack like `at`, with row m at w + c_m g_m for ``factors`` c (M,).

        g_m is row m of this stack: the factors of `scaled` apply, and leaves that `columns` omitted
        keep their values. Plan "fused" computes the M sets of parameters only where it has to.
        """
        check_per_row("factor", factors, len(self))
        return self.at_rows(self._points(factors))

    @abstractmethod
    def _points(self, factors: Tensor) -> Tree:
        """Return the parameters w + c_m g_m of every row. (M, *shape)."""

    def mean_over_ranks(self, tree: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the mean of the trees of all processes that hold some of these rows.

        A stack of one process returns the tree itself. In a `RankStack` all ranks have to ask.
        """
        return tree

    def gram_is_cheap(self) -> bool:
        """Return whether the Gram costs less than the norms, a `combine` and a `dot` together."""
        return len(self) <= GRAM_UP_TO

    def explain(self) -> str:
        """Return a text about how the rows are computed and held."""
        return repr(self)

    @abstractmethod
    def release(self) -> None:
        """Free everything that can be computed again; the stack still answers questions."""


# --- Stacks that can be cut, scaled and computed again ---


@dataclass(frozen=True)
class StackOrigin:
    """The function and parameters to compute a stack again.

    Attributes:
        rows: The number of rows.
        params: The parameters at which the stack was computed.
        evaluate: ``(params, per_row, kept) -> stack``. ``kept`` names the parameters that are
            still those of the stack; they must not have been written since.
        per_row: True if every row has its own parameters: leaves (M, *shape).
        check: Called with the names of such parameters, and raises if they were written.
    """

    rows: int
    params: Mapping[str, Tensor] = field(repr=False)
    evaluate: Callable[[Mapping[str, Tensor], bool, Collection[str]], GradStack] = field(repr=False)
    per_row: bool = False
    check: Callable[[Collection[str]], None] = field(default=lambda names: None, repr=False)


def _shapes(origin: StackOrigin) -> dict[str, torch.Size]:
    """Return the shape of every parameter in a row."""
    return {name: p.shape[1:] if origin.per_row else p.shape for name, p in origin.params.items()}


class BaseStack(GradStack):
    """The base class of stacks that are computed from a batch.

    Attributes:
        scale: The factors (M,), applied where the rows are used, or None.
        origin: The way to compute the rows again; without it `at`, `at_rows` and `along` raise.
    """

    scale: Tensor | None
    origin: StackOrigin | None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the rows."""

    @abstractmethod
    def _scaled(self, scale: Tensor) -> Self: ...

    @abstractmethod
    def _columns(self, names: Collection[str]) -> Self: ...

    @abstractmethod
    def _first(self, count: int) -> Self: ...

    def _empty(self) -> Tensor | None:
        """Find the empty rows as defined in `GradStack`; None if there are none. (M,) bool."""
        return None

    @property
    @override
    def live(self) -> Tensor:
        scale, empty = self.scale, self._empty()
        if scale is not None:
            return scale != 0 if empty is None else (scale != 0) & ~empty
        if empty is not None:
            return ~empty
        return torch.ones(self._rows, dtype=torch.bool, device=self.device)

    @override
    def scaled(self, factors: Tensor) -> Self:
        """Return diag(c) J; the factors are applied where the rows are used."""
        check_per_row("factor", factors, self._rows)
        # Copy, so that later writes into the factors have no effect.
        factors = _tree.at_least_float32(factors).clone()
        return self._scaled(scale_rows(factors, self.scale))

    @override
    def columns(self, names: Collection[str]) -> Self:
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

    @override
    def first(self, count: int) -> Self:
        if not 1 <= count <= len(self):
            raise ValueError(f"Expected 1 <= count <= M = {len(self)}, found count={count}.")
        return self._first(count)

    @override
    def at(self, params: Params) -> GradStack:
        origin = self.known_origin("at", params)
        check_shapes(_shapes(origin), params, "at")
        kept = origin.params.keys() - params.keys()
        if origin.per_row and kept:
            given = {name: p.expand(len(self), *p.shape) for name, p in params.items()}
            return self.at_rows(given)
        return self.like(origin.evaluate({**origin.params, **params}, False, kept))

    @override
    def at_rows(self, params: Tree) -> GradStack:
        origin = self.known_origin("at_rows", params)
        check_shapes(_shapes(origin), params, "at_rows", rows=len(self))
        # A stack cut by `first` is computed with all rows: its random numbers stay the same.
        whole = {
            name: p if origin.per_row else p.expand(origin.rows, *p.shape)
            for name, p in origin.params.items()
        }
        given = {name: torch.cat([leaf, whole[name][len(self) :]]) for name, leaf in params.items()}
        kept = origin.params.keys() - params.keys()
        return self.like(origin.evaluate({**whole, **given}, True, kept))

    @override
    def _points(self, factors: Tensor) -> Tree:
        origin = self.known_origin("along", {})
        origin.check(set(self.shapes))
        steps, near = _tree.at_least_float32(factors), {}
        for name, leaf in self.stacked().items():
            own, rows = origin.params[name], _tree.at_least_float32(leaf)
            base = _tree.at_least_float32(own[: len(self)] if origin.per_row else own)
            step = steps.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
            near[name] = torch.addcmul(base, rows, step).to(own.dtype)
        return near

    def known_origin(self, question: str, params: Mapping[str, Tensor]) -> StackOrigin:
        """Return the origin, or refuse a question that needs it, or its unknown parameters."""
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

    @override
    def like(self, stack: GradStack) -> GradStack:
        if self._rows < stack._rows:
            stack = stack.first(self._rows)
        if set(self.shapes) < set(stack.shapes):
            stack = stack.columns(list(self.shapes))
        return stack if self.scale is None else stack.scaled(self.scale)


class ComputedStack(BaseStack):
    """The rows of `microbatch_grads` and `per_sample_grads`, computed by any plan.

    Attributes:
        losses: The losses (M,).
        origin: The way to compute the rows again, for `at` and `at_rows`.
    """

    # Stacks are immutable, so a subclass may narrow the type of an attribute.
    losses: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    origin: StackOrigin  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def mean_loss(self) -> Tensor:
        """Return the mean of the losses of the rows that take part. ()."""
        return mean_of(self.losses, self.live)


# --- The stack that holds its rows ---


@copied("losses", "scale", "empty")
@dataclass(frozen=True, eq=False, repr=False)
class DenseStack(BaseStack):
    """A stack that holds its rows.

    Args:
        rows: One tensor per leaf with leading axis M, for example the output of
            ``torch.func.vmap(torch.func.grad(f), ...)``.
        losses: The losses (M,), if known.
        buffers: The buffers after the M microbatches.
        aux: A tree of tensors with leading axis M.
        scale: The factors (M,), applied where the rows are used.
        origin: The way to compute the rows again; without it `at`, `at_rows` and `along` raise.
        empty: The mask (M,) of empty rows, if known; else computed from losses and rows.

    Raises:
        TypeError: ``rows`` is not a dict of tensors.
        ValueError: The leaves disagree on M, or there are none.
        RuntimeError: At a question, if rows have been written into since.

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

    @override
    def __len__(self) -> int:
        return int(next(iter(self.rows.values())).shape[0])

    @property
    @override
    def shapes(self) -> dict[str, torch.Size]:
        return {name: leaf.shape[1:] for name, leaf in self.rows.items()}

    @property
    @override
    def device(self) -> torch.device:
        return _tree.device_of(self.rows)

    @override
    def release(self) -> None:
        """Do nothing, because the rows cannot be computed again."""

    @override
    def explain(self) -> str:
        """Return a text with the number of rows and their bytes."""
        size = sum(leaf.nbytes for leaf in self.rows.values())
        return f"{self!r}: all rows are held, {size / 1e6:.1f} MB"

    def _check_unwritten(self) -> None:
        """Refuse to answer from rows that have been written into."""
        names = written(self.rows, self.__dict__["_versions"])
        if names:
            raise RuntimeError(
                f"Expected rows as they were when the stack was made, found {names[0]!r} written "
                "in place since. Write to a copy: stack.stacked() gives the rows themselves, "
                "{name: leaf.clone() for name, leaf in stack.stacked().items()} copies of them."
            )

    def _matrices(self) -> list[Tensor]:
        """Return the leaves as matrices (M, p)."""
        self._check_unwritten()
        return [leaf.reshape(len(self), -1) for leaf in self.rows.values()]

    @override
    def _empty(self) -> Tensor | None:
        known, losses = self.empty, self.losses
        if known is not None or losses is None:
            return known
        lost: Tensor = losses.isnan()
        if readable(lost) and not any(lost.tolist()):
            return None
        unscaled = self if self.scale is None else replace(self, scale=None)
        return lost & (unscaled.sq_norms() == 0)

    def _total(self, per_leaf: list[Tensor]) -> Tensor:
        """Sum over leaves."""
        return torch.stack(per_leaf).sum(0)

    @override
    def gram(self) -> Tensor:
        gram, scale = self._total([_products.inner(g, g) for g in self._matrices()]), self.scale
        return gram if scale is None else scale_rows(scale_rows(gram, scale).T, scale).T

    @override
    def dot(self, tree: Mapping[str, Tensor]) -> Tensor:
        check_same_leaves(self.shapes, tree, "dot")
        parts = [
            _products.inner(matrix, tree[name].reshape(1, -1))[:, 0]
            for name, matrix in zip(self.rows, self._matrices(), strict=True)
        ]
        return scale_rows(self._total(parts), self.scale)

    @override
    def sq_norms(self) -> Tensor:
        norms = self._total([_products.row_sq_norms(g) for g in self._matrices()])
        scale = self.scale
        return norms if scale is None else scale_rows(scale_rows(norms, scale), scale)

    @override
    def combine(self, weights: Tensor) -> Tree:
        check_per_row("weight", weights, len(self))
        weights = scale_rows(_tree.at_least_float32(weights), self.scale)

        def weigh(leaf: Tensor, matrix: Tensor) -> Tensor:
            total = _products.weighted_sum(weights, matrix)
            return total.to(leaf.dtype).reshape(leaf.shape[1:])

        pairs = zip(self.rows.items(), self._matrices(), strict=True)
        return {name: weigh(leaf, matrix) for (name, leaf), matrix in pairs}

    @override
    def sum_squares(self, weights: Tensor) -> Tree:
        self._check_unwritten()
        check_per_row("weight", weights, len(self))
        weights = scale_rows(scale_rows(_tree.at_least_float32(weights), self.scale), self.scale)
        return {name: squares_of(weights, leaf) for name, leaf in self.rows.items()}

    @override
    def stacked(self) -> Tree:
        """Return the rows leaf by leaf: the tensors themselves, or scaled copies."""
        self._check_unwritten()
        scale = self.scale
        return {name: scale_rows(leaf, scale) for name, leaf in self.rows.items()}

    @override
    def reduce_columns(self, function: Callable[[Tensor], Tensor]) -> Tree:
        self._check_unwritten()
        scale = self.scale
        return {name: reduce_pieces(function, leaf, scale) for name, leaf in self.rows.items()}

    @override
    def _scaled(self, scale: Tensor) -> DenseStack:
        self._check_unwritten()
        return replace(self, scale=scale)

    @override
    def _columns(self, names: Collection[str]) -> DenseStack:
        self._check_unwritten()
        rows = {n: leaf for n, leaf in self.rows.items() if n in names}
        # Emptiness is a property of the whole row.
        return replace(self, rows=rows, empty=self._empty())

    @override
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
        fallback: The reason why another plan was refused; empty if none was.

    The other arguments are those of `DenseStack`; ``losses`` and ``origin`` are required.
    """

    losses: Tensor = field(kw_only=True)
    origin: StackOrigin = field(kw_only=True)
    plan: str = "loop"
    fallback: str = ""

    @override
    def explain(self) -> str:
        """Return the plan, the bytes held, and the reason for a fall-back to the loop, if any."""
        lines = [f'plan "{self.plan}"', super().explain()]
        return "\n".join([*lines, *explain_fallback(self.fallback)])


def explain_fallback(reason: str) -> list[str]:
    """Return the line with the reason for a fall-back to the loop; empty without a reason."""
    return [f'fell back to plan "loop": {reason}'] if reason else []


def as_stack(grads: GradStack | Tree) -> GradStack:
    """Return a GradStack unchanged; wrap a plain stacked dict in a `DenseStack`."""
    return grads if isinstance(grads, GradStack) else DenseStack(grads)
