"""Any hyperparameter of any link by a schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradfilter._made import remembered
from gradfilter._types import Out, Params, State, Transform
from gradfilter.transforms._rule import new_count, schedule_value
from gradfilter.transforms._schedule import Schedule


@remembered
def scheduled(factory: Callable[..., Transform], /, **schedules: Any) -> Transform:
    """Drive hyperparameters of a link by schedules.

    Equivalent code: ``factory(**{name: schedule(count)})`` in every step, where ``count`` is the
    number of applied steps, or the extra keyword ``count=``.

    Args:
        factory: A link factory, for example `agc_clip`.
        **schedules: Its arguments by name: a `Schedule`, or a value, which is passed as it is.

    Publishes: what the link publishes, and every scheduled value under its argument's name.

    Raises:
        TypeError: The factory has no such argument, or nothing is scheduled.

    Examples:
        >>> import gradfilter as gf
        >>> lr = gf.cosine(0.1, 1000)
        >>> update = gf.chain(
        ...     gf.mean_rows(),
        ...     gf.scheduled(gf.sam_perturb, rho=gf.proportional(lr, 0.02, 0.05)),
        ...     gf.sgd(lr),
        ... )
    """
    factory = inspect.unwrap(factory)  # what it makes is gone after the step
    accepted = inspect.signature(factory).parameters
    unknown = sorted(set(schedules) - set(accepted))
    moving = {name: s for name, s in schedules.items() if isinstance(s, Schedule)}
    if unknown or not moving:
        raise TypeError(
            f"scheduled: expected at least one Schedule among the arguments {sorted(accepted)}, "
            f"found {'unknown ' + str(unknown) if unknown else sorted(schedules)}."
        )
    fixed = {name: value for name, value in schedules.items() if name not in moving}
    # At the largest values the factory shows its kind, and refuses ranges that cannot be right.
    template = factory(**fixed, **{name: s.max_value for name, s in moving.items()})
    structure = factory(**fixed, **{name: _stand_in(s) for name, s in moving.items()})

    def init(params: Params) -> State:
        count = new_count(params)
        return {
            "count": count,
            "schedules": {name: s.init(count) for name, s in moving.items()},
            "link": structure.init(params),
        }

    def update(grads: Any, state: State, params: Params, /, **extra: Any) -> tuple[Any, State, Out]:
        values, schedule_states = {}, {}
        for name, s in moving.items():
            values[name], schedule_states[name] = schedule_value(
                s, state["count"], state["schedules"][name], extra
            )
        link = factory(**fixed, **values)
        grads, link_state, out = link.update(grads, state["link"], params, **extra)
        state = {
            "count": state["count"] + 1,
            "schedules": schedule_states,
            "link": link_state,
        }
        return grads, state, out | values

    publishes = template.publishes | frozenset(moving)
    name = template.name or "scheduled"
    return replace(template, name=name, init=init, update=update, publishes=publishes, links=())


def _stand_in(schedule: Schedule) -> Tensor:
    """A 0-d tensor like those of the steps: a scheduled momentum has its buffer at 0, too."""
    return torch.tensor(schedule.max_value, dtype=torch.float64)
