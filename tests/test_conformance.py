"""The laws of the design, one test each, over every public link."""

import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
from _cases import (
    CASES,
    EXTRA,
    VARIANTS,
    build,
    make_params,
    make_rows,
    make_stack,
    step,
)
from gradfilter import _tree

every_link = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}")
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str
)


def bits(tree):
    """The leaves as integers, so that −0.0 differs from 0.0 and NaN equals itself."""
    as_int = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return [
        leaf.clone().contiguous().view(as_int[leaf.element_size()]) for leaf in _tree.leaves(tree)
    ]


def assert_same_bits(a, b):
    a, b = bits(a), bits(b)
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def planted(tree):
    """The tree with −0.0 and NaN in every floating leaf."""

    def plant(leaf):
        if not leaf.is_floating_point():
            return leaf
        leaf = leaf.clone().contiguous()
        leaf.view(-1)[-1] = torch.nan
        leaf.view(-1)[0] = -0.0
        return leaf

    return _tree.tree_map(plant, tree)


def started(variant, dtype=torch.float32):
    """A chain one step into its work, so that no state is all zeros."""
    update, params = build(variant), make_params(dtype)
    rows = make_rows(params)
    params, state, _ = step(update, params, update.init(params), rows)
    return update, params, state, make_rows(params, seed=2)


def test_every_public_link_is_a_case():
    public = {
        name
        for name, thing in vars(gf).items()
        if inspect.isfunction(thing)
        and not name.startswith("_")
        and inspect.signature(thing).return_annotation == "Transform"
    }
    assert public >= {"chain", "agree_filter", "sgd"}
    assert public == set(CASES)


@every_link
def test_inputs_are_never_mutated(variant):
    update, params, state, rows = started(variant)
    before = bits((params, state, rows))
    step(update, params, state, rows)
    assert all(torch.equal(x, y) for x, y in zip(before, bits((params, state, rows)), strict=True))


@every_link
def test_a_step_changes_something_and_is_reproducible(variant):
    update, params, state, rows = started(variant)
    first, second = (step(update, params, state, rows) for _ in range(2))
    assert_same_bits(first, second)
    if variant != ("freeze", 1):
        assert any((first[0][n] != params[n]).any() for n in params)


@every_link
def test_unknown_keywords_are_ignored(variant):
    update, params, state, rows = started(variant)
    assert_same_bits(
        step(update, params, state, rows), step(update, params, state, rows, nobody_knows=object())
    )


@every_link
@every_dtype
def test_a_skipped_step_changes_no_bit(variant, dtype):
    update, params, state, rows = started(variant, dtype)
    params, state = planted(params), planted(state)
    new_params, new_state, info = step(update, params, state, rows, keep=torch.tensor(False))
    assert_same_bits((new_params, new_state), (params, state))
    assert not info["keep"]


@every_link
def test_a_filter_that_rejects_everything_skips_states_before_and_after_it(variant):
    """The filter stands in the middle; what it skips is the whole step."""
    if not any("rows" in kind for kind in build(variant).kinds):
        pytest.fail("every case starts from rows")
    update = gf.chain(gf.scheduled(gf.clip_per_row, max_norm=gf.linear(2.0, 10)), build(variant))
    params = make_params()
    rows = {n: torch.full_like(g, torch.nan) for n, g in make_rows(params).items()}
    guarded = gf.chain(gf.finite_filter(), update)
    state = planted(guarded.init(params))
    new_params, new_state, info = step(guarded, planted(params), state, rows)
    assert not info["keep"]
    assert_same_bits((new_params, new_state), (planted(params), state))


@every_link
@every_dtype
def test_dtype_shape_and_device_are_preserved(variant, dtype):
    update, params = build(variant), make_params(dtype)
    state = update.init(params)
    new_params, new_state, _ = step(update, params, state, make_rows(params))
    for before, after in ((params, new_params), (state, new_state)):
        for old, new in zip(_tree.leaves(before), _tree.leaves(after), strict=True):
            assert (old.dtype, old.shape, old.device) == (new.dtype, new.shape, new.device)


@every_link
def test_half_precision_follows_single_precision(variant):
    """Norms and Grams of bfloat16 are accumulated wider: only the inputs' rounding shows."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        update, params = build(variant), make_params(torch.bfloat16)
        rows = make_rows(params)
        cast = lambda tree, dtype=dtype: {n: t.to(dtype) for n, t in tree.items()}
        params = cast(params)
        results.append(step(update, params, update.init(params), cast(rows))[0])
    for single, half in zip(*(r.values() for r in results), strict=True):
        torch.testing.assert_close(half.float(), single, rtol=0.05, atol=0.05)


class NoHostSync(TorchDispatchMode):
    """Refuses the operations by which a program waits for the value of a tensor."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name.lstrip("_") in {w.lstrip("_") for w in self.waiting}:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


def test_the_host_sync_detector_detects():
    with NoHostSync(), pytest.raises(AssertionError, match="wait"):
        torch.ones(()).item()
    with NoHostSync(), pytest.raises(AssertionError, match="wait"):
        bool(torch.ones(()) > 0)


@every_link
def test_no_host_synchronisation(variant):
    update, params, state, rows = started(variant)
    with NoHostSync():
        step(update, params, state, rows)


@every_link
def test_state_round_trips_through_a_file(variant, tmp_path):
    update, params, state, rows = started(variant)
    flat = gf.state_dict(state)
    assert all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in flat.items())
    torch.save(flat, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again = gf.load_state_dict(update.init(params), loaded)
    assert_same_bits(again, state)
    assert_same_bits(step(update, params, again, rows), step(update, params, state, rows))


@every_link
def test_nesting_does_not_matter(variant):
    update, params, _, rows = started(variant)
    links = update.links or (update,)
    for cut in range(1, len(links)):
        try:
            nested = gf.chain(gf.chain(*links[:cut]), *links[cut:])
        except (TypeError, ValueError) as error:  # a part alone may lack what the whole has
            assert "needs" in str(error) or "takes" in str(error)
            continue
        assert_same_bits(
            step(nested, params, nested.init(params), rows),
            step(update, params, update.init(params), rows),
        )


@every_link
def test_info_holds_keep_and_published_metrics_only(variant):
    update, params, state, rows = started(variant)
    info = step(update, params, state, rows)[2]
    metrics = {update.metric(n) for n in update.publishes} - {"weights", "clean_grads", "keep"}
    assert set(info) - {"keep"} == metrics - {
        update.metric(n) for n in ("weights", "clean_grads", "keep")
    }
    assert all(isinstance(value, torch.Tensor) for value in info.values())
    assert info["keep"].dtype == torch.bool and info["keep"].shape == ()


@every_link
@pytest.mark.parametrize("change", ["missing", "extra"])
def test_leaves_that_do_not_match_are_named(variant, change):
    update, params, state, rows = started(variant)
    if change == "missing":
        del rows["head.bias"]
    else:
        rows["stray"] = torch.zeros(5, 2)
    with pytest.raises(
        ValueError, match=rf"{change} \['{'head.bias' if change == 'missing' else 'stray'}'\]"
    ):
        update(params, state, rows, **EXTRA)


@every_link
def test_donated_inputs_keep_their_storage(variant):
    update, params, state, rows = started(variant)
    expected = step(update, params, state, rows)[:2]
    got = step(update, params, state, rows, donate=True)[:2]
    assert_same_bits(got, expected)
    assert all(got[0][n] is params[n] for n in params)


@every_link
def test_compiles_whole_and_once(variant):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    update, params = build(variant), make_params()
    state = update.init(params)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(params, state, rows, late):
        return update(params, state, make_stack(params, rows), late=late)

    for seed in range(3):  # the schedules give another lr in each
        rows = make_rows(params, seed=seed)
        expected = step(update, params, state, rows)
        params, state, info = compiled(params, state, rows, torch.tensor(True))
        for got, want in zip(
            _tree.leaves((params, state, info)), _tree.leaves(expected), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inductor_agrees_with_eager():
    torch._dynamo.reset()
    update, params = build(("chain", 0)), make_params()
    state = update.init(params)
    compiled = torch.compile(update, fullgraph=True)
    for seed in range(3):
        rows = make_rows(params, seed=seed)
        grad_fn = lambda p, rows=rows: rows
        expected = update(params, state, rows, grad_fn=grad_fn)
        params, state, _ = compiled(params, state, rows, grad_fn=grad_fn)
        for got, want in zip(
            _tree.leaves((params, state)), _tree.leaves(expected[:2]), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_link
def test_on_a_gpu_as_on_the_cpu_and_without_waiting(variant):
    update, params, state, rows = started(variant)
    cuda = lambda tree: _tree.tree_map(lambda t: t.cuda(), tree)
    expected = step(update, params, state, rows)[:2]
    late = torch.tensor(True, device="cuda")
    on_gpu = cuda(params), cuda(state)
    stack = make_stack(on_gpu[0], cuda(rows))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = update(*on_gpu, stack, late=late)[:2]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(_tree.leaves(got), _tree.leaves(expected), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
