"""The memory of Jacobians: no (C, C) matrices, and no float64 copies of large tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter.diagnostics as gd


class Float64(TorchDispatchMode):
    """The largest float64 tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("target_only", [False, True])
def test_a_jacobian_over_its_norm_is_made_in_place(target_only):
    weight, x, y = torch.randn(4, 6), torch.randn(50, 6), torch.arange(50) % 4
    options = {"targets": y, "target_logit_only": target_only}
    with Float64() as seen:
        found = gd.input_jacobian(lambda x: x @ weight.T, x, normalization="jacobian", **options)
    expected = (weight / weight.norm()).expand(50, -1, -1)
    torch.testing.assert_close(found, expected[range(50), y][:, None] if target_only else expected)
    assert seen.largest <= max(50, 4 * 6)


@pytest.mark.parametrize("normalization", ["none", "softmax", "logsoftmax"])
def test_very_many_classes(normalization):
    weight, x = torch.randn(20000, 3, dtype=torch.float64), 0.1 * torch.randn(4, 3).double()
    found = gd.operator_norm(lambda x: x @ weight.T, x, normalization=normalization).values
    p = (x @ weight.T).softmax(1)
    mean = p @ weight
    centred = weight - mean[:, None]  # (N, C, D)
    expected = {
        "none": weight.expand(4, -1, -1),
        "logsoftmax": centred,
        "softmax": p[:, :, None] * centred,
    }[normalization]
    gram = expected.mT @ expected
    torch.testing.assert_close(found, torch.linalg.eigvalsh(gram)[:, -1].sqrt(), rtol=1e-4, atol=0)
