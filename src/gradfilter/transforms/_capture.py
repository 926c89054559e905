"""Run the whole training step as one CUDA graph."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._info import Info
from gradfilter._overlap import copied_where_shared
from gradfilter.grads._batch import plain
from gradfilter.grads._call_context import Rewinds, random_state_restored
from gradfilter.transforms._compile import decisions
from gradfilter.transforms._train_step import TrainState, TrainStep

WARM_UPS = 3  # torch chooses kernels and libraries allocate workspaces


@dataclass(eq=False)
class Captured:
    """``captured(batch, **extra) -> (state, info)``, made by `capture`.

    Attributes:
        graph: The graph that is replayed.
        inputs: The static tensors of the batch and of the extra keywords.
        tensors: The static state except for the random state.
        info: The static info.
        random: The random state after the last step.
        rewinds: The random states that the graph draws from.
        end: The random state from which the next step starts.

    Examples:
        >>> import torch, gradfilter as gf
        >>> def losses(captured: gf.Captured, batches):
        ...     return [captured(batch)[1]["loss"].clone() for batch in batches]
    """

    graph: Any
    inputs: dict[str, Any]
    tensors: dict[str, Any]
    info: Info
    random: dict[str, Tensor]
    rewinds: Rewinds
    end: torch.Generator

    def __call__(self, batch: Any, **extra: Any) -> tuple[TrainState, Info]:
        """Run one step. The results are static tensors, which the next call overwrites."""
        copy_inputs(self.inputs, _inputs(batch, extra))
        self.rewinds.align(self.random["cuda"])
        self.graph.replay()
        self.random = {**self.random, "cuda": self.end.get_state()}
        return self.state, self.info

    @property
    def state(self) -> TrainState:
        """The present state, as `TrainStep` takes and returns it, in the static tensors."""
        state: Any = {**self.tensors, "random": dict(self.random)}
        present: TrainState = state
        return present


@dataclass(frozen=True, eq=False)
class _StepInPlace:
    """A step that reads static tensors and writes its new state into them.

    Attributes:
        step: The step.
        inputs: The static tensors of the batch and of the extra keywords.
        tensors: The static state except for the random state.
    """

    step: TrainStep
    inputs: dict[str, Any]
    tensors: dict[str, Any]

    def advance(self) -> tuple[Info, torch.Generator]:
        """Run the step; return its info, and the generator after it."""
        before: Any = {**self.tensors, "random": {}}
        given = {name: value for name, value in self.inputs.items() if name != "batch"}
        new: Any
        new, info = self.step(before, self.inputs["batch"], **given)
        end: torch.Generator = new.pop("random")["cuda"]
        info = copied_where_shared(info, self.tensors)
        _tree.donate_into(self.tensors, copied_where_shared(new, self.tensors))
        return info, end


def capture(step: TrainStep, state: TrainState, batch: Any, **extra: Any) -> Captured:
    """Record a step of `train_step` as a CUDA graph, which runs without waiting for Python.

    ``captured(batch)`` equals ``step(state, batch)``, beginning with ``state``: forward pass,
    backward pass, filter and update are one launch. The new state and ``info`` are static tensors
    that the next call overwrites; ``clone`` those to keep. Settings that Python reads, such as
    training mode, autocast and every number in the chain, stay as they are at the capture. Random
    numbers drawn on the CPU also stay the same; those drawn on the GPU are the ones that ``step``
    would draw.

    Args:
        step: A step made by `train_step`, without ``chunk_size`` unless its plan is "vmap" or
            "loop".
        state: The state before the first step, on a CUDA device. Not changed.
        batch: An example batch. All later batches need its structure, shapes and dtypes. No step
            is taken on it.
        **extra: ``keep``, ``count``, ``value`` as CUDA tensors; later calls pass the same ones.

    Returns:
        A `Captured`, which runs the steps. Its ``state`` is the present state.

    Raises:
        ValueError: The state, or some of the batch, is not on a CUDA device; or a later batch
            differs from the captured one.
        RuntimeError: The loss or a transform waits for the host.

    Examples:
        >>> import torch, gradfilter as gf
        >>> cuda = torch.cuda.is_available()
        >>> model = torch.nn.Linear(2, 2).to("cuda" if cuda else "cpu")
        >>> loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
        >>> step = gf.train_step(loss, gf.chain(gf.mean_rows(), gf.sgd(0.1)), microbatches=2)
        >>> state = step.init(model)
        >>> batch = tuple(t.to(model.weight.device) for t in (torch.randn(8, 2), torch.arange(8)%2))
        >>> captured = gf.capture(step, state, batch) if cuda else None
        >>> for _ in range(3):
        ...     state, info = captured(batch) if captured else step(state, batch)
    """
    if not isinstance(step, TrainStep):
        raise TypeError(
            f"Expected a step made by train_step, found {type(step).__name__}. Build it with "
            "train_step(loss, update), whose state is one tree of tensors."
        )
    if any(True for _ in decisions(step.update, state["transforms"])):
        raise ValueError(
            "Expected a chain without every(), late() and look_sam(), found one: a CUDA graph "
            "would repeat the transforms of the step that it was captured from. Use "
            "gradfilter.compile."
        )
    device = _tree.device_of(state["params"])
    if device.type != "cuda":
        raise ValueError(
            f"Expected a state on a CUDA device, found {device.type}. CUDA graphs exist only "
            "there; call step(state, batch) instead."
        )
    if step.grads_of.chunk_size is not None and step.grads_of.plan in ("auto", "fused"):
        raise ValueError(
            f"Expected a step without chunk_size, found chunk_size={step.grads_of.chunk_size}: "
            "whether a chunk drew random numbers cannot be asked inside a graph. Leave it out."
        )
    inputs = static_inputs(_inputs(batch, extra), device)
    trees: dict[str, Any] = {name: tree for name, tree in state.items() if name != "random"}
    tensors = _tree.tree_map(_copied, trees)
    in_place = _StepInPlace(step, inputs, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), random_state_restored(device):
        random = dict(state["random"])
        random.setdefault("cuda", torch.cuda.get_rng_state(device))
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        rewinds = Rewinds(generator, random["cuda"])
        here = torch.cuda.current_stream()
        new_stream: Any = torch.cuda.Stream
        side = new_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                with rewinds.drawing():
                    in_place.advance()
        here.wait_stream(side)
        _tree.donate_into(tensors, trees)
        rewinds.align(random["cuda"])
        with warnings.catch_warnings():
            # Newer versions of torch register states themselves, and raise.
            warnings.filterwarnings("ignore", message=".*register_generator_state")
            for clone in rewinds.states:
                graph.register_generator_state(clone)
        try:
            with rewinds.drawing(), torch.cuda.graph(graph):
                info, end = in_place.advance()
        except RuntimeError as error:
            raise RuntimeError(
                f"The step cannot be captured: {error}\nInside a graph nothing may wait for the "
                "host: no .item(), no print, no Python branch on a tensor, in the loss or in a "
                'transform. A loss that falls back to plan "loop" often does one of these. Remove '
                "it, or call step(state, batch) instead."
            ) from error
    return Captured(graph, inputs, tensors, info, random, rewinds, end)


def static_inputs(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors, for a graph to read."""
    for name, value in _tree.flatten_with_names(given)[0].items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"Expected {name!r} on {device}, found it on {value.device}, where a graph cannot "
                f"follow its values. Move it with .to({str(device)!r}), or call step(state, batch) "
                "instead."
            )
    copies: dict[str, Any] = _tree.tree_map(_copied, given)
    return copies


def copy_inputs(static: dict[str, Any], given: dict[str, Any]) -> None:
    """Write a batch and extra keywords into the static tensors, which they must match."""
    old, new = (_tree.flatten_with_names(tree)[0] for tree in (static, given))
    if old.keys() != new.keys():
        raise ValueError(
            f"Expected the leaves {sorted(old)}, as captured, found {sorted(new)}. Capture the "
            "step once more for batches of another structure."
        )
    for name, value in new.items():
        expected, found = _kind(old[name]), _kind(value)
        if expected != found:
            raise ValueError(
                f"Expected {name!r} as captured, {expected}, found {found}. A graph is fixed: pass "
                "tensors for what changes, drop the last incomplete batch "
                "(DataLoader(..., drop_last=True)), or capture the step once more."
            )
    with torch.no_grad():
        for name, value in new.items():
            if isinstance(value, Tensor):
                old[name].copy_(value)


def _inputs(batch: Any, extra: dict[str, Any]) -> dict[str, Any]:
    return {"batch": plain(batch), **extra}


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _kind(leaf: Any) -> str:
    """Describe what a graph fixes of a leaf: the shape and dtype of a tensor, else the value."""
    return f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
