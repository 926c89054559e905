"""Join the batch norms of all rows in a traced step to one formula, for torch's compiler.

In training mode every row has its own statistics, so a step calls the kernel of torch M times in
every layer, forward and backward. The compiler takes each call apart and compiles it on its own.
The same formula over a tensor of all rows is compiled once, and joined with what surrounds it:
ResNet18 with 8 rows compiles in a third of the time, and a step takes 0.85x as long.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gradfilter.transforms._trace import arguments_of

aten: Any = torch.ops.aten

WIDE = (torch.float32, torch.float64)
"""The dtypes in which torch's kernel computes as it stores."""

RESULTS = ("out", "save_mean", "save_invstd")
"""The arguments into which a norm writes its results."""


def join_batch_norms(graph: GraphModule) -> None:
    """Replace the batch norms of all rows of a layer by one formula; only the rounding differs."""
    for layer in _layers(graph, aten.native_batch_norm_backward.default, ()):
        _join_backward(graph, layer)
    for layer in _layers(graph, aten.native_batch_norm.out, ("momentum",)):
        _join_forward(graph, layer)


# --- Find the calls that belong together ---


@dataclass(frozen=True)
class _Layer:
    """The calls of one layer in one pass, for the rows 0, 1, ... in order.

    Attributes:
        norms: The calls.
        tensors: The tensors of all rows, by the name of the argument that is a slice of them.
        shared: The other arguments, which are those of all calls.
    """

    norms: list[Node]
    tensors: dict[str, Node]
    shared: dict[str, Any]

    @property
    def over(self) -> list[int]:
        """The axes of samples and positions of x, (M, B, C, ...)."""
        return [1, *range(3, self.tensors["input"].meta["val"].ndim)]


def _layers(graph: GraphModule, target: Any, own: Collection[str]) -> list[_Layer]:
    """Find the layers whose calls read slices of one tensor, one for each row in order.

    Args:
        graph: The step.
        target: The operation.
        own: The names of arguments that may differ from row to row without being slices.
    """
    found: dict[tuple[Any, ...], list[tuple[int, Node]]] = {}
    layers: dict[tuple[Any, ...], tuple[dict[str, Node], dict[str, Any]]] = {}
    for node in graph.graph.nodes:
        if node.target is target:
            arguments = arguments_of(node)
            slices = {name: s for name, v in arguments.items() if (s := _slice(v)) is not None}
            rows = {row for _, row in slices.values()}
            if len(rows) == 1 and "input" in slices:
                tensors = {name: source for name, (source, _) in slices.items()}
                rest = {k: v for k, v in arguments.items() if k not in slices and k not in own}
                key = (*tensors.items(), *((name, str(value)) for name, value in rest.items()))
                layers[key] = tensors, rest
                found.setdefault(key, []).append((rows.pop(), node))
    return [
        _Layer([node for _, node in calls], *layers[key])
        for key, calls in found.items()
        if _is_whole(layers[key][0]["input"].meta["val"], [row for row, _ in calls])
    ]


def _is_whole(x: torch.Tensor, rows: list[int]) -> bool:
    """Return whether these are all rows in order, of known sizes and the computation's dtype."""
    known = all(isinstance(size, int) for size in x.shape)
    return known and x.dtype in WIDE and len(rows) > 1 and rows == list(range(len(x)))


def _slice(value: Any) -> tuple[Node, int] | None:
    """Return the source and the row m if a value is ``source[m]``."""
    if isinstance(value, Node) and value.target is aten.select.int and value.args[1] == 0:
        source, _, row = value.args
        if isinstance(source, Node) and isinstance(row, int):
            return source, row
    return None


def _read_between(layer: _Layer, written: set[Node]) -> bool:
    """Return whether another operation reads what the calls write, before the last of them."""
    node = layer.norms[0]
    while node is not layer.norms[-1]:
        node = node.next
        if node.target is aten.select.int:
            if node.args[0] in written:
                written.add(node)
        elif node not in layer.norms and written.intersection(node.all_input_nodes):
            return True
    return False


# --- The formulas ---


class _Writer:
    """Adds operations to a graph before a node."""

    def __init__(self, graph: GraphModule, before: Node) -> None:
        self._module, self._graph, self._before = graph, graph.graph, before

    def __call__(self, target: Any, *args: Any) -> Node:
        with self._graph.inserting_before(self._before):
            return self._graph.call_function(target, args)

    def constant(self, values: list[float], like: torch.Tensor) -> Node:
        """Return a vector that the graph holds."""
        name = f"_shares_{len(dict(self._module.named_buffers()))}"
        numbers = torch.tensor(values, dtype=like.dtype, device=like.device)
        self._module.register_buffer(name, numbers)
        with self._graph.inserting_before(self._before):
            return self._graph.get_attr(name)

    def per_channel(self, vector: Node, over: list[int]) -> Node:
        """Return (..., C) with an axis of length 1 for each dim of a position."""
        for _ in over[1:]:
            vector = self(aten.unsqueeze.default, vector, -1)
        return vector

    def per_row(self, matrix: Node, over: list[int]) -> Node:
        """Return (M, C) as (M, 1, C, 1, ...)."""
        return self.per_channel(self(aten.unsqueeze.default, matrix, 1), over)

    def scaled(self, value: Node, weight: Node | None, over: list[int]) -> Node:
        """Multiply by a weight (C,), if there is one."""
        if weight is None:
            return value
        return self(aten.mul.Tensor, value, self.per_channel(weight, over))


def _join_forward(graph: GraphModule, layer: _Layer) -> None:
    """Compute y = w (x − mean) / √(var + ε) + b for all rows, and the running statistics."""
    x, over = layer.tensors["input"], layer.over
    results = [layer.tensors.get(name) for name in RESULTS]
    weight, bias, mean, var = (
        layer.shared[name] for name in ("weight", "bias", "running_mean", "running_var")
    )
    written = {node for node in (*results, mean, var) if node is not None}
    statistics = [node.meta["val"].dtype for node in (mean, var) if node is not None]
    if (
        None in results
        or not layer.shared["training"]
        or any(dtype != x.meta["val"].dtype for dtype in statistics)
        or _read_between(layer, set(written))
    ):
        return
    write = _Writer(graph, layer.norms[-1])
    wide_mean = write(aten.mean.dim, x, over, True)
    centred = write(aten.sub.Tensor, x, wide_mean)
    squares = write(aten.mul.Tensor, centred, centred)
    biased = write(aten.mean.dim, squares, over, True)
    inverse = write(aten.rsqrt.default, write(aten.add.Scalar, biased, layer.shared["eps"]))
    y = write(aten.mul.Tensor, centred, write.scaled(inverse, weight, over))
    if bias is not None:
        y = write(aten.add.Tensor, y, write.per_channel(bias, over))
    own_mean, own_inverse = (write(aten.squeeze.dims, v, over) for v in (wide_mean, inverse))
    for place, value in zip(results, (y, own_mean, own_inverse), strict=True):
        write(aten.copy_.default, place, value)
    if mean is not None:
        rates = [arguments_of(norm)["momentum"] for norm in layer.norms]
        _update(write, mean, own_mean, rates)
        n = math.prod(x.meta["val"].shape[axis] for axis in over)
        flat = write(aten.squeeze.dims, biased, over)
        _update(write, var, write(aten.mul.Tensor, flat, n / (n - 1)), rates)
    for norm in layer.norms:
        replace_results(graph, norm, [norm.kwargs[name] for name in RESULTS])


def _update(write: _Writer, running: Node, own: Node, rates: list[float]) -> None:
    """Write what running statistics r are after r ← (1 − a_m) r + a_m s_m for all rows m."""
    kept = [math.prod(1 - rate for rate in rates[m:]) for m in range(len(rates) + 1)]
    shares = [rate * rest for rate, rest in zip(rates, kept[1:], strict=True)]
    column = write(aten.unsqueeze.default, write.constant(shares, running.meta["val"]), 1)
    new = write(aten.sum.dim_IntList, write(aten.mul.Tensor, own, column), [0])
    old = write(aten.mul.Scalar, running, kept[0])
    write(aten.copy_.default, running, write(aten.add.Tensor, old, new))


def _join_backward(graph: GraphModule, layer: _Layer) -> None:
    """Compute the gradients of x, w and b for all rows.

    With the unit input u = (x − mean) / √(var + ε) and the means over samples and positions of a
    row, they are w / √(var + ε) (g − mean(g) − u mean(g u)), Σ g u and Σ g.
    """
    x, over = layer.tensors["input"], layer.over
    grad, mean, inverse = (
        layer.tensors.get(name) for name in ("grad_out", "save_mean", "save_invstd")
    )
    if grad is None or mean is None or inverse is None or not layer.shared["train"]:
        return
    write = _Writer(graph, layer.norms[0])
    wide_inverse = write.per_row(inverse, over)
    centred = write(aten.sub.Tensor, x, write.per_row(mean, over))
    unit = write(aten.mul.Tensor, centred, wide_inverse)
    along = write(aten.mul.Tensor, grad, unit)
    found: list[Node | None] = [None, None, None]
    wanted = layer.shared["output_mask"]
    if wanted[0]:
        rest = write(aten.sub.Tensor, grad, write(aten.mean.dim, grad, over, True))
        slope = write(aten.mul.Tensor, unit, write(aten.mean.dim, along, over, True))
        rest = write(aten.sub.Tensor, rest, slope)
        gain = write.scaled(wide_inverse, layer.shared["weight"], over)
        found[0] = write(aten.mul.Tensor, rest, gain)
    if wanted[1]:
        found[1] = write(aten.sum.dim_IntList, along, over)
    if wanted[2]:
        found[2] = write(aten.sum.dim_IntList, grad, over)
    rows = range(len(layer.norms))
    slices = [
        [] if value is None else [write(aten.select.int, value, 0, row) for row in rows]
        for value in found
    ]
    for row, norm in enumerate(layer.norms):
        replace_results(graph, norm, [of_rows[row] if of_rows else None for of_rows in slices])
    for value, of_rows in zip(found, slices, strict=True):
        if value is None:
            continue
        for user in list(of_rows[0].users):
            if user.target is aten.stack.default and user.args == (of_rows,):
                user.replace_all_uses_with(value)
                graph.graph.erase_node(user)


def replace_results(graph: GraphModule, norm: Node, results: list[Any]) -> None:
    """Let the users of a call's results use others, and erase the call."""
    for user in list(norm.users):
        index: Any = user.args[1]
        user.replace_all_uses_with(results[index])
        graph.graph.erase_node(user)
    graph.graph.erase_node(norm)
