"""A pure loss at one batch, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._any_loss import AnyLoss

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LossAt:
    """The loss as a function of the parameters alone."""

    loss: AnyLoss
    batch: Any
    buffers: Tree

    @classmethod
    def of(cls, loss: Callable[..., Any], batch: Any, buffers: Tree | None) -> LossAt:
        """A module's loss, or a plain one without buffers."""
        if not callable(loss):
            raise TypeError(
                f"Expected `loss` to be a function (params, batch) -> scalar, found "
                f"{type(loss).__name__}. gradfilter.model_loss(model, criterion) makes one."
            )
        any_loss = AnyLoss.of(loss, has_aux=False)
        return cls(any_loss, batch, any_loss.incoming(buffers))

    def value(self, params: Params) -> Tensor:
        """f(w), and nothing else. ()."""
        self.loss.check_params(params)
        return self.loss.pure(params, self.batch, self.buffers)[0]

    def inside(self, leaves: Tree, backward: Callable[[], T]) -> T:
        """A backward pass; checkpointed parts run forward again in it, at these leaves."""
        return self.loss.inside(leaves, self.buffers, backward)

    def gradient(self, params: Params, *, twice: bool = False) -> tuple[Tensor, Tree, Tree]:
        """f(w), ∇f(w), and the leaves it was taken at; ``twice`` keeps it differentiable.

        A parameter that the loss does not use has a zero gradient.
        """
        with torch.enable_grad():
            leaves = {name: self.loss.leaf(name, p) for name, p in params.items()}
            _tree.device_of(leaves)  # refuses none at all
            value = self.value(leaves)
            self.loss.check_reaches(value, leaves.values())
            differentiate = partial(
                torch.autograd.grad,
                value,
                list(leaves.values()),
                create_graph=twice,
                materialize_grads=True,
            )
            slopes = self.inside(leaves, differentiate)
        return value, dict(zip(leaves, slopes, strict=True)), leaves
