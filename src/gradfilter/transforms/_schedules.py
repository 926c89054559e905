"""Schedules that depend on the step alone: constant, linear, cosine, poly and step."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfilter._made import remembered
from gradfilter.transforms._schedule import Schedule, after_warmup, progress


@remembered
def constant(value: float, *, warmup_steps: int = 0, init_value: float | None = None) -> Schedule:
    """One value, after an optional warm-up from ``init_value`` (0).

    Args:
        value: The value.
        warmup_steps: Wm.
        init_value: Value at step 0 of the warm-up; 0 by default.

    Examples:
        >>> import gradfilter as gf
        >>> [gf.constant(1.0, warmup_steps=2)(k).item() for k in range(4)]
        [0.0, 0.5, 1.0, 1.0]
    """
    start = 0.0 if init_value is None else init_value
    return after_warmup(lambda k: torch.full_like(k, value), value, value, warmup_steps, start)


@remembered
def linear(
    max_value: float,
    total_steps: int,
    *,
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """Max + (min − max) x, with x the part of the steps after the warm-up that is done.

    Args:
        max_value: Value at the end of the warm-up.
        total_steps: T, warm-up included.
        min_value: Value from step T on.
        warmup_steps: Wm.
        init_value: Value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import gradfilter as gf
        >>> [gf.linear(1.0, 4)(k).item() for k in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
    """
    x = progress(total_steps, warmup_steps)

    def curve(k: Tensor) -> Tensor:
        return max_value + (min_value - max_value) * x(k)

    return after_warmup(curve, max_value, min_value, warmup_steps, init_value)


@remembered
def cosine(
    max_value: float,
    total_steps: int,
    *,
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """Min + (max − min) (1 + cos πx) / 2, x as in `linear`.

    Args:
        max_value: Value at the end of the warm-up.
        total_steps: T, warm-up included.
        min_value: Value from step T on.
        warmup_steps: Wm.
        init_value: Value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import gradfilter as gf
        >>> [round(gf.cosine(1.0, 4)(k).item(), 4) for k in (0, 1, 2, 4)]
        [1.0, 0.8536, 0.5, 0.0]

    References:
        Loshchilov, Hutter, "SGDR", 2017, https://arxiv.org/abs/1608.03983
    """
    x = progress(total_steps, warmup_steps)

    def curve(k: Tensor) -> Tensor:
        return min_value + (max_value - min_value) * (1 + torch.cos(torch.pi * x(k))) / 2

    return after_warmup(curve, max_value, min_value, warmup_steps, init_value)


@remembered
def poly(
    max_value: float,
    power: float,
    *,
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """Min + (max − min) (k − Wm + 1)^power.

    Args:
        max_value: Value at the end of the warm-up.
        power: At most 0; −0.5 is the inverse square root.
        min_value: The limit.
        warmup_steps: Wm.
        init_value: Value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import gradfilter as gf
        >>> [gf.poly(1.0, -1.0)(k).item() for k in (0, 1, 3)]
        [1.0, 0.5, 0.25]
    """
    if power > 0:
        raise ValueError(f"Expected power <= 0, found power={power}. -0.5 is usual.")

    def curve(k: Tensor) -> Tensor:
        return min_value + (max_value - min_value) * (k + 1) ** power

    return after_warmup(curve, max_value, min_value, warmup_steps, init_value)


@remembered
def step(
    max_value: float,
    every: int,
    factor: float = 0.1,
    *,
    min_value: float = 0.0,
    warmup_steps: int = 0,
    init_value: float | None = None,
) -> Schedule:
    """max(min, max · factor^⌊(k − Wm) / every⌋).

    Args:
        max_value: Value at the end of the warm-up.
        every: Steps between drops, >= 1.
        factor: In (0, 1].
        min_value: Never below this.
        warmup_steps: Wm.
        init_value: Value at step 0 of the warm-up; ``min_value`` by default.

    Examples:
        >>> import gradfilter as gf
        >>> [gf.step(1.0, 2, 0.5)(k).item() for k in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if every < 1 or not 0 < factor <= 1:
        raise ValueError(
            f"Expected every >= 1 and 0 < factor <= 1, found every={every}, factor={factor}."
        )

    def curve(k: Tensor) -> Tensor:
        return (max_value * factor ** torch.floor(k / every)).clamp(min=min_value)

    return after_warmup(curve, max_value, min_value, warmup_steps, init_value)
