"""Questions to the host: ``if mask.all():`` has an answer where all rows give the same.

Where they do not, they are taken apart into groups that do, by `gradfilter.grads._groups`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._rules._draws import DRAWS
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


def value_of(convert: Callable[..., Any]) -> Rule:
    """The rule of `torch.Tensor.__bool__`, `item` and their like."""

    def rule(host: Host, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not host.level.batched(tensor) or host.batched(*args):
            return NotImplemented
        if host.drew:
            raise RuntimeError(
                f"{convert.__name__} cannot run over all rows at once: the loss draws a random "
                "number and asks for a value, which may be another one in every row"
            )
        rows = host.level.lower(tensor)
        answers: list[Any] = []
        host.level.aside(
            lambda: answers.extend(convert(row, *args, **kwargs) for row in rows.detach().unbind())
        )
        texts = [_text(answer) for answer in answers]
        if any(text != texts[0] for text in texts):
            if convert is torch.Tensor.__bool__ and asks_for_a_shortcut():
                return False
            raise Disagreement(convert.__name__, texts)
        return answers[0]

    return rule


def _text(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"{tuple(answer.shape)} {answer.tolist()}"
    if isinstance(answer, tuple):
        return " ".join(map(_text, answer))
    return repr(answer)


def places_of(convert: Callable[..., Any]) -> Rule:
    """The rule of functions that return places: tensors whose shape is an answer of the host."""
    rule = value_of(convert)

    def places(host: Host, *args: Any, **kwargs: Any) -> Any:
        # Of three arguments torch.where chooses between two tensors.
        if len(args) != 1 or not isinstance(args[0], Tensor) or kwargs.keys() - {"as_tuple"}:
            return NotImplemented
        return rule(host, *args, **kwargs)

    return places


VALUES: dict[Callable[..., Any], Rule] = {
    **{
        convert: value_of(convert)
        for convert in (
            torch.Tensor.__bool__,
            torch.Tensor.__int__,
            torch.Tensor.__float__,
            torch.Tensor.__index__,
            torch.Tensor.item,
            torch.Tensor.tolist,
        )
    },
    **{
        convert: places_of(convert)
        for convert in (
            torch.Tensor.nonzero,
            torch.nonzero,
            torch.Tensor.argwhere,
            torch.argwhere,
            torch.where,
        )
    },
    **DRAWS,
}
