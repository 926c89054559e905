"""torchvision's data sets, imported when they are first asked for."""

from __future__ import annotations

import importlib
from typing import Any

from gradfilter.lab._usage import UsageError


def torchvision_datasets(name: str) -> Any:
    """The module ``torchvision.datasets``.

    Args:
        name: The data set that needs it.

    Raises:
        UsageError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--data: expected torchvision for {name}, found no such package. "
            'pip install "gradfilter[lab]" brings it.'
        ) from error
