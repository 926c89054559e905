"""Memory formats, which say nothing of values: inside vmap a row has none of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._rules._host import Host, Rule


def without_format(function: Callable[..., Tensor]) -> Rule:
    """The rule of `torch.Tensor.to` and its like, which vmap refuses where a format is named."""

    def rule(host: Host, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = kwargs.pop("memory_format", torch.contiguous_format)
        if named is torch.contiguous_format or not host.level.batched(input):
            return NotImplemented
        return function(input, *args, **kwargs)

    return rule


FORMATS: dict[Callable[..., Any], Rule] = {
    function: without_format(function)
    for function in (torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.clone, torch.clone)
}
