"""A data set by its name."""

from __future__ import annotations

from pathlib import Path

from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._cifar import cifar
from gradfilter.lab.data._digits import digits
from gradfilter.lab.data._folder import folder
from gradfilter.lab.data._origin import Origin
from gradfilter.lab.data._synthetic import KINDS, synthetic

HUMAN = "cifar100n-fine"
NAMES = (
    "digits",
    "cifar10",
    "cifar100",
    f"{HUMAN}:FILE",
    "synthetic",
    *(f"synthetic-{kind}" for kind in KINDS),
    "folder:PATH",
)


def find(
    kind: str, path: str, *, data_dir: Path, download: bool, split_seed: int, image_size: int
) -> Origin:
    """The data set as its makers left it.

    Args:
        kind: Its name up to a colon.
        path: What follows the colon.
        data_dir: See `cifar`, like ``download``.
        download: Fetch it if it is not there.
        split_seed: Of the test split of digits.
        image_size: See `folder`.

    Raises:
        UsageError: There is no such name, or the data set is not there.
    """
    match kind, path:
        case "folder", path if path:
            return folder(Path(path), size=image_size)
        case "cifar100n-fine", _:
            return cifar("cifar100", data_dir, download=download)
        case (("cifar10" | "cifar100"), ""):
            return cifar(kind, data_dir, download=download)
        case "digits", "":
            return digits(split_seed)
        case "synthetic", "":
            return synthetic("uniform")
    for each in KINDS:
        if (kind, path) == (f"synthetic-{each}", ""):
            return synthetic(each)
    raise UsageError(
        f"--data: expected one of {', '.join(NAMES)}, found {f'{kind}:{path}' if path else kind!r}."
        " digits is the default and needs no download."
    )
