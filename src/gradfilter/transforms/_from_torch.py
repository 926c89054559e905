"""Run any optimizer of torch as a pure transform."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from typing_extensions import override

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._readable import differentiated, readable, transformed
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._shards import is_sharded
from gradfilter._types import (
    Context,
    Kind,
    Out,
    Params,
    State,
    Transform,
    Tree,
    all_keep,
)
from gradfilter.schedules._schedules import Schedule, as_schedule
from gradfilter.transforms._transform import check_leaves, check_number, transform_in_context
from gradfilter.transforms._update_rules import new_count, schedule_value


@factory
def from_torch(
    optimizer: type[Optimizer], *, lr: float | Schedule | None = None, **arguments: Any
) -> Transform:
    """Apply an optimizer of `torch.optim`, or of a package that follows its conventions.

    In every step an optimizer of the class is made for copies of the parameters, gets gradients and
    state, and steps; its parameters and its state are the results. On a CPU they equal those of the
    class bit for bit. In a graph, on an accelerator and under a dispatch mode, where no number may
    be read, it runs as torch runs it inside its compiler, with ``capturable=True`` where the class
    has it: equal up to rounding.

    A chain that ends in it gets the optimizer's parameters themselves. Where another transform
    follows, the update is the difference to the old ones, and the sum may differ in the last bit.

    Args:
        optimizer: The class: constructor ``(params, **arguments)``, tensors and numbers in
            ``state[p]`` and in the groups, ``step()`` without a closure. The state must have the
            same entries after every step.
        lr: The learning rate, at least 0, or a Schedule. By default that of the class.
        **arguments: Further arguments of the class, as plain values. ``capturable`` is set where it
            is needed; ``differentiable`` is refused.

    Sharded parameters (DTensor, of `fully_shard`) take the way of a graph, on a CPU also. Training
    then equals that on whole parameters up to rounding. Refused: Adafactor, which reads numbers;
    Muon, which needs whole matrices; and flags whose operations torch does not have for DTensors
    (``fused=True`` of SGD and Adagrad; Rprop without ``foreach=False``).

    The state: ``leaves`` (the entries of ``state[p]`` by name), ``group`` (the numbers of the group
    that change), ``count`` and ``lr``. Numbers are tensors of shape (). `import_torch_state` and
    `export_torch_state` convert it.

    Publishes: ``lr`` ().

    Cost: that of the class, and a copy of parameters, gradients and state. When it is made, it
    takes a few steps on small tensors; ``init`` takes one on copies of the parameters. An optimizer
    whose first step differs from the others (SGD with dampening) is run twice where no number may
    be read.

    Raises:
        TypeError: Not a class of optimizers; an unknown argument, ``params``, or a tensor.
        ValueError: The class needs a closure, sparse gradients or a state of other objects, refuses
            its arguments, or refuses the shape of a parameter.
        RuntimeError: At the call: the class reads numbers on the host, and is not on a CPU or is
            traced (`gradfilter.compile`); a derivative is taken of the step.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.from_torch(torch.optim.NAdam, lr=0.1), {"w": torch.ones(1)}
        >>> params, state, info = update(params, update.init(params), {"w": torch.ones(1)})
        >>> params["w"], sorted(state["leaves"])
        (tensor([0.8944]), ['exp_avg', 'exp_avg_sq', 'mu_product', 'step'])
    """
    _check_class(optimizer)
    _check_arguments(optimizer, lr, arguments)
    name = optimizer.__name__.lower()
    if lr is None:
        lr = _default_lr(optimizer, arguments)
    if not isinstance(lr, Schedule):
        check_number("from_torch", "lr", lr, low=0, fix="A Schedule such as cosine(...) also fits.")
    runner = _Runner(
        optimizer, arguments, lr.max_value if isinstance(lr, Schedule) else lr, {}, None
    )
    conventions = _examined(runner, scheduled=isinstance(lr, Schedule))
    updates = _TorchUpdates(
        name, as_schedule(lr), None if isinstance(lr, Schedule) else lr, *conventions
    )
    made = transform_in_context(
        name,
        Kind.TREE_TO_UPDATE,
        updates.compute,
        init=updates.init,
        publishes=("lr",),
        row_rules=IGNORES_ROWS,
    )
    return made.with_apply(updates.apply)


def _check_class(optimizer: Any) -> None:
    if isinstance(optimizer, Optimizer):
        found = type(optimizer).__name__
        raise TypeError(
            f"from_torch: expected a class of optimizers, found an instance of {found}. Give the "
            f"class and its arguments: from_torch({found}, lr=...), and take over the state of the "
            "instance with import_torch_state."
        )
    if not isinstance(optimizer, type) or not issubclass(optimizer, Optimizer):
        raise TypeError(
            f"from_torch: expected a subclass of torch.optim.Optimizer, found {optimizer!r}. Give "
            "the class itself: from_torch(torch.optim.NAdam, lr=...)."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"from_torch: expected an optimizer whose step needs no closure, found "
            f"{optimizer.__name__}, which evaluates the loss several times in a step. A transform "
            "gets one gradient: use another class."
        )


def _check_arguments(optimizer: type[Optimizer], lr: Any, arguments: Mapping[str, Any]) -> None:
    if "params" in arguments:
        raise TypeError(
            "from_torch: expected no params, found params=... A transform gets the parameters in "
            "every call: update(params, state, grads). Leave them out."
        )
    tensors = sorted(
        key for key, value in {"lr": lr, **arguments}.items() if _is_driven(key, value)
    )
    if tensors:
        raise TypeError(
            f"from_torch: expected plain values, found a tensor or a Schedule in {tensors}. Only "
            "lr may be driven, by a Schedule: from_torch(..., lr=cosine(...)), without scheduled()."
        )
    if arguments.get("differentiable"):
        raise TypeError(
            "from_torch: expected differentiable=False, found True. The step is computed on copies "
            "without a graph. Use gradfilter's own rules inside torch.func.grad."
        )
    if "capturable" in arguments:
        raise TypeError(
            "from_torch: expected no capturable, which it sets where the device needs it. Leave "
            "it out."
        )
    parameters = inspect.signature(optimizer).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    unknown = sorted(set(arguments) - set(known))
    if unknown and len(known) == len(parameters):
        raise TypeError(
            f"from_torch: expected arguments of {optimizer.__name__} among {known[1:]}, found "
            f"unknown {unknown}. Look at the signature of the class."
        )


def _is_driven(key: str, value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_driven("", item) for item in value)
    return isinstance(value, Tensor) or (isinstance(value, Schedule) and key != "lr")


def _default_lr(optimizer: type[Optimizer], arguments: Mapping[str, Any]) -> float:
    lr = inspect.signature(optimizer).parameters.get("lr")
    if lr is None or not isinstance(lr.default, (int, float)):
        raise ValueError(
            f"from_torch: expected lr, because {optimizer.__name__} has no default for it. Write "
            f"from_torch({optimizer.__name__}, lr=...)."
        )
    return float(lr.default)


# --- One step of an optimizer as a function of tensors ---


Layout = tuple[tuple[str, tuple[str, ...]], ...]
"""The entries of ``state[p]`` in an order, each with the names of the leaves that have it."""

Number = type[bool] | type[int] | type[float]


@dataclass(frozen=True, eq=False)
class _Runner:
    """A class of optimizers with its arguments.

    Attributes:
        kind: The class.
        arguments: Its arguments, without lr.
        lr: The learning rate for the constructor.
        numbers: The entries of ``state[p]`` and of the group that are Python numbers.
        reads: Why the class can only run where numbers may be read; None if it can run elsewhere.
    """

    kind: type[Optimizer]
    arguments: Mapping[str, Any]
    lr: float
    numbers: Mapping[str, Number]
    reads: str | None

    def made(self, params: list[Tensor], in_graph: bool) -> Optimizer:
        """Return an optimizer of these parameters."""
        extra: dict[str, Any] = {}
        if in_graph:
            known = inspect.signature(self.kind).parameters
            if "capturable" in known:
                extra["capturable"] = True
            chosen = any(self.arguments.get(key) is not None for key in ("foreach", "fused"))
            # Functions of lists never read an lr that is a tensor; vmap does not support them.
            if "foreach" in known and not chosen and not transformed():
                extra["foreach"] = True
        build: Any = self.kind
        made: Optimizer = build(params, lr=self.lr, **self.arguments, **extra)
        return made

    def step(
        self,
        lr: float | Tensor,
        names: Sequence[str],
        layout: Layout,
        group: Sequence[str],
        tensors: tuple[list[Tensor], list[Tensor], list[Tensor]],
        in_graph: bool,
    ) -> tuple[Tensor, ...]:
        """Return parameters and state after a step, as one tuple in the order of the arguments.

        Args:
            lr: The learning rate.
            names: The names of the leaves.
            layout: The entries of the state of leaves.
            group: The entries of the state of the group.
            tensors: Parameters, gradients, and the values of the state by layout and group; no
                values for a new optimizer.
            in_graph: Whether no number may be read.
        """
        params, grads, values = tensors
        with torch.no_grad(), _as_compiled(in_graph):
            new = [p.detach().clone() for p in params]
            for p, g in zip(new, grads, strict=True):
                p.grad = g.detach().to(p.dtype).clone()  # some classes write into gradients
            optimizer = self.made(new, in_graph)
            own = dict(zip(names, new, strict=True))
            for options in optimizer.param_groups:
                options["lr"] = lr
            if values:
                self._put(optimizer, own, (layout, group), iter(values), in_graph)
            _take_step(optimizer, in_graph)
            state = [
                self._tensor(entry, optimizer.state[own[name]].get(entry), params[0])
                for entry, leaves in layout
                for name in leaves
            ]
            options = optimizer.param_groups[0]
            state += [self._tensor(entry, options.get(entry), params[0]) for entry in group]
            return (*(p.detach() for p in new), *state)

    def _put(
        self,
        optimizer: Optimizer,
        own: Tree,
        structure: tuple[Layout, Sequence[str]],
        values: Iterator[Tensor],
        in_graph: bool,
    ) -> None:
        """Give the optimizer its state: copies, because it writes into them."""
        layout, group = structure

        states: dict[str, dict[str, Any]] = {name: {} for name in own}
        for entry, leaves in layout:
            for name in leaves:
                states[name][entry] = self._given(entry, next(values), in_graph)
        for name, p in own.items():
            optimizer.state[p] = states[name]
        for entry in group:
            optimizer.param_groups[0][entry] = self._given(entry, next(values), in_graph)

    def _given(self, entry: str, value: Tensor, in_graph: bool) -> Any:
        number = self.numbers.get(entry)
        return value.clone() if number is None or in_graph else number(value.item())

    def _tensor(self, entry: str, value: Any, like: Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach()
        if value is None:
            raise ValueError(
                f"from_torch: expected {self.kind.__name__} to keep the entry {entry!r} in every "
                "step, found it removed. A state has a fixed structure: use another class."
            )
        return as_tensor_of_number(value, like.device)


def as_tensor_of_number(value: float, device: torch.device) -> Tensor:
    """Return a number as a tensor (): a bool, int64, or the widest float of the device."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    dtypes: dict[Any, torch.dtype] = {bool: torch.bool, int: torch.int64, float: wide}
    return torch.full((), value, dtype=dtypes[type(value)], device=device)


def _take_step(optimizer: Optimizer, in_graph: bool) -> None:
    """Take a step; in a graph without the mark for profilers, which torch's compiler refuses."""
    step: Any = type(optimizer).step
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if in_graph and getattr(step, "hooked", False) and not own_hooks:
        step = step.__wrapped__
    step(optimizer)


@contextmanager
def _as_compiled(in_graph: bool) -> Iterator[None]:
    """Let torch's optimizers take the way of a compiler: numbers of the state remain tensors."""
    if in_graph:
        from torch._export.utils import _compiling_state_context  # slow to import

        with _compiling_state_context():
            yield
    else:
        yield


# --- The conventions of a class, found by steps on small tensors ---


EXAMPLES: Mapping[str, tuple[int, ...]] = {
    "matrix": (3, 2),
    "vector": (2,),
    "filter": (2, 3, 2, 2),
    "number": (),
}


class _RecordedState(dict[str, Any]):
    """The state of a parameter, which also keeps the first value of every entry."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}
        self.update(*given)

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        self.first.setdefault(key, value.clone() if isinstance(value, Tensor) else value)
        super().__setitem__(key, value)

    @override
    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    @override
    def update(self, *given: Any, **more: Any) -> None:
        for key, value in dict(*given, **more).items():
            self[key] = value


class _RecordedStates(dict[Tensor, Any]):
    """The states of all parameters, as recorders."""

    def __missing__(self, key: Tensor) -> _RecordedState:
        """Return a new recorder, which is kept."""
        made = _RecordedState()
        super().__setitem__(key, made)
        return made

    @override
    def __setitem__(self, key: Tensor, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise ValueError(
                f"from_torch: expected a dict for each parameter in the state of the optimizer, "
                f"found {type(value).__name__} under {key!r}. Use another class."
            )
        super().__setitem__(key, _RecordedState(value))


@dataclass(frozen=True, eq=False)
class _FirstState:
    """The state of an optimizer as it looks at the beginning, found by its first step.

    Attributes:
        leaves: The first values of the entries of every leaf.
        group: The values of the group before the step; those that it added, after it.
        changed: The entries of the group that a step has changed.
    """

    leaves: dict[str, dict[str, Any]]
    group: dict[str, Any]
    changed: list[str]


def _started(runner: _Runner, params: Tree, grads: Tree, in_graph: bool, steps: int) -> _FirstState:
    """Take steps with an optimizer on copies of parameters, and record how its state begins."""
    own = {name: p.detach().clone() for name, p in params.items()}
    with torch.no_grad(), _as_compiled(in_graph):
        for name, p in own.items():
            p.grad = grads[name].clone()
        optimizer = runner.made(list(own.values()), in_graph)
        recorders = _RecordedStates()
        for p, state in optimizer.state.items():
            recorders[p] = state
        holder: Any = optimizer
        holder.state = recorders
        group = optimizer.param_groups[0]
        before = {k: _copied(v) for k, v in group.items() if k not in ("params", "lr")}
        counts = {k: v for k, v in vars(optimizer).items() if type(v) in (int, float, Tensor)}
        # Only several steps are on a CPU, where values may be compared.
        attributes = {} if steps == 1 else {k: _copied(v) for k, v in counts.items()}
        optimizer.step()
        entries = {name: _entries(optimizer.state[p]) for name, p in own.items()}
        for _ in range(steps - 1):
            optimizer.step()
        _check_structure(runner, optimizer, own, entries, attributes)
    after = {k: v for k, v in group.items() if k not in ("params", "lr")}
    changed = [] if steps == 1 else [k for k, v in after.items() if not _same(before.get(k), v)]
    leaves = {
        name: {entry: recorders[p].first[entry] for entry in entries[name]}
        for name, p in own.items()
    }
    return _FirstState(leaves, {**after, **before}, changed)


def _check_structure(
    runner: _Runner,
    optimizer: Optimizer,
    own: Tree,
    entries: dict[str, list[str]],
    attributes: dict[str, Any],
) -> None:
    label = f"from_torch: expected {runner.kind.__name__}"
    for name, p in own.items():
        odd = [k for k, v in optimizer.state[p].items() if v is not None and not _is_value(v)]
        if odd:
            raise ValueError(
                f"{label} to keep tensors and numbers in its state, found other objects in {odd}. "
                "Use another class."
            )
        if _entries(optimizer.state[p]) != entries[name]:
            raise ValueError(
                f"{label} to have the state {entries[name]} after every step, found "
                f"{_entries(optimizer.state[p])} later. Use another class."
            )
    moved = [k for k, v in attributes.items() if not _same(v, vars(optimizer).get(k))]
    if moved:
        raise ValueError(
            f"{label} to keep its numbers in the state and in groups, found attributes {moved} "
            "that a step changes. Use another class."
        )


def _entries(state: Mapping[str, Any]) -> list[str]:
    return [key for key, value in state.items() if value is not None]


def _is_value(value: Any) -> bool:
    return isinstance(value, (bool, int, float, Tensor))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def _examined(runner: _Runner, *, scheduled: bool) -> tuple[_Runner, tuple[str, ...], bool]:
    """Return the runner, the entries of the group's state, and whether the first step differs.

    The returned runner knows which entries are numbers, and whether the class reads them.
    """
    generator = torch.Generator().manual_seed(0)
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    trees: list[Tree] = [
        {name: torch.randn(shape, generator=generator, **exact) for name, shape in EXAMPLES.items()}
        for _ in range(2)
    ]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        params = trees[0]
        admitted: dict[str, _FirstState] = {}
        first: Exception | None = None
        for name in EXAMPLES:
            alone = [{name: tree[name]} for tree in trees]
            try:
                admitted[name] = _started(runner, alone[0], alone[1], in_graph=False, steps=3)
            except Exception as error:
                first = first or error
        if not admitted:
            raise ValueError(
                f"from_torch: expected {runner.kind.__name__} to step on dense gradients with "
                f"these arguments, found {type(first).__name__}: {first}"
            ) from first
        params, grads = ({name: tree[name] for name in admitted} for tree in trees)
        start = _started(runner, params, grads, in_graph=False, steps=3)
        odd = [key for key in start.changed if not _is_value(start.group[key])]
        if odd:
            raise ValueError(
                f"from_torch: expected {runner.kind.__name__} to keep numbers and tensors in its "
                f"group, found other objects in {odd} that a step changes. Use another class."
            )
        every = [*start.leaves.values(), {key: start.group[key] for key in start.changed}]
        numbers = {k: type(v) for own in every for k, v in own.items() if not isinstance(v, Tensor)}
        group = tuple(start.changed)
        runner = _Runner(runner.kind, runner.arguments, runner.lr, numbers, None)
        structure = _values_of(start, group, params)
        _check_carried(runner, structure, (params, grads))
        special = _starts_otherwise(runner, structure, (params, grads), scheduled)
        reads = _reason_to_read(runner, structure, (params, grads), scheduled, special)
    return _Runner(runner.kind, runner.arguments, runner.lr, numbers, reads), group, special


@dataclass(frozen=True, eq=False)
class _Structure:
    """The state of an optimizer: its values, and how to find them.

    Attributes:
        layout: The entries of the leaves.
        group: The entries of the group.
        values: The values in this order.
    """

    layout: Layout
    group: tuple[str, ...]
    values: list[Tensor]


def _values_of(start: _FirstState, group: tuple[str, ...], params: Tree) -> _Structure:
    device = _tree.device_of(params)
    entries: dict[str, list[str]] = {}
    for name, own in start.leaves.items():
        for entry in own:
            entries.setdefault(entry, []).append(name)
    layout = tuple((entry, tuple(names)) for entry, names in entries.items())
    found = [start.leaves[name][entry] for entry, names in layout for name in names]
    found += [start.group[entry] for entry in group]
    values = [
        v.detach() if isinstance(v, Tensor) else as_tensor_of_number(v, device) for v in found
    ]
    return _Structure(layout, group, values)


Trees = tuple[Tree, Tree]


CARRIED_STEPS = 8
"""Enough for classes that warm up: RAdam takes its first adaptive step at the sixth."""


def _check_carried(runner: _Runner, structure: _Structure, trees: Trees) -> None:
    """Refuse a class whose steps depend on more than parameters, gradients and state."""
    lr, names = runner.lr, tuple(trees[0])
    params, grads = (list(tree.values()) for tree in trees)
    own = [p.clone() for p in params]
    optimizer = runner.made(own, in_graph=False)
    values: list[Tensor] = []
    for k in range(1, CARRIED_STEPS + 1):
        given = [g * (k % 3 - 1.5) for g in grads]
        fixed = (lr, names, structure.layout, structure.group)
        new = runner.step(*fixed, (params, given, values), False)
        params, values = list(new[: len(names)]), list(new[len(names) :])
        for p, g in zip(own, given, strict=True):
            p.grad = g.clone()
        with torch.no_grad():
            optimizer.step()
        same = [
            torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(own, params, strict=True)
        ]
        if not all(same):
            raise ValueError(
                f"from_torch: expected steps of {runner.kind.__name__} that depend on parameters, "
                f"gradients and state alone, found others in step {k}. It draws random numbers, or "
                "keeps something in other places than state[p] and the numbers of its group. Use "
                "another class."
            )


def _starts_otherwise(
    runner: _Runner, structure: _Structure, trees: Trees, scheduled: bool
) -> bool:
    """Return whether a step from the recorded state differs from the first step."""
    lr = runner.lr / 2 if scheduled else runner.lr  # a first step that copies the lr is special
    params, grads = (list(tree.values()) for tree in trees)
    fixed = (lr, tuple(trees[0]), structure.layout, structure.group)
    fresh = runner.step(*fixed, (params, grads, []), False)
    try:
        ours = runner.step(*fixed, (params, grads, structure.values), False)
    except Exception:  # it does not begin from a state that looks like this one
        return True
    return not all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(fresh, ours, strict=True)
    )


def _reason_to_read(
    runner: _Runner, structure: _Structure, trees: Trees, scheduled: bool, special: bool
) -> str | None:
    """Return where the class reads a number, found by a step on tensors without values."""
    with FakeTensorMode() as mode:
        fake: Callable[[Tensor], Tensor] = mode.from_tensor
        params: list[Tensor] = [fake(t) for t in trees[0].values()]
        grads: list[Tensor] = [fake(t) for t in trees[1].values()]
        values: list[Tensor] = [fake(v) for v in structure.values]
        lr: Any = runner.lr
        if scheduled:
            lr = mode.from_tensor(torch.full((), runner.lr, dtype=torch.float64))
        fixed = (lr, tuple(trees[0]), structure.layout, structure.group)
        try:
            runner.step(*fixed, (params, grads, values), True)
            if special:
                runner.step(*fixed, (params, grads, []), True)
        except Exception as error:
            file = inspect.unwrap(runner.kind.step).__code__.co_filename
            frames = traceback.extract_tb(error.__traceback__)
            frame = next((f for f in reversed(frames) if f.filename == file), frames[-1])
            return f"line {frame.lineno} of {frame.filename}: {frame.line}"
    return None


# --- The transform ---


@dataclass(frozen=True, eq=False)
class _TorchUpdates:
    """The updates of all leaves by an optimizer.

    Attributes:
        name: The name of the transform.
        schedule: The learning rate.
        lr: The learning rate if it is one number.
        runner: The optimizer.
        group: The entries of the state of the group.
        special: Whether the first step differs from the others.
        step_in_graph: A step of the optimizer without reading numbers.
    """

    name: str
    schedule: Schedule
    lr: float | None
    runner: _Runner
    group: tuple[str, ...]
    special: bool
    step_in_graph: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        step: Callable[..., tuple[Tensor, ...]] = self.runner.step

        def step_in_graph(*given: Any) -> tuple[Tensor, ...]:
            return step(*given, True)

        # A compiler does not follow optimizers that are made inside of what it compiles.
        mark: Any = torch.compiler.allow_in_graph
        opaque = mark(step_in_graph)
        object.__setattr__(self, "step_in_graph", opaque)

    def init(self, params: Params) -> State:
        """Return the state as it looks before the first step of the optimizer."""
        count = new_count(params)
        in_graph = not _are_plain(params)
        self._check_place(in_graph, params)
        grads = {name: torch.ones_like(p) for name, p in params.items()}
        device = _tree.device_of(params)
        with ExitStack() as stack:
            if not torch.compiler.is_compiling() and device.type in ("cpu", "cuda"):
                stack.enter_context(_random_numbers_kept(device))
            try:
                start = _started(self.runner, params, grads, in_graph, steps=1)
            except NotImplementedError as error:  # torch has no rule for an operation on shards
                if _sharded_name(params) is None:
                    raise
                raise ValueError(
                    f"from_torch: expected parameters that {self.runner.kind.__name__} takes with "
                    f"these arguments, found {_sharded_name(params)!r} as a DTensor, sharded over "
                    f"ranks, for which torch says: {_first_line(error)} Give fused=False, then "
                    "foreach=False, or use another class, such as torch.optim.AdamW."
                ) from error
            except ValueError as error:
                raise ValueError(
                    f"from_torch: expected parameters that {self.runner.kind.__name__} takes, "
                    f"found {error} Use partition({{...}}, label) with another rule for the rest."
                ) from error
        found = _values_of(start, self.group, params)
        made = iter(found.values)
        leaves = {entry: {name: next(made) for name in names} for entry, names in found.layout}
        group = {entry: next(made) for entry in found.group}
        if self.special:  # nobody reads it
            leaves, group = _tree.tree_map(torch.zeros_like, (leaves, group))
        return {"leaves": leaves, "group": group, "count": count, "lr": self.schedule.init(count)}

    def compute(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        """Return the differences of new and old parameters."""
        new, new_state, out = self._stepped(grads, state, params, context)
        return {name: new[name] - p for name, p in params.items()}, new_state, out

    def apply(
        self, grads: Tree, state: State, params: Params, context: Context, *, donate: bool
    ) -> tuple[Params, State, Out]:
        """Return the new parameters themselves; the caller writes them where they are donated."""
        check_leaves(self.name, grads, params)
        new, new_state, out = self._stepped(grads, state, params, context)
        keep = all_keep(params, context.keep)
        if keep is None:
            return new, new_state, out
        return *_tree.select(keep, (new, new_state), (params, state)), out

    def _stepped(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Params, State, Out]:
        if differentiated():
            raise RuntimeError(
                f"{self.name}: expected no derivative of the step, found one of torch.func around "
                "it. from_torch runs without a graph: use adam, adamw, sgd or rmsprop inside it."
            )
        in_graph = not _are_plain(params) or not _are_plain(grads)
        self._check_place(in_graph, params)
        value, lr_state = schedule_value(self.schedule, state["count"], state["lr"], context)
        lr: Any = value if self.lr is None else self.lr
        count = state["count"]
        leaves, names = state["leaves"], tuple(params)
        layout = tuple((entry, tuple(own)) for entry, own in leaves.items())
        old = [leaf for own in leaves.values() for leaf in own.values()]
        old += [state["group"][entry] for entry in self.group]
        given = (list(params.values()), [grads[name] for name in names])
        if not in_graph:
            lr = float(lr)
            new: Sequence[Tensor] = self.runner.step(
                *(lr, names, layout, self.group),
                (*given, old if int(count) > 0 else []),
                in_graph=False,
            )
        else:
            new = self._in_graph(lr, (names, layout, self.group), given, old, count > 0)
        made = iter(new)
        new_params = {name: next(made) for name in names}
        new_leaves = {
            entry: {name: next(made).to(leaf.dtype) for name, leaf in own.items()}
            for entry, own in leaves.items()
        }
        new_group = {e: next(made).to(state["group"][e].dtype) for e in self.group}
        new_state = {"leaves": new_leaves, "group": new_group, "count": count + 1, "lr": lr_state}
        return new_params, new_state, {"lr": value}

    def _in_graph(
        self,
        lr: float | Tensor,
        fixed: tuple[Any, ...],
        given: tuple[list[Tensor], list[Tensor]],
        old: list[Tensor],
        started: Tensor,
    ) -> list[Tensor]:
        run = self.step_in_graph
        new = run(lr, *fixed, (*given, old))
        if not self.special:
            return list(new)
        fresh = run(lr, *fixed, (*given, []))
        return [torch.where(started, n, f.to(n.dtype)) for n, f in zip(new, fresh, strict=True)]

    def _check_place(self, in_graph: bool, params: Params) -> None:
        sharded = _sharded_name(params) if in_graph else None
        if sharded is not None and issubclass(self.runner.kind, torch.optim.Muon):
            raise ValueError(
                f"from_torch: expected whole matrices for {self.runner.kind.__name__}, found "
                f"{sharded!r} as a DTensor, sharded over ranks. Its iteration needs all entries of "
                "a matrix, and on shards it fails for some shapes. Use torch.optim.AdamW."
            )
        if in_graph and self.runner.reads is not None:
            kind = self.runner.kind.__name__
            if sharded is not None:
                raise RuntimeError(
                    f"from_torch: expected whole parameters for {kind}, which reads numbers on the "
                    f"host ({self.runner.reads}), found {sharded!r} as a DTensor, sharded over "
                    "ranks, of which no number can be read. Omit foreach=False if it is given, or "
                    "use another class, such as torch.optim.AdamW."
                )
            raise RuntimeError(
                f"from_torch: expected plain tensors on a CPU for {kind}, which reads numbers on "
                f"the host ({self.runner.reads}), found parameters on "
                f"{_tree.device_of(params)}, or a step that is compiled or traced, where a number "
                "cannot be read without waiting. Call step(state, batch) on a CPU without "
                "compiling it, or use another class."
            )


def _sharded_name(params: Params) -> str | None:
    """Return the name of a parameter that is sharded over ranks, if there is one."""
    return next((name for name, p in params.items() if is_sharded(p)), None)


def _first_line(error: Exception) -> str:
    return f"{str(error).strip().partition(chr(10))[0].rstrip('.')}."


def _are_plain(tree: Tree) -> bool:
    return not torch.compiler.is_compiling() and all(
        readable(leaf.detach()) for leaf in tree.values()
    )


def _random_numbers_kept(device: torch.device) -> AbstractContextManager[Any]:
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices) if readable(torch.empty(0)) else nullcontext()
