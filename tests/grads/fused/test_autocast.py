"""Half precision under plan "fused": autocast, and parameters of any dtype."""

import pytest
import torch
import torch.nn.functional as F

import gradfilter as gf
from _zoo import ZOO
from _zoo_case import PLAN, inputs, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

M = 3

AUTOCAST = ["linear-3d", "lenet", "batch-norm-maps", "layer-norm-0", "attention-causal"]
AUTOCAST += ["used-twice", "lora-adapter", "embedding-padding", "tied-head", "encoder-pre-norm"]


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_is_close_to_the_loops(name):
    case = ZOO[name]
    model, batch = case.model(), case.samples(M, 4)
    exact = rows_of(model, batch, "loop", criterion=case.criterion)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loop, fused = (
            rows_of(model, batch, plan, criterion=case.criterion) for plan in ("loop", PLAN)
        )
    assert fused.losses.dtype == loop.losses.dtype
    torch.testing.assert_close(fused.losses, loop.losses, rtol=0.02, atol=0.02)
    gradient, want = fused.combine(torch.ones(M)), exact.combine(torch.ones(M))
    flat = lambda tree: torch.cat([leaf.flatten() for leaf in tree.values()])
    cosine = F.cosine_similarity(flat(gradient), flat(want), dim=0)
    by_loop = F.cosine_similarity(flat(loop.combine(torch.ones(M))), flat(want), dim=0)
    assert cosine > 0.999 or cosine > by_loop - 0.001, (cosine, by_loop)
    assert all(leaf.dtype == torch.float32 for leaf in gradient.values())
    assert all(leaf.dtype == torch.float32 for leaf in fused.stacked().values())
    assert fused.gram().dtype == torch.float64
    for a, b in zip(fused.buffers.values(), loop.buffers.values(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_autocast_is_that_of_the_pass_not_of_the_question():
    model, batch = ZOO["linear-3d"].model(), inputs(4, 6)(6)
    plain = rows_of(model, batch).combine(torch.ones(M))
    rows = rows_of(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        late = rows.combine(torch.ones(M))
        cast = rows_of(model, batch)
        early = cast.gram()
    torch.testing.assert_close(late, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cast.gram(), early, rtol=1e-9, atol=0)
    assert torch.equal(cast.at(gf.extract(model)[0]).losses, cast.losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["lenet", "layer-norm-0", "used-twice"])
def test_dtypes_are_preserved(name, dtype):
    case = ZOO[name]
    model = case.model().to(dtype)
    x, y = case.samples(M, 2)
    loop, fused = (rows_of(model, (x.to(dtype), y), plan) for plan in ("loop", PLAN))
    gradient = fused.combine(torch.ones(M))
    assert all(g.dtype == dtype for g in (*gradient.values(), *fused.stacked().values()))
    assert fused.gram().dtype == fused.sq_norms().dtype == fused.dot(gradient).dtype
    assert fused.gram().dtype == torch.float64
    assert fused.losses.dtype == loop.losses.dtype
    loose = 0.1 if dtype == torch.bfloat16 else 1e-4
    want = loop.combine(torch.ones(M))
    for leaf in want:
        assert (gradient[leaf] - want[leaf]).norm() <= loose * want[leaf].norm() + loose * 0.01
