"""Refuse a pass over all rows that seeds a generator and draws from it.

A loop over rows that calls ``torch.manual_seed(0)`` in every row draws the same numbers in all of
them. In a pass over all rows every row would draw its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from gradfilter.grads._call_context import is_recorded

DRAWS = frozenset(
    (
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
        *("bernoulli", "bernoulli_", "normal", "normal_", "uniform_", "random_", "cauchy_"),
        *("exponential_", "geometric_", "log_normal_", "multinomial", "poisson", "binomial"),
        *("dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
        *("dropout1d", "dropout2d", "dropout3d", "rrelu", "rrelu_", "_standard_gamma"),
        *("native_dropout", "scaled_dot_product_attention", "multi_head_attention_forward"),
    )
)
"""The names of functions that draw."""


class Seeds:
    """The seeds of the generators at the start of a pass.

    Args:
        generators: The generators that the loss refers to. torch's default generator of the CPU is
            always known.
    """

    def __init__(self, generators: Iterable[Any] = ()) -> None:
        own = [generator for generator in generators if isinstance(generator, torch.Generator)]
        self._default = _Seeded(torch.default_generator)
        self._own = {id(generator): _Seeded(generator) for generator in own}

    def check(self, func: Any, kwargs: dict[str, Any]) -> None:
        """Refuse a draw from a generator that the pass has seeded or made.

        Raises:
            SeedsInLoss: It has.
        """
        if (
            getattr(func, "__name__", "") not in DRAWS
            or torch.compiler.is_compiling()
            or is_recorded()
        ):
            return
        generator = kwargs.get("generator")
        seeded = self._default if generator is None else self._own.get(id(generator))
        if seeded is None or seeded.again():
            raise SeedsInLoss(
                "the loss seeds or sets a generator and draws from it, so that in a loop all rows "
                "draw the same numbers. Draw them once, and keep them in a buffer"
            )


class SeedsInLoss(RuntimeError):
    """Raised for a loss that seeds a generator and draws from it."""


class _Seeded:
    """A generator with its seed and its state at the start of a pass."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator, self._seed = generator, generator.initial_seed()
        self._start: Tensor | None = generator.get_state()

    def again(self) -> bool:
        """Return whether it was seeded since the start; to be asked before every draw.

        It has another seed then, or the state of a generator that has not drawn.
        """
        if self._generator.initial_seed() != self._seed:
            return True
        unused = _unused(self._generator)
        if not torch.equal(self._generator.get_state(), unused):
            self._start = None
            return False
        return self._start is None or not torch.equal(self._start, unused)


def _unused(generator: torch.Generator) -> Tensor:
    """Return the state of a generator with this seed that has not drawn."""
    return torch.Generator(generator.device).manual_seed(generator.initial_seed()).get_state()


def draw_once(generators: Iterable[Any]) -> bool:
    """Draw a number from every generator that has not drawn yet, also from torch's default one.

    `Seeds` cannot tell a generator that has not drawn from one that a pass has seeded as before.

    Returns:
        True if there is such a generator.
    """
    own = [generator for generator in generators if isinstance(generator, torch.Generator)]
    unused = [g for g in (torch.default_generator, *own) if torch.equal(g.get_state(), _unused(g))]
    for generator in unused:
        torch.rand(1, generator=generator, device=generator.device)
    return bool(unused)


class SeedWatch(TorchFunctionMode):
    """Check every draw inside the context."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self._seeds = seeds

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Check a function that draws, and run it."""
        kwargs = kwargs or {}
        self._seeds.check(func, kwargs)
        return func(*args, **kwargs)
