"""Run a link only in the steps in which a bool says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gradfilter import _tree
from gradfilter._made import remembered
from gradfilter._types import Out, Params, State, Transform
from gradfilter.grads._stack import GradStack
from gradfilter.grads._views import choose
from gradfilter.transforms._link import admit
from gradfilter.transforms._reduce import mean_weights


@remembered
def gate(link: Transform, when: str) -> Transform:
    """Run a link where a published or given bool is true, and step around it elsewhere.

    Chosen with `select`: the link is computed in every step, and its result and state are taken or
    left. Stepping around means: gradients pass unchanged; a reducer gives the plain mean and keeps
    the step; an update rule changes nothing. Metrics are those of the link as computed.

    Args:
        link: Any link.
        when: Name of a bool of shape (): an extra keyword of the update, ``keep``, or a metric of
            an earlier link such as ``"finite_filter/finite"``.

    Raises:
        ValueError: At the call, nobody published or gave ``when``.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.gate(gf.agc_clip(0.01), "late"), gf.sgd(1.0))
        >>> params, grads = {"w": torch.ones(1)}, {"w": torch.ones(1)}
        >>> update(params, update.init(params), grads, late=torch.tensor(False))[0]
        {'w': tensor([0.])}
    """
    name = link.name or "gate"
    rules = {kind in ("rows -> update", "tree -> update") for kind in link.kinds}
    if len(rules) > 1:
        raise TypeError(
            f"gate: {name!r} may be an update rule or follow one, and stepping around it would "
            "mean different things. Gate the update rule, or use freeze(names) after it."
        )
    is_rule = rules == {True}

    def update(grads: Any, state: State, params: Params, /, **extra: Any) -> tuple[Any, State, Out]:
        if when not in extra:
            raise ValueError(
                f"gate: {name!r} runs when {when!r} is true, but nobody gave that name. Pass "
                f"update(..., {when}=torch.tensor(True)), or name a metric of an earlier link."
            )
        on = _tree.flag(extra[when], _tree.device_of(params))
        grads = admit(name, link.kinds, grads, params)
        new, new_state, out = link.update(grads, state, params, **extra)
        if is_rule:
            result: Any = _tree.select(on, new, _tree.no_update(new))
        elif isinstance(new, GradStack):
            result = choose(on, new, grads)
        elif isinstance(grads, GradStack):
            weights = mean_weights(grads)
            result = _tree.select(on, new, grads.combine(weights))
            if "weights" in out:
                out = out | {"weights": torch.where(on, out["weights"], weights)}
        else:
            result = _tree.select(on, new, grads)
        clean = out.get("clean_grads")
        if isinstance(clean, GradStack):
            out = out | {"clean_grads": choose(on, clean, grads)}
        elif clean is not None:  # around it, the clean gradient is the one that goes on
            out = out | {"clean_grads": _tree.select(on, clean, result)}
        if "keep" in out:
            out = out | {"keep": out["keep"] | ~on}
        return result, _tree.select(on, new_state, state), out

    return replace(link, name=name, update=update, links=())
