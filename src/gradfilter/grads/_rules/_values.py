"""Questions to the host: ``if mask.all():`` has an answer where all rows give the same.

Where they do not, they are taken apart into groups that do, by `gradfilter.grads._groups`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._rules._host import Host, Rule
from gradfilter.grads._rules._shortcuts import asks_for_a_shortcut


class Disagreement(RuntimeError):
    """Rows that answer the host differently.

    Attributes:
        answers: What each row answers, as text: nan is equal to nan, and 0.0 is not -0.0.
    """

    def __init__(self, question: str, answers: list[str]) -> None:
        """Of one question."""
        super().__init__(
            f"{question} cannot run over all rows at once: the loss asks for a value that differs "
            "from row to row"
        )
        self.answers = answers


def value_of(convert: Callable[[Tensor], Any]) -> Rule:
    """The rule of `torch.Tensor.__bool__`, `item` and their like."""

    def rule(host: Host, tensor: Tensor) -> Any:
        if not host.level.batched(tensor):
            return NotImplemented
        rows = host.level.lower(tensor)
        answers: list[Any] = []
        host.level.aside(lambda: answers.extend(convert(row) for row in rows.detach().unbind()))
        texts = [repr(answer) for answer in answers]
        if any(text != texts[0] for text in texts):
            if convert is torch.Tensor.__bool__ and asks_for_a_shortcut():
                return False
            raise Disagreement(convert.__name__, texts)
        return answers[0]

    return rule


VALUES: dict[Callable[..., Any], Rule] = {
    convert: value_of(convert)
    for convert in (
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.__index__,
        torch.Tensor.item,
        torch.Tensor.tolist,
    )
}
