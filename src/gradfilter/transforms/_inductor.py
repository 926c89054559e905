"""Compile a graph of aten operations by torch's compiler."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from gradfilter.transforms._joined_norms import RESULTS, join_batch_norms, replace_results
from gradfilter.transforms._trace import updates_statistics

aten: Any = torch.ops.aten


def by_inductor(graph: GraphModule) -> Callable[..., Any]:
    """Compile a graph; a graph with symbolic sizes is compiled again when a size changes first."""
    for node in list(graph.graph.nodes):
        if node.target is aten.add.Tensor:
            _keep_apart_from_a_product(graph, node)
    join_batch_norms(graph)
    for node in list(graph.graph.nodes):
        if node.target is aten.native_batch_norm.out:
            _copy_the_results(graph, node)
        elif updates_statistics(node):
            _declare_the_update(graph, node)
    graph.recompile()
    symbolic = any(isinstance(node.meta.get("val"), torch.SymInt) for node in graph.graph.nodes)
    compiled: Callable[..., Any] = torch.compile(
        graph, fullgraph=True, dynamic=None if symbolic else False
    )
    return compiled


def _keep_apart_from_a_product(graph: GraphModule, add: Node) -> None:
    """Write a + b as b − (−a) if b is a large matrix product on a CPU: the same bits.

    The compiler would join sum and product to one call (addmm). On a CPU this call copies a into
    its result first, so that the momentum of a large weight would be written twice.
    """
    if add.kwargs or len(add.args) != 2:
        return
    for other, product in (add.args, add.args[::-1]):
        if isinstance(other, Node) and isinstance(product, Node) and _is_product(product):
            value = product.meta["val"]
            if value.device.type == "cpu" and other.meta["val"].shape == value.shape:
                with graph.graph.inserting_before(add):
                    negated = graph.graph.call_function(aten.neg.default, (other,))
                    negated.meta["val"] = other.meta["val"]
                    new = graph.graph.call_function(aten.sub.Tensor, (product, negated))
                new.meta = dict(add.meta)
                add.replace_all_uses_with(new)
                graph.graph.erase_node(add)
                return


def _copy_the_results(graph: GraphModule, norm: Node) -> None:
    """Let a norm return its results, and copy them where it has written them.

    The compiler takes this form of the operation apart too late to see that it writes into them.
    """
    with graph.graph.inserting_before(norm):
        found = graph.graph.call_function(aten._native_batch_norm_legit.default, norm.args)
        for i, name in enumerate(RESULTS):
            result = graph.graph.call_function(operator.getitem, (found, i))
            graph.graph.call_function(aten.copy_.default, (norm.kwargs[name], result))
    replace_results(graph, norm, [norm.kwargs[name] for name in RESULTS])


def _declare_the_update(graph: GraphModule, norm: Node) -> None:
    """Replace a norm by one whose schema says that it updates running statistics.

    The compiler would drop the update of the other.
    """
    args: tuple[Any, ...]
    if norm.target is aten.native_batch_norm.default:
        args = norm.args
    elif norm.target is aten.batch_norm_update_stats.default and not norm.users:
        x, mean, var, momentum = norm.args
        args = x, None, None, mean, var, True, momentum, 0.0
    else:
        return
    with graph.graph.inserting_before(norm):
        declared = graph.graph.call_function(aten._native_batch_norm_legit.default, args)
    norm.replace_all_uses_with(declared)
    graph.graph.erase_node(norm)


def _is_product(node: Any) -> bool:
    """Return whether a node is a matrix product, perhaps seen in another shape."""
    while isinstance(node, Node) and node.target in (
        aten.view.default,
        aten._unsafe_view.default,
    ):
        node = node.args[0]
    return isinstance(node, Node) and node.target is aten.mm.default
