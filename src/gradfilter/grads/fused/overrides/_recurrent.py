"""Overrides of LSTM, GRU and RNN, and of their cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfilter.grads.fused._host import Host, Override
from gradfilter.grads.fused._lift import autocast_dtype
from gradfilter.grads.fused.overrides._linear import linear_or_vmap

# --- LSTM, GRU and RNN: the ordinary kernel, row by row; vmap does not support them ---


def recurrent(kernel: Callable[..., Any]) -> Override:
    """Return the override of `torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`."""

    def replacement(host: Host, input: Tensor, *args: Any) -> Any:
        packed = len(args) > 0 and isinstance(args[2], (list, tuple))
        if packed:  # (data, batch_sizes, hidden, weights, ...)
            raise RuntimeError(
                "a packed sequence cannot run over all rows at once: rows of the batch differ in "
                "length"
            )
        given: list[Any] = [*args]
        hidden, weights, *rest = given
        states = () if isinstance(hidden, Tensor) else tuple(hidden)
        network = _Network(kernel, len(states), rest)
        tensors = [host.level.lower(t) for t in (input, *(states or (hidden,)), *weights)]
        return host.run("rnn", network.of_rows, tensors)

    return replacement


@dataclass(frozen=True)
class _Network:
    """A recurrent network.

    Attributes:
        kernel: torch's function.
        states: The number of states in a tuple; 0 for one state that is not in a tuple.
        options: The arguments after input, states and weights.
    """

    kernel: Callable[..., tuple[Tensor, ...]]
    states: int
    options: list[Any]

    def of_rows(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Run the kernel row by row, given input, states and weights (M, ...)."""
        # unbind instead of indexing, because its backward pass stacks the rows' gradients once.
        rows = zip(*(t.unbind() for t in tensors), strict=True)
        return tuple(torch.stack(parts) for parts in zip(*map(self._of_row, rows), strict=True))

    def _of_row(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        end = 1 + max(self.states, 1)
        state = tensors[1:end] if self.states else tensors[1]
        return self.kernel(tensors[0], state, list(tensors[end:]), *self.options)


# --- Cells: two linear layers and a function of their sum ---


Gates = Callable[[Tensor, Tensor, Any], Any]
"""(from the input, from the hidden state, the states) -> the new states."""


def cell(gates: Gates) -> Override:
    """Return the override of `torch.lstm_cell` and its like."""

    def replacement(
        host: Host,
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        input = host.own(input)
        states = tuple(map(host.own, (hx,) if isinstance(hx, Tensor) else hx))
        if not host.batched(input, *states, w_ih, w_hh):
            return NotImplemented
        dtype = autocast_dtype(input.device)
        if dtype is not None and input.device.type != "cpu":  # autocast knows the cell there
            states = tuple(s.to(dtype) for s in states)
        host.tape.overrides["cell"] += 1
        from_input = linear_or_vmap(host, input, w_ih, b_ih)
        from_hidden = linear_or_vmap(host, states[0], w_hh, b_hh)
        return gates(from_input, from_hidden, states[0] if len(states) == 1 else states)

    return replacement


def lstm(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute c' = σ(f) c + σ(i) tanh(g) and h' = σ(o) tanh(c') from the gates i, f, g, o."""
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(x: Tensor, h: Tensor, state: Tensor) -> Tensor:
    """Compute h' = n + σ(z) (h − n) with n = tanh(n_x + σ(r) n_h) from the gates r, z, n."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = x.chunk(3, -1), h.chunk(3, -1)
    new = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return new + (z_x + z_h).sigmoid() * (state - new)


CELLS: dict[str, Override] = {
    "lstm_cell": cell(lstm),
    "gru_cell": cell(gru),
    "rnn_tanh_cell": cell(lambda x, h, _: torch.tanh(x + h)),
    "rnn_relu_cell": cell(lambda x, h, _: torch.relu(x + h)),
}
