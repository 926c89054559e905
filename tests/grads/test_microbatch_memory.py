"""The memory of steps: a training holds as many tensors after many steps as after a few."""

import gc

import pytest
import torch

import gradfilter as gf
from gradfilter import diagnostics


@pytest.fixture(autouse=True)
def only_new_objects():
    """Hide everything older than a test from the garbage collector, which otherwise visits it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors():
    gc.collect()
    return sum(type(found) is torch.Tensor for found in gc.get_objects())


def model_of(norm):
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8) if norm else torch.nn.Tanh(),
        torch.nn.Dropout(0.1), torch.nn.Linear(8, 3),
    )  # fmt: skip


CHAINS = {
    "mean": (gf.mean_rows(),),
    "agreement": (gf.agree_filter(0.97),),
    "consensus, clipped": (gf.clip_per_row(1.0), gf.consensus_filter()),
    "sharp": (gf.mean_rows(), gf.sam_perturb(0.05), gf.gsam_decompose(0.4), gf.agc_clip(0.01)),
    "m-sharp": (gf.sam_perturb(0.05, per_microbatch=True), gf.mean_rows()),
}


@pytest.mark.parametrize(
    ("rows", "plan"),
    [
        (4, "fused"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [(1, "fused"), (1, "vmap"), (4, "vmap"), (1, "loop"), (4, "loop")]
        ),
    ],
)
@pytest.mark.parametrize("name", CHAINS)
def test_a_training_does_not_grow(name, rows, plan):
    if rows == 1 and name == "agreement":
        rows = 2
    model = model_of(norm=True)
    update = gf.chain(*CHAINS[name], gf.adam(1e-3), gf.ema_params())
    loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
    step = gf.train_step(loss, update, microbatches=rows, plan=plan)
    batch = torch.randn(16, 6), torch.randint(0, 3, (16,))
    state = step.init(model, seed=0)
    counts = []
    for _ in range(3):
        for _ in range(4):
            state, info = step(state, batch)
        counts.append(live_tensors())
    assert counts[1] == counts[2], counts
    assert info["loss"].isfinite()


def test_rows_that_were_never_asked_leave_nothing():
    model = model_of(norm=False)
    loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
    batch = torch.randn(16, 6), torch.randint(0, 3, (16,))
    params, buffers = gf.extract(model)
    for make in (gf.microbatch_grads(loss, 1), gf.microbatch_grads(loss, 4)):
        counts = []
        for _ in range(3):
            for _ in range(3):
                make(params, batch, buffers=buffers)
            counts.append(live_tensors())
        assert counts[1] == counts[2], counts


def test_measuring_leaves_nothing():
    model, x = model_of(norm=False).eval(), torch.randn(4, 6)
    counts = []
    for _ in range(3):
        diagnostics.jacobian_norm(model, x)
        diagnostics.operator_norm(model, x, method="power")
        diagnostics.loss_curvature(model, x, torch.tensor([0, 1, 2, 0]))
        counts.append(live_tensors())
    assert counts[1] == counts[2], counts
