"""Overrides of products with a parameter: ``x @ w``, `mm`, `addmm`, `bmm`, `baddbmm`, `einsum`.

Under vmap the gradient of the parameter in every row is computed and held. Here one operand is a
parameter that all rows share, or such a parameter transposed or expanded, so one product runs over
all rows, and the gradients are kept as factors, like those of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter.grads.fused._factors import DenseFactor, Factor, OuterFactor
from gradfilter.grads.fused._host import Host, Override, in_autocast
from gradfilter.grads.fused._lift import autocast_any
from gradfilter.grads.fused._tape import ProductSize, Weight
from gradfilter.grads.fused.overrides._row_operation import (
    Gradients,
    NeedsGrad,
    RowOperation,
    Saved,
)
from gradfilter.grads.fused.overrides._spellings import spellings

# --- The operands: every dim is a letter, as in einsum ---


@dataclass(frozen=True)
class _Letters:
    """The letters of a product: of the input, of the parameter, of the output.

    Attributes:
        x: The input's letters, without the rows.
        w: The parameter's letters.
        y: The output's letters, without the rows.
        sizes: The size of every letter.
    """

    x: str
    w: str
    y: str
    sizes: dict[str, int]

    @classmethod
    def of(cls, x: str, w: str, y: str, shapes: tuple[torch.Size, torch.Size]) -> _Letters | None:
        """Return the letters of a product; None if dims are summed, repeated or broadcast."""
        if any(len(set(term)) < len(term) for term in (x, w, y)):
            return None
        every = set(x) | set(w) | set(y)
        if any(sum(letter in term for term in (x, w, y)) < 2 for letter in every):
            return None
        sizes = dict(zip(w, shapes[1], strict=True))
        for letter, size in zip(x, shapes[0], strict=True):
            if sizes.setdefault(letter, size) != size:
                return None
        found = cls(x, w, y, sizes)
        return found if found.contracted else None

    @property
    def joint(self) -> str:
        """The letters of all three: one product for each of their places."""
        return "".join(c for c in self.w if c in self.x and c in self.y)

    @property
    def contracted(self) -> str:
        """The letters of the input and the parameter, over which the product is summed."""
        return "".join(c for c in self.w if c in self.x and c not in self.y)

    @property
    def free(self) -> str:
        """The letters of the parameter and the output."""
        return "".join(c for c in self.w if c not in self.x)

    @property
    def free_first(self) -> bool:
        """True if the parameter's dims begin with those of the output."""
        return bool(self.free) and self.w.startswith(self.free)

    @property
    def is_outer(self) -> bool:
        """True if the parameter's gradient has the shape of an outer product."""
        return self.w in (self.contracted + self.free, self.free + self.contracted)

    @property
    def positions(self) -> str:
        """The letters of the input and the output."""
        return "".join(c for c in self.x if c not in self.w)

    def size(self, letters: str) -> int:
        """Return the number of places of some letters."""
        return math.prod(self.sizes[c] for c in letters)


ROWS = "0"
"""The letter of the rows."""


def _arranged(tensor: Tensor, have: str, want: str) -> Tensor:
    """Permute the dims from one order of letters to another."""
    return tensor if have == want else tensor.permute([have.index(c) for c in want])


# --- The product over all rows ---


@dataclass(eq=False)
class _Product(RowOperation[Tensor]):
    """y = alpha · x w + beta · b; the bias is added to the last dim of the output.

    All rows are flattened into one matrix (joint, rows · positions, contracted), and the parameter
    into (joint, contracted, free).
    """

    letters: _Letters
    alpha: float
    beta: float

    @property
    def _input_order(self) -> str:
        of = self.letters
        return of.joint + ROWS + of.positions + of.contracted

    @property
    def _output_order(self) -> str:
        of = self.letters
        return of.joint + ROWS + of.positions + of.free

    def _shape(self, order: str, count: int) -> list[int]:
        return [count if c == ROWS else self.letters.sizes[c] for c in order]

    def _matrix(self, tensor: Tensor, have: str, want: str, rows: int, columns: int) -> Tensor:
        joint = self.letters.joint
        blocks = (self.letters.size(joint),) if joint else ()
        return _arranged(tensor, have, want).reshape(*blocks, rows, columns)

    def _weight(self, weight: Tensor) -> Tensor:
        of = self.letters
        order, d, p = of.joint + of.contracted + of.free, of.size(of.contracted), of.size(of.free)
        return self._matrix(weight, of.w, order, d, p)

    @override
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Saved]:
        of, count, order = self.letters, x.shape[0], self._output_order
        positions, d = count * of.size(of.positions), of.size(of.contracted)
        rows = self._matrix(x, ROWS + of.x, self._input_order, positions, d)
        matrix = self._weight(weight)
        if bias is not None:
            found = torch.addmm(bias, rows, matrix, beta=self.beta, alpha=self.alpha)
        else:
            found = rows @ matrix
            found = found if self.alpha == 1 else found * self.alpha
        found = _arranged(found.view(self._shape(order, count)), order, ROWS + of.y)
        return found.contiguous(), (rows,)  # a loss may call `view`, as it may on torch's product

    @override
    def backward(
        self, grad: Tensor, saved: Any, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
    ) -> Gradients:
        of, count, (rows,) = self.letters, grad.shape[0], saved
        n, p = of.size(of.positions), of.size(of.free)
        outputs = self._matrix(grad, ROWS + of.y, self._output_order, count * n, p)
        inputs = weights = biases = None
        if needs_grad.bias:
            sums = outputs.view(count, n, p).sum(1)
            biases = DenseFactor(sums if self.beta == 1 else sums * self.beta)
        if self.alpha != 1:
            outputs = outputs * self.alpha
        if needs_grad.input:
            order = self._input_order
            found = (outputs @ self._weight(weight).mT).view(self._shape(order, count))
            inputs = _arranged(found, order, ROWS + of.x)
        if needs_grad.weight:
            weights = self._factor(rows, outputs, weight.shape, count)
        return Gradients(inputs, weights, biases)

    def _factor(self, rows: Tensor, outputs: Tensor, shape: torch.Size, count: int) -> Factor:
        of = self.letters
        n, d, p = of.size(of.positions), of.size(of.contracted), of.size(of.free)
        if of.is_outer:
            a, g = rows.view(count, n, d), outputs.view(count, n, p)
            return OuterFactor(*((a, g) if of.free_first else (g, a)), shape)
        # Joint dims, or dims that alternate: no product of two matrices has the parameter's shape.
        a, g = rows.reshape(-1, count, n, d), outputs.reshape(-1, count, n, p)
        order = of.joint + ROWS + of.contracted + of.free
        found = (a.mT @ g).movedim(1, 0) if not of.joint else a.mT @ g
        return DenseFactor(_arranged(found.reshape(self._shape(order, count)), order, ROWS + of.w))


def _multiply(
    host: Host,
    operands: tuple[Tensor, Tensor],
    terms: tuple[str, str],
    y: str,
    bias: Tensor | None = None,
    alpha: float = 1,
    beta: float = 1,
) -> Any:
    """Run the product of two operands if one of them is a parameter that all rows share."""
    for at in (1, 0):
        weight, x = operands[at], operands[1 - at]
        found = host.viewed(weight) if host.batched(weight) else None
        if found is None:
            continue
        leaf, dims = found
        if not leaf.dtype.is_floating_point or (weight.dtype != x.dtype and not autocast_any()):
            return NotImplemented  # torch raises the error
        term = {dim: c for dim, c in zip(dims, terms[at], strict=True) if dim is not None}
        w = "".join(term.get(dim, "") for dim in range(len(leaf.shape)))
        x, x_term = _squeezed(host.own(x), terms[1 - at], w + y)
        if len(w) < len(leaf.shape):
            continue
        letters = _Letters.of(x_term, w, y, (x.shape, leaf.shape))
        if letters is None:
            continue
        host.use_view(weight, leaf)
        return _run(host, x, leaf, letters, bias, alpha, beta)
    return NotImplemented


def _squeezed(x: Tensor, term: str, others: str) -> tuple[Tensor, str]:
    """Remove the dims of one unit that only the input has: matmul broadcasts them."""
    for dim in reversed(range(x.ndim)):
        if term[dim] not in others and x.shape[dim] == 1:
            x, term = x.squeeze(dim), term[:dim] + term[dim + 1 :]
    return x, term


def _run(
    host: Host,
    x: Tensor,
    weight: Weight,
    letters: _Letters,
    bias: Tensor | None,
    alpha: float,
    beta: float,
) -> Any:
    last = bias is not None and bias.ndim == 1 and len(letters.free) == 1 and not letters.joint
    natural = letters.y == letters.positions + letters.free
    fits = last and natural and bias is not None and len(bias) == letters.size(letters.free)
    shared = host.weight(bias) if bias is not None and fits and beta != 0 else None
    rows = host.level.lower(x)
    product = host.run("product", _apply, host, rows, weight, shared, letters, alpha, beta)
    if bias is None or shared is not None or beta == 0:
        return product
    added: Tensor = host.own(bias).to(product.dtype)
    return product + (added if beta == 1 else added * beta)


def _apply(
    host: Host,
    x: Tensor,
    weight: Weight,
    bias: Weight | None,
    letters: _Letters,
    alpha: float,
    beta: float,
) -> Tensor:
    x, weight, bias, no_autocast = in_autocast(x, weight, bias)
    n, d, p = (letters.size(of) for of in (letters.positions, letters.contracted, letters.free))
    if letters.is_outer:
        p, d = (p, d) if letters.free_first else (d, p)
        host.used_in_product("product", weight, ProductSize(x.shape[0], n, p, d), x.element_size())
    else:
        host.used("product", weight, 2 * x.shape[0] * n * d * p * letters.size(letters.joint))
    host.used("product", bias, x.shape[0] * n * p)
    with no_autocast:
        return _Product(letters, alpha, beta).apply(host.tape, x, weight, bias)


# --- The functions ---


SELF = "self"
"""The name of the first argument in `torch.ops.aten`, which `torch` itself calls ``input``."""


def _bound(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
    """Return the arguments in order, the last two with default 1; None if there are others."""
    given = dict(zip(names, args, strict=False))
    given |= {"input" if key == SELF else key: value for key, value in kwargs.items()}
    known = len(args) <= len(names) and given.keys() <= {*names, "alpha", "beta"}
    if not known or not all(isinstance(given.get(name), Tensor) for name in names):
        return None
    return [*(given[name] for name in names), given.get("alpha", 1), given.get("beta", 1)]


@dataclass(frozen=True)
class _Fixed:
    """The override of a product whose operands have a fixed number of dims.

    Attributes:
        names: The names of the tensors: both operands, and before them the tensor that is added,
            if there is one.
        terms: The letters of both operands.
        y: The letters of the output.
    """

    names: tuple[str, ...]
    terms: tuple[str, str]
    y: str

    def __call__(self, host: Host, /, *args: Any, **kwargs: Any) -> Any:
        # ``self`` is positional only, because aten's functions have an argument of that name.
        found = _bound(self.names, args, kwargs)
        if found is None:
            return NotImplemented
        *first, a, b, alpha, beta = found
        bias = first[0] if first else None
        if (a.ndim, b.ndim) != (len(self.terms[0]), len(self.terms[1])):
            return NotImplemented
        if bias is None and kwargs.keys() & {"alpha", "beta"}:
            return NotImplemented
        if bias is not None and bias.ndim > len(self.y):
            return NotImplemented
        return _multiply(host, (a, b), self.terms, self.y, bias, alpha, beta)


def matmul(host: Host, *args: Any, **kwargs: Any) -> Any:
    """Replace `torch.matmul` and the operator ``@``."""
    found = _bound(("input", "other"), args, kwargs)
    if found is None:
        return NotImplemented
    a, b = found[:2]
    if not a.ndim or not b.ndim:
        return NotImplemented  # torch raises the error
    left, right, y = _matmul_terms(a.shape, b.shape)
    return _multiply(host, (a, b), (left, right), y)


def _matmul_terms(a: torch.Size, b: torch.Size) -> tuple[str, str, str]:
    """Return the letters of `torch.matmul`; dims that are broadcast get letters of their own."""
    left = ("i" if len(a) > 1 else "") + "k"
    right = "k" + ("j" if len(b) > 1 else "")
    y = left[:-1] + right[1:]
    batch = [*zip_longest(reversed(a[:-2]), reversed(b[:-2]))]
    for at, (own, other) in enumerate(batch):
        joint, alone = ascii_uppercase[at], ascii_lowercase[12 + at]
        if own is not None:
            left = (alone if own == 1 and other not in (None, 1) else joint) + left
        if other is not None:
            right = (alone if other == 1 and own not in (None, 1) else joint) + right
        y = joint + y
    return left, right, y


def rmatmul(host: Host, input: Tensor, other: Tensor) -> Any:
    """Replace `torch.Tensor.__rmatmul__`: ``other @ input``."""
    return matmul(host, other, input)


def einsum(host: Host, equation: Any, *operands: Any, **kwargs: Any) -> Any:
    """Replace `torch.einsum` of two operands, given as a text."""
    given = operands[0] if len(operands) == 1 else operands
    two = isinstance(given, (list, tuple)) and len(given) == 2
    if kwargs or not two or not isinstance(equation, str):
        return NotImplemented
    a, b = given
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return NotImplemented
    parsed = _parsed(equation, a.ndim, b.ndim)
    if parsed is None:
        return NotImplemented
    left, right, y = parsed
    return _multiply(host, (a, b), (left, right), y)


def _parsed(equation: str, *dims: int) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the output; None if there are not two operands."""
    terms, arrow, y = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if len(operands) != 2:
        return None
    if not arrow:  # torch's order: capital letters first, and the dims of an ellipsis before
        letters = terms.replace("...", "").replace(",", "")
        y = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    rest = [d - len(term.replace("...", "")) for d, term in zip(dims, operands, strict=True)]
    fits = all(r >= 0 if "..." in term else r == 0 for r, term in zip(rest, operands, strict=True))
    if not fits:
        return None  # torch raises the error
    dots = DIGITS[: max(rest)]
    if len(dots) < max(rest):
        return None
    left, right = (
        term.replace("...", dots[len(dots) - r :]) for r, term in zip(rest, operands, strict=True)
    )
    return left, right, y.replace("...", dots)


DIGITS = "123456789"
"""The letters of the dims that an ellipsis stands for."""


def linear_of_view(host: Host, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """Replace `torch.nn.functional.linear` where the weight is a transposed parameter."""
    positions = DIGITS[: x.ndim - 1]
    if not x.ndim or weight.ndim != 2 or len(positions) < x.ndim - 1:
        return NotImplemented
    return _multiply(host, (x, weight), (positions + "k", "jk"), positions + "j", bias)


PRODUCTS: dict[Callable[..., Any], Override] = {
    **dict.fromkeys((*spellings("matmul"), torch.linalg.matmul), matmul),
    torch.Tensor.__matmul__: matmul,
    torch.Tensor.__rmatmul__: rmatmul,
    **dict.fromkeys(spellings("mm"), _Fixed(("input", "mat2"), ("ik", "kj"), "ij")),
    **dict.fromkeys(spellings("bmm"), _Fixed(("input", "mat2"), ("eik", "ekj"), "eij")),
    **dict.fromkeys(spellings("addmm"), _Fixed(("input", "mat1", "mat2"), ("ik", "kj"), "ij")),
    **dict.fromkeys(
        spellings("baddbmm"),
        _Fixed(("input", "batch1", "batch2"), ("eik", "ekj"), "eij"),
    ),
    **dict.fromkeys((*spellings("einsum"), torch.functional.einsum), einsum),
}
"""The override of every spelling of a product."""
