"""The data that ranks send, by the sizes of the tensors in the collectives."""

import pytest
import torch
import torch.distributed as dist
from benchmarks._wire import Wire

import gradfilter as gf
from gradfilter.distributed import RankStack, across_ranks
from gradfilter.distributed._ranks import ALONE, LONG, Ranks

P = 12_000  # divides by every W, so that nothing is filled up
NUMBERS = 8  # bytes each, in float64


def rows(m):
    rank = dist.get_rank()
    g = torch.Generator().manual_seed(rank)
    return {
        "a": torch.randn(m, 100, 90, generator=g) + 1,
        "b": torch.randn(m, P - 9000, generator=g) + 1,
    }


def sent(m, name, *arguments):
    """Bytes per number of a shared gradient, in addition to those that making the stack takes."""
    size = dist.get_world_size()
    stack = RankStack(rows(m))
    with Wire(size) as wire:
        if name == "gram":
            stack.gram()
        elif name == "combine":
            stack.combine(torch.ones(m * size))
        elif name == "both":
            stack.gram()
            stack.combine(torch.ones(m * size))
        else:
            link = getattr(gf, name)(*arguments)
            params = {n: leaf[0] for n, leaf in stack.shapes.items()}
            params = {n: torch.zeros(shape) for n, shape in stack.shapes.items()}
            link.update(stack, {}, params)
    return wire.sent / NUMBERS, wire.calls


def all_alike(found):
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("m", [1, 2, 8])
def test_a_gram_sends_the_rows_once_and_a_combination_one_more(world, m):
    size = len(world.pipes)
    share = (size - 1) / size
    numbers = 2 * (m * size) ** 2 * share  # the Gram itself, by a ring all-reduce
    gram, calls = all_alike(world.run(sent, m, "gram"))
    assert gram == pytest.approx(m * P * share + numbers)
    assert calls.count("allreduce_") == 1
    both, _ = all_alike(world.run(sent, m, "both"))
    assert both == pytest.approx((m + 1) * P * share + numbers)
    combination, _ = all_alike(world.run(sent, m, "combine"))
    assert combination == pytest.approx(2 * P * share)  # whatever M is


def test_filtering_one_row_per_rank_sends_what_an_all_reduce_sends(world):
    size = len(world.pipes)
    ring = 2 * P * (size - 1) / size
    for rule in ("agree_filter", "consensus_filter", "mean_rows"):
        found, _ = all_alike(world.run(sent, 1, rule))
        assert ring <= found <= 1.05 * ring, rule


@pytest.mark.parametrize("m", [2, 3, 16])
def test_consensus_takes_two_sums_of_gradients_and_a_few_numbers(world, m):
    size = len(world.pipes)
    ring = 2 * P * (size - 1) / size
    found, calls = all_alike(world.run(sent, m, "consensus_filter"))
    few = 2 * m * size if m > 2 else 2 * (m * size) ** 2
    assert found <= 2 * ring + few
    assert ("alltoall_base_" in calls) == (m <= 2)  # a Gram, where that sends less


def making(m):
    size, local = dist.get_world_size(), gf.DenseStack(rows(m), losses=torch.ones(m))
    with Wire(size) as wire:
        across_ranks().update(local, {}, {n: leaf[0] for n, leaf in local.rows.items()})
    return wire.sent / NUMBERS


def test_making_a_stack_sends_a_few_numbers(world):
    for found in world.run(making, 4):
        assert found == (4 + 3 * 32) * (len(world.pipes) - 1)


def gathering(count):
    ranks = Ranks.of(None)
    with Wire(ranks.size) as wire:
        found = ranks.gather(torch.full((count,), float(ranks.rank)))
    assert torch.equal(found, torch.arange(float(ranks.size))[:, None].expand(-1, count))
    return wire.sent / NUMBERS, wire.calls


def test_a_process_alone_answers_with_its_own_tensors():
    own = torch.tensor([[3.0, 4.0]], requires_grad=True)
    assert (ALONE.rank, ALONE.size, ALONE.is_first, ALONE.name(0)) == (0, 1, True, 0)
    assert torch.equal(ALONE.gather(own), own[None]) and not ALONE.gather(own).requires_grad
    assert torch.equal(ALONE.exchange(own)(), own)
    total = ALONE.total(own)
    total += 1  # in memory of its own
    assert torch.equal(total, own + 1) and own.tolist() == [[3.0, 4.0]]
    assert torch.equal(ALONE.gather_on_host(own[0]), own)
    assert ALONE.gather_texts("é") == ["é"]
    assert ALONE.first_numbers([1, 0.5]) == [1.0, 0.5]
    assert ALONE.on_any(lambda: True)() and not ALONE.on_any(lambda: False)()
    ALONE.wait_for_all()


def deciding():
    ranks = Ranks.of(None)
    last, none = ranks.on_any(lambda: ranks.rank == ranks.size - 1), ranks.on_any(lambda: False)
    ranks.wait_for_all()
    return ranks.first_numbers([ranks.rank + 0.5, 7]), last(), none()


def test_ranks_decide_together(world):
    for found in world.run(deciding):
        assert found == ([0.5, 7.0], True, False)


def test_cpus_gather_large_tensors_by_broadcasts_which_send_no_more(world):
    size = len(world.pipes)
    assert set(world.run(gathering, LONG)[0][1]) == {"_allgather_base_"}
    for sent_here, calls in world.run(gathering, LONG + 1):
        assert calls == ["broadcast_"] * size
        assert sent_here == (LONG + 1) * (size - 1)
