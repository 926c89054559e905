"""The laws of a transform, one function each; a broken law raises."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from gradfilter import _tree
from gradfilter._state_rules import COUNTER, settled
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.grads._stack import DenseStack, StackOrigin
from gradfilter.schedules._schedules import linear
from gradfilter.transforms._chain import chain, row_part
from gradfilter.transforms._clipping import clip_by_global_norm
from gradfilter.transforms._compile import decisions
from gradfilter.transforms._reducers import finite_filter
from gradfilter.transforms._row_clipping import clip_per_row
from gradfilter.transforms._scheduled import scheduled
from gradfilter.transforms._state_dict import load_state_dict, state_dict
from gradfilter.transforms._streaming import ReducedRows

# --- Compare trees as bits: −0.0 differs from 0.0, and NaN equals itself ---


AS_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def ensure(holds: Any, otherwise: str) -> None:
    """Raise AssertionError, also if ``python -O`` removes assert statements."""
    if not holds:
        raise AssertionError(otherwise)


def ensure_tensors(tree: Any) -> None:
    """Refuse leaves that are not tensors."""
    for name, leaf in _tree.flatten_with_names(tree)[0].items():
        ensure(
            isinstance(leaf, Tensor),
            f"expected tensors only, found {name!r} of type {type(leaf).__name__}. Keep numbers in "
            "states and metrics as tensors of shape (), and write {} for no state",
        )


def copied(tree: Any) -> Any:
    """Return the tree in its own storage, so that later writes do not change it."""
    ensure_tensors(tree)
    return _tree.tree_map(torch.clone, tree)


def bits(tree: Any) -> dict[str, Tensor]:
    """Copy the leaves as integers, under their dotted names."""
    named = _tree.flatten_with_names(copied(tree))[0]
    real = {n: torch.view_as_real(t) if t.is_complex() else t for n, t in named.items()}
    return {n: t.contiguous().view(AS_INTEGER[t.element_size()]) for n, t in real.items()}


def assert_same_bits(found: Any, expected: Any, what: str) -> None:
    """Refuse trees that differ in a name, a shape or a bit; ``what`` ends the error."""
    got, want = bits(found), bits(expected)
    ensure(list(got) == list(want), f"leaves {sorted(set(got) ^ set(want))} come and go {what}")
    differ = [name for name in want if not torch.equal(got[name], want[name])]
    ensure(not differ, f"{differ} differ {what}")


def planted(tree: Any) -> Any:
    """Put −0.0 and NaN into every floating leaf of a copy of the tree."""

    def plant(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or not leaf.numel():
            return leaf
        leaf = leaf.clone().contiguous()
        leaf.view(-1)[-1] = torch.nan
        leaf.view(-1)[0] = -0.0
        return leaf

    ensure_tensors(tree)
    return _tree.tree_map(plant, tree)


# --- Raise when a program waits for the value of a tensor, also on a CPU ---


WAITING = {
    *("local_scalar_dense", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "bincount"),
    *("unique", "unique2", "unique_dim", "unique_consecutive"),
    *("linalg_check_errors", "linalg_eig", "linalg_eigvals", "linalg_eigh", "linalg_svd"),
}
# On a CPU these call no operation, because there is nothing to copy.
COPIES = (Tensor.cpu, Tensor.numpy, Tensor.tolist)


@contextmanager
def no_host_sync(state: State = None) -> Iterator[None]:
    """Refuse everything by which a program waits for the value of a tensor.

    Args:
        state: A state whose counters are on the CPU: the host may read them.
    """
    named = {} if state is None else _tree.flatten_with_names(state)[0]
    counters = [leaf for name, leaf in named.items() if _is_counter(name)]
    with _NoWaiting(), _NoCopies(counters):
        yield


def _is_counter(name: str) -> bool:
    return name.split(".")[-1] == COUNTER


class _NoWaiting(TorchDispatchMode):
    """Refuse operations that wait."""

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            _refuse(func)
        return func(*args, **(kwargs or {}))


class _NoCopies(TorchFunctionMode):
    """Refuse methods that copy to the host, except for counters."""

    def __init__(self, counters: list[Tensor]) -> None:
        super().__init__()
        self._counters = counters

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES and not any(args[0] is counter for counter in self._counters):
            _refuse(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def waits(func: Any, args: Any) -> bool:
    """Return whether an operation of torch waits for values of its arguments."""
    name = func.name().split("::")[1].split(".")[0].strip("_")
    return name in WAITING or (name in ("index", "index_put") and _by_a_mask(*args))


def _by_a_mask(tensor: Tensor, indices: Any, values: Tensor | None = None, *rest: Any) -> bool:
    """Return whether a mask must be counted; a single number is written without counting."""
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and (values is None or values.numel() > 1)


def _refuse(what: Any) -> None:
    raise AssertionError(
        f"{what} makes the host wait for the device. Instead of .item(), float(), `if` or an index "
        "by a mask, use torch.where"
    )


# --- A small problem: parameters and rows without equal numbers ---


M = 5
SHAPES: dict[str, Sequence[int]] = {
    "body.weight": (4, 3),
    "body.conv": (2, 3, 2, 2),
    "head.weight": (3, 2),
    "head.bias": (),
}
# The numbers do not depend on torch's default dtype and device.
EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def make_params(
    dtype: torch.dtype = torch.float32, seed: int = 0, shapes: Mapping[str, Sequence[int]] = SHAPES
) -> Params:
    """Draw parameters from a normal distribution."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tuple(shape), generator=g, **EXACT).to(dtype)
        for name, shape in shapes.items()
    }


def make_rows(params: Params, seed: int = 1, rows: int = M) -> Tree:
    """Draw rows that mostly agree, with very different norms."""
    g = torch.Generator().manual_seed(seed)

    def leaf(p: Tensor) -> Tensor:
        common = torch.randn(p.shape, generator=g, **EXACT)
        own = torch.randn((rows, *p.shape), generator=g, **EXACT)
        size = torch.arange(1, rows + 1, **EXACT).reshape(-1, *[1] * p.ndim)
        return (size * (common + own)).to(p.dtype)

    return {name: leaf(p) for name, p in params.items()}


def make_stack(params: Params, rows: Tree) -> DenseStack:
    """Make a stack with known gradients at other parameters: g_m(p') = g_m + (p' − p) / 2."""
    first = next(iter(rows.values()))
    # Each loss depends on its own row alone, so that a part of the rows has its part of the losses.
    losses = first.reshape(len(first), -1).to(torch.float32).abs().sum(1).nan_to_num(0.0, 0.0)
    known = _KnownGradients(params, rows, losses)
    return DenseStack(rows, losses=losses, origin=known.origin)


@dataclass(frozen=True, eq=False)
class _KnownGradients:
    """The gradients of `make_stack`, with losses that are larger by 1 at other parameters."""

    params: Params
    rows: Tree
    losses: Tensor

    @property
    def origin(self) -> StackOrigin:
        return StackOrigin(len(self.losses), self.params, self.at)

    def at(
        self, elsewhere: Mapping[str, Tensor], per_row: bool, kept: Collection[str]
    ) -> DenseStack:
        moved = {
            name: g + 0.5 * (elsewhere[name] - self.params[name] + torch.zeros_like(g))
            for name, g in self.rows.items()
        }
        return DenseStack(moved, losses=self.losses + 1, origin=self.origin)


@dataclass(frozen=True)
class Problem:
    """The parameters and gradients on which a chain is tried.

    Attributes:
        shapes: The shapes of the parameters, by name.
        count: The number of rows.
        extra: Keywords for every step.
    """

    shapes: Mapping[str, Sequence[int]] = field(default_factory=lambda: SHAPES)
    count: int = M
    extra: Mapping[str, Any] = field(default_factory=dict)

    def params(self, dtype: torch.dtype = torch.float32) -> Params:
        """Draw parameters of a dtype."""
        return make_params(dtype, shapes=self.shapes)

    def rows(self, params: Params, seed: int = 1) -> Tree:
        """Draw gradients for parameters: stacked rows."""
        return make_rows(params, seed, self.count)

    def given(self, params: Params, rows: Tree) -> Any:
        """Return the gradients in the form that the chain takes."""
        return make_stack(params, rows)

    def keywords(self, params: Params, rows: Tree) -> dict[str, Any]:
        """Return the keywords for these gradients."""
        return {}

    def step(
        self, update: Transform, params: Params, state: State, rows: Tree, **extra: Any
    ) -> tuple[Params, State, Out]:
        """Run one step on these rows."""
        ensure_tensors(state)
        given = {**self.keywords(params, rows), **self.extra, **extra}
        return update(params, state, self.given(params, rows), **given)

    def started(
        self, update: Transform, dtype: torch.dtype = torch.float32
    ) -> tuple[Params, State, Tree]:
        """Return parameters and state after one step, so that no state is all zeros, and rows."""
        params = self.params(dtype)
        params, state, _ = self.step(update, params, update.init(params), self.rows(params))
        return params, state, self.rows(params, seed=2)


@dataclass(frozen=True)
class TreeProblem(Problem):
    """A problem for a chain that takes one gradient, whose tensors the caller owns."""

    @override
    def rows(self, params: Params, seed: int = 1) -> Tree:
        """Draw the gradient for parameters."""
        return {name: leaf.sum(0) for name, leaf in make_rows(params, seed, self.count).items()}

    @override
    def given(self, params: Params, rows: Tree) -> Any:
        """Return the gradient itself, so that writes into it are detected."""
        return rows

    @override
    def keywords(self, params: Params, rows: Tree) -> dict[str, Any]:
        """Return a function that computes the gradient at other parameters, as in `make_stack`."""
        return {
            "grad_fn": lambda near: {n: g + 0.5 * (near[n] - params[n]) for n, g in rows.items()}
        }


# --- The laws of a chain from rows to an update ---


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def mutates_nothing(update: Transform, problem: Problem) -> None:
    """Parameters, state and rows are after a step what they were before."""
    params, state, rows = problem.started(update)
    before = copied((params, state, rows))
    problem.step(update, params, state, rows)
    assert_same_bits((params, state, rows), before, "after a step: inputs were written into")


def is_reproducible(update: Transform, problem: Problem) -> None:
    """The same inputs give the same outputs."""
    params, state, rows = problem.started(update)
    first = copied(problem.step(update, params, state, rows))  # buffers may be reused
    second = problem.step(update, params, state, rows)
    assert_same_bits(second, first, "between two steps from the same inputs")


def changes_something(update: Transform, problem: Problem) -> None:
    """A step moves some parameter, and other gradients move it elsewhere."""
    params, state, rows = problem.started(update)
    after = problem.step(update, params, state, rows)[0]
    moved = any((after[name] != params[name]).any() for name in params)
    ensure(moved, "no parameter has moved")
    # Momentum and decay move parameters even if a transform passes no gradient.
    other = problem.step(update, params, state, problem.rows(params, seed=3))[0]
    follows = any((after[name] != other[name]).any() for name in params)
    ensure(follows, "other gradients lead to the same parameters: none get through")


def ignores_unknown_keywords(update: Transform, problem: Problem) -> None:
    """A keyword meant for another transform changes nothing."""
    params, state, rows = problem.started(update)
    expected = problem.step(update, params, state, rows)
    found = problem.step(update, params, state, rows, nobody_knows=object())
    assert_same_bits(found, expected, "when an unknown keyword is given")


def assert_skipped(update: Transform, found: Any, before: Any, when: str) -> None:
    """Parameters and state are as before, except for states that observe."""
    (params, state), (old_params, old_state) = found, before
    expected = settled(update.rules, False, state, old_state)
    assert_same_bits((params, state), (old_params, expected), when)


def skips_bit_by_bit(update: Transform, problem: Problem) -> None:
    """A step with ``keep=False`` returns parameters and state as they were, −0.0 and NaN too."""
    for dtype in DTYPES:
        params, state, rows = problem.started(update, dtype)
        params, state = planted(params), planted(state)
        before = copied((params, state))
        new_params, new_state, info = problem.step(
            update, params, state, rows, keep=torch.tensor(False)
        )
        assert_skipped(update, (new_params, new_state), before, f"on a skipped step in {dtype}")
        ensure(not info["keep"], "info['keep'] is true on a skipped step")


def skips_where_rows_are_rejected(update: Transform, problem: Problem) -> None:
    """A filter before the chain that rejects all rows skips the whole step."""
    clip = clip_by_global_norm if isinstance(problem, TreeProblem) else clip_per_row
    clipped = chain(scheduled(clip, max_norm=linear(2.0, 10)), update)
    guarded = chain(finite_filter(), clipped)
    params = problem.params()
    rows = {name: torch.full_like(g, torch.nan) for name, g in problem.rows(params).items()}
    params, state = planted(params), planted(guarded.init(params))
    before = copied((params, state))
    new_params, new_state, info = problem.step(guarded, params, state, rows)
    ensure(not info["keep"], "info['keep'] is true though every row was rejected")
    assert_skipped(guarded, (new_params, new_state), before, "though every row was rejected")


def leaves_rejected_rows_out(update: Transform, problem: Problem) -> None:
    """A row of NaN that a filter before the chain removed does not come back."""
    if isinstance(problem, TreeProblem):  # a single gradient is skipped with its step
        return
    guarded = chain(finite_filter(), update)
    params = problem.params()
    rows = problem.rows(params)
    for leaf in rows.values():
        leaf[-1] = torch.nan
    before = (params, guarded.init(params))
    after = problem.step(guarded, *before, rows)[:2]
    old, new = (_tree.flatten_with_names(tree)[0] for tree in (before, after))
    spoilt = [name for name in new if (old[name].isfinite() & ~new[name].isfinite()).any()]
    ensure(not spoilt, f"{spoilt} are not finite after a step without the rejected row")


def keeps_dtypes_and_shapes(update: Transform, problem: Problem) -> None:
    """Parameters and state have the dtype, shape and device they had."""
    for dtype in DTYPES:
        params = problem.params(dtype)
        state = update.init(params)
        new = problem.step(update, params, state, problem.rows(params))[:2]
        after, before = (_tree.flatten_with_names(tree)[0] for tree in (new, (params, state)))
        ensure(list(after) == list(before), "the leaves of the state change in a step")
        for name, old in before.items():
            kept = [(t.dtype, t.shape, t.device) for t in (old, after[name])]
            ensure(kept[0] == kept[1], f"{name} was {kept[0]} and is {kept[1]} after a step")


def half_precision_follows_single(update: Transform, problem: Problem) -> None:
    """Norms and Grams of bfloat16 are accumulated wider: only the inputs' rounding shows."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        rounded = problem.params(torch.bfloat16)
        rows = {name: g.to(dtype) for name, g in problem.rows(rounded).items()}
        params = {name: p.to(dtype) for name, p in rounded.items()}
        results.append(problem.step(update, params, update.init(params), rows)[0])
    single, half = results
    for name, expected in single.items():
        torch.testing.assert_close(half[name].float(), expected, rtol=0.05, atol=0.05)


def never_waits(update: Transform, problem: Problem) -> None:
    """No step asks the host for the value of a tensor."""
    params, state, rows = problem.started(update)
    with no_host_sync(state):
        problem.step(update, params, state, rows)


def state_round_trips(update: Transform, problem: Problem) -> None:
    """Saving the state as plain tensors and loading it does not change the training."""
    params, state, rows = problem.started(update)
    flat = state_dict(state)
    plain = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in flat.items())
    ensure(plain, "state_dict holds something else than tensors under names")
    file = io.BytesIO()
    torch.save(flat, file)
    file.seek(0)
    again = load_state_dict(update.init(params), torch.load(file, weights_only=True))
    assert_same_bits(again, state, "after a round trip through a file")
    assert_same_bits(
        problem.step(update, params, again, rows),
        problem.step(update, params, state, rows),
        "in the step after a round trip through a file",
    )


def nesting_does_not_matter(update: Transform, problem: Problem) -> None:
    """``chain(chain(a, b), c)`` is ``chain(a, b, c)``."""
    params, _, rows = problem.started(update)
    parts = update.parts or (update,)
    for cut in range(1, len(parts)):
        try:
            nested = chain(chain(*parts[:cut]), *parts[cut:])
        except (TypeError, ValueError) as error:  # a part alone may lack a published name
            ensure("needs" in str(error) or "takes" in str(error), str(error))
            continue
        assert_same_bits(
            problem.step(nested, params, nested.init(params), rows),
            problem.step(update, params, update.init(params), rows),
            f"when the first {cut} transforms are a chain of their own",
        )


def publishes_what_it_says(update: Transform, problem: Problem) -> None:
    """``info`` holds ``keep`` and the metrics that were announced, as tensors, and nothing else."""
    params, state, rows = problem.started(update)
    info = problem.step(update, params, state, rows)[2]
    trees = {"weights", "clean_grads", "keep"}
    metrics = {update.metric(n) for n in update.publishes} - trees
    announced = metrics - {update.metric(n) for n in trees}
    found = set(info) - {"keep"}
    ensure(
        # What rests in a step, by every() or late(), publishes nothing.
        found == announced or (found < announced and _has_counters(update, state)),
        f"publishes= announces {sorted(announced - found)} that never come, and does not announce "
        f"{sorted(found - announced)}",
    )
    ensure(all(isinstance(v, Tensor) for v in info.values()), "a metric is not a tensor")
    ensure(info["keep"].dtype == torch.bool, "keep is not a bool tensor")
    ensure(info["keep"].shape == (), "keep is not of shape ()")


def names_leaves_that_do_not_match(update: Transform, problem: Problem) -> None:
    """Rows with a leaf too few or too many are refused, and the error names it."""
    params, state, rows = problem.started(update)
    last = next(reversed(rows))
    wrong = {"extra ['stray']": {**rows, "stray": torch.zeros(problem.count, 2)}}
    if len(rows) > 1:
        wrong[f"missing ['{last}']"] = {n: g for n, g in rows.items() if n != last}
    for said, other in wrong.items():
        try:
            update(params, state, other, **problem.extra)
        except ValueError as error:
            ensure(said in str(error), f"expected {said} in an error, found {str(error)!r}")
        else:
            raise AssertionError(f"rows with {said} were taken")


def donates_storage(update: Transform, problem: Problem) -> None:
    """With ``donate=True`` the same results, or on a skip none, stand in the tensors given."""
    for keep in (True, False):
        params, state, rows = problem.started(update)
        extra = {} if keep else {"keep": torch.tensor(False)}
        expected = copied(problem.step(update, params, state, rows, **extra)[:2])
        given = _tree.leaves((params, state))
        found = problem.step(update, params, state, rows, donate=True, **extra)[:2]
        when = "" if keep else " on a skipped step"
        assert_same_bits(found, expected, f"with donate=True{when}")
        same = all(new is old for new, old in zip(_tree.leaves(found), given, strict=True))
        ensure(same, f"parameters or state have new tensors with donate=True{when}")


def works_on_parts_of_the_rows(update: Transform, problem: Problem) -> None:
    """What acts row by row by its rules gives the same for parts of the rows, without draws."""
    guarded = chain(finite_filter(), update)
    of_chain = None if isinstance(problem, TreeProblem) else row_part(guarded)
    if of_chain is None:
        return
    params, state, rows = problem.started(guarded, torch.float64)
    for spoilt in ((), (problem.count - 1,), range(problem.count // 2)):
        rows = {name: leaf.clone() for name, leaf in rows.items()}
        for leaf in rows.values():
            leaf[list(spoilt)] = torch.nan
        expected = problem.step(guarded, params, state, rows)
        for size in range(1, problem.count):
            extra = {**problem.keywords(params, rows), **problem.extra}
            reduced = ReducedRows(of_chain, state, params, extra)
            stack = make_stack(params, rows)
            random = torch.get_rng_state()
            with torch.no_grad():
                for part in _parts_of(stack, size):
                    reduced.add(part)
            ensure(torch.equal(random, torch.get_rng_state()), "random numbers are drawn")
            found = guarded(params, state, reduced, **extra)
            _assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def _parts_of(stack: DenseStack, size: int) -> Iterator[DenseStack]:
    """Cut a stack of `make_stack` into stacks of some rows each."""
    assert stack.origin is not None and stack.losses is not None  # it is one of `make_stack`
    for low in range(0, len(stack), size):
        rows = {name: leaf[low : low + size] for name, leaf in stack.rows.items()}
        losses = stack.losses[low : low + size]
        known = _KnownGradients(dict(stack.origin.params), rows, losses)
        yield DenseStack(rows, losses=losses, origin=known.origin)


# --- The laws about torch.compile and devices ---


def compiles_whole_and_once(update: Transform, problem: Problem) -> None:
    """One graph without breaks serves step after step, and agrees with eager execution.

    With `every` or `late` there is one graph per branch, which only `gradfilter.compile` makes.
    """
    if _has_counters(update, update.init(problem.params())):
        return
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    params = problem.params()
    state = update.init(params)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(params: Params, state: State, rows: Tree, extra: dict[str, Any]) -> Any:
        given = {**problem.keywords(params, rows), **extra}
        return update(params, state, problem.given(params, rows), **given)

    for seed in range(3):  # the schedules give each step another lr
        rows = problem.rows(params, seed=seed)
        expected = problem.step(update, params, state, rows)
        params, state, info = compiled(params, state, rows, dict(problem.extra))
        _assert_close((params, state, info), expected, equal_nan=True)
    ensure(counter.frame_count == 1, f"compiled {counter.frame_count} times in three steps")


def same_on_a_gpu(update: Transform, problem: Problem) -> None:
    """On a CUDA device as on the CPU, without waiting for the device."""
    params, state, rows = problem.started(update)
    expected = problem.step(update, params, state, rows)[:2]
    extra = _cuda(dict(problem.extra))
    on_gpu, state_there, rows_there = _cuda((params, state, rows))
    stack = problem.given(on_gpu, rows_there)
    extra = {**problem.keywords(on_gpu, rows_there), **extra}
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = update(on_gpu, state_there, stack, **extra)[:2]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    _assert_close(_tree.tree_map(lambda t: t.cpu(), found), expected, atol=1e-5)


def _cuda(tree: Any) -> Any:
    named, rebuild = _tree.flatten_with_names(tree)
    return rebuild(
        leaf.cuda() if isinstance(leaf, Tensor) and not _is_counter(name) else leaf
        for name, leaf in named.items()
    )


def _has_counters(update: Transform, state: State) -> bool:
    return any(True for _ in decisions(update, state))


def _assert_close(
    found: Any,
    expected: Any,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    equal_nan: bool = False,
) -> None:
    got, want = (_tree.flatten_with_names(tree)[0] for tree in (found, expected))
    ensure(list(got) == list(want), f"leaves {sorted(set(got) ^ set(want))} come and go")
    for name, value in want.items():
        try:
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, equal_nan=equal_nan)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
