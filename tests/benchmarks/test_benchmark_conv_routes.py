"""All routes to the gradients of a convolution's weight give the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from benchmarks._conv_routes import ROUTES, Layer, layers_of
from torch import nn


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "layer",
    [
        Layer((6, 3, 9, 7), (4, 3, 3, 3), (2, 1), (1, 2)),
        Layer((6, 5, 6, 6), (2, 5, 1, 1), (2, 2), (0, 0)),
    ],
)
def test_a_route_is_autograd_microbatch_by_microbatch(route, layer):
    x, weight = torch.randn(layer.inputs).double(), torch.randn(layer.weight).double()
    weight.requires_grad_()
    out = F.conv2d(x, weight, None, layer.stride, layer.padding)
    d = torch.randn_like(out)
    expected = [
        torch.autograd.grad(part, weight, own, retain_graph=True)[0]
        for part, own in zip(out.chunk(3), d.chunk(3), strict=True)
    ]
    found = ROUTES[route](layer, x, d, weight.detach(), 3)
    torch.testing.assert_close(found, torch.stack(expected))


def test_equal_layers_are_listed_once():
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)), nn.Conv2d(3, 2, 1))
    layers = layers_of(model, torch.randn(2, 3, 5, 5))
    assert [layer.weight for layer in layers] == [(3, 3, 3, 3), (2, 3, 1, 1)]
    assert layers[0].title == "3 -> 3, 3 x 3 / 1, 5 x 5"
