"""What the rules of the fused plan share: the leaves, and what a backward pass leaves of them."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradfilter._types import Tree
from gradfilter.grads._factor import Factor

Visit = Callable[[str, list[Factor], Tensor | None], None]


@dataclass(frozen=True)
class Weight:
    """A parameter as a rule sees it.

    Attributes:
        value: What all rows share, without a leading axis.
        rows: (M, *shape), where autograd expects its gradient; None for a frozen parameter.
        leaf: The name of the leaf it is; None where it was computed from leaves, or is frozen.
    """

    value: Tensor
    rows: Tensor | None
    leaf: str | None


@dataclass(frozen=True)
class Use:
    """One use of a leaf by a rule in the forward pass, from which its mode is chosen.

    Attributes:
        leaf: The leaf's name.
        rule: The rule's name.
        flops: Of the leaf's ordinary weight gradient over all rows.
        kept: Bytes of the factor, inputs and output gradients; 0 where rows come for free.
        ghost_flops: Of the ghost Gram; None where there is none or it does not pay.
    """

    leaf: str
    rule: str
    flops: int
    kept: int = 0
    ghost_flops: int | None = None


@dataclass
class Tape:
    """The leaves of one forward pass, (M, *shape) each, and where their gradients go.

    A leaf is complete when the backward pass is through with every use of it. Then ``visit`` gets
    its name, the factors that rules recorded, and the gradient (M, *shape) that came by autograd.

    Attributes:
        leaves: (M, *shape) each.
        alone: Of a single row, the same tensors as the loss had them, without a leading axis.
        visit: Hears of complete leaves during a backward pass.
        uses: What the rules noted.
        overrides: How often each rule ran.
        ignored: Which rows had only ignored labels in every class loss; None where nobody took
            note, as where the losses can be looked at. (M,) bool.
        linear: Whether the backward pass is linear in the cotangent: no hook changes it.
    """

    leaves: Tree
    alone: Tree | None = None
    visit: Visit | None = None
    uses: list[Use] = field(default_factory=list)
    overrides: Counter[str] = field(default_factory=Counter)
    ignored: Tensor | None = None
    linear: bool = True
    _factors: dict[str, list[Factor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Hear of every leaf as soon as it is complete, so that nothing has to wait for the end."""
        for name, leaf in (self.alone or self.leaves).items():
            on_completion: Callable[..., Any] = leaf.register_post_accumulate_grad_hook
            on_completion(self._completion(name))

    def _completion(self, name: str) -> Callable[[Tensor], None]:
        # The leaf holds its hook, and the tape the leaf. A cycle through a tensor's hooks is not
        # always found by the garbage collector: it would keep the parameters of every step.
        weak = weakref.ref(self)

        def complete(leaf: Tensor) -> None:
            tape = weak()
            grad, leaf.grad = leaf.grad, None
            if tape is None:
                return
            if grad is not None and tape.alone is not None:
                grad = (grad.to_dense() if grad.is_sparse else grad).unsqueeze(0)
            tape._finish(name, grad)

        return complete

    def _finish(self, name: str, grad: Tensor | None) -> None:
        factors = self._factors.pop(name, [])
        if self.visit is not None and (factors or grad is not None):
            self.visit(name, factors, grad)

    def record(self, weight: Weight, factor: Factor) -> Tensor | None:
        """Take the gradient of a weight; what is returned is what autograd is to be given."""
        if weight.leaf is None:
            return factor.rows()
        self._factors.setdefault(weight.leaf, []).append(factor)
        return None

    def backward(self, losses: Tensor, cotangent: Tensor, visit: Visit, *, retain: bool) -> None:
        """Run one backward pass, and hand every leaf that has a gradient to ``visit``."""
        self.visit = visit
        try:
            inputs = list((self.alone or self.leaves).values())
            torch.autograd.backward(losses, cotangent, retain_graph=retain, inputs=inputs)
            for name in list(self._factors):
                self._finish(name, None)
        finally:
            self.visit = None
            self._factors.clear()
