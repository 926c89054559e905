"""Random numbers that a loss draws to ask the host about: a layer left out now and then.

Each row draws its own. A pass over all rows continues only where their answers agree, and answers
that agree by chance are not what M passes in order would have drawn: layers would be left out too
seldom. So a loss that has drawn a single number for each row may ask no more questions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._rules._host import Host, Rule


def _drawn(function: Callable[..., Any]) -> Rule:
    def rule(host: Host, *args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if isinstance(found, Tensor) and found.numel() == 1:
            host.drew = True
        return found

    return rule


DRAWS: dict[Callable[..., Any], Rule] = {
    function: _drawn(function)
    for function in (
        *(torch.rand, torch.randn, torch.randint, torch.bernoulli, torch.normal),
        *(torch.rand_like, torch.randn_like, torch.randint_like),
        *(torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.uniform_),
        *(torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.exponential_),
    )
}
