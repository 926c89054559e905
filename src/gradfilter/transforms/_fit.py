"""Which links fit behind each other, and where one that does not fit belongs instead."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer

from gradfilter._types import Transform
from gradfilter.transforms._link import REDUCERS

Links = tuple[Transform, ...]
RULES = frozenset({"rows -> update", "tree -> update"})
BEHIND = "Put it after sgd, adam, adamw or rmsprop."


def no_link(found: Any, who: str = "chain") -> TypeError:
    """What is said of an argument of `chain`, or of somebody else, that is no link."""
    kind = found if isinstance(found, type) else type(found)
    if isinstance(found, (list, tuple)):
        fix = "Unpack it: chain(*links)."
    elif issubclass(kind, Optimizer):
        fix = "Use sgd(lr) and so on, or interop.Filtered to keep a torch optimizer."
    elif inspect.isroutine(found):
        fix = "Call the factory: agree_filter(0.97), not agree_filter."
    else:
        fix = "Factories such as agree_filter(0.97) make them, or link() for one of your own."
    return TypeError(f"{who}: expected links, found {kind.__name__}. {fix}")


def ways_through(links: Links) -> tuple[str, ...]:
    """The kinds of the whole: every way from an input of the first link to the end."""
    ways, fitting = _ways(links)
    if fitting < len(links):
        raise TypeError(_why_not({here for _, here in ways}, links, fitting))
    return tuple(sorted(f"{start} -> {end}" for start, end in ways))


def _ways(links: Links) -> tuple[set[tuple[str, str]], int]:
    """Every (input, output) of the links that fit, counted from the first, and their number."""
    ways = {(kind.split(" -> ")[0],) * 2 for kind in links[0].kinds}
    for position, part in enumerate(links):
        steps = [tuple(kind.split(" -> ")) for kind in part.kinds]
        onward = {(start, out) for start, here in ways for into, out in steps if into == here}
        if not onward:
            return ways, position
        ways = onward
    return ways, len(links)


def _fits(links: Links) -> bool:
    return _ways(links)[1] == len(links)


def _why_not(here: set[str], links: Links, position: int) -> str:
    part, before = links[position], links[position - 1]
    where = f"chain: link {position + 1}, {part.name!r},"
    rule = next((link for link in links[:position] if RULES & {*link.kinds}), None)
    if "update" in here and rule is None:
        return f"chain: link 1, {links[0].name!r}, takes an update, found none before it. {BEHIND}"
    if rule is not None and RULES & {*part.kinds}:
        return f"{where} is a second update rule after {rule.name!r}. Keep one of the two."
    if rule is not None:
        return (
            f"{where} stands after the update rule {rule.name!r}, and only links from update to "
            f"update may, such as ema_params. {_move(links, position, rule)}"
        )
    if part.kinds[0].startswith("update"):
        found = "a tree" if here == {"tree"} else "rows"
        return f"{where} takes an update, found {found}. {BEHIND}"
    if here == {"rows"}:
        later = _reducer(links[position:])
        fix = (
            f"Insert a reducer before it: {REDUCERS}."
            if later is None
            else f"Put {later.name!r} before it."
        )
        return f"{where} takes one gradient tree, but rows reach it from {before.name!r}. {fix}"
    reducer = _reducer(links[:position])
    cause = (
        f"{_first_of_trees(links).name!r} works on one gradient."
        if reducer is None
        else f"{reducer.name!r} has already reduced the rows."
    )
    return f"{where} takes rows, but a tree reaches it: {cause} {_move(links, position, part)}"


def _move(links: Links, position: int, rule: Transform) -> str:
    """Where a link would fit, tried out; ``rule`` is what it could else become a part of."""
    part, before, reducer = links[position], links[:position], _reducer(links[:position])
    for place in reversed(range(position)):
        if _fits((*before[:place], part, *before[place:])):
            who = repr(part.name) if rule is part else "it"  # behind a rule it is the subject
            return f"Move {who} before {before[place].name!r}."
    if reducer is not None and "rows -> tree" in part.kinds:
        if reducer.name == "mean_rows" != part.name:
            return f"Put {part.name!r} in the place of 'mean_rows': a chain has one reducer."
        return f"Remove {part.name!r}: a chain has one reducer."
    if RULES & {*part.kinds}:
        rest = [link for link in before if link is not reducer]
        if reducer is not None and _fits((*rest, part)):
            return f"Remove {reducer.name!r}: {part.name!r} has reducers of its own."
        return f"Put what stands before it inside {part.name!r}."
    if not _takes_rows(part) or all(map(_takes_rows, before)):
        return f"Put it inside {rule.name!r}, or leave it out."
    later = _reducer(links[position + 1 :])
    between = f"a reducer ({REDUCERS})" if later is None else repr(later.name)
    return f"Put {part.name!r}, and {between} behind it, before {_first_of_trees(links).name!r}."


def _reducer(links: Links) -> Transform | None:
    return next((link for link in links if "rows -> tree" in link.kinds), None)


def _first_of_trees(links: Links) -> Transform:
    return next(link for link in links if not _takes_rows(link))


def _takes_rows(link: Transform) -> bool:
    return any(kind.startswith("rows") for kind in link.kinds)
