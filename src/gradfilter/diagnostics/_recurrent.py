"""Recurrent layers that can be differentiated in every way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def plain_recurrence(model: Callable[..., Any], device: torch.device) -> Iterator[None]:
    """Recurrent layers step by step, in a module that has any.

    On a CPU the fused LSTM keeps no workspace where parameters ask for no gradient, and then has
    no backward pass; on a GPU fused layers have none in evaluation mode.
    """
    fused = nn.LSTM if device.type == "cpu" else nn.RNNBase
    layers = model.modules() if isinstance(model, nn.Module) else ()
    if not any(isinstance(layer, fused) for layer in layers):
        yield
        return
    # Not their flags(), which set everything else to defaults too.
    # Any: torch's stubs leave `enabled` out.
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cudnn
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before
