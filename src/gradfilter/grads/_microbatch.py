"""Gradients of every microbatch or every sample, as a GradStack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from torch import nn

from gradfilter.grads._budget import check_budget
from gradfilter.grads._grad_function import GradFunction, Plan
from gradfilter.grads._loss import ModelLoss


def microbatch_grads(
    loss: Callable[..., Any],
    microbatches: int,
    *,
    has_aux: bool = False,
    plan: Plan = "auto",
    chunk_size: int | None = None,
    memory_budget: int | float = 0.25,
) -> GradFunction:
    """One gradient per microbatch: a function ``(params, batch, *, buffers) -> GradStack``.

    Row m is ∇f over samples m·B .. (m + 1)·B − 1 of the batch, N = M·B.

    To carry running statistics (BatchNorm) from batch to batch, pass on what the stack gives:
    ``grads_of(params, batch, buffers=rows.buffers)``; without ``buffers=``, every call starts from
    the module's own.

    Args:
        loss: ``loss(params, batch) -> scalar``, pure, or what `model_loss` returns. Each row's
            loss should be the mean over its samples.
        microbatches: M >= 1; has to divide N.
        has_aux: ``loss`` returns ``(scalar, aux)``, aux any tree of tensors.
        plan: How the rows are computed. ``"fused"``: one forward pass over all rows, one backward
            pass when the first question is asked, and rows made only where that is the cheaper
            way to the answer; for M = 1 an ordinary forward and backward pass. ``"loop"``: M
            backward passes, always possible. ``"vmap"``: all rows at once by
            ``torch.func.vmap(grad)``. ``"auto"``, the default, is ``"fused"``, and goes back to
            the loop with a warning where the loss cannot run over all rows at once. Plans
            differ by rounding, and in which random numbers a dropout layer draws.
        chunk_size: Rows computed at a time, to bound memory, by plan ``"vmap"``. Plan ``"fused"``
            heeds it where every row has its own parameters (`GradStack.at_rows`), unless the loss
            draws random numbers.
        memory_budget: What plan ``"fused"`` may hold between questions, beside what an ordinary
            backward pass takes: bytes (int), or a fraction of the device's memory (float, up to
            1). With less it streams, and in the end runs a backward pass for every question.
            ``explain()`` of a stack prints what was chosen.

    Raises:
        ValueError: M < 1; N not divisible by M; tensors of the batch disagree on N; the batch is
            on another device than the parameters; the loss is not a scalar.
        TypeError: A parameter is not floating point.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, batch: (params["w"] * batch).sum(1).mean()
        >>> rows = gf.microbatch_grads(loss, 2)({"w": torch.ones(2)}, torch.eye(2))
        >>> rows.stacked()
        {'w': tensor([[1., 0.],
                [0., 1.]])}
    """
    if not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 1:
        raise ValueError(
            f"Expected a whole number of microbatches >= 1, found {microbatches!r}. M = 8 is a "
            "usual choice."
        )
    return _grad_function(loss, microbatches, has_aux, plan, chunk_size, memory_budget)


def per_sample_grads(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    plan: Plan = "auto",
    chunk_size: int | None = None,
    memory_budget: int | float = 0.25,
) -> GradFunction:
    """One gradient per sample: `microbatch_grads` with M = N, B = 1.

    The loss sees batches of one sample, leading axis kept. As there, without ``buffers=``, every
    call starts from the module's own.

    Args:
        loss: As in `microbatch_grads`.
        has_aux: As in `microbatch_grads`.
        plan: As in `microbatch_grads`.
        chunk_size: As in `microbatch_grads`.
        memory_budget: As in `microbatch_grads`.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, batch: (params["w"] * batch).sum(1).mean()
        >>> len(gf.per_sample_grads(loss)({"w": torch.ones(3)}, torch.eye(3)))
        3
    """
    return _grad_function(loss, None, has_aux, plan, chunk_size, memory_budget)


def _grad_function(
    loss: Callable[..., Any],
    microbatches: int | None,
    has_aux: bool,
    plan: Plan,
    chunk_size: int | None,
    memory_budget: int | float,
) -> GradFunction:
    if isinstance(loss, nn.Module) or not callable(loss):
        raise TypeError(
            f"Expected a function loss(params, batch), found {type(loss).__name__}. Use "
            "model_loss(model, criterion)."
        )
    if plan not in get_args(Plan):
        raise ValueError(f'Expected plan "auto", "fused", "loop" or "vmap", found {plan!r}.')
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (whole and chunk_size >= 1):
        raise ValueError(
            f"Expected chunk_size as a whole number of rows >= 1 or None, found {chunk_size!r}. "
            "None computes all rows at once."
        )
    if has_aux and isinstance(loss, ModelLoss):
        raise ValueError(
            "Expected has_aux on model_loss(model, criterion, has_aux=True), found it here."
        )
    check_budget(memory_budget)
    return GradFunction(loss, microbatches, has_aux, plan, chunk_size, memory_budget)
