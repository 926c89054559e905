"""One case of the zoo: a model, a loss, a batch, and the expected use of plan "fused"."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gradfilter as gf

PLAN = "fused"


def wavy(output, y):
    """Return a loss in which all entries of the output have different weights."""
    entries = output.flatten(1)
    place = torch.arange(entries.shape[1], dtype=entries.dtype, device=entries.device)
    return (entries.tanh() * torch.cos(place + y[:, None])).sum(1).mean()


def token_loss(logits, labels):
    """Return the cross-entropy over tokens; any number of labels may be -100, which is omitted."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Args:
        name: Its unusual property.
        build: Makes the model, in training or evaluation mode.
        batch: Makes a batch of n samples.
        criterion: As in `gf.model_loss`.
        rules: Names of overrides that plan "fused" uses at least once, separated by spaces.
        sizes: (M, B); B = 1 is asked for with `gf.per_sample_grads`.
        has_aux: The criterion returns (loss, aux).
        rtol: Relative tolerance; larger if a model computes in float32 for any input.
        may_refuse: The text of a refusal, if plan "fused" may refuse the model.
        large: Whether questions are asked in fewer orders.
        slow: Whether the everyday run omits it.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    criterion: Callable[..., Any] | None = wavy
    rules: str = ""
    sizes: tuple[tuple[int, int], ...] = ((2, 3), (3, 2), (4, 1))
    has_aux: bool = False
    rtol: float = 1e-10
    may_refuse: str | None = None
    large: bool = False
    slow: bool = False

    def model(self) -> nn.Module:
        """Build the model with no weights or running statistics at zero or one."""
        torch.default_generator.manual_seed(1)
        model = self.build()
        with torch.no_grad():
            for p in model.parameters():
                spread = p.std(correction=0)
                p.add_(torch.randn_like(p) * torch.where(spread == 0, 0.1, 0.1 * spread))
            for name, b in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    b.add_(torch.rand_like(b))
        return model

    def samples(self, m: int, b: int) -> Any:
        """Make a batch of M·B samples."""
        torch.default_generator.manual_seed(2)
        return self.batch(m * b)

    def rows(
        self, model: nn.Module, batch: Any, m: int, b: int, plan: str, **options: Any
    ) -> gf.GradStack:
        """Make a fresh stack."""
        loss = gf.model_loss(model, self.criterion, has_aux=self.has_aux)
        params, buffers = gf.extract(model)
        grads_of = (
            gf.per_sample_grads(loss, plan=plan, **options)
            if b == 1
            else gf.microbatch_grads(loss, m, plan=plan, **options)
        )
        return grads_of(params, batch, buffers=buffers)


def rows_of(model, batch, plan=PLAN, m=3, criterion=wavy):
    """Make a fresh stack of a model that is not a case."""
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, criterion)
    return gf.microbatch_grads(loss, m, plan=plan)(params, batch, buffers=buffers)


class Net(nn.Module):
    """Modules and parameters by name, and a forward pass written as a function of them."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))


def buffered(model: nn.Module, **buffers: torch.Tensor) -> nn.Module:
    for name, tensor in buffers.items():
        model.register_buffer(name, tensor)
    return model


def frozen(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, p in model.named_parameters():
        if name.startswith(prefixes):
            p.requires_grad_(False)
    return model


def inputs(*shape: int, classes: int = 5) -> Callable[[int], Any]:
    """Return a maker of batches of normal numbers (n, *shape) and one class per sample."""
    return lambda n: (torch.randn(n, *shape), torch.randint(0, classes, (n,)))


def tokens(length: int = 6, vocabulary: int = 11) -> Callable[[int], Any]:
    """Return a maker of batches of tokens (n, length) and one class per token."""
    return lambda n: tuple(torch.randint(0, vocabulary, (n, length)) for _ in range(2))
