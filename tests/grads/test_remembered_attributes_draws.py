"""The check of remembered attributes draws nothing from the generators of a module."""

import pytest
import torch
from torch import nn

import gradfilter as gf


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.generator = nn.Linear(3, 2), torch.Generator().manual_seed(5)

    def forward(self, x):
        self.seen = self.linear.weight.T
        return self.linear(x) * torch.rand(2, generator=self.generator)


@pytest.mark.parametrize("plan", ["auto", "fused", "vmap", "loop"])
def test_the_next_draw_is_that_of_a_plain_loop(plan):
    model, plain = Noisy(), Noisy()
    batch = (torch.ones(4, 3), torch.zeros(4, 2))
    params, _ = gf.extract(model)
    gf.microbatch_grads(gf.model_loss(model, nn.functional.mse_loss), 2, plan=plan)(params, batch)
    for rows in batch[0].split(2):
        plain(rows)
    draws = [torch.rand(3, generator=m.generator) for m in (model, plain)]
    torch.testing.assert_close(*draws, rtol=0, atol=0)
