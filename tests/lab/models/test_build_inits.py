"""Weight initialisations: the parameters that each draws, sets to zero, or leaves unchanged."""

import math

import pytest
import torch

from _lab_models import NAMES, RESIDUAL, SMALL, made, weights
from gradfilter.lab._usage import UsageError
from gradfilter.lab.models._build import residual_blocks


@pytest.mark.parametrize("name", ["resnet18_32", "tv_resnet18", "wrn_16_4", "resnet34"])
@pytest.mark.parametrize(("init", "std"), [("fixup", 0.0), ("mfixup", 1e-6)])
def test_fixup(name, init, std):
    model, plain = made(name, seed=3, init=init), made(name, seed=3)
    blocks = residual_blocks(model)
    assert len(blocks) == {"resnet34": 16, "wrn_16_4": 6}.get(name, 8)
    head = model.fc if name.startswith("tv") else model.head
    changed = set()
    for first, second in blocks:
        expected = math.sqrt(2 / (9 * first.out_channels)) / math.sqrt(len(blocks))
        assert first.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert first.weight.mean().item() == pytest.approx(0, abs=0.1 * expected)
        assert first.bias is None or not first.bias.any()
        changed |= {*first.parameters(), *second.parameters()}
    changed |= set(head.parameters())
    almost_zero = [p for _, second in blocks for p in second.parameters()] + [*head.parameters()]
    together = torch.cat([p.detach().flatten() for p in almost_zero])
    assert together.double().std().item() == pytest.approx(std, rel=0.02)
    assert all(bool(p.any()) == (std > 0) for p in almost_zero)
    # All else is as it was.
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours in changed or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["resnet18_32", "mlp_128", "vit_32", "tv_resnet18", "vgg8"])
def test_nkaiming(name):
    model, plain = made(name, init="nkaiming"), weights(made(name))
    modules = dict(model.named_modules())
    for path, parameter in weights(model).items():
        owner, _, kind = path.rpartition(".")
        drawn = isinstance(modules[owner], torch.nn.Conv2d | torch.nn.Linear)
        if not drawn or owner in ("head", "fc"):
            assert torch.equal(parameter, plain[path])
        elif kind == "bias":
            assert not parameter.any()
        else:
            fan_out = parameter.numel() / parameter.shape[1]
            assert parameter.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(RESIDUAL)])
@pytest.mark.parametrize("init", ["fixup", "mfixup"])
def test_fixup_is_for_residual_networks(name, init):
    shape = next(shape for n, shape, _ in SMALL if n == name)
    more = {"width": 2} if name.startswith("vgg") else {}
    with pytest.raises(UsageError, match="expected a model with residual blocks"):
        made(name, shape, init=init, **more)
