"""Recurrent networks: whole sequences, cells, given states, packed sequences."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from _zoo_case import Case, Net, frozen, inputs, parameter

T, D, H = 5, 4, 6


def recurrent(kind, **options):
    """Build a model of the outputs and the last hidden state of every layer, batch first or not."""

    def run(net, x):
        first = net.rnn.batch_first
        output, state = net.rnn(x if first else x.transpose(0, 1))
        output = output if first else output.transpose(0, 1)
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([output.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)

    return lambda: Net(run, rnn=kind(D, H, **{"batch_first": True, **options}))


def given_state(kind):
    """Build a recurrent network with a trained first state, the same for all samples."""

    def run(net, x):
        state = net.h.expand(-1, len(x), -1).contiguous()
        given = (state, state.tanh()) if kind is nn.LSTM else state
        return net.out(net.rnn(x, given)[0])

    parts = {"rnn": kind(D, H, batch_first=True), "out": nn.Linear(H, 3)}
    return lambda: Net(run, h=parameter(1, 1, H), **parts)


def cell(kind):
    def run(net, x):
        state, outputs = None, []
        for t in range(T):
            state = net.cell(x[:, t], state)
            outputs.append(state[0] if kind is nn.LSTMCell else state)
        return torch.stack(outputs, 1)

    return lambda: Net(run, cell=kind(D, H))


def packed():
    """Build a recurrent network of packed sequences of several lengths."""

    def run(net, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(net.rnn(packed)[0], batch_first=True, total_length=T)[0]

    return Net(run, rnn=nn.GRU(D, H, batch_first=True))


def sequences_of_lengths(n):
    x, y = inputs(T, D)(n)
    return (x, 1 + torch.arange(n) % T), y


def used_twice():
    run = lambda net, x: net.rnn(net.rnn(x)[0])[0]
    return Net(run, rnn=nn.LSTM(D, D, batch_first=True))


def in_late_build(make):
    return lambda: make()()


LAYERS = {
    "lstm": lambda: recurrent(nn.LSTM),
    "lstm-deep": lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm-projected": lambda: recurrent(nn.LSTM, proj_size=3),
    "lstm-sequence-first": lambda: recurrent(nn.LSTM, batch_first=False, bias=False),
    "gru": lambda: recurrent(nn.GRU),
    "gru-deep": lambda: recurrent(nn.GRU, num_layers=2, bidirectional=True),
    "rnn-tanh": lambda: recurrent(nn.RNN),
    "rnn-relu": lambda: recurrent(nn.RNN, nonlinearity="relu", num_layers=2),
    "lstm-given-state": lambda: given_state(nn.LSTM),
    "gru-given-state": lambda: given_state(nn.GRU),
}

CASES = [
    *(Case(name, in_late_build(make), inputs(T, D), rules="rnn") for name, make in LAYERS.items()),
    Case("lstm-used-twice", used_twice, inputs(T, D), rules="rnn"),
    Case(
        "gru-partly-frozen",
        lambda: frozen(recurrent(nn.GRU)(), "rnn.weight_hh", "rnn.bias_ih"),
        inputs(T, D),
        rules="rnn",
    ),
    *(
        Case(name, in_late_build(lambda kind=kind: cell(kind)), inputs(T, D), rules="cell linear")
        for name, kind in {
            "lstm-cell": nn.LSTMCell,
            "gru-cell": nn.GRUCell,
            "rnn-cell": nn.RNNCell,
        }.items()
    ),
    Case(
        "packed-sequence",
        packed,
        sequences_of_lengths,
        may_refuse="pack_padded_sequence",
    ),
]
