"""Rows on GPUs, one GPU per rank, with NCCL; skipped if there are too few GPUs."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import gradfilter as gf
from gradfilter.distributed import RankStack, across_ranks

pytestmark = pytest.mark.gpu
LEAVES = {"a": (300, 70), "b": (41,), "c": ()}
M = 3


def rows(seed, count, device):
    g = torch.Generator().manual_seed(seed)
    return {
        name: (1 + torch.randn(count, *shape, generator=g)).to(device)
        for name, shape in LEAVES.items()
    }


def compare(rank, size, store, backend):
    """The answers of one stack of all rows, and a step that never waits for the device."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    full = rows(0, M * size, device)
    whole = gf.DenseStack(full)
    spread = RankStack({name: t[rank * M :][:M] for name, t in full.items()})
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    weights = torch.linspace(0, 1, M * size, device=device)
    torch.testing.assert_close(spread.gram(), whole.gram(), **tolerance)
    for _ in range(2):
        torch.testing.assert_close(spread.combine(weights), whole.combine(weights), **tolerance)
    params = {name: torch.zeros(shape, device=device) for name, shape in LEAVES.items()}
    for link in (gf.agree_filter(0.9), gf.consensus_filter(), gf.mean_rows()):
        update = gf.chain(across_ranks(), link, gf.sgd(0.1, momentum=0.9))
        state = update.init(params)
        local = {name: t[rank * M :][:M] for name, t in full.items()}
        update(params, state, local)
        torch.cuda.set_sync_debug_mode("error")
        found, _, info = update(params, state, local)
        torch.cuda.set_sync_debug_mode("default")
        expected = gf.chain(link, gf.sgd(0.1, momentum=0.9))(params, state_of(link, params), full)
        torch.testing.assert_close(found, expected[0], **tolerance)
        assert info["keep"] == expected[2]["keep"]
    dist.destroy_process_group()


def needing(size):
    """Return a number of ranks, for a test that needs a CUDA device for each."""
    few = torch.cuda.device_count() < size
    return pytest.param(size, marks=pytest.mark.skipif(few, reason=f"needs {size} CUDA devices"))


def state_of(link, params):
    return gf.chain(link, gf.sgd(0.1, momentum=0.9)).init(params)


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize("size", [needing(1), needing(2)])
def test_ranks_on_gpus_answer_as_one_stack(tmp_path, size, backend):
    torch.multiprocessing.spawn(
        compare, (size, str(tmp_path / "store"), backend), nprocs=size, join=True
    )
