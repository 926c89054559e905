"""Links in a row: checked when the chain is built, run one after the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from gradfilter import _tree
from gradfilter._made import remembered
from gradfilter._types import GLOBAL_NAMES, Out, Params, State, Transform
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._begun import check_state, check_tree
from gradfilter.transforms._fingerprint import initialising
from gradfilter.transforms._fit import no_link, ways_through
from gradfilter.transforms._link import REDUCERS, admit

PUBLISHER = {
    "clean_grads": "sam_perturb(rho)",
    "weights": f"a reducer ({REDUCERS})",
    "rows": "a link that gives rows",
    "keep": "agree_filter(), consensus_filter() or finite_filter()",
}

BEGIN = (
    "Begin with state = update.init(params), and go on with params, state, info = "
    "update(params, state, grads)."
)


@remembered
def chain(*links: Transform) -> Transform:
    """Compose links: each gets what the one before gives, and sees what all before published.

    Equivalent code, without checks, names and metrics::

        for link in links:
            grads, state[link], out = link.update(grads, state[link], params, **published)
            published |= out                        # `keep` is ANDed

    Args:
        *links: At least one. A chain among them is replaced by its links, so that
            ``chain(chain(a, b), c)`` is ``chain(a, b, c)``. Repeated names are numbered
            (``agc_clip``, ``agc_clip_2``); `named` gives a name outright.

    Raises:
        TypeError: An argument is not a Transform, or a link cannot take what the one before it
            gives: rows reaching sgd, a tree reaching agree_filter, anything after an update rule.
            When called: the parameters are no dict, or the state is none.
        ValueError: A link needs a name nobody publishes, or two links were given one name. When
            called: the state is that of another chain.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.agree_filter(0.97), gf.agc_clip(0.01), gf.sgd(0.1))
        >>> params = {"w": torch.ones(2)}
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [1.0, 0.1]])}
        >>> params, state, info = update(params, update.init(params), rows)
        >>> sorted(info)[:3]
        ['agc_clip/clipped_fraction', 'agree_filter/accepted', 'agree_filter/cosine']
    """
    flat = _flattened(links)
    names = _names(flat)
    kinds = ways_through(flat)
    _check_needs(flat)
    label = "chain " + " -> ".join(part.name for part in flat)

    def init(params: Params) -> State:
        check_tree(label, params)
        with initialising(built):
            return {name: part.init(params) for name, part in zip(names, flat, strict=True)}

    def update(grads: Any, state: State, params: Params, /, **extra: Any) -> tuple[Any, State, Out]:
        check_state(label, "chain", state, names, BEGIN)
        grads = admit(label, kinds, grads, params)
        visible: dict[str, Any] = dict(extra)
        published: Out = {}
        new_state: dict[str, State] = {}
        for name, part in zip(names, flat, strict=True):
            if isinstance(grads, GradStack):
                visible["rows"] = grads
            grads, new_state[name], out = part.update(grads, state[name], params, **visible)
            found = {k: v for k, v in out.items() if k in GLOBAL_NAMES}
            if "keep" in visible and "keep" in found:
                before = _tree.flag(visible["keep"], found["keep"].device)
                found["keep"] = before & found["keep"]
            found |= {f"{name}/{k}": v for k, v in out.items() if k not in GLOBAL_NAMES}
            visible |= found
            published |= found
        return grads, new_state, published

    publishes = {
        key if key in GLOBAL_NAMES else f"{name}/{key}"
        for name, part in zip(names, flat, strict=True)
        for key in part.publishes
    }
    built = Transform("", kinds, init, update, frozenset(), frozenset(publishes), flat)
    return built


@remembered
def named(name: str, link: Transform) -> Transform:
    """Give a link (or a chain, which then stays one link) a name for metrics and state.

    Args:
        name: Without ``/`` and ``.``, which join names in metrics and state dictionaries.
        link: Any link.

    Examples:
        >>> import gradfilter as gf
        >>> gf.named("head", gf.agc_clip(0.01)).metric("clipped_fraction")
        'head/clipped_fraction'
    """
    if not name or "/" in name or "." in name:
        raise ValueError(f"Expected a name without '/' and '.', found {name!r}.")
    return replace(link, name=name, links=())


def _flattened(links: tuple[Transform, ...]) -> tuple[Transform, ...]:
    flat: list[Transform] = []
    for part in links:
        if not isinstance(part, Transform):
            raise no_link(part)
        flat.extend(part.links or (part,))
    if not flat:
        raise ValueError("chain: expected at least one link, found none.")
    return tuple(flat)


def _names(links: tuple[Transform, ...]) -> tuple[str, ...]:
    """Every link's name, numbered from its second appearance on."""
    seen: Counter[str] = Counter()
    names = []
    for part in links:
        seen[part.name] += 1
        names.append(part.name if seen[part.name] == 1 else f"{part.name}_{seen[part.name]}")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"chain: two links are called {twice!r}. Choose another with named().")
    return tuple(names)


def _check_needs(links: tuple[Transform, ...]) -> None:
    published: set[str] = set()
    for position, part in enumerate(links):
        if any("rows" in kind for kind in part.kinds):
            published.add("rows")
        missing = sorted(part.needs - published)
        if missing:
            raise ValueError(
                f"chain: link {position + 1}, {part.name!r}, needs {missing[0]!r}, which no "
                f"earlier link publishes. Put {PUBLISHER[missing[0]]} before it."
            )
        published |= part.publishes
