"""Import classes that need another framework in addition to torch at their first use."""

from __future__ import annotations

from importlib import import_module

HOMES = {
    "FilteredModule": "gradfilter.interop._lightning",
    "FilteredTrainer": "gradfilter.interop._transformers",
}


def __getattr__(name: str) -> object:
    """Return a class by its name, for the package that re-exports this function.

    Raises:
        ImportError: The framework is not installed.
        AttributeError: There is no such class.
    """
    if name not in HOMES:
        raise AttributeError(f"module 'gradfilter.interop' has no attribute {name!r}")
    try:
        return getattr(import_module(HOMES[name]), name)
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"Expected the package {missing.name!r}, which {name} is built on, found none. "
            'Install it: pip install "gradfilter[interop]".'
        ) from missing
