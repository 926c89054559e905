"""Which models there are, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher

from torch import nn

from gradfilter.lab._usage import UsageError
from gradfilter.lab.models._cnn import cnn, cnn5
from gradfilter.lab.models._lenet import lenet
from gradfilter.lab.models._mlp import mlp
from gradfilter.lab.models._resnet import resnet
from gradfilter.lab.models._torchvision import torchvision_resnet
from gradfilter.lab.models._vgg import vgg
from gradfilter.lab.models._vit import vit
from gradfilter.lab.models._wide_resnet import wide_resnet


@dataclass(frozen=True)
class Family:
    """Models that one function makes.

    Attributes:
        build: ``build(*sizes, classes=, shape=, **additions, **options) -> nn.Module``.
        pattern: Of the name, with a group for each of the sizes.
        examples: Names, for a user who misspelt one.
        additions: What ``--model-additions`` may name, "dropout" for dropout-P.
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
    "resnet18_K": Family(resnet, f"resnet(18)_{_SIZE}", ("resnet18_64",), ("batchnorm",)),
    "resnet18, resnet34": Family(resnet, "resnet(18|34)", ("resnet18", "resnet34"), ("batchnorm",)),
    "tv_resnet18, tv_resnet34": Family(
        torchvision_resnet, "tv_resnet(18|34)", ("tv_resnet18", "tv_resnet34")
    ),
    "cnn_K": Family(cnn, f"cnn_{_SIZE}", ("cnn_64",), ("batchnorm",)),
    "cnn5_K": Family(cnn5, f"cnn5_{_SIZE}", ("cnn5_64",), ("batchnorm",)),
    ", ".join(_VGGS): Family(vgg, "vgg(8|11|13|16|19)", _VGGS, ("batchnorm",), ("width",)),
    "vit_D": Family(vit, f"vit_{_SIZE}", ("vit_512",), ("dropout",), ("patch", "depth")),
    "mlp_H": Family(mlp, f"mlp_{_SIZE}", ("mlp_64",), ("dropout",), ("depth",)),
    "wrn_D_W": Family(wide_resnet, f"wrn_{_SIZE}_{_SIZE}", ("wrn_28_10",), ("dropout",)),
    "lenet": Family(lenet, "lenet", ("lenet",)),
}
"""Every family, under the names that a user is told."""


def find_family(name: str) -> tuple[Family, list[int]]:
    """The family of a model and the sizes in its name.

    Raises:
        UsageError: No family has such names.

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
    """The example that looks most like a name, as it is or with other sizes, if any does."""
    examples = [example for family in FAMILIES.values() for example in family.examples]

    def likeness(example: str) -> float:
        pairs = ((name, example), (_without_sizes(name), _without_sizes(example)))
        return max(SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(examples, key=likeness)
    return best if likeness(best) >= 0.6 else None


def _without_sizes(name: str) -> str:
    return re.sub("_[0-9]+", "_K", name)
