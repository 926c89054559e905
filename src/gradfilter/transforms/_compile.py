"""Compile a training step: trace it once for its shapes, and run the graph from then on."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._info import Info
from gradfilter._types import State, Transform
from gradfilter.grads._batch import mark_samples, plain
from gradfilter.grads._call_context import random_state, random_state_restored, set_random_state
from gradfilter.grads._error_notes import stacklevel
from gradfilter.grads._loss import ModelLoss
from gradfilter.grads._microbatch import GradFunction
from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.grads._recorded_draws import START
from gradfilter.grads._state_owners import values_in
from gradfilter.transforms._host_changes import HostState
from gradfilter.transforms._inductor import by_inductor
from gradfilter.transforms._symbolic_sizes import FixedSizes
from gradfilter.transforms._trace import Donated, Run, Trace, trace
from gradfilter.transforms._train_step import TrainState, TrainStep

Backend = Callable[[torch.fx.GraphModule], Callable[..., Any]]
"""Compiles a graph of aten operations; the result takes and returns the same tensors."""

MOST_TRACES = 16
"""The number of traces that are kept; the one that was used longest ago is dropped."""

EXPECTED_TRACES = 2
"""The number of traces without a warning: one, and one for a last batch of another size."""


@dataclass(frozen=True, eq=False)
class _CompiledTrace:
    """A compiled trace.

    Attributes:
        trace: The traced step.
        run: The compiled graph.
        outside: The kinds of the tensors from outside that the graph reads.
        host: The Python state that the trace depends on.
        others: The modes of the modules that are reached in other ways than by the losses.
    """

    trace: Trace
    run: Callable[..., Any]
    outside: tuple[Any, ...]
    host: HostState
    others: Any

    def is_valid(self) -> bool:
        """Return whether what the trace found outside of its arguments is still so."""
        return (
            self.host.changed() is None
            and self.host.read.changed() is None
            and self.others == _modes_of(_named(self.host.read.modules))
            and self.outside == tuple(_kind_of(place()) for place in self.trace.outside)
        )


@dataclass(frozen=True, eq=False)
class Moment:
    """What a run of a graph depended on in addition to its inputs.

    Attributes:
        outside: The tensors from outside that it read.
    """

    outside: tuple[Any, ...]
    _entry: _CompiledTrace
    _surroundings: Any

    @property
    def calls(self) -> tuple[Any, ...]:
        """The draws of random numbers that it ran."""
        return self._entry.trace.calls

    def is_present(self, parts: Parts) -> bool:
        """Return whether the Python state, the modes and the settings are still those."""
        return _surroundings(parts.modules) == self._surroundings and self._entry.is_valid()


@dataclass(frozen=True, eq=False)
class Parts:
    """The losses and transforms that a function is made of.

    Attributes:
        losses: The losses, with their modules as they are now.
        updates: The transforms.
        owners: Other objects whose attributes the function may read.
    """

    losses: tuple[NormalizedLoss, ...]
    updates: tuple[Transform, ...]
    owners: tuple[Any, ...] = ()

    @classmethod
    def of_step(cls, step: TrainStep) -> Parts:
        """Return the parts of a training step."""
        grads_of = step.grads_of
        return cls((NormalizedLoss.of(grads_of.loss, grads_of.has_aux),), (step.update,))

    @classmethod
    def of_function(cls, function: Callable[..., Any]) -> Parts:
        """Return the parts that a function of the user refers to."""
        steps, losses, updates, owners = [], [], [], []
        for value in values_in(function, names=True):
            if isinstance(value, TrainStep):
                steps.append(value)
            elif isinstance(value, GradFunction):
                losses.append(NormalizedLoss.of(value.loss, value.has_aux))
            elif isinstance(value, Transform):
                updates.append(value)
            elif isinstance(value, nn.Module):
                losses.append(NormalizedLoss.of(ModelLoss(value, None), False))
            else:
                owners.append(value)
        for part in map(cls.of_step, steps):
            losses.extend(part.losses)
            updates.extend(part.updates)
        return cls(tuple(losses), tuple(updates), tuple(owners))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of the losses, each under a name of its own."""
        return {
            f"{i}.{name}": module
            for i, loss in enumerate(self.losses)
            for name, module in loss.modules.items()
        }


@dataclass(eq=False)
class Graphs:
    """The compiled traces of one function, for different shapes and modes.

    Attributes:
        backend: The compiler: "inductor", "graph", or a function.
        dynamic: True if one trace may hold for several sizes of the batch.
        entries: The traces for each key; several only for different sizes of the batch.
    """

    backend: str | Backend
    dynamic: bool = False
    entries: OrderedDict[Any, list[_CompiledTrace]] = field(
        default_factory=OrderedDict, init=False, repr=False
    )
    _traces: int = field(default=0, init=False, repr=False)
    _last_key: Any = field(default=None, init=False, repr=False)

    def run(
        self,
        function: Run,
        given: dict[str, Any],
        parts: Parts,
        *,
        options: Any = None,
        random: dict[str, Any] | None = None,
        donated: Donated | None = None,
    ) -> tuple[Any, dict[str, Any] | None, Moment]:
        """Return ``function(given)``, computed by a graph.

        Args:
            function: A pure function of a tree, called only to be traced: see `trace`.
            given: Its argument.
            parts: What the function is made of.
            options: Everything else that it depends on, comparable.
            random: The state of the generators to draw from; None to draw from the generators as
                they are, and to advance them.
            donated: Chooses the results that are written into tensors of the argument; ``options``
                must tell one choice from another.

        Returns:
            The result, the random state after it if one was given, and what the graph depended on.
        """
        leaves, _ = _tree.flatten_with_names(given)
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        sized = {name for name in tensors if self.dynamic and name.split(".")[0] == "batch"}
        kinds = {name: _kind_of(leaf, name in sized) for name, leaf in leaves.items()}
        surroundings = _surroundings(parts.modules)
        key = (tuple(kinds.items()), options, surroundings)
        inputs = list(tensors.values())
        known = self.entries.get(key, [])
        entry = next((e for e in known if e.trace.sizes.hold_for(inputs)), None)
        if entry is None or not entry.is_valid():
            self._warn_of_retrace(key, entry)
            symbolic = [i for i, name in enumerate(tensors) if name in sized]
            new = self._compile(function, given, parts, donated, symbolic)
            self._keep(key, new, entry)
            entry = new
        self.entries.move_to_end(key)
        outside = tuple(place() for place in entry.trace.outside)
        with torch.no_grad(), ExitStack() as stack:
            for context in entry.trace.around:
                stack.enter_context(context())
            if entry.trace.calls and random is not None:
                device = _device_of(inputs)
                stack.enter_context(random_state_restored(device))
                set_random_state(random, device)
                results = entry.run(*inputs, *outside)
                random = random_state(device)
            else:
                results = entry.run(*inputs, *outside)
        moment = Moment(outside, entry, surroundings)
        return entry.trace.result(results, inputs), random, moment

    def _keep(self, key: Any, new: _CompiledTrace, stale: _CompiledTrace | None) -> None:
        """Keep a trace in place of one that is not valid any more, and drop the oldest ones."""
        self.entries[key] = [
            *(e for e in self.entries.get(key, []) if e is not stale),
            new,
        ]
        self.entries.move_to_end(key)
        while sum(map(len, self.entries.values())) > MOST_TRACES:
            oldest = next(iter(self.entries))
            del self.entries[oldest][0]
            if not self.entries[oldest]:
                del self.entries[oldest]

    def _compile(
        self,
        function: Run,
        given: dict[str, Any],
        parts: Parts,
        donated: Donated | None,
        symbolic: Collection[int],
    ) -> _CompiledTrace:
        host = HostState.now(parts.losses, parts.updates, parts.owners)
        others = _named(host.read.modules)
        modules = [*parts.modules.values(), *others.values()]
        traced = partial(trace, function, given, modules, donated)
        with host.kept(traced):
            found = traced()
        if symbolic:
            tensors = [leaf for leaf in _tree.leaves(given) if isinstance(leaf, Tensor)]
            shapes = FixedSizes({i: tensors[i].shape for i in symbolic})
            found = _with_symbolic_sizes(partial(traced, symbolic), replace(found, sizes=shapes))
        outside = tuple(_kind_of(place()) for place in found.outside)
        run = self._compiler()(found.graph)
        return _CompiledTrace(found, run, outside, host, _modes_of(others))

    def _compiler(self) -> Backend:
        if self.backend == "graph":
            return lambda graph: graph
        if self.backend == "inductor":
            return by_inductor
        assert callable(self.backend)
        return self.backend

    def _warn_of_retrace(self, key: Any, stale: _CompiledTrace | None) -> None:
        last, self._last_key = self._last_key, key
        self._traces += 1
        if self._traces <= EXPECTED_TRACES:
            return
        why = "the Python state of the loss, or a tensor outside of the state, has changed"
        if stale is None:
            names = ("state, batch or keywords", "options", "modes and settings")
            parts = zip(names, last, key, strict=True)
            changed = [name for name, old, new in parts if old != new] or ["sizes of the batch"]
            why = " and ".join(changed) + " differ"
        warnings.warn(
            f"gradfilter.compile: trace number {self._traces} of this step, because {why} from "
            "those of the last trace. Each trace is compiled anew. Pass numbers that change as "
            "tensors, and drop the last incomplete batch or keep to one size.",
            stacklevel=stacklevel(),
        )


@dataclass(eq=False)
class CompiledStep:
    """``compiled(state, batch, **extra) -> (state, info)``, made by `compile`.

    Attributes:
        step: The step that is compiled.
        graphs: Its compiled traces, and their backend.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, x: (params["w"] * x).sum(1).mean()
        >>> step = gf.train_step(loss, gf.chain(gf.mean_rows(), gf.sgd(1.0)), microbatches=2)
        >>> compiled = gf.compile(step, backend="graph")
        >>> state, info = compiled(compiled.init({"w": torch.zeros(2)}), torch.eye(2))
        >>> state["params"]["w"]
        tensor([-0.5000, -0.5000])
    """

    step: TrainStep
    graphs: Graphs

    def init(self, model: nn.Module | dict[str, Tensor], *, seed: int | None = None) -> TrainState:
        """Return the first state; see `TrainStep`."""
        return self.step.init(model, seed=seed)

    def __call__(
        self,
        state: TrainState,
        batch: Any,
        *more: Any,
        donate: bool = False,
        sample_weights: Tensor | None = None,
        groups: Tensor | None = None,
        **extra: Any,
    ) -> tuple[TrainState, Info]:
        """Run one step; see `TrainStep`. The first step with new shapes traces and compiles.

        Raises:
            RuntimeError: The step reads the value of a tensor, draws from Python's or NumPy's
                generators, or changes a Python attribute: none of these can be in a graph.
        """
        if more or not isinstance(state, dict) or "random" not in state:
            return self.step(state, batch, *more, donate=donate, **extra)  # raises the clear error
        update, transforms = self.step.update, state["transforms"]
        batch = mark_samples(batch, sample_weights, groups, self.step.grads_of.microbatches)
        given: TrainState = {**state, "transforms": decided(update, transforms)}
        new, info = _run(
            self.graphs,
            self.step,
            Parts.of_step(self.step),
            (given, batch, extra),
            (donate, decisions(update, transforms)),
            _params_and_transforms if donate else None,
        )
        new["transforms"] = counted(update, new["transforms"], transforms)
        if donate:  # the graph has written all but the counters, which it has not seen
            _tree.donate_into(transforms, new["transforms"])
            new["transforms"] = transforms
        return new, Info(info)


@dataclass(eq=False)
class CompiledFunction:
    """``compiled(state, batch, **extra) -> (state, info)`` of a function, made by `compile`.

    Attributes:
        function: The function that is compiled.
        graphs: Its compiled traces, and their backend.

    Examples:
        >>> import torch, gradfilter as gf
        >>> grads_of = gf.per_sample_grads(lambda params, x: (params["w"] * x).sum(1).mean())
        >>> update = gf.chain(gf.clip_per_row(1.0), gf.mean_rows(), gf.sgd(1.0))
        >>> def step(params, x):
        ...     return update(params, update.init(params), grads_of(params, x))[0], {}
        >>> compiled = gf.compile(step, backend="graph")
        >>> compiled({"w": torch.zeros(2)}, torch.eye(2))[0]["w"]
        tensor([-0.5000, -0.5000])
    """

    function: Callable[..., Any]
    graphs: Graphs

    def __call__(self, state: Any, batch: Any, **extra: Any) -> Any:
        """Run the function; the first call with new shapes traces and compiles.

        Raises:
            RuntimeError: See `CompiledStep`.
        """
        parts = Parts.of_function(self.function)
        return _run(self.graphs, self.function, parts, (state, batch, extra), None)


# --- Counters, by which the host decides which transforms run: a graph for each branch ---


def decisions(update: Transform, state: State) -> tuple[bool, ...]:
    """Return for each counter in a state whether its transform runs in the next call."""
    return () if update.rules is None else tuple(update.rules.decisions(state))


def decided(update: Transform, state: State) -> State:
    """Return a state with decisions in place of counters: a graph cannot read them."""
    return state if update.rules is None else update.rules.decided(state)


def counted(update: Transform, new: State, old: State) -> State:
    """Return a state with counters again, one call after those of ``old``."""
    return new if update.rules is None else update.rules.counted(new, old)


def _run(
    graphs: Graphs,
    function: Callable[..., Any],
    parts: Parts,
    arguments: tuple[Any, Any, dict[str, Any]],
    options: Any,
    donated: Donated | None = None,
) -> Any:
    """Return ``function(state, batch, **extra)``, whose random state is not a part of the graph."""
    state, batch, extra = arguments
    random: dict[str, Any] | None = None
    if isinstance(state, dict) and isinstance(state.get("random"), dict):
        random = dict(state["random"])
        state = {name: tree for name, tree in state.items() if name != "random"}
    drawing = random is not None

    def run(tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {**tree["state"], "random": START} if drawing else tree["state"]
        found = function(given, tree["batch"], **tree["extra"])
        if not drawing:
            return found, random_state(torch.device("cpu"))
        new, info = found
        new = dict(new)
        after = new.pop("random")
        return (new, dict(info)), after

    given = {"state": state, "batch": plain(batch), "extra": extra}
    found, after, _ = graphs.run(run, given, parts, options=options, random=random, donated=donated)
    if not drawing:
        return found
    new, info = found
    new["random"] = after
    return new, info


def _with_symbolic_sizes(traced: Callable[[], Trace], fixed: Trace) -> Trace:
    """Return a trace with symbolic sizes if it holds the operations of one with fixed sizes.

    Some functions of torch have no rule for symbols. A plan could then take another way to the
    rows, so the operations are compared, and not only the success.
    """
    if fixed.has_forgotten_draws:
        return fixed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trace with fixed sizes has shown them
            found = traced()
    except Exception:
        return fixed
    return found if found.operations() == fixed.operations() else fixed


def _device_of(tensors: list[Tensor]) -> torch.device:
    """Return the device whose generator a computation on these tensors draws from."""
    devices = [tensor.device for tensor in tensors if tensor.device.type != "cpu"]
    return devices[0] if devices else torch.device("cpu")


def _params_and_transforms(given: Any, result: Any) -> list[tuple[Any, Any]]:
    """Choose the parts of a step's state that ``donate=True`` overwrites."""
    new, _ = result
    pairs: list[tuple[Any, Any]] = []
    for part in ("params", "transforms"):
        _tree.tree_map(lambda *pair: pairs.append(pair), given["state"][part], new[part])
    return pairs


# --- The key of the cache: everything that a trace depends on ---


def _kind_of(leaf: Any, sized: bool = False) -> Any:
    """Return what a graph fixes of a leaf: all of a tensor except for its values.

    Args:
        leaf: A tensor or another value.
        sized: True if the sizes are symbols of the trace, which has conditions of its own. The
            sizes 0 and 1 are never symbols: such an axis is empty, or is expanded.
    """
    if not isinstance(leaf, Tensor):
        return type(leaf), repr(leaf)
    layout: Any = (tuple(leaf.shape), leaf.stride())
    if sized and leaf.is_contiguous():
        layout = tuple(min(size, 2) for size in leaf.shape)
    return type(leaf), layout, leaf.dtype, leaf.device, leaf.is_conj(), leaf.is_neg()


GLOBAL_HOOKS: tuple[Any, ...] = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)
"""torch's tables of hooks that run in all modules; their keys are new for every hook."""


def _named(modules: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return modules and their submodules, each under a name of its own."""
    found = {id(part): part for module in modules for part in module.modules()}
    return {str(i): module for i, module in enumerate(found.values())}


def _modes_of(modules: dict[str, nn.Module]) -> Any:
    """Return the modes of modules, their hooks, and which of their parameters are trainable."""
    return tuple(
        (
            name,
            id(module),
            module.training,
            tuple((n, p is not None and p.requires_grad) for n, p in module._parameters.items()),
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks),
            tuple(module._backward_hooks),
            tuple(module._backward_pre_hooks),
        )
        for name, module in modules.items()
    )


def _surroundings(modules: dict[str, nn.Module]) -> Any:
    """Return the modes of the modules and the settings of torch that change what is computed."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    attention: Any = torch.backends.cuda  # its functions are not annotated
    return (
        _modes_of(modules),
        tuple(map(tuple, GLOBAL_HOOKS)),
        tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.mkldnn.enabled,
        attention.flash_sdp_enabled(),
        attention.math_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.cudnn_sdp_enabled(),
        torch.is_inference_mode_enabled(),
    )


def check_backend(backend: str | Backend) -> str | Backend:
    """Return a backend, or refuse an unknown one."""
    if not callable(backend) and backend not in ("inductor", "graph"):
        raise ValueError(
            f'Expected backend "inductor", "graph" or a function of a GraphModule, found '
            f"{backend!r}."
        )
    return backend


@overload
def compile(
    step: TrainStep, *, backend: str | Backend = "inductor", dynamic: bool = False
) -> CompiledStep: ...
@overload
def compile(
    step: Callable[..., Any], *, backend: str | Backend = "inductor", dynamic: bool = False
) -> CompiledFunction: ...
def compile(
    step: Callable[..., Any], *, backend: str | Backend = "inductor", dynamic: bool = False
) -> CompiledStep | CompiledFunction:
    """Compile a step of `train_step`: forward pass, backward pass, filter and update in one graph.

    ``compile(step)(state, batch) = step(state, batch)``, up to the rounding of the compiler; with
    ``backend="graph"``, which runs the traced operations as they are, to the bit (apart from the
    fused kernels of update rules, for which the graph has formulas). The first call with new
    shapes, dtypes, modes or Python values traces the step on tensors without values, and compiles
    the graph. Later calls run it. Values of tensors never cause another trace: the learning rate of
    a schedule and the weights of a frozen layer are inputs of the graph.

    Random numbers of torch are drawn in the graph, from the generator that the state describes: a
    step is a function of its state, as without compiling. The second pass of `sam_perturb` uses the
    numbers of the first. With ``backend="inductor"`` the compiler draws other numbers than torch.

    Args:
        step: The result of `train_step`, or a pure function ``(state, batch, **extra) -> (state,
            info)`` that calls gradient functions, chains or such a step. State and info are any
            trees of tensors. If the state is a dict with the entry ``random`` of `TrainState`, so
            is the new one, and the draws are a function of it; otherwise the function draws from
            torch's generators.
        backend: "inductor" for torch's compiler, "graph" for the graph without a compiler, or a
            function that is called with the `torch.fx.GraphModule` and returns a function of the
            same tensors.
        dynamic: True to trace with symbols in place of the sizes of the batch's tensors. One graph
            then holds for all sizes that take the same way through the step: a last, smaller batch,
            texts of other lengths and pictures of other sides need no second trace, and with one
            row per sample other numbers of rows do not either. The sizes 0 and 1 are never symbols.
            A size that decides how something is computed (``explain()``), or that the loss reads as
            a number, limits the graph to the sizes with the same answer; for others the step is
            traced again. A graph has no loops, so a step that takes the rows one after another is
            traced for every number of rows M: `agree_filter` against the running mean, where the
            verdict on a row depends on the rows before it; BatchNorm in training mode, which
            updates its running statistics M times in order; recurrent layers, and others that
            ``explain()`` lists as "row by row"; the Gram of short lookups in an embedding, and the
            rows of a convolution with groups, which have one product per row; plan ``"loop"``.
            Every size is traced for itself where torch computes something else under symbols, such
            as the dropout inside of `torch.nn.functional.scaled_dot_product_attention`, or has no
            rule for them (some attention in torch 2.11). Compiled code for symbolic sizes may be
            slower.

    Returns:
        A `CompiledStep`, which is called as the step is, also with ``donate=True``, or a
        `CompiledFunction`. State, batch and results are those of the step, so states are saved and
        loaded as usual.

    Raises:
        TypeError: ``step`` cannot be called, or is a transform, a module or a class.
        ValueError: The backend is unknown.

    Examples:
        >>> import torch, gradfilter as gf
        >>> model = torch.nn.Linear(2, 2)
        >>> loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
        >>> step = gf.train_step(loss, gf.chain(gf.mean_rows(), gf.sgd(0.1)), microbatches=2)
        >>> compiled = gf.compile(step, backend="graph")
        >>> state = compiled.init(model)
        >>> state, info = compiled(state, (torch.randn(8, 2), torch.arange(8) % 2))
        >>> sorted(info)
        ['keep', 'loss', 'sgd/lr']
    """
    if not callable(step) or isinstance(step, (Transform, nn.Module, GradFunction, type)):
        raise TypeError(
            f"Expected a step made by train_step, or a function (state, batch) -> (state, info), "
            f"found {type(step).__name__}. Build it with train_step(loss, update)."
        )
    backend = check_backend(backend)
    if isinstance(step, TrainStep):
        return CompiledStep(step, Graphs(backend, dynamic))
    return CompiledFunction(step, Graphs(backend, dynamic))
