"""Build a model from its name and settings: families, keyword arguments, initialisation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from typing import Any

import torch
from torch import nn

from gradfilter.lab._usage import UsageError, check
from gradfilter.lab.models._networks import (
    Shape,
    cnn,
    cnn3,
    cnn5,
    lenet,
    mlp,
    resnet,
    torchvision_resnet,
    vgg,
    vit,
    wide_resnet,
)

# --- Families of models, by name ---


@dataclass(frozen=True)
class ModelFamily:
    """Models that one function builds.

    Attributes:
        build: ``build(*sizes, classes=, shape=, **additions, **options) -> nn.Module``.
        pattern: Pattern of the name, with one group per size.
        examples: Names to suggest after a misspelt one.
        additions: Possible ``--model-additions``, "dropout" for dropout-P.
        options: Keyword arguments that are whole numbers >= 1.
    """

    build: Callable[..., nn.Module]
    pattern: str
    examples: tuple[str, ...]
    additions: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


_SIZE = r"([1-9][0-9]{0,3})"
_VGGS = ("vgg8", "vgg11", "vgg13", "vgg16", "vgg19")

FAMILIES = {
    "resnet18_K": ModelFamily(resnet, f"resnet(18)_{_SIZE}", ("resnet18_64",), ("batchnorm",)),
    "resnet18, resnet34": ModelFamily(
        resnet, "resnet(18|34)", ("resnet18", "resnet34"), ("batchnorm",)
    ),
    "tv_resnet18, tv_resnet34": ModelFamily(
        torchvision_resnet, "tv_resnet(18|34)", ("tv_resnet18", "tv_resnet34")
    ),
    "cnn_K": ModelFamily(cnn, f"cnn_{_SIZE}", ("cnn_64",), ("batchnorm",)),
    "cnn3_K": ModelFamily(cnn3, f"cnn3_{_SIZE}", ("cnn3_16",), ("batchnorm",)),
    "cnn5_K": ModelFamily(cnn5, f"cnn5_{_SIZE}", ("cnn5_64",), ("batchnorm",)),
    ", ".join(_VGGS): ModelFamily(vgg, "vgg(8|11|13|16|19)", _VGGS, ("batchnorm",), ("width",)),
    "vit_D": ModelFamily(vit, f"vit_{_SIZE}", ("vit_512",), ("dropout",), ("patch", "depth")),
    "mlp_H": ModelFamily(mlp, f"mlp_{_SIZE}", ("mlp_64",), ("dropout",), ("depth",)),
    "wrn_D_W": ModelFamily(wide_resnet, f"wrn_{_SIZE}_{_SIZE}", ("wrn_28_10",), ("dropout",)),
    "lenet": ModelFamily(lenet, "lenet", ("lenet",)),
}
"""Every family, under the names that messages show."""


def find_family(name: str) -> tuple[ModelFamily, list[int]]:
    """Return the family of a model and the sizes in its name.

    Raises:
        UsageError: No family has this name.

    Examples:
        >>> family, sizes = find_family("wrn_28_10")
        >>> family.build.__name__, sizes
        ('wide_resnet', [28, 10])
    """
    for family in FAMILIES.values():
        if match := re.fullmatch(family.pattern, name):
            return family, [int(size) for size in match.groups()]
    near = _nearest(name.lower().replace("-", "_"))
    hint = f"Did you mean {near}?" if near else "K, H, D and W are whole numbers."
    raise UsageError(f"--model: expected one of {', '.join(FAMILIES)}, found {name!r}. {hint}")


def _nearest(name: str) -> str | None:
    """Return the example most similar to a name, with or without its sizes, or None."""
    examples = [example for family in FAMILIES.values() for example in family.examples]

    def likeness(example: str) -> float:
        pairs = ((name, example), (_without_sizes(name), _without_sizes(example)))
        return max(SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(examples, key=likeness)
    return best if likeness(best) >= 0.6 else None


def _without_sizes(name: str) -> str:
    return re.sub("_[0-9]+", "_K", name)


# --- Settings of a model: additions and keyword arguments ---


def as_arguments(
    name: str, family: ModelFamily, additions: Sequence[str], kwargs: Mapping[str, int]
) -> dict[str, Any]:
    """Check additions and keyword arguments, and return keyword arguments of the family's function.

    Raises:
        UsageError: The family does not have the argument, or a value is out of range.

    Examples:
        >>> from gradfilter.lab.models._build import FAMILIES
        >>> as_arguments("mlp_64", FAMILIES["mlp_H"], ["dropout-0.1"], {"depth": 3})
        {'dropout': 0.1, 'depth': 3}
    """
    some = ", ".join(family.options) or "none"
    for option, value in kwargs.items():
        check(option in family.options, "model keyword", some, option, f"{name} has no other.")
        fair = is_whole(value) and 1 <= value <= 1000
        check(fair, option, "a whole number from 1 to 1000", value, "Omit it.")
    return {**_additions(name, family, additions), **kwargs}


def _additions(name: str, family: ModelFamily, additions: Sequence[str]) -> dict[str, Any]:
    """Return the additions as keyword arguments of the family's function."""
    found: dict[str, Any] = {}
    for addition in additions:
        kind, _, amount = addition.partition("-")
        if kind not in family.additions or (kind == "batchnorm" and amount):
            some = ", ".join("dropout-P" if a == "dropout" else a for a in family.additions)
            raise UsageError(
                f"--model-additions: expected {some or 'none'} for {name}, found {addition!r}. "
                "Omit it, or use another model."
            )
        fix = "Name it once."
        check(kind not in found, "--model-additions", f"{kind} once", list(additions), fix)
        found[kind] = True if kind == "batchnorm" else _probability(addition, amount)
    return found


def _probability(addition: str, amount: str) -> float:
    try:
        value = float(amount)
    except ValueError:
        value = -1.0
    fix = "dropout-0.1 is usual."
    check(0 < value < 1, "--model-additions", "dropout-P with 0 < P < 1", repr(addition), fix)
    return value


def is_whole(value: object) -> bool:
    """Return whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


# --- Initialisation of weights ---


SMALL = 1e-6


def initialise(model: nn.Module, init: str) -> None:
    """Initialise the weights of a newly constructed model.

    ========== ====================================================================================
    pytorch    The initialisation of the layers' constructors.
    nkaiming   Convolutions and hidden linear layers: weight N(0, std = √(2 / fan-out)), bias 0.
               The last linear layer keeps its own: its fan-out is the number of classes.
    fixup      In each of the L residual blocks: first convolution N(0, std = √(2/(9·out)) / √L)
               with bias 0; second convolution 0, weight and bias. Last linear layer 0, weight and
               bias. The rest keeps its own.
    mfixup     As fixup, but second convolutions and the last linear layer, weight and bias, are
               N(0, std = 1e-6).
    ========== ====================================================================================

    fixup and mfixup are for networks with residual blocks of two convolutions: resnet18_K,
    resnet18, resnet34, tv_resnet18, tv_resnet34 and wrn_D_W. They are meant for networks without
    batch norm, but work with it.

    Args:
        model: The model, changed in place with random numbers of torch's default generator.
        init: One of the four names.

    Raises:
        UsageError: The name is unknown, or fixup or mfixup is given for a model without residual
            blocks.

    Examples:
        >>> from gradfilter.lab.models._networks import resnet
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
    """Return the two convolutions of every block that has a ``conv1`` and a ``conv2``.

    These are torchvision's names, and no other module here has both.
    """
    pairs = ((getattr(m, "conv1", None), getattr(m, "conv2", None)) for m in model.modules())
    return [
        (first, second)
        for first, second in pairs
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    ]


def _pytorch(model: nn.Module) -> None:
    del model  # the constructors have initialised it


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
            "mfixup, found one without. Use pytorch or nkaiming, or a resnet18_K or wrn_D_W."
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
    """Return the last linear layer, which computes the logits."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


INITS: dict[str, Callable[[nn.Module], None]] = {
    "pytorch": _pytorch,
    "fixup": _fixup,
    "mfixup": _mfixup,
    "nkaiming": _nkaiming,
}


# --- From a name and settings to a model, and to what a checkpoint stores ---


MOST_PARAMETERS = 2 * 10**9


def build_model(
    name: str,
    *,
    classes: int,
    shape: Shape | Sequence[int],
    additions: Sequence[str] = (),
    init: str = "pytorch",
    seed: int = 0,
    **kwargs: int,
) -> nn.Module:
    """Build a model, on the CPU and in training mode: (B, channels, h, w) to (B, classes).

    Equal arguments give equal parameters on every device; the global random state of torch is not
    changed.

    Args:
        name: ``resnet18_K``, ``resnet18``, ``resnet34``, ``tv_resnet18``, ``tv_resnet34``,
            ``cnn_K``, ``cnn3_K``, ``cnn5_K``, ``vgg8`` .. ``vgg19``, ``vit_D``, ``mlp_H``,
            ``wrn_D_W``, ``lenet``.
        classes: Number of classes, C >= 2.
        shape: Shape of one image, (channels, height, width).
        additions: ``batchnorm`` for resnet, cnn, cnn3, cnn5 and vgg; ``dropout-P``, 0 < P < 1, for
            mlp, vit and wrn.
        init: ``pytorch``, ``nkaiming``, ``fixup`` or ``mfixup``; the last two need residual
            blocks.
        seed: Seed of the parameters.
        **kwargs: ``width`` of vgg (64), ``patch`` (4) and ``depth`` (6) of vit, ``depth`` (2) of
            mlp.

    Raises:
        UsageError: The model, initialisation, addition or keyword is unknown, a value is out of
            range, images are too small for the model's pools, or the model has more than 2 · 10⁹
            parameters.

    Examples:
        >>> build_model("mlp_16", classes=10, shape=(1, 8, 8))(torch.ones(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check(is_whole(classes) and classes >= 2, "classes", ">= 2", classes, "Digits have 10.")
    check(
        len(shape) == 3 and all(is_whole(size) and size >= 1 for size in shape),
        "shape",
        "(channels, height, width)",
        tuple(shape),
        "That of digits is (1, 8, 8).",
    )
    family, sizes = find_family(name)
    settings = as_arguments(name, family, additions, kwargs)
    make = partial(family.build, *sizes, classes=classes, shape=tuple(shape), **settings)
    _check_count(name, make)
    # torch.manual_seed would also seed the generators of other devices.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = make()
        initialise(model, init)
    return model


def model_arguments(
    name: str,
    *,
    classes: int,
    shape: Shape | Sequence[int],
    additions: Sequence[str] = (),
    init: str = "pytorch",
    seed: int = 0,
    **kwargs: int,
) -> dict[str, Any]:
    """Return what a checkpoint stores: ``build_model(**model_arguments(...))`` is the same model.

    The arguments of `build_model`, as types of JSON and ``torch.load(..., weights_only=True)``.

    Examples:
        >>> model_arguments("vit_8", classes=10, shape=(1, 8, 8), depth=2)  # doctest: +ELLIPSIS
        {'name': 'vit_8', 'classes': 10, 'shape': [1, 8, 8], ..., 'seed': 0, 'depth': 2}
    """
    return {
        "name": name,
        "classes": classes,
        "shape": list(shape),
        "additions": list(additions),
        "init": init,
        "seed": seed,
        **kwargs,
    }


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of a model.

    Examples:
        >>> parameter_count(nn.Linear(8, 10))
        90
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check_count(name: str, make: Callable[[], nn.Module]) -> None:
    """Refuse too many parameters before memory is allocated, with a clear message."""
    with torch.device("meta"):
        count = parameter_count(make())
    check(
        count <= MOST_PARAMETERS,
        "--model",
        f"at most {MOST_PARAMETERS:.0e} parameters",
        f"{count:.1e} in {name}",
        "Use a narrower one.",
    )
