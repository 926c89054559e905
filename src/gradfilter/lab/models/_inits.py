"""How the weights start."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from gradfilter.lab._usage import UsageError, check

SMALL = 1e-6


def initialise(model: nn.Module, init: str) -> None:
    """Give a model, fresh from its constructor, the weights of an initialisation.

    ========== ====================================================================================
    pytorch    What the layers' constructors do.
    nkaiming   Convolutions and hidden linear layers: weight N(0, std = √(2 / fan-out)), bias 0.
               The last linear layer keeps its own: its fan-out, the classes, says nothing of it.
    fixup      In each of the L residual blocks: first convolution N(0, std = √(2/(9·out)) / √L)
               with bias 0; second convolution 0, weight and bias. Last linear layer 0, weight and
               bias. The rest keeps its own.
    mfixup     As fixup, but second convolutions and the last linear layer, weight and bias, are
               N(0, std = 1e-6).
    ========== ====================================================================================

    fixup and mfixup are for networks with residual blocks of two convolutions: resnet18_K,
    resnet18, resnet34, tv_resnet18, tv_resnet34 and wrn_D_W. They were made to do without batch
    norm; with it they are allowed.

    Args:
        model: Changed in place, with random numbers of torch's default generator.
        init: One of the four names.

    Raises:
        UsageError: Another name; fixup or mfixup and the model has no residual blocks.

    Examples:
        >>> from gradfilter.lab.models._resnet import resnet
        >>> model = resnet(18, 2, classes=10, shape=(1, 8, 8))
        >>> initialise(model, "fixup")
        >>> model(torch.ones(1, 1, 8, 8)).abs().sum().item()
        0.0

    References:
        He et al., "Delving Deep into Rectifiers", 2015, https://arxiv.org/abs/1502.01852; Zhang,
        Dauphin, Ma, "Fixup Initialization", 2019, https://arxiv.org/abs/1901.09321
    """
    fix = "pytorch is the default."
    check(init in INITS, "--weight-init", f"one of {', '.join(INITS)}", repr(init), fix)
    with torch.no_grad():
        INITS[init](model)


def residual_blocks(model: nn.Module) -> list[tuple[nn.Conv2d, nn.Conv2d]]:
    """The two convolutions of every block that has a ``conv1`` and a ``conv2``.

    Theirs are torchvision's names, and here no other module has both.
    """
    pairs = ((getattr(m, "conv1", None), getattr(m, "conv2", None)) for m in model.modules())
    return [
        (first, second)
        for first, second in pairs
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    ]


def _pytorch(model: nn.Module) -> None:
    del model  # its constructors have done it


def _nkaiming(model: nn.Module) -> None:
    head = _head(model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module is not head:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                module.bias.zero_()


def _fixup(model: nn.Module) -> None:
    _scale_blocks(model, std=0.0)


def _mfixup(model: nn.Module) -> None:
    _scale_blocks(model, std=SMALL)


def _scale_blocks(model: nn.Module, std: float) -> None:
    blocks = residual_blocks(model)
    if not blocks:
        raise UsageError(
            "--weight-init: expected a model with residual blocks of convolutions for fixup and "
            "mfixup, found one without. Take pytorch or nkaiming, or a resnet18_K or wrn_D_W."
        )
    for first, second in blocks:
        fan_out = math.prod(first.kernel_size) * first.out_channels
        first.weight.normal_(0, math.sqrt(2 / fan_out / len(blocks)))
        if first.bias is not None:
            first.bias.zero_()
        _almost_zero(second, std)
    _almost_zero(_head(model), std)


def _almost_zero(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    for parameter in layer.parameters():
        parameter.normal_(0, std)


def _head(model: nn.Module) -> nn.Linear:
    """The last linear layer, which gives the logits."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


INITS: dict[str, Callable[[nn.Module], None]] = {
    "pytorch": _pytorch,
    "fixup": _fixup,
    "mfixup": _mfixup,
    "nkaiming": _nkaiming,
}
