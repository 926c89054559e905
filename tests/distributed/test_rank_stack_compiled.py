"""Compiled steps on several ranks: the collectives are a part of the graph."""

import copy
import os
import signal
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _formulas import formulas
from _world import World
from gradfilter.distributed import across_ranks
from gradfilter.interop import Filtered

M, STEPS = 2, 3


class Net(nn.Module):
    """Layers with buffers, and masks that every rank draws for itself."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(F.dropout(self.norm(self.a(x)).relu(), 0.3, self.training))


CHAINS = {
    "agreement": lambda: (across_ranks(), gf.agree_filter(1.2), gf.sgd(0.1, momentum=0.9)),
    "consensus": lambda: (across_ranks(), gf.consensus_filter(), gf.adam(0.01)),
    "clips": lambda: (across_ranks(), gf.clip_per_row(0.5), gf.mean_rows(), gf.sgd(0.1)),
    "clips here": lambda: (gf.clip_per_row(0.5), across_ranks(), gf.mean_rows(), gf.sgd(0.1)),
    "signs": lambda: (across_ranks(), gf.sign_agreement(0.5), gf.agc_clip(0.1), gf.sgd(0.1)),
    "SAM": lambda: (across_ranks(), gf.mean_rows(), gf.sam_perturb(0.05), gf.sgd(0.1)),
    "SAM here": lambda: (gf.sam_perturb(0.05), across_ranks(), gf.mean_rows(), gf.sgd(0.1)),
    "SAM per row": lambda: (
        across_ranks(),
        gf.sam_perturb(0.05, per_microbatch=True),
        gf.agree_filter(1.5),
        gf.sgd(0.1),
    ),
    "skips": lambda: (
        gf.finite_filter(),
        across_ranks(),
        gf.mean_rows(),
        gf.sgd(0.1, momentum=0.9),
        gf.ema_params(0.9),
    ),
}


def batch_of(seed, rows=M, broken=False):
    """All ranks' rows, of which this rank takes its own. (W, M * 4, ...)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(dist.get_world_size(), rows * 4, 5, generator=g)
    if broken and seed == 1:
        x[-1] = torch.nan  # the last rank has no row, and all ranks skip the step
    return x[dist.get_rank()], torch.arange(rows * 4) % 3


def close(found, expected, tolerance=0.0):
    """Without a tolerance: to the bit. A skipped step may leave NaN in a running mean."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def step_of(chain, m=M):
    torch.manual_seed(0)
    model = Net()
    loss = gf.model_loss(model, F.cross_entropy)
    return model, gf.train_step(loss, gf.chain(*CHAINS[chain]()), microbatches=m)


# What follows runs on every rank.


def trains_alike(chain, m, backend="graph", tolerance=0.0):
    model, step = step_of(chain, m)
    compiled = gf.compile(step, backend=backend)
    expected = own = step.init(model, seed=dist.get_rank())
    for seed in range(STEPS):
        batch = batch_of(seed, m, chain == "skips")
        with formulas() if backend == "graph" else nullcontext():
            expected, info = step(expected, batch)
        own, found = compiled(own, batch)
        assert bool(info["keep"]) == (chain != "skips" or seed != 1)
        for part in ("params", "transforms", "buffers"):
            close(own[part], expected[part], tolerance)
        close(dict(found), dict(info), tolerance)
    for leaf in own["params"].values():
        parts = [torch.empty_like(leaf) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, leaf.contiguous())
        assert all(torch.equal(part, leaf) for part in parts)
    return sum(map(len, compiled.graphs.entries.values()))


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, M])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_graph_trains_to_the_bit_as_without_compiling(two, chain, m):
    assert two.run(trains_alike, chain, m) == [1, 1]


@pytest.mark.slow
def test_more_ranks(four):
    assert four.run(trains_alike, "consensus", M) == [1] * 4


def of_many_sizes():
    model, step = step_of("agreement")
    compiled = gf.compile(step, backend="graph", dynamic=True)
    expected = own = step.init(model.eval(), seed=0)
    for size in (6, 12, 10):
        batch = batch_of(size, size)
        with formulas():
            expected, _ = step(expected, batch)
        own, _ = compiled(own, batch)
        close(own["params"], expected["params"])
    return sum(map(len, compiled.graphs.entries.values()))


@pytest.mark.slow
def test_a_graph_for_many_sizes(two):
    assert two.run(of_many_sizes) == [1, 1]


@pytest.mark.slow
def test_inductor_trains_as_without_compiling(two):
    # This chain needs every collective: it exchanges rows, gathers losses, and adds up.
    assert two.run(_without_dropout, "SAM per row") == [1, 1]


def _without_dropout(chain):
    with pytest.MonkeyPatch.context() as patch:  # the compiler draws other numbers
        patch.setattr(F, "dropout", lambda x, *_: x)
        return trains_alike(chain, M, "inductor", 1e-12)


def hosts(accumulate):
    def make(compile):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        chain = gf.chain(across_ranks(), gf.agree_filter(1.2), gf.sam_perturb(0.05))
        return model, Filtered(model, F.cross_entropy, chain, optimizer, M, compile=compile)

    (plain, eager), (model, host) = make(False), make("graph")
    for seed in range(STEPS):
        results = []
        for own, context in ((eager, formulas), (host, nullcontext)):
            torch.manual_seed(seed + 10 * dist.get_rank())
            with context():
                if accumulate:
                    own.accumulate(*batch_of(seed + 100))
                results.append(own.step(*batch_of(seed)))
        close(results[1].info, results[0].info)
        close(results[1].loss, results[0].loss)
        close(dict(model.state_dict()), dict(plain.state_dict()))
    return True


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_host_trains_to_the_bit(two, accumulate):
    assert two.run(hosts, accumulate) == [True, True]


def fewer_rows_later():
    model, step = step_of("agreement", None)
    compiled = gf.compile(step, backend="graph")
    state = compiled.init(model.eval(), seed=0)
    state, _ = compiled(state, batch_of(0, 1))
    before = copy.deepcopy(state)
    x, y = batch_of(1, 1)
    n = 3 if dist.get_rank() == 1 else 4
    try:
        compiled(state, (x[:n], y[:n]))
        said = "nothing"
    except ValueError as error:
        said = str(error)
    close(state["params"], before["params"])
    compiled(state, batch_of(1, 1))  # and all go on
    return said


def test_ranks_that_differ_are_named_before_the_graph_runs(two):
    for said in two.run(fewer_rows_later):
        assert "as many rows on every rank, found 4 on rank 0 and 3 on rank 1" in said


def ends():
    model, step = step_of("consensus")
    compiled = gf.compile(step, backend="graph")
    state = compiled.init(model, seed=0)
    state, _ = compiled(state, batch_of(0))
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    compiled(state, batch_of(1))


@pytest.mark.slow
def test_the_others_fail_when_a_rank_is_gone():
    world = World(2, timeout=20)
    try:
        world.start(ends)
        fine, said = world.outcome(0)
        assert not fine and "Rank 0 of 2 lost the others" in said
    finally:
        world.close()


def one_collective_fails():
    """The error of a collective in the graph is explained, others are shown as they are."""
    from gradfilter._lost_ranks import LostRanksError
    from gradfilter.distributed._ranks import Ranks

    ranks = Ranks.of(None)
    for text, kind in (("[gloo/pair.cc] closed", LostRanksError), ("no memory", RuntimeError)):
        with pytest.raises(RuntimeError) as found, ranks.around_graph(lambda: None):
            raise RuntimeError(text)
        assert found.type is kind
    return True


def test_what_fails_inside_of_a_graph_is_explained(two):
    assert two.run(one_collective_fails) == [True, True]
