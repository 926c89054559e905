"""The parameters to evaluate, for update rules that take gradients at other ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._types import Kind, Params, State, Tree
from gradfilter.transforms._fingerprint import whole_chain

AHEAD = "ahead_of_evaluated"
"""The entry of a state that says how far the parameters are ahead of those to evaluate.

``{name: factor ()}``: parameters = evaluated ones + factor · the buffer of this name, which is in
the same state, or in that of the wrapped rule.
"""


def evaluated_params(params: Params, state: State) -> Params:
    """Return the parameters to evaluate and to save, where training takes gradients elsewhere.

    `schedule_free` takes gradients between the average and the newest parameters, and the average
    is evaluated; `msam` takes them at perturbed parameters, and the unperturbed ones are evaluated.
    Training continues from the parameters as they are, not from these.

    Args:
        params: The parameters after the last step.
        state: The state of a transform, a chain, a partition or a `train_step`, after that step.

    Returns:
        New parameters; those that no such rule moves are returned as they are.

    Raises:
        ValueError: The state is of other parameters.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.msam(gf.sgd(1.0, momentum=0.9), rho=0.5)
        >>> params = {"w": torch.zeros(1)}
        >>> params, state, _ = update(params, update.init(params), {"w": torch.ones(1)})
        >>> params, gf.evaluated_params(params, state)
        ({'w': tensor([-1.5000])}, {'w': tensor([-1.])})
    """
    found = dict(params)
    for factor, buffer in _displacements(state):
        unknown = sorted(set(buffer) - set(params))
        if unknown:
            raise ValueError(
                f"evaluated_params: expected the state of these parameters, found one of {unknown} "
                "in addition. Give the parameters and the state that one step returned."
            )
        found.update(behind({name: params[name] for name in buffer}, factor, buffer))
    return found


def behind(params: Params, factor: Tensor, buffer: Tree) -> Params:
    """Return parameters − factor · buffer, in the dtypes of the parameters."""
    return {
        name: (_tree.at_least_float32(p) - factor * buffer[name]).to(p.dtype)
        for name, p in params.items()
    }


def _displacements(state: Any) -> Iterator[tuple[Tensor, Tree]]:
    """Yield the factors and the buffers of all rules inside that are ahead."""
    if not isinstance(state, dict):
        return
    ahead = state.get(AHEAD)
    if isinstance(ahead, dict):  # a parameter may have this name
        for name, factor in ahead.items():
            yield factor, state[name] if name in state else state["rule"][name]
        return
    for part in state.values():
        yield from _displacements(part)


def new_number(value: float | Tensor, params: Params) -> Tensor:
    """Return a number of a state, in float32 or wider as the parameters are. ()."""
    first = _tree.at_least_float32(next(iter(params.values())))
    device = _tree.device_of(params)
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=first.dtype, copy=True)
    return torch.full((), value, dtype=first.dtype, device=device)


def refuse_followers(name: str) -> None:
    """Refuse transforms of updates in the chain that is initialised, if it is known.

    They would move the parameters without moving those to evaluate.
    """
    found = [part.name for part in whole_chain() if part.kinds == (Kind.UPDATE_TO_UPDATE,)]
    if found:
        raise ValueError(
            f"{name}: expected no transform of updates behind it, found {found[0]!r}, which would "
            "not act on the parameters to evaluate. Omit it, or freeze leaves by partition with "
            "freeze() as their branch."
        )
