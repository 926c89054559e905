"""Rows at separate parameters, computed in chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import ConvBN, Dropped, images, vectors
from gradfilter.grads.fused import _forward as _fused


def per_row(params, rows):
    noise = torch.linspace(0.9, 1.1, rows, dtype=torch.float64)
    return {n: p * noise.view(-1, *[1] * p.ndim) for n, p in params.items()}


def stacks(model, batch, rows, size):
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    plain = gf.microbatch_grads(loss, rows, plan="fused")
    chunked = gf.microbatch_grads(loss, rows, plan="fused", chunk_size=size)
    own = per_row(params, rows)
    state = torch.get_rng_state()
    found = []
    for grads_of in (plain, chunked):
        torch.set_rng_state(state)
        found.append(grads_of(params, batch, buffers=buffers).at_rows(own))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_chunks_give_the_rows_of_the_whole(float64, size):
    whole, chunked = stacks(ConvBN(), images(), 4, size)
    assert isinstance(chunked, gf.DenseStack)
    torch.testing.assert_close(chunked.stacked(), whole.stacked(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chunked.losses, whole.losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(chunked.buffers, whole.buffers, rtol=1e-12, atol=0)


def test_rows_that_draw_random_numbers_are_computed_together(float64):
    whole, chunked = stacks(Dropped(), vectors(), 4, 2)
    assert torch.equal(whole.losses, chunked.losses)
    torch.testing.assert_close(whole.gram(), chunked.gram())


def test_no_more_rows_at_a_time_than_asked_for(monkeypatch, float64):
    seen, entered = [], _fused.Level.entered
    monkeypatch.setattr(_fused.Level, "entered", lambda n: seen.append(n) or entered(n))
    stacks(nn.Linear(6, 3), vectors(), 4, 2)
    assert seen == [4, 4, 4, 2, 2]  # plain and its at_rows, then chunked and its two chunks
