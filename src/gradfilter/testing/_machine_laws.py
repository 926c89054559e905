"""The laws about torch.compile and devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gradfilter import _tree
from gradfilter._types import Params, State, Transform, Tree
from gradfilter.testing._bits import ensure
from gradfilter.testing._problem import Problem


def compiles_whole_and_once(update: Transform, problem: Problem) -> None:
    """One graph without breaks serves step after step, and agrees with eager execution."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    params = problem.params()
    state = update.init(params)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(params: Params, state: State, rows: Tree, extra: dict[str, Any]) -> Any:
        given = {**problem.keywords(params, rows), **extra}
        return update(params, state, problem.given(params, rows), **given)

    for seed in range(3):  # the schedules give another lr in each
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
    return _tree.tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, tree)


def _assert_close(
    found: Any, expected: Any, *, atol: float = 1e-6, equal_nan: bool = False
) -> None:
    got, want = (_tree.flatten_with_names(tree)[0] for tree in (found, expected))
    ensure(list(got) == list(want), f"leaves {sorted(set(got) ^ set(want))} come and go")
    for name, value in want.items():
        try:
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=atol, equal_nan=equal_nan)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
