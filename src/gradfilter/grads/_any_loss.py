"""Every kind of loss in one form: ``(params, batch, buffers) -> (scalar, new buffers, aux)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

from gradfilter._types import Params, Tree
from gradfilter.grads._check_loss import check_value
from gradfilter.grads._loss import ModelLoss, check_names
from gradfilter.grads._places import Places
from gradfilter.grads._running_stats import cumulative_means

T = TypeVar("T")


class _Surroundings(nn.Module):
    """A module around a model, whose forward pass is whatever it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        """Run it."""
        return compute()


@dataclass(frozen=True, eq=False)
class AnyLoss:
    """A module's loss or a plain one, as they are when a batch is met.

    Attributes:
        loss: What `model_loss` returned, or a plain ``loss(params, batch)``.
        has_aux: A plain loss returns ``(scalar, aux)``.
        places: Those of the module, found once; None for a plain loss.
    """

    loss: Callable[..., Any]
    has_aux: bool
    places: Places | None

    @classmethod
    def of(cls, loss: Callable[..., Any], has_aux: bool) -> AnyLoss:
        """The loss, its module as it is now."""
        places = Places.of(loss.model) if isinstance(loss, ModelLoss) else None
        return cls(loss, has_aux, places)

    @property
    def cumulative(self) -> set[str]:
        """The names of running means with momentum None."""
        return cumulative_means(self.loss.model) if isinstance(self.loss, ModelLoss) else set()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the model, by name."""
        return dict(self.loss.model.named_modules()) if isinstance(self.loss, ModelLoss) else {}

    def check_params(self, params: Params) -> None:
        """Refuse parameters that are not the module's."""
        if self.places is not None:
            check_names("parameters", params, self.places.trainable)

    def incoming(self, buffers: Tree | None) -> Tree:
        """The buffers before the first row: those given, or the module's own."""
        if self.places is None and buffers:
            raise TypeError(
                "Expected no buffers with a plain loss(params, batch), which cannot take them. "
                "Make the loss with model_loss(model, criterion), or close over them."
            )
        if self.places is None:
            return {}
        if buffers is None:
            return {name: b.detach().clone() for name, b in self.places.buffers.items()}
        check_names("buffers", buffers, self.places.buffers)
        return {name: b.detach() for name, b in buffers.items()}

    def leaf(self, name: str, value: Tensor) -> Tensor:
        """A parameter to differentiate with respect to, with memory of its own if need be."""
        written = self.places is not None and name in self.places.renormalised
        return (value.clone() if written else value).detach().requires_grad_()

    def inside(self, params: Params, buffers: Tree, compute: Callable[[], T]) -> T:
        """Run something with the module's tensors replaced, as they are in a forward pass.

        A backward pass is to run so: activation checkpointing then calls the module again.
        """
        if self.places is None or not isinstance(self.loss, ModelLoss):
            return compute()
        tensors = self.places.fill({**params, **{name: b.clone() for name, b in buffers.items()}})
        state = {f"model.{place}": tensor for place, tensor in tensors.items()}
        found: T = functional_call(
            _Surroundings(self.loss.model), state, (compute,), tie_weights=False
        )
        return found

    def pure(self, params: Params, batch: Any, buffers: Tree) -> tuple[Tensor, Tree, Any]:
        """The loss, with nothing it is given changed."""
        if self.places is not None:
            buffers = {name: b.clone() for name, b in buffers.items()}
        return self.writing(params, batch, buffers)

    def writing(self, params: Params, batch: Any, buffers: Tree) -> tuple[Tensor, Tree, Any]:
        """The loss; a module writes into the buffers it is given."""
        aux = None
        if isinstance(self.loss, ModelLoss) and self.places is not None:
            value, buffers, *rest = self.loss.run(params, batch, buffers, self.places)
            aux = rest[0] if rest else None
        elif self.has_aux:
            value, aux = self.loss(params, batch)
        else:
            value = self.loss(params, batch)
        check_value(value, aux)
        return value, buffers, aux
