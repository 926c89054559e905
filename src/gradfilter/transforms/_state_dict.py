"""Convert states to flat dicts of tensors and back, for checkpoints without unpickling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradfilter import _tree


def state_dict(state: Any) -> dict[str, Tensor]:
    """Return a state as ``dict[str, Tensor]`` with dotted names such as ``sgd.momentum.fc.weight``.

    A file written by ``torch.save`` loads with ``weights_only=True``.

    Args:
        state: The state of any transform, chain or train step.

    Examples:
        >>> import torch, gradfilter as gf
        >>> sorted(gf.state_dict(gf.sgd(0.1, momentum=0.9).init({"fc.weight": torch.ones(1)})))
        ['count', 'momentum.fc.weight']
    """
    return _tree.flatten_with_names(state)[0]


S = TypeVar("S")


def load_state_dict(template: S, flat: Mapping[str, Tensor]) -> S:
    """Put a flat dict back into the structure of a state.

    Args:
        template: A state of the same structure, for example ``update.init(params)``. It is not
            changed.
        flat: The result of `state_dict`. Values are copied to the template's devices.

    Returns:
        A new state.

    Raises:
        TypeError: ``flat`` is not a dict, for example the path of a file.
        ValueError: Names are missing or extra, a value is not a tensor, or a shape or dtype
            differs.

    Examples:
        >>> import torch, gradfilter as gf
        >>> params = {"w": torch.ones(1)}
        >>> state = gf.adam(0.1).init(params)
        >>> again = gf.load_state_dict(gf.adam(0.1).init(params), gf.state_dict(state))
    """
    if not isinstance(flat, Mapping):
        raise TypeError(
            f"Expected a flat dict from state_dict, found {type(flat).__name__}. Read it first: "
            "torch.load(path, weights_only=True)."
        )
    named, rebuild = _tree.flatten_with_names(template)
    missing, extra = sorted(set(named) - set(flat)), sorted(set(flat) - set(named))
    if missing or extra:
        raise ValueError(
            f"Expected the entries of this state, missing {missing}, extra {extra}. "
            + _remedy([*missing, *extra])
        )
    for name, leaf in named.items():
        if not isinstance(flat[name], Tensor):
            raise ValueError(
                f"Expected {name!r} to be a tensor, found {type(flat[name]).__name__}. Pass what "
                "`state_dict` gave."
            )
        if flat[name].layout != torch.strided or flat[name].device.type == "meta":
            what = "on the meta device" if flat[name].device.type == "meta" else flat[name].layout
            raise ValueError(
                f"Expected {name!r} to be a dense tensor with values, found {what}. Use "
                ".to_dense(), or load the file without mapping it to meta."
            )
        if leaf.shape != flat[name].shape or leaf.dtype != flat[name].dtype:
            raise ValueError(
                f"Expected {name!r} of shape {tuple(leaf.shape)} and {leaf.dtype}, found "
                f"{tuple(flat[name].shape)} and {flat[name].dtype}."
            )
    state: S = rebuild(
        flat[name].detach().to(leaf.device, copy=True) for name, leaf in named.items()
    )
    return state


def _remedy(odd: Sequence[str]) -> str:
    if all(name.startswith("random.") for name in odd):
        return (
            "They are random states, of which a GPU has one more than a CPU: take those entries "
            "from `state_dict` of the template, and the random numbers are its own."
        )
    return "Build the template with the same chain and the same parameters."
