"""Faults of several ranks: every rank raises an error with the cause; no update is applied."""

import copy
import os
import signal
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

import gradfilter as gf
import gradfilter.schedules as gs
from _world import PATIENCE, Failed, World
from gradfilter.distributed import RankStack, across_ranks

LEAVES = {"a.weight": (2, 3), "a.bias": (2,)}


def rows(m=2, leaves=LEAVES, dtype=torch.float64):
    return {name: torch.ones(m, *shape, dtype=dtype) for name, shape in leaves.items()}


def fewer_rows():
    RankStack(rows(3 if dist.get_rank() == 2 else 2))


def many_rows():
    RankStack(rows(300 if dist.get_rank() == 2 else 299))


def another_order():
    leaves = dict(reversed(LEAVES.items())) if dist.get_rank() == 3 else LEAVES
    RankStack(rows(leaves=leaves))


def another_shape():
    RankStack(rows(leaves={**LEAVES, "a.bias": (5,)} if dist.get_rank() == 1 else LEAVES))


def another_dtype():
    RankStack(rows(dtype=torch.float32 if dist.get_rank() == 1 else torch.float64))


def one_leaf_less():
    RankStack(rows(leaves={"a.weight": (2, 3)} if dist.get_rank() == 1 else LEAVES))


def losses_on_some():
    losses = None if dist.get_rank() == 1 else torch.ones(2)
    RankStack(gf.DenseStack(rows(), losses=losses))


def keep_on_some():
    RankStack(rows(), keep=True if dist.get_rank() == 3 else None)


DIFFERENCES = {
    keep_on_some: "keep unknown on rank 0 and known on rank 3. Give them on all ranks or on none.",
    fewer_rows: "2 on rank 0 and 3 on rank 2",
    many_rows: "299 on rank 0 and 300 on rank 2",
    another_order: "leaf 0 is 'a.weight' of shape [2, 3] and dtype torch.float64 on rank 0 and "
    "'a.bias' of shape [2] and dtype torch.float64 on rank 3",
    another_shape: "leaf 1 is 'a.bias' of shape [2] and dtype torch.float64 on rank 0 and "
    "'a.bias' of shape [5] and dtype torch.float64 on rank 1",
    another_dtype: "and 'a.weight' of shape [2, 3] and dtype torch.float32 on rank 1",
    one_leaf_less: "2 leaves on rank 0 and 1 on rank 1",
    losses_on_some: "losses known on rank 0 and unknown on rank 1",
}


def fine():
    return RankStack(rows()).gram().sum().item()


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda f: f.__name__)
def test_ranks_that_differ_are_named_on_every_rank(four, difference):
    for said in four.errors(difference):
        assert said.startswith("RankStack: expected") and DIFFERENCES[difference] in said
    assert four.run(fine) == [8 * 8 * 8.0] * 4  # and nothing is left half-sent


def stranger():
    group = dist.new_group([0, 2])
    if dist.get_rank() in (0, 2):
        return RankStack(rows(), group).gram().shape[0]
    with pytest.raises(RuntimeError, match=r"Expected a process group that rank . is a member of"):
        RankStack(rows(), group)
    return None


def test_a_group_of_some_ranks(four):
    assert four.run(stranger) == [4, None, 4, None]


def test_without_a_process_group_the_error_says_what_to_call():
    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first, .* torchrun"):
        RankStack(rows())


def named_in_a_group():
    group = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        return "", ""
    said = []
    for own in (rows(dist.get_rank()), rows(dtype=[torch.float32, torch.float64][rank_is(3)])):
        with pytest.raises(ValueError, match="RankStack: expected") as raised:
            RankStack(own, group)
        said.append(str(raised.value))
    return said


def rank_is(rank):
    return dist.get_rank() == rank


def test_ranks_of_a_group_are_named_as_everybody_knows_them(four):
    said = four.run(named_in_a_group)
    for count, kind in (said[1], said[3]):
        assert "1 on rank 1 and 3 on rank 3" in count
        assert "float32 on rank 1 and" in kind and "float64 on rank 3" in kind


def skipped_together(how):
    """A step that one rank would skip, by its own rows or its caller, all skip: to the bit."""
    guard = [gf.finite_filter()] if how == "rows" else []
    update = gf.chain(*guard, across_ranks(), gf.mean_rows(), gf.sgd(1.0, momentum=0.9))
    params = {name: torch.zeros(shape) for name, shape in LEAVES.items()}
    state = update.init(params)
    for step in range(3):
        own, extra = rows(), {}
        if step == 1 and rank_is(2) and how == "rows":
            own["a.bias"][:] = torch.nan
        if how == "caller":
            extra["keep"] = torch.tensor(not (step == 1 and rank_is(2)))
        params, state, info = update(params, state, own, **extra)
        assert bool(info["keep"]) == (step != 1)
    return {name: leaf.tolist() for name, leaf in gf.state_dict((params, state)).items()}


@pytest.mark.parametrize("how", ["rows", "caller"])
def test_a_step_that_one_rank_would_skip_all_skip(four, how):
    found = four.run(skipped_together, how)
    assert all(one == found[0] for one in found)


# A rank that is killed, stalls or raises.


UPDATE = gf.chain(across_ranks(), gf.agree_filter(1.0), gf.sgd(0.1, momentum=0.9))
# The private name is that of older releases.
set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def steps(victim, harm):
    """Ten steps, and what was updated and said when something happened to one rank in the fifth."""
    params = {name: torch.zeros(shape) for name, shape in LEAVES.items()}
    state = UPDATE.init(params)
    for step in range(10):
        before = copy.deepcopy((params, state))
        if step == 4:
            dist.barrier()  # impatient from here on, however long a busy machine took to get here
            set_timeout(timedelta(seconds=1))
            if dist.get_rank() == victim:
                if harm == "raises":
                    raise ValueError("my own mistake")
                if harm == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()  # until the test is over
        try:
            params, state, _ = UPDATE(params, state, rows(), donate=True)
        except RuntimeError as error:
            now, then = (gf.state_dict(tree) for tree in ((params, state), before))
            unchanged = all(torch.equal(now[name], then[name]) for name in then)
            return step, unchanged, str(error)
    return None


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("harm", ["killed", "stalls", "raises"])
def test_the_others_fail_within_the_timeout_when_a_rank_is_gone(size, harm):
    victim = size - 1
    world = World(size, timeout=10 * PATIENCE)  # a test waits for no rank that long
    try:
        world.start(steps, victim, harm)
        for rank in range(size):
            if rank != victim:
                fine, said = world.outcome(rank)
                assert fine, said
                step, unchanged, message = said
                assert step == 4 and unchanged
                assert f"Rank {rank} of {size} lost the others while" in message
                assert "raised an error" in message
                assert "Nothing was updated in this step" in message
        if harm == "raises":
            fine, said = world.outcome(victim)
            assert not fine and said.startswith("my own mistake")
    finally:
        world.close()


def dies_alone():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_world_names_a_process_that_died_and_starts_new_ones(two):
    with pytest.raises(Failed, match=r"^rank 1: its process died, exit code -9$"):
        two.run(dies_alone)
    assert two.run(fine) == [4 * 4 * 8.0] * 2


def nan_rank(seed):
    """Rank 1 has nothing but NaN for a while; the others go on without it."""
    g = torch.Generator().manual_seed(seed)
    rank, size = dist.get_rank(), dist.get_world_size()
    params = {name: torch.zeros(shape) for name, shape in LEAVES.items()}
    update = gf.chain(across_ranks(), gf.finite_filter(), gf.agree_filter(2.0), gf.sgd(1.0))
    state, expected = update.init(params), {n: torch.zeros(s) for n, s in LEAVES.items()}
    for step in range(3):
        full = {n: torch.randn(size, 2, *s, generator=g) for n, s in LEAVES.items()}
        if step < 2:
            full["a.bias"][1, :, 0] = torch.nan
        good = [r for r in range(size) if r != 1 or step == 2]
        for n in expected:
            expected[n] -= full[n][good].flatten(0, 1).mean(0)
        params, state, info = update(params, state, {n: t[rank] for n, t in full.items()})
        assert info["keep"] and info["agree_filter/accepted"].sum() == 2 * len(good)
    for n in expected:
        torch.testing.assert_close(params[n], expected[n], rtol=1e-12, atol=1e-12)


def test_a_rank_of_nan_rows_is_left_out_and_training_goes_on(four):
    four.run(nan_rank, 0)


def started(difference):
    """Return the errors of `init` for parameters that differ on one rank."""
    rank = dist.get_rank()
    params = {
        "a.weight": torch.linspace(0, 1, 6).reshape(2, 3).T,
        "a.bias": torch.full((2,), torch.nan),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.zeros(0),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    if difference == "values" and rank == 2:
        params["half"][1] += 0.01  # one unit in the last place
    if difference == "leaves" and rank == 3:
        del params["none"]
    return UPDATE.init(params)


def test_ranks_that_start_apart_are_refused_before_the_first_step(four):
    assert len(four.run(started, None)) == 4
    for said in four.errors(started, "values"):
        assert said.startswith(
            "across_ranks: expected the same parameters on every rank, found other values of "
            "'half' on rank 0 than on rank 2. Wrap the model in DistributedDataParallel"
        )
    for said in four.errors(started, "leaves"):
        assert "on rank 0 and 'complex' of shape [2]" in said and "on rank 3" in said


OTHER_CHAINS = {
    "threshold": (
        lambda odd: [gf.agree_filter(0.9 if odd else 0.97), gf.sgd(0.1)],
        "found agree_filter() on rank 0 and agree_filter(threshold=0.9) on rank 2",
    ),
    "default written out": (lambda odd: [*([gf.agree_filter(0.5)]), gf.sgd(lr=0.1)], None),
    "the same, given otherwise": (
        lambda odd: [gf.agree_filter(threshold=0.5) if odd else gf.agree_filter(0.5), gf.sgd(0.1)],
        None,
    ),
    "schedule": (
        lambda odd: [gf.mean_rows(), gf.sgd(gs.cosine(0.1, 20 if odd else 10))],
        "total_steps=10)) on rank 0 and sgd(lr=cosine(max_value=0.1, total_steps=20)) on rank 2",
    ),
    "another link": (
        lambda odd: [gf.mean_rows(), *([gf.agc_clip(0.01)] if odd else []), gf.sgd(0.1)],
        "found sgd(lr=0.1) on rank 0 and agc_clip() on rank 2",
    ),
    "one more at the end": (
        lambda odd: [gf.mean_rows(), gf.sgd(0.1), *([gf.ema_params()] if odd else [])],
        "found nothing on rank 0 and ema_params() on rank 2",
    ),
    "inside a partition": (
        lambda odd: [
            gf.partition(
                {"all": gf.chain(gf.mean_rows(), gf.sgd(0.2 if odd else 0.1))}, lambda name: "all"
            )
        ],
        "partition(branches={'all': chain(mean_rows(), sgd(lr=0.1))}, ",
    ),
    "scheduled": (
        lambda odd: [
            gf.scheduled(gf.agree_filter, threshold=gs.linear(1.0, 10), min_accepted=2 + odd),
            gf.sgd(0.1),
        ],
        "scheduled(factory=agree_filter, min_accepted=2, ",
    ),
    "a closure": (
        lambda odd: [gf.mean_rows(), times(2.0 + odd), gf.sgd(0.1)],
        "update=times.update[factor=2.0]) on rank 0",
    ),
    "changed since it was made": (
        lambda odd: [
            replace(gf.consensus_filter(0.9 if odd else 1.0), name="mine"),
            gf.sgd(0.1),
        ],
        "threshold=1.0, soft=True, min_accepted=2)) ",
    ),
    "code": (
        lambda odd: [
            gf.mean_rows(),
            gf.masked(gf.agc_clip(), (lambda n: "a" in n) if odd else (lambda n: "b" in n)),
            gf.sgd(0.1),
        ],
        "on rank 0 with other functions than on rank 2",
    ),
    "a partial": (
        lambda odd: [
            gf.mean_rows(),
            gf.masked(gf.agc_clip(), partial(begins, letter="b" if odd else "a")),
            gf.sgd(0.1),
        ],
        "names=partial(begins, {'letter': 'a'})) on rank 0",
    ),
}


def begins(name, letter):
    return name.startswith(letter)


def times(factor):
    def update(grads, state, params, /, **extra):
        return {name: factor * g for name, g in grads.items()}, state, {}

    return gf.link("times", "tree -> tree", update)


def begin_with(kind):
    params = {name: torch.zeros(shape) for name, shape in LEAVES.items()}
    update = gf.chain(across_ranks(), *OTHER_CHAINS[kind][0](dist.get_rank() == 2))
    update(params, update.init(params), rows())


@pytest.mark.parametrize("kind", OTHER_CHAINS)
def test_ranks_with_another_chain_are_named_when_they_begin(four, kind):
    said = OTHER_CHAINS[kind][1]
    if said is None:
        four.run(begin_with, kind)
        return
    for error in four.errors(begin_with, kind):
        assert "across_ranks: expected the same chain on every rank, found" in error
        assert said in error
    assert four.run(fine) == [8 * 8 * 8.0] * 4


def clipped_by_rank():
    """Transforms before across_ranks work on the rows of one rank."""
    params = {name: torch.zeros(shape) for name, shape in LEAVES.items()}
    clip = gf.clip_per_row(1.0 + dist.get_rank())
    update = gf.chain(clip, across_ranks(), gf.mean_rows(), gf.sgd(0.1))
    return update(params, update.init(params), rows())[0]["a.bias"].tolist()


def test_what_stands_before_may_differ(four):
    said = four.run(clipped_by_rank)
    assert said == [said[0]] * 4


def begun_alone():
    params = {name: torch.zeros(shape) for name, shape in LEAVES.items()}
    return across_ranks().init(params)


def test_a_link_that_begins_alone_has_no_chain_to_compare(four):
    assert four.run(begun_alone) == [{}] * 4
