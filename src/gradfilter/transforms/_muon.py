"""Muon: the momentum of a matrix, made nearly orthogonal by a Newton-Schulz iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._shards import is_sharded
from gradfilter._types import Params, State, Transform
from gradfilter.schedules._schedules import Schedule
from gradfilter.transforms._transform import check_number, is_off
from gradfilter.transforms._update_rules import Decay, Leaf, check_decays, update_rule

Scaling = Literal["original", "match_rms_adamw", "spectral_unclamped"]

SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}
"""The factor of the learning rate for a matrix of this shape."""

ADVICE = (
    'Give it the matrices only: partition({"matrices": muon(lr), "rest": adamw(lr)}, label), with '
    "a label that knows which leaves have two dims."
)


@factory
def muon(
    lr: float | Schedule = 1e-3,
    *,
    weight_decay: float = 0.1,
    decays: Decay | None = None,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Scaling = "original",
) -> Transform:
    """Apply Muon to matrices, as `torch.optim.Muon`.

    b ← μ b + (1 − μ) g;  v = b, Nesterov: (1 − μ) g + μ b;  X = v / max(‖v‖, eps), then
    ``ns_steps`` times X ← a X + (b' A + c A²) X with A = X Xᵀ and the coefficients (a, b', c);
    p ← p − lr λ p − lr s X, with s by the shape of the matrix. X has nearly the singular vectors of
    v, and all singular values that were not tiny are between about 0.7 and 1.2.

    The iteration runs in bfloat16 for every dtype of the parameters, as in torch, and autocast does
    not change it. Everything else has the dtype of the parameters.

    Every leaf must have two dims. Kernels of convolutions are refused, as torch does: whether to
    flatten their last dims is a decision about the model. Embeddings and the last layer have two
    dims, but Jordan gives them to AdamW. See `partition`, and
    [update rules](../ideas/update_rules.md#muon) for a label.

    Args:
        lr: The learning rate, at least 0, or a Schedule.
        weight_decay: The decoupled factor λ >= 0.
        decays: A predicate on names: the leaves that decay, of which there must be one; None for
            all.
        momentum: The factor μ in [0, 1]; without it there is no buffer.
        nesterov: False to take the buffer itself.
        ns_coefficients: (a, b', c) of the iteration.
        eps: The smallest norm that v is divided by.
        ns_steps: The number of iterations, from 1 to 99.
        adjust_lr_fn: The factor s of an (A, B) matrix: "original" √max(1, A/B), "match_rms_adamw"
            0.2 √max(A, B), which fits learning rates of AdamW, "spectral_unclamped" √(A/B).

    Publishes: ``lr`` (), without the factor s.

    Cost: one buffer of the size of the parameters, and ``3 ns_steps`` matrix products per leaf.

    Raises:
        ValueError: A number out of range; at ``init``, a leaf that has not two dims, or that is
            sharded over ranks, because the iteration needs the whole matrix.

    Examples:
        >>> import torch, gradfilter as gf
        >>> params = {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}
        >>> label = lambda name: "matrices" if params[name].ndim == 2 else "rest"
        >>> update = gf.partition({"matrices": gf.muon(0.1), "rest": gf.adamw(0.1)}, label)
        >>> grads = {"fc.weight": torch.eye(3, 2), "fc.bias": torch.ones(3)}
        >>> moved = update(params, update.init(params), grads)[0]
        >>> torch.linalg.matrix_norm(moved["fc.weight"], 2) < 0.15
        tensor(True)

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon/
        Liu et al., "Muon is Scalable for LLM Training", 2025, https://arxiv.org/abs/2502.16982
    """
    check_number("muon", "weight_decay", weight_decay, low=0, fix="0 switches it off.")
    check_number("muon", "momentum", momentum, low=0, high=1, fix="0.95 is usual.")
    check_number("muon", "eps", eps, low=0, open_low=True, fix="1e-7 is usual.")
    whole = isinstance(ns_steps, int) and not isinstance(ns_steps, bool)
    if not (whole and 1 <= ns_steps < 100):
        raise ValueError(
            f"muon: expected ns_steps as a whole number from 1 to 99, found {ns_steps!r}. 5 is "
            "usual."
        )
    if adjust_lr_fn not in SCALES:
        raise ValueError(
            f"muon: expected adjust_lr_fn among {sorted(SCALES)}, found {adjust_lr_fn!r}."
        )
    plain = all(isinstance(number, (int, float)) for number in ns_coefficients)
    if len(ns_coefficients) != 3 or not plain:
        raise ValueError(
            f"muon: expected ns_coefficients as three plain numbers, found {ns_coefficients!r}. "
            "They are fixed; (3.4445, -4.7750, 2.0315) is usual."
        )
    iteration = _NewtonSchulz(ns_coefficients, eps, ns_steps)
    rule = _Muon(weight_decay, momentum, nesterov, adjust_lr_fn, iteration)
    check_decays("muon", weight_decay, decays)
    made = update_rule("muon", lr, rule, decays)
    return replace(made, init=_MatricesOnly(made.init))


@dataclass(frozen=True, eq=False)
class _MatricesOnly:
    """The ``init`` of Muon, which refuses all leaves but whole matrices."""

    init: Callable[[Params], State]

    def __call__(self, params: Params) -> State:
        others = {name: tuple(p.shape) for name, p in params.items() if p.ndim != 2}
        if others:
            name, shape = next(iter(others.items()))
            raise ValueError(
                f"muon: expected leaves with two dims, found {name!r} of shape {shape}, and "
                f"{len(others) - 1} others without. {ADVICE}"
            )
        for name, p in params.items():
            if is_sharded(p):
                raise ValueError(
                    f"muon: expected whole matrices, found {name!r} as a DTensor, sharded over "
                    "ranks. The iteration needs all entries of a matrix. Use adamw for it."
                )
        return self.init(params)


@dataclass(frozen=True, eq=False)
class _NewtonSchulz:
    """The iteration that makes a matrix nearly orthogonal, with its numbers."""

    coefficients: tuple[float, float, float]
    eps: float
    steps: int

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return a matrix with nearly equal singular values, in bfloat16. (A, B)."""
        a, b, c = self.coefficients
        tall = matrix.shape[0] > matrix.shape[1]
        with _tree.no_autocast(matrix):
            x = matrix.bfloat16()
            x = x.T if tall else x  # the Gram of the shorter side
            x = x / x.norm().clamp(min=self.eps)
            for _ in range(self.steps):
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x


@dataclass(frozen=True, eq=False)
class _Muon:
    """Muon for one matrix."""

    decoupled_decay: float
    momentum: float
    nesterov: bool
    adjust_lr_fn: str
    iteration: _NewtonSchulz
    weight_decay: float = 0.0
    maximize: bool = False

    def without_decay(self) -> _Muon:
        return replace(self, decoupled_decay=0.0)

    @property
    def buffers(self) -> tuple[str, ...]:
        return () if is_off(self.momentum) else ("momentum",)

    def step(self, g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        if self.buffers:
            # lerp rounds as torch.optim.Muon does; in bfloat16 the iteration shows a last bit.
            b = torch.lerp(own["momentum"], g, _weight(1 - self.momentum, g))
            own = {"momentum": b}
            g = torch.lerp(g, b, _weight(self.momentum, g)) if self.nesterov else b
        scale = SCALES[self.adjust_lr_fn](*p.shape)
        update = -(lr * scale) * self.iteration(g).to(p.dtype)
        decay = self.decoupled_decay
        return update if is_off(decay) else update - (lr * decay) * p, own

    @property
    def kernel(self) -> None:
        return None  # torch has none


def _weight(weight: float | Tensor, like: Tensor) -> float | Tensor:
    """Return the weight of a lerp: a scheduled one has to have the dtype of its operands."""
    return weight.to(like.dtype) if isinstance(weight, Tensor) else weight
