"""The laws of a chain from rows to an update, one function each; a broken one raises."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Transform
from gradfilter.testing._bits import assert_same_bits, copied, ensure, planted
from gradfilter.testing._problem import Problem, TreeProblem
from gradfilter.testing._waiting import no_host_sync
from gradfilter.transforms._chain import chain
from gradfilter.transforms._clip import clip_by_global_norm, clip_per_row
from gradfilter.transforms._finite import finite_filter
from gradfilter.transforms._scheduled import scheduled
from gradfilter.transforms._schedules import linear
from gradfilter.transforms._state import load_state_dict, state_dict

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
    first = copied(problem.step(update, params, state, rows))  # no buffer that is used again
    second = problem.step(update, params, state, rows)
    assert_same_bits(second, first, "between two steps from the same inputs")


def changes_something(update: Transform, problem: Problem) -> None:
    """A step moves some parameter, and other gradients move it elsewhere."""
    params, state, rows = problem.started(update)
    after = problem.step(update, params, state, rows)[0]
    moved = any((after[name] != params[name]).any() for name in params)
    ensure(moved, "no parameter has moved")
    # Momentum and decay move parameters even where a link lets no gradient through.
    other = problem.step(update, params, state, problem.rows(params, seed=3))[0]
    follows = any((after[name] != other[name]).any() for name in params)
    ensure(follows, "other gradients lead to the same parameters: none get through")


def ignores_unknown_keywords(update: Transform, problem: Problem) -> None:
    """A keyword meant for another link changes nothing."""
    params, state, rows = problem.started(update)
    expected = problem.step(update, params, state, rows)
    found = problem.step(update, params, state, rows, nobody_knows=object())
    assert_same_bits(found, expected, "when an unknown keyword is given")


def skips_bit_by_bit(update: Transform, problem: Problem) -> None:
    """A step with ``keep=False`` returns parameters and state as they were, −0.0 and NaN too."""
    for dtype in DTYPES:
        params, state, rows = problem.started(update, dtype)
        params, state = planted(params), planted(state)
        before = copied((params, state))
        new_params, new_state, info = problem.step(
            update, params, state, rows, keep=torch.tensor(False)
        )
        assert_same_bits((new_params, new_state), before, f"on a skipped step in {dtype}")
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
    assert_same_bits((new_params, new_state), before, "though every row was rejected")


def leaves_rejected_rows_out(update: Transform, problem: Problem) -> None:
    """A row of NaN that a filter before the chain removed does not come back."""
    if isinstance(problem, TreeProblem):  # one gradient is left out with its step
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
    with no_host_sync():
        problem.step(update, params, state, rows)


def state_round_trips(update: Transform, problem: Problem) -> None:
    """The state goes through a file of plain tensors, and training goes on as if it had not."""
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
    links = update.links or (update,)
    for cut in range(1, len(links)):
        try:
            nested = chain(chain(*links[:cut]), *links[cut:])
        except (TypeError, ValueError) as error:  # a part alone may lack what the whole has
            ensure("needs" in str(error) or "takes" in str(error), str(error))
            continue
        assert_same_bits(
            problem.step(nested, params, nested.init(params), rows),
            problem.step(update, params, update.init(params), rows),
            f"when the first {cut} links are a chain of their own",
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
        found == announced,
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
