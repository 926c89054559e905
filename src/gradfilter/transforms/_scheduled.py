"""Drive any hyperparameter of any transform by a schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory, undecorated
from gradfilter._row_rules import Join, RowRules
from gradfilter._state_rules import PartRules
from gradfilter._types import Context, Kind, Out, Params, State, Transform
from gradfilter.schedules._schedules import Schedule
from gradfilter.transforms._update_rules import new_count, schedule_value


@factory
def scheduled(factory: Callable[..., Transform], /, **schedules: Any) -> Transform:
    """Drive hyperparameters of a transform by schedules.

    Equivalent code: ``factory(**{name: schedule(count)})`` in every step, where ``count`` is the
    number of applied steps, or the extra keyword ``count=``.

    Args:
        factory: A transform factory, for example `agc_clip`.
        **schedules: Its arguments by name: a `Schedule`, a tuple, list or dict that contains some
            (``betas=(linear(0.9, 1000), 0.999)``), or a value, which is passed unchanged.

    Publishes: the values of the transform, and every scheduled value under its argument's name,
    with its position if it is one of several: ``betas.0``.

    Raises:
        TypeError: The factory has no such argument, or nothing is scheduled; a transform is given
            instead of its factory; a schedule for an argument that is not a number.

    Examples:
        >>> import gradfilter as gf
        >>> lr = gf.schedules.cosine(0.1, 1000)
        >>> update = gf.chain(
        ...     gf.mean_rows(),
        ...     gf.scheduled(gf.sam_perturb, rho=gf.schedules.proportional(lr, 0.02, 0.05)),
        ...     gf.sgd(lr),
        ... )
    """
    given: Any = factory
    if isinstance(given, Transform) or not callable(given):
        found = repr(given) if isinstance(given, Transform) else type(given).__name__
        name = getattr(given, "name", "") or "agree_filter"
        raise TypeError(
            f"scheduled: expected a factory, found {found}. Give the function itself and its "
            f"arguments by name: scheduled({name}, threshold=...), not scheduled({name}(...), ...)."
        )
    factory = undecorated(factory)  # its transforms live for one step only
    accepted = inspect.signature(factory).parameters
    unknown = sorted(set(schedules) - set(accepted))
    fixed, driven = _split_arguments(schedules)
    moving = {name: s for argument in driven.values() for name, s in argument.schedules.items()}
    if unknown or not moving:
        raise TypeError(
            f"scheduled: expected at least one Schedule among the arguments {sorted(accepted)}, "
            f"found {'unknown ' + str(unknown) if unknown else sorted(schedules)}."
        )
    for name in driven:
        if isinstance(accepted[name].default, (bool, str)):
            raise TypeError(
                f"scheduled: expected {name} as one of its fixed values, found a Schedule, which "
                f"gives numbers. Write {name}={accepted[name].default!r}."
            )

    made = _ScheduledFactory(factory, fixed, driven)
    # Call the factory with the largest values once, to get its kind and to check the ranges.
    template = made({name: s.max_value for name, s in moving.items()})
    structure = made({name: _example_value(s) for name, s in moving.items()})

    def init(params: Params) -> State:
        count = new_count(params)
        return {
            "count": count,
            "schedules": {name: s.init(count) for name, s in moving.items()},
            "link": structure.init(params),
        }

    def compute(
        grads: Any, state: State, params: Params, context: Context
    ) -> tuple[Any, State, Out]:
        values, schedule_states = {}, {}
        for name, s in moving.items():
            values[name], schedule_states[name] = schedule_value(
                s, state["count"], state["schedules"][name], context
            )
        transform = made(values)
        grads, link_state, out = transform.compute(grads, state["link"], params, context)
        state = {
            "count": state["count"] + 1,
            "schedules": schedule_states,
            "link": link_state,
        }
        return grads, state, out | values

    publishes = template.publishes | frozenset(moving)
    name = template.name or "scheduled"
    rules = PartRules.of({"link": template.rules})
    row_rules = template.row_rules
    if Kind.ROWS_TO_TREE in template.kinds:  # its divisor may be scheduled
        row_rules = None
    if row_rules is not None and row_rules.observe:  # its state is inside another one
        row_rules = None
    if row_rules is not None:  # a schedule reads any keyword
        joins: dict[str, Join] = {**row_rules.joins, **dict.fromkeys(moving, "same")}
        row_rules = RowRules(joins, reads=None)
    return replace(
        template,
        name=name,
        init=init,
        compute=compute,
        publishes=publishes,
        rules=rules,
        row_rules=row_rules,
    )


@dataclass(frozen=True, eq=False)
class _ScheduledArgument:
    """An argument that contains schedules.

    Attributes:
        name: The name of the argument.
        leaves: The schedules and the plain values inside, by their position: ``betas.0``.
        rebuild: Makes ``{name: argument}`` from a list of values in place of the leaves.
    """

    name: str
    leaves: Mapping[str, Any]
    rebuild: Callable[[list[Any]], Any]

    @property
    def schedules(self) -> dict[str, Schedule]:
        return {name: leaf for name, leaf in self.leaves.items() if isinstance(leaf, Schedule)}

    def at(self, values: Mapping[str, Any]) -> Any:
        """Return the argument with these values in place of the schedules."""
        leaves = [values.get(name, leaf) for name, leaf in self.leaves.items()]
        return self.rebuild(leaves)[self.name]


@dataclass(frozen=True, eq=False)
class _ScheduledFactory:
    """A factory of transforms, its fixed arguments and its scheduled ones by name."""

    factory: Callable[..., Transform]
    fixed: Mapping[str, Any]
    scheduled: Mapping[str, _ScheduledArgument]

    def __call__(self, values: Mapping[str, Any]) -> Transform:
        """Return the transform with these values in place of the schedules."""
        arguments = {name: argument.at(values) for name, argument in self.scheduled.items()}
        return self.factory(**self.fixed, **arguments)


def _split_arguments(
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, _ScheduledArgument]]:
    """Return the fixed arguments, and those that contain schedules."""
    fixed: dict[str, Any] = {}
    scheduled: dict[str, _ScheduledArgument] = {}
    for name, value in given.items():
        argument = _ScheduledArgument(name, *_tree.flatten_with_names({name: value}))
        if argument.schedules:
            scheduled[name] = argument
        else:
            fixed[name] = value
    return fixed, scheduled


def _example_value(schedule: Schedule) -> Tensor:
    """Return a 0-d tensor like a scheduled value, so that a momentum of 0 also gets its buffer."""
    return torch.tensor(schedule.max_value, dtype=torch.float64)
