"""Rows of a convolution as products of windows and of bands, against the gradient of each row."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gradfilter.grads.fused import _conv_factor
from gradfilter.grads.fused._conv_factor import ConvFactor
from gradfilter.grads.fused._conv_geometry import Geometry
from gradfilter.grads.fused._conv_windows import fastest

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def layers(draw):
    """Draw M, B, channels, and per dim the kernel, stride, padding, dilation and size."""
    dims = draw(st.integers(1, 3))
    number = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))
    kernel, stride, padding, dilation = number(1, 3), number(1, 2), number(0, 2), number(1, 2)
    extra = number(0, 4)
    # The padded input holds the dilated kernel at least once.
    spans = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    sizes = tuple(max(1, span) + e for span, e in zip(spans, extra, strict=True))
    counts = tuple(draw(st.integers(1, 3)) for _ in range(4))  # M, B, in, out
    return counts, kernel, stride, padding, dilation, sizes


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layout", ["calls", "windows", "bands"])
@given(layer=layers())
@settings(max_examples=60, deadline=None)
def test_rows_and_norms_are_those_of_a_backward_pass_per_row(layout, layer):
    (m, b, fan_in, fan_out), kernel, stride, padding, dilation, sizes = layer
    if layout == "bands":
        stride = (1, *stride[1:])
    dims = len(kernel)
    weight = torch.randn(fan_out, fan_in, *kernel, requires_grad=True)
    x = torch.randn(m, b, fan_in, *sizes)
    outputs = [CONV[dims](row, weight, None, stride, padding, dilation) for row in x]
    grads = [torch.randn_like(y) for y in outputs]
    want = torch.stack(
        [torch.autograd.grad(y, weight, g)[0] for y, g in zip(outputs, grads, strict=True)]
    )
    geometry = Geometry(dims, stride, padding, dilation, False, (0,) * dims, 1)
    factor = ConvFactor(x, torch.stack(grads), weight.detach(), geometry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_conv_factor, "fastest", lambda *_: layout)
        close(factor.rows(), want)
        close(factor._sq_norms_of_rows(), want.flatten(1).square().sum(1))
        close(factor.rows(fan_out // 2, fan_out), want[:, fan_out // 2 :])


def layout(inputs, outputs, kernel, side, samples, stride=1, groups=1):
    geometry = Geometry(2, (stride,) * 2, (0, 0), (1, 1), False, (0, 0), groups)
    weight = torch.Size((outputs, inputs // groups, kernel, kernel))
    return fastest(weight, geometry, samples, samples * ((side - kernel) // stride + 1) ** 2)


def test_the_layout_depends_on_samples_positions_channels_and_stride():
    assert layout(3, 6, 5, 32, 1) == "bands"  # the first layer of LeNet
    assert layout(3, 6, 5, 32, 1, stride=2) == "windows"  # lines of a band would be left out
    assert layout(16, 32, 3, 18, 1) == "calls"  # one grouped convolution with full vectors
    assert layout(64, 64, 3, 6, 8) == "windows"  # fewer positions than taps
    assert layout(64, 64, 3, 10, 16) == "bands"
    assert layout(64, 64, 3, 10, 100) == "calls"  # many positions
    assert layout(6, 12, 3, 18, 8, groups=2) == "calls"
    assert layout(6, 12, 3, 18, 0) == "calls"
