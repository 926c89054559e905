"""From a model's name and settings to the model, and to what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gradfilter.lab._usage import check
from gradfilter.lab.models._families import find_family
from gradfilter.lab.models._images import Shape
from gradfilter.lab.models._inits import initialise
from gradfilter.lab.models._settings import as_arguments, is_whole

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
    """Make a model, on the CPU and in training mode: (B, channels, h, w) to (B, classes).

    The same arguments give the same parameters, whichever device they are moved to; torch's own
    random numbers are left where they were.

    Args:
        name: ``resnet18_K``, ``resnet18``, ``resnet34``, ``tv_resnet18``, ``tv_resnet34``,
            ``cnn_K``, ``cnn5_K``, ``vgg8`` .. ``vgg19``, ``vit_D``, ``mlp_H``, ``wrn_D_W``,
            ``lenet``.
        classes: C >= 2.
        shape: Of one image, (channels, height, width).
        additions: ``batchnorm`` for resnet, cnn, cnn5 and vgg; ``dropout-P``, 0 < P < 1, for
            mlp, vit and wrn.
        init: ``pytorch``, ``nkaiming``, ``fixup`` or ``mfixup``; the last two need residual
            blocks.
        seed: Of the parameters.
        **kwargs: ``width`` of vgg (64), ``patch`` (4) and ``depth`` (6) of vit, ``depth`` (2) of
            mlp.

    Raises:
        UsageError: An unknown model, initialisation, addition or keyword; a value out of range;
            images too small for the model's pools; more than 2 · 10⁹ parameters.

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
    # Seeding all generators, as torch.manual_seed does, would reach those of other devices.
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
    """What a checkpoint keeps: ``build_model(**model_arguments(...))`` is the model again.

    The arguments of `build_model`, as JSON and ``torch.load(..., weights_only=True)`` know them.

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
    """How many numbers a model learns.

    Examples:
        >>> parameter_count(nn.Linear(8, 10))
        90
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check_count(name: str, make: Callable[[], nn.Module]) -> None:
    """Count before anything is allocated: no memory error helps who typed a digit too many."""
    with torch.device("meta"):
        count = parameter_count(make())
    check(
        count <= MOST_PARAMETERS,
        "--model",
        f"at most {MOST_PARAMETERS:.0e} parameters",
        f"{count:.1e} in {name}",
        "Take a narrower one.",
    )
