"""Check that a compiled step is the step."""

import torch

import gradfilter as gf


def check_compiled(model, criterion, batch, m, *transforms):
    """Compare three steps of a compiled `train_step` with those of the step itself."""
    chain = gf.chain(*transforms, gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, criterion), chain, microbatches=m)
    compiled = gf.compile(step, backend="graph")
    state = other = step.init(model, seed=0)
    for _ in range(3):
        state, _ = step(state, batch)
        other, _ = compiled(other, batch)
    torch.testing.assert_close(other["params"], state["params"], rtol=1e-12, atol=1e-14)
