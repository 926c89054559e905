"""LSTM, GRU and RNN: the ordinary kernel, row after row; vmap has no rule for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads._rules._host import Host, Rule


def recurrent(kernel: Callable[..., Any]) -> Rule:
    """The rule of `torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`."""

    def rule(host: Host, input: Tensor, *args: Any) -> Any:
        packed = len(args) > 0 and isinstance(args[2], (list, tuple))
        if packed:  # (data, batch_sizes, hidden, weights, ...)
            raise RuntimeError(
                "a packed sequence cannot run over all rows at once: rows of the batch differ in "
                "length"
            )
        hidden, weights, *rest = args
        states = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
        tensors = [host.level.lower(t) for t in (input, *states, *weights)]

        def one(per_row: Sequence[Tensor]) -> tuple[Tensor, ...]:
            x, own, mine = per_row[0], per_row[1 : 1 + len(states)], per_row[1 + len(states) :]
            state = own[0] if isinstance(hidden, Tensor) else tuple(own)
            found: tuple[Tensor, ...] = kernel(x, state, list(mine), *rest)
            return found

        return host.run("rnn", _each, one, tensors)

    return rule


def _each(one: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    # unbind, and not an index per row: its backward pass stacks the rows' gradients once.
    rows = zip(*(t.unbind() for t in tensors), strict=True)
    return tuple(torch.stack(parts) for parts in zip(*(one(row) for row in rows), strict=True))
