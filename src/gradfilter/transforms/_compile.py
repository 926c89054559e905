"""Compile a training step: trace it once for its shapes, and run the graph from then on."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._info import Info
from gradfilter.grads._batch import plain
from gradfilter.grads._call_context import random_state, random_state_restored, set_random_state
from gradfilter.grads._error_notes import stacklevel
from gradfilter.grads._normalized_loss import NormalizedLoss
from gradfilter.transforms._host_changes import HostState
from gradfilter.transforms._trace import Trace, trace
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
    """

    trace: Trace
    run: Callable[..., Any]
    outside: tuple[Any, ...]
    host: HostState

    def is_valid(self) -> bool:
        """Return whether what the trace found outside of its arguments is still so."""
        return self.host.changed() is None and self.outside == tuple(
            _kind_of(place()) for place in self.trace.outside
        )


@dataclass(eq=False)
class CompiledStep:
    """``compiled(state, batch, **extra) -> (state, info)``, made by `compile`.

    Attributes:
        step: The step that is compiled.
        backend: The compiler: "inductor", "graph", or a function.

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
    backend: str | Backend
    _entries: OrderedDict[Any, _CompiledTrace] = field(
        default_factory=OrderedDict, init=False, repr=False
    )
    _traces: int = field(default=0, init=False, repr=False)
    _last_key: Any = field(default=None, init=False, repr=False)

    def init(self, model: nn.Module | dict[str, Tensor], *, seed: int | None = None) -> TrainState:
        """Return the first state; see `TrainStep`."""
        return self.step.init(model, seed=seed)

    def __call__(
        self, state: TrainState, batch: Any, *more: Any, donate: bool = False, **extra: Any
    ) -> tuple[TrainState, Info]:
        """Run one step; see `TrainStep`. The first step with new shapes traces and compiles.

        Raises:
            RuntimeError: The step reads the value of a tensor, draws from Python's or NumPy's
                generators, or changes a Python attribute: none of these can be in a graph.
        """
        if more or not isinstance(state, dict) or "random" not in state:
            return self.step(state, batch, *more, donate=donate, **extra)  # raises the clear error
        given: dict[str, Any] = {
            "state": {name: tree for name, tree in state.items() if name != "random"},
            "batch": plain(batch),
            "extra": extra,
        }
        leaves, _ = _tree.flatten_with_names(given)
        kinds = {name: _kind_of(leaf) for name, leaf in leaves.items()}
        key = (tuple(kinds.items()), donate, _surroundings(self._modules()))
        entry = self._entries.get(key)
        if entry is None or not entry.is_valid():
            self._warn_of_retrace(key, entry)
            entry = self._entries[key] = self._compile(given, donate)
            while len(self._entries) > MOST_TRACES:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        tensors = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor)]
        outside = [place() for place in entry.trace.outside]
        device = _tree.device_of(state["params"])
        random = dict(state["random"])
        with torch.no_grad(), ExitStack() as stack:
            if entry.trace.draws:
                stack.enter_context(random_state_restored(device))
                set_random_state(random, device)
            results = entry.run(*tensors, *outside)
            if entry.trace.draws:
                random = random_state(device)
        new, info = entry.trace.rebuild(results)
        if donate:
            _put_back(state, new)
        new["random"] = random
        return new, Info(info)

    def _modules(self) -> dict[str, nn.Module]:
        loss = self.step.grads_of.loss
        return NormalizedLoss.of(loss, self.step.grads_of.has_aux).modules

    def _compile(self, given: dict[str, Any], donate: bool) -> _CompiledTrace:
        normalized = NormalizedLoss.of(self.step.grads_of.loss, self.step.grads_of.has_aux)
        host = HostState.now(normalized, self.step.update)

        def run(tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            before: Any = {**tree["state"], "random": {"draws": 0}}
            new: Any
            new, info = self.step(before, tree["batch"], donate=donate, **tree["extra"])
            random = new.pop("random")
            return (new, dict(info)), random

        traced = partial(trace, run, given, tuple(normalized.modules.values()))
        with host.kept(traced):
            found = traced()
        outside = tuple(_kind_of(place()) for place in found.outside)
        return _CompiledTrace(found, self._compiler()(found.graph), outside, host)

    def _compiler(self) -> Backend:
        if self.backend == "graph":
            return lambda graph: graph
        if self.backend == "inductor":
            return _by_inductor
        assert callable(self.backend)
        return self.backend

    def _warn_of_retrace(self, key: Any, stale: _CompiledTrace | None) -> None:
        last, self._last_key = self._last_key, key
        self._traces += 1
        if self._traces <= EXPECTED_TRACES:
            return
        why = "the Python state of the loss, or a tensor outside of the state, has changed"
        if stale is None:
            names = ("state, batch or keywords", "donate", "modes and settings")
            parts = zip(names, last, key, strict=True)
            why = " and ".join(name for name, old, new in parts if old != new) + " differ"
        warnings.warn(
            f"gradfilter.compile: trace number {self._traces} of this step, because {why} from "
            "those of the last trace. Each trace is compiled anew. Pass numbers that change as "
            "tensors, and drop the last incomplete batch or keep to one size.",
            stacklevel=stacklevel(),
        )


def _by_inductor(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(graph, fullgraph=True, dynamic=False)
    return compiled


def _put_back(old: Any, new: Any) -> None:
    """Put the results of a donated step into their old tensors, where a compiler has moved them."""
    for part in ("params", "transforms"):
        new[part] = _tree.tree_map(_into, old[part], new[part])


def _into(old: Any, new: Any) -> Any:
    if not isinstance(old, Tensor) or old is new:
        return new
    same = old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
    return old if same and old.stride() == new.stride() else old.copy_(new)


# --- The key of the cache: everything that a trace depends on ---


def _kind_of(leaf: Any) -> Any:
    """Return what a graph fixes of a leaf: all of a tensor except for its values."""
    if not isinstance(leaf, Tensor):
        return type(leaf), repr(leaf)
    return (
        type(leaf),
        tuple(leaf.shape),
        leaf.stride(),
        leaf.dtype,
        leaf.device,
        leaf.is_conj(),
        leaf.is_neg(),
    )


def _surroundings(modules: dict[str, nn.Module]) -> Any:
    """Return the modes of the modules and the settings of torch that change what is computed."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    attention: Any = torch.backends.cuda  # its functions are not annotated
    return (
        tuple(
            (
                name,
                id(module),
                module.training,
                tuple(
                    (n, p is not None and p.requires_grad) for n, p in module._parameters.items()
                ),
            )
            for name, module in modules.items()
        ),
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


def compile(step: TrainStep, *, backend: str | Backend = "inductor") -> CompiledStep:
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
        step: The result of `train_step`.
        backend: "inductor" for torch's compiler, "graph" for the graph without a compiler, or a
            function that is called with the `torch.fx.GraphModule` and returns a function of the
            same tensors.

    Returns:
        A `CompiledStep`, which is called as the step is, also with ``donate=True``. State, batch
        and results are those of the step, so states are saved and loaded as usual.

    Raises:
        TypeError: ``step`` is not made by `train_step`.
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
    if not isinstance(step, TrainStep):
        raise TypeError(
            f"Expected a step made by train_step, found {type(step).__name__}. Build it with "
            "train_step(loss, update)."
        )
    if not callable(backend) and backend not in ("inductor", "graph"):
        raise ValueError(
            f'Expected backend "inductor", "graph" or a function of a GraphModule, found '
            f"{backend!r}."
        )
    return CompiledStep(step, backend)
