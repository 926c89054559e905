"""Questions to the host: ``if mask.all():`` has an answer where all rows give the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._rules._host import Host, Rule


def value_of(convert: Callable[[Tensor], Any]) -> Rule:
    """The rule of `torch.Tensor.__bool__`, `item` and their like."""

    def rule(host: Host, tensor: Tensor) -> Any:
        if not host.level.batched(tensor):
            return NotImplemented
        rows = host.level.lower(tensor)
        answers: list[Any] = []
        host.level.aside(lambda: answers.extend(convert(row) for row in rows.detach().unbind()))
        if any(answer != answers[0] for answer in answers):
            raise RuntimeError(
                f"{convert.__name__} cannot run over all rows at once: the loss asks for a value "
                "that differs from row to row"
            )
        return answers[0]

    return rule


VALUES: dict[Callable[..., Any], Rule] = {
    convert: value_of(convert)
    for convert in (
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.item,
    )
}
