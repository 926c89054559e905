"""Move the state of a torch optimizer into a transform of `from_torch`, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradfilter._types import State
from gradfilter.transforms._chain import check_state

PARTS = ("leaves", "group", "count", "lr")
REMEDY = "Give the state of from_torch itself: that of a chain has it under the class's name."


def import_torch_state(
    state: State,
    torch_state: Mapping[str, Any],
    names: Iterable[str],
    *,
    count: int | None = None,
) -> State:
    """Return the state of `from_torch` in which a torch optimizer's training continues.

    Args:
        state: The state of a transform of the same class, for example ``update.init(params)``; in a
            chain the entry of this transform, such as ``state["nadam"]``. It is not changed.
        torch_state: The result of ``optimizer.state_dict()``.
        names: The names of the parameters, in the order in which the optimizer got them:
            ``[name for name, _ in model.named_parameters()]``. Parameters that the state does not
            have, such as frozen ones, are ignored.
        count: The number of steps so far, which schedules continue from. None to take the entry
            ``step`` of the optimizer.

    Returns:
        A new state. Hyperparameters are not moved: they are those of the transform.

    Raises:
        TypeError: ``state`` is not a dict.
        ValueError: Names, entries or shapes differ; the optimizer keeps no ``step`` (SGD, Muon),
            and no count is given.

    Examples:
        >>> import torch, gradfilter as gf
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> old = torch.optim.Adam([w], lr=0.1)
        >>> w.sum().backward()
        >>> old.step()
        >>> state = gf.from_torch(torch.optim.Adam, lr=0.1).init({"w": w})
        >>> gf.import_torch_state(state, old.state_dict(), ["w"])["count"]
        tensor(1)
    """
    check_state("import_torch_state", "transform", state, PARTS, REMEDY)
    positions = _positions("import_torch_state", state, torch_state, names)
    own, group = torch_state["state"], torch_state["param_groups"][0]
    leaves = {
        entry: {
            name: _like(f"{entry!r} of {name!r}", _entry(own, positions[name], entry, name), old)
            for name, old in part.items()
        }
        for entry, part in state["leaves"].items()
    }
    missing = sorted(set(state["group"]) - set(group))
    if missing:
        raise ValueError(
            f"import_torch_state: expected the entries {missing} in the group of the optimizer, "
            "found none. Give the state_dict() of an optimizer of the same class after a step."
        )
    new_group = {key: _like(f"{key!r}", group[key], old) for key, old in state["group"].items()}
    if count is None:
        steps = [
            *leaves.get("step", {}).values(),
            *(new_group[k] for k in new_group if k == "step"),
        ]
        if not steps:
            raise ValueError(
                "import_torch_state: expected count=, because this optimizer does not count its "
                "steps, found None. Give the number of steps that it has taken."
            )
        count = int(max(step.item() for step in steps))
    return {
        "leaves": leaves,
        "group": new_group,
        "count": torch.full_like(state["count"], count),
        "lr": state["lr"],
    }


def export_torch_state(
    state: State, torch_state: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Return a state dict for ``optimizer.load_state_dict`` from the state of `from_torch`.

    Args:
        state: The state of `from_torch`, as in `import_torch_state`.
        torch_state: ``optimizer.state_dict()`` of the optimizer that shall continue: its groups
            with their hyperparameters are kept. It is not changed.
        names: The names of the parameters, in the order in which the optimizer got them.

    Raises:
        TypeError: ``state`` is not a dict.
        ValueError: Names differ.

    Examples:
        >>> import torch, gradfilter as gf
        >>> params = {"w": torch.ones(2)}
        >>> update = gf.from_torch(torch.optim.Adam, lr=0.1)
        >>> params, state, _ = update(params, update.init(params), {"w": torch.ones(2)})
        >>> new = torch.optim.Adam([torch.nn.Parameter(params["w"])], lr=0.1)
        >>> new.load_state_dict(gf.export_torch_state(state, new.state_dict(), ["w"]))
        >>> new.state_dict()["state"][0]["step"]
        tensor(1.)
    """
    check_state("export_torch_state", "transform", state, PARTS, REMEDY)
    positions = _positions("export_torch_state", state, torch_state, names)
    own: dict[int, dict[str, Any]] = {}
    for entry, part in state["leaves"].items():
        for name, value in part.items():
            own.setdefault(positions[name], {})[entry] = _number_or_copy(value)
    numbers = {key: _number_or_copy(value) for key, value in state["group"].items()}
    groups = [{**group, **numbers} for group in torch_state["param_groups"]]
    return {"state": own if int(state["count"]) else {}, "param_groups": groups}


def _positions(
    caller: str, state: State, torch_state: Mapping[str, Any], names: Iterable[str]
) -> dict[str, int]:
    """Return the position of every name in the optimizer, which must have those of the state."""
    order = list(names)
    given = [i for group in torch_state["param_groups"] for i in group["params"]]
    if len(order) != len(given) or len(set(order)) != len(order):
        raise ValueError(
            f"{caller}: expected one name for each of the {len(given)} parameters of the "
            f"optimizer, found {len(order)} names, {len(set(order))} of them different. Give them "
            "in the order in which the optimizer got the parameters."
        )
    needed = {name for part in state["leaves"].values() for name in part}
    unknown = sorted(needed - set(order))
    if unknown:
        raise ValueError(
            f"{caller}: expected the names of all leaves of the state, found none for {unknown}. "
            "Names are those of named_parameters()."
        )
    return dict(zip(order, given, strict=True))


def _entry(own: Mapping[Any, Any], position: int, entry: str, name: str) -> Any:
    value = own.get(position, {}).get(entry)
    if value is None:
        raise ValueError(
            f"import_torch_state: expected the entry {entry!r} of {name!r} in the state of the "
            "optimizer, found none. Give the state_dict() of an optimizer of the same class and "
            "arguments after a step in which every parameter had a gradient."
        )
    return value


def _like(what: str, value: Any, old: Tensor) -> Tensor:
    """Return a value of an optimizer as a new tensor like that of the state."""
    if isinstance(value, Tensor) and value.shape != old.shape:
        raise ValueError(
            f"import_torch_state: expected {what} of shape {tuple(old.shape)}, found "
            f"{tuple(value.shape)}. Give the names in the order in which the optimizer got the "
            "parameters."
        )
    if isinstance(value, Tensor):
        return value.detach().to(device=old.device, dtype=old.dtype, copy=True)
    return torch.full_like(old, value)


def _number_or_copy(value: Tensor) -> Any:
    """Return a Python number for a whole number or a bool, as optimizers have them, else a copy."""
    whole = value.ndim == 0 and value.dtype in (torch.int64, torch.bool)
    return value.item() if whole else value.detach().clone()
