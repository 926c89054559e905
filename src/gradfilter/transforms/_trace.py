"""Trace a step as one graph of aten operations.

The step runs once on fake tensors, which have shapes and devices but no values, while `make_fx`
records the operations below autograd and ``torch.func``. So the graph holds forward pass, backward
pass, filter and update, and whatever would read a value raises an error.

The graph is a function of tensors alone: the leaves of state, batch and keywords, and the tensors
from outside that the step used, such as frozen parameters. Random numbers are drawn in the graph.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from gradfilter import _tree
from gradfilter._overlap import storage_of
from gradfilter.grads._call_context import Surrounding, recording
from gradfilter.grads._recorded_draws import CannotRecord, RecordedDraws, draws_nothing, is_draw
from gradfilter.transforms._host_changes import is_users_code
from gradfilter.transforms._symbolic_sizes import FixedSizes, SymbolicRules, SymbolicSizes

aten: Any = torch.ops.aten

COPIES = ("empty", "clone", "_unsafe_view")
"""Operations that compute nothing; which of them a trace has may depend on its symbols."""

SPELLINGS = {
    "_native_batch_norm_legit": "native_batch_norm",
    "_native_batch_norm_legit_no_training": "native_batch_norm",
}
"""Operations that a trace with symbols calls by another name: the kernel is the same."""

Place = Callable[[], Any]
"""Returns the present tensor of a place, such as a frozen parameter of a module."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A step as a graph.

    Attributes:
        graph: The graph: a function of the leaves that are tensors, then of ``outside``.
        outside: The places of the other tensors that it reads.
        writes: Pairs of positions: a result, and the input into which the graph writes it.
        calls: The draws of random numbers that it runs, in order, as `RecordedDraws` has them.
        sizes: The sizes of the inputs for which it holds.
        around: The contexts in which it runs.
        has_forgotten_draws: True if a pass that was given up drew numbers.
    """

    graph: GraphModule
    outside: tuple[Place, ...]
    writes: tuple[tuple[int, int], ...]
    calls: tuple[Any, ...]
    sizes: SymbolicSizes | FixedSizes
    around: tuple[Surrounding, ...]
    has_forgotten_draws: bool
    _rebuild: Callable[[Iterable[Any]], Any]

    def result(self, results: Iterable[Any], inputs: Sequence[Tensor]) -> Any:
        """Return results of the graph in the structure of the step's results."""
        leaves = list(results)
        for position, source in self.writes:
            leaves[position] = inputs[source]
        return self._rebuild(leaves)

    def operations(self) -> list[str]:
        """Return the names of the operations that compute something, in their order."""
        called = (n.target for n in self.graph.graph.nodes if n.op == "call_function")
        names = [
            target._schema.name.removeprefix("aten::").rstrip("_")
            for target in called
            if isinstance(target, torch._ops.OpOverload) and not _is_view(target)
        ]
        computing = (name for name in names if not name.startswith(("sym_", *COPIES)))
        return [SPELLINGS.get(name, name) for name in computing]


Run = Callable[[Any], tuple[Any, dict[str, Any]]]
"""A pure function of a tree; it returns another tree, and the random state after it."""

Donated = Callable[[Any, Any], Iterable[tuple[Any, Any]]]
"""Given the argument and the result, returns pairs of a leaf of each: the one to write into, and
the one to write."""


@dataclass(eq=False)
class _Flat:
    """A function of a tree as a function of the tensors among its leaves.

    Attributes:
        run: The function of the tree.
        leaves: The leaves of the tree; those that are not tensors are constants.
        restore: Puts leaves into the structure of the tree.
        numbers: The random numbers of the trace.
        rebuild: Puts results into the structure of the result; set by a call.
        results: The number of results; set by a call.
        random: The random state after the call.
    """

    run: Run
    leaves: list[Any]
    restore: Callable[[Iterable[Any]], Any]
    numbers: RecordedDraws
    rebuild: Callable[[Iterable[Any]], Any] = list
    results: int = 0
    random: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def writes(self, donated: Donated) -> tuple[tuple[int, int], ...]:
        """Return which result is to be written into which tensor."""
        tensors = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        inputs = {position: i for i, position in enumerate(tensors)}
        given, result = self.restore(range(len(self.leaves))), self.rebuild(range(self.results))
        pairs = donated(given, result)
        return tuple((new, inputs[old]) for old, new in pairs if old in inputs)

    def __call__(self, *tensors: Tensor) -> list[Any]:
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        with self.numbers.recorded():
            result, self.random = self.run(self.restore(filled))
        results, self.rebuild = _tree.flatten(result)
        self.results = len(results)
        return results


def trace(
    run: Run,
    given: Any,
    modules: Iterable[nn.Module],
    donated: Donated | None = None,
    symbolic: Collection[int] = (),
) -> Trace:
    """Trace ``run(given)``, which is called once, on tensors without values.

    Args:
        run: The function.
        given: Its argument. Leaves that are not tensors are constants of the graph.
        modules: The modules whose tensors the function may read.
        donated: Chooses the results that the graph writes into its inputs.
        symbolic: The positions of the tensors, among all tensors of the argument, whose sizes are
            symbols: the trace holds for every size that takes the same way through the function.

    Raises:
        RuntimeError: The function reads the value of a tensor.
    """
    leaves, restore = _tree.flatten(given)
    flat = _Flat(run, leaves, restore, RecordedDraws())
    # Real tensors that the step meets (frozen parameters) become attributes of the graph. Tensors
    # that are fake already bring a mode of their own, and two modes do not mix.
    sizes = SymbolicSizes(tuple(symbolic))
    own_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=sizes.environment)
    fake = detect_fake_mode(flat.tensors()) or own_mode
    mode: Literal["fake", "symbolic"] = "symbolic" if symbolic else "fake"
    try:
        inputs = sizes.inputs(fake, flat.tensors())
        rules = SymbolicRules() if symbolic else nullcontext()
        around: list[Surrounding] = []
        with recording(flat.numbers, around), torch.no_grad(), rules:
            # A lambda, because make_fx counts the parameters of the function itself.
            graph = make_fx(lambda *tensors: flat(*tensors), tracing_mode=mode)(*inputs)
    except Exception as error:
        cause = _cause_of(error)
        if cause is None:
            raise
        raise _untraceable(error, cause) from error
    if flat.random != {"draws": len(flat.numbers.draws)}:
        raise RuntimeError(
            "The step cannot be traced: a repeated pass draws more random numbers than the first "
            "one. Call step(state, batch) instead."
        )
    sizes.close()
    _erase_forgotten(graph, flat.numbers.forgotten)
    _clean(graph)
    writes = () if donated is None else flat.writes(donated)
    _write_into_inputs(graph, writes)
    outside = _lift_constants(graph, modules)
    graph.recompile()
    forgotten, calls = any(flat.numbers.forgotten), flat.numbers.calls
    return Trace(graph, outside, writes, calls, sizes, tuple(around), forgotten, flat.rebuild)


# --- Errors ---


NO_VALUES = ("Cannot convert", "numpy() is not supported", "data pointer of Tensor")
"""torch's texts for a tensor without values whose memory is asked for."""


def _cause_of(error: BaseException | None) -> BaseException | None:
    """Return the error among the causes that comes from the trace, or None.

    A plan may name the operation in an error of its own.
    """
    kinds = (DataDependentOutputException, DynamicOutputShapeException, CannotRecord)
    while error is not None:
        if isinstance(error, kinds) or any(text in str(error) for text in NO_VALUES):
            return error
        error = error.__cause__
    return None


def _untraceable(error: Exception, cause: BaseException) -> RuntimeError:
    """Return the error for a step that reads a value, with the line that does."""
    frames = list(traceback.walk_tb(error.__traceback__))
    frame, line = next((f for f in reversed(frames) if is_users_code(f[0])), frames[-1])
    if isinstance(cause, DataDependentOutputException):
        reason = f"{_name(cause.func)} reads the value of a tensor"
    elif isinstance(cause, DynamicOutputShapeException):
        reason = f"the shape of the result of {_name(cause.func)} depends on values"
    else:
        reason = str(cause).splitlines()[0].rstrip(".")
    file = frame.f_code.co_filename
    return RuntimeError(
        f"The step cannot be traced: {reason}, in {file}, line {line}: "
        f"{linecache.getline(file, line).strip()}\nA graph has no values to read: no .item(), "
        ".tolist(), numpy() or `if` on a tensor. Use torch.where, or call step(state, batch) "
        "without compiling it."
    )


def _name(func: Any) -> str:
    return str(func).removeprefix("aten.").removeprefix("_").split(".")[0]


# --- The graph ---


def _erase_forgotten(graph: GraphModule, forgotten: list[bool]) -> None:
    """Erase the draws of passes that were given up: they would change the numbers of the others."""
    if not any(forgotten):
        return
    drawing = [n for n in graph.graph.nodes if n.op == "call_function" and is_draw(n.target)]
    drawing = [n for n in drawing if not draws_nothing(n.target, n.args, n.kwargs)]
    for node, dead in zip(drawing, forgotten, strict=True):
        if not dead:
            continue
        with graph.graph.inserting_before(node):
            unused: Any = node.args[0]  # a draw in place
            if not node.target._schema.is_mutable:
                numbers = node.meta["val"]
                options = {"dtype": numbers.dtype, "device": numbers.device}
                shape = (list(numbers.shape),)
                unused = graph.graph.call_function(aten.zeros.default, shape, options)
        node.replace_all_uses_with(unused)
        graph.graph.erase_node(node)


def _clean(graph: GraphModule) -> None:
    """Remove dead code, aliases, and views that another node has computed already."""
    seen: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif _is_view(node.target):
            key = (node.target, _hashable(node.args), _hashable(node.kwargs))
            known = seen.setdefault(key, node)
            if known is not node:
                node.replace_all_uses_with(known)
                graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or updates_statistics(node))
    graph.graph.lint()


def updates_statistics(node: Node) -> bool:
    """Return whether a batch norm updates running statistics, which its schema does not say."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    given = arguments_of(node)
    return given.get("running_mean") is not None and given.get("training", True) is True


def arguments_of(node: Node) -> dict[str, Any]:
    """Return the arguments of an operation by name."""
    operation: Any = node.target
    names = [argument.name for argument in operation._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _is_view(target: Any) -> bool:
    """Return whether an operation only shows the memory of its argument in another way."""
    aliased = [a.alias_info for a in target._schema.arguments if a.alias_info is not None]
    return len(aliased) == 1 and not aliased[0].is_write and len(target._schema.returns) == 1


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in sorted(value.items()))
    return value if isinstance(value, Node) else (type(value), value)


def _write_into_inputs(graph: GraphModule, writes: Iterable[tuple[int, int]]) -> None:
    """Write results into inputs at the end of the graph, in place of returning them.

    A compiler then computes each result in the memory of its input.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    results = list(output.args[0])
    targets = [(i, inputs[source]) for i, source in writes]
    memory = {storage_of(target.meta["val"]) for i, target in targets if results[i] is not target}
    unchanged = {i for i, target in targets if results[i] is target}
    with graph.graph.inserting_before(output):
        for i, value in enumerate(results):
            shown = value.meta.get("val") if isinstance(value, Node) else None
            if i not in unchanged and isinstance(shown, Tensor) and storage_of(shown) in memory:
                results[i] = graph.graph.call_function(aten.clone.default, (value,))
                results[i].meta["val"] = shown
        for i, target in targets:
            if i not in unchanged:
                graph.graph.call_function(aten.copy_.default, (target, results[i]))
            results[i] = None
    output.args = (results,)


def _lift_constants(graph: GraphModule, modules: Iterable[nn.Module]) -> tuple[Place, ...]:
    """Make inputs of the tensors that were there before the trace.

    A constant of the graph would keep its value when a frozen parameter is loaded or replaced.
    """
    known = _places_in(modules)
    places: list[Place] = []
    inputs: dict[int, Node] = {}  # by identity: a trace has one constant for each use of a tensor
    last = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if isinstance(tensor, FakeTensor) or _made_in_the_trace(node):
            continue
        if id(tensor) not in inputs:
            places.append(known.get(id(tensor)) or _Entry({"": tensor}, ""))
            first = graph.graph.inserting_after(last[-1]) if last else None
            with first or graph.graph.inserting_before(node):
                new = graph.graph.placeholder(f"outside_{len(places)}")
            last.append(new)
            new.meta = dict(node.meta)
            inputs[id(tensor)] = new
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    return tuple(places)


def _made_in_the_trace(node: Node) -> bool:
    """Return whether a constant was made by a call such as ``torch.tensor(0.5)``."""
    users = list(node.users)
    fresh = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
    return bool(users) and all(user.target in fresh for user in users)


def _places_in(modules: Iterable[nn.Module]) -> dict[int, Place]:
    """Return the places of parameters, buffers and attributes that are tensors, by identity."""
    found: dict[int, Place] = {}
    for module in modules:
        for table in (module._parameters, module._buffers, vars(module)):
            for key, value in table.items():
                if isinstance(value, Tensor):
                    found[id(value)] = _Entry(table, key)
    return found


@dataclass(frozen=True, eq=False)
class _Entry:
    """The present tensor of an entry of a dict."""

    table: Any
    key: str

    def __call__(self) -> Any:
        return self.table[self.key]
