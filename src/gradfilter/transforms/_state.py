"""States as flat dicts of tensors, for checkpoints that need no unpickling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradfilter import _tree


def state_dict(state: Any) -> dict[str, Tensor]:
    """A state as ``dict[str, Tensor]`` with dotted names such as ``sgd.momentum.fc.weight``.

    What ``torch.save`` writes of it loads with ``weights_only=True``.

    Args:
        state: The state of any link, chain or train step.

    Example:
        >>> import torch, gradfilter as gf
        >>> sorted(gf.state_dict(gf.sgd(0.1, momentum=0.9).init({"fc.weight": torch.ones(1)})))
        ['count', 'momentum.fc.weight']
    """
    return _tree.flatten_with_names(state)[0]


def load_state_dict(template: Any, flat: Mapping[str, Tensor]) -> Any:
    """Put a flat dict back into the structure of a state.

    Args:
        template: A state of the same structure, for example ``update.init(params)``. Unchanged.
        flat: What `state_dict` gave. Values are copied to the template's devices.

    Returns:
        A new state.

    Raises:
        ValueError: Names are missing or extra, or a shape or dtype differs.

    Example:
        >>> import torch, gradfilter as gf
        >>> params = {"w": torch.ones(1)}
        >>> state = gf.adam(0.1).init(params)
        >>> again = gf.load_state_dict(gf.adam(0.1).init(params), gf.state_dict(state))
    """
    named, rebuild = _tree.flatten_with_names(template)
    missing, extra = sorted(set(named) - set(flat)), sorted(set(flat) - set(named))
    if missing or extra:
        raise ValueError(
            f"Expected the entries of this state, missing {missing}, extra {extra}. Build the "
            "template with the same chain and the same parameters."
        )
    for name, leaf in named.items():
        if leaf.shape != flat[name].shape or leaf.dtype != flat[name].dtype:
            raise ValueError(
                f"Expected {name!r} of shape {tuple(leaf.shape)} and {leaf.dtype}, found "
                f"{tuple(flat[name].shape)} and {flat[name].dtype}."
            )
    return rebuild(flat[name].detach().to(leaf.device, copy=True) for name, leaf in named.items())
