"""Run a transform in some of the steps, chosen by a counter on the host: `every` and `late`.

`gate` computes its transform in every step and discards what it does not use. Here the host
decides, so that a pass that is not needed is not made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._row_rules import RowRules, reads_of
from gradfilter._state_rules import COUNTER, CounterRules, PartRules, new_counter
from gradfilter._types import Context, Kind, Out, Params, State, Transform
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._reducers import mean_weights
from gradfilter.transforms._transform import COUNTED, check_whole, convert_grads


@factory
def every(k: int, transform: Transform, otherwise: Transform | None = None) -> Transform:
    """Run a transform in the calls 0, k, 2k, ..., and another or none in the calls between.

    A transform that does not run costs nothing: with ``every(4, sam_perturb(0.05))`` three of four
    steps make no second pass. Its state waits unchanged. Calls are counted, skipped steps included,
    by a tensor on the CPU that the host reads without waiting for a device.

    Without ``otherwise``, gradients pass unchanged; a reducer gives the plain mean; an update rule
    changes nothing. ``info`` has the metrics of what ran.

    Args:
        k: The number of calls from one run to the next, >= 1.
        transform: Any transform.
        otherwise: A transform of the same kinds for the other calls, or None.

    Raises:
        TypeError: The two transforms have different kinds.
        ValueError: k is not a whole number >= 1.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.every(2, gf.agc_clip(0.01)), gf.sgd(1.0))
        >>> params, grads = {"w": torch.ones(1)}, {"w": torch.ones(1)}
        >>> state = update.init(params)
        >>> for _ in range(2):
        ...     moved, state, _ = update(params, state, grads)
        ...     moved["w"]
        tensor([0.9900])
        tensor([0.])

    References:
        Liu, Y., Mai, S., Chen, X., Hsieh, C.-J., You, Y. Towards Efficient and Scalable
        Sharpness-Aware Minimization. CVPR 2022. https://arxiv.org/abs/2203.02714
    """
    check_whole("every", "k", k, low=1, fix=COUNTED)
    return _some_calls("every", transform, otherwise, lambda call: call % k == 0)


@factory
def late(transform: Transform, start: int, otherwise: Transform | None = None) -> Transform:
    """Run a transform from call number ``start`` on, and another or none before.

    As with `every`, a transform that does not run costs nothing, and skipped steps count.

    Args:
        transform: Any transform.
        start: The number of calls before its first run, >= 0.
        otherwise: A transform of the same kinds for the calls before, or None.

    Raises:
        TypeError: The two transforms have different kinds.
        ValueError: ``start`` is not a whole number >= 0.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.late(gf.agc_clip(0.01), 1), gf.sgd(1.0))
        >>> params, grads = {"w": torch.ones(1)}, {"w": torch.ones(1)}
        >>> state = update.init(params)
        >>> for _ in range(2):
        ...     moved, state, _ = update(params, state, grads)
        ...     moved["w"]
        tensor([0.])
        tensor([0.9900])

    References:
        Zhou, Z., Wang, M., Mao, Y., Li, B., Yan, J. Sharpness-Aware Minimization Efficiently
        Selects Flatter Minima Late in Training. ICLR 2025. https://arxiv.org/abs/2410.10373
    """
    check_whole("late", "start", start, low=0, fix=COUNTED)
    return _some_calls("late", transform, otherwise, lambda call: call >= start)


def _some_calls(
    caller: str, transform: Transform, otherwise: Transform | None, runs: Callable[[int], bool]
) -> Transform:
    for part in (transform, otherwise):
        if part is not None and not isinstance(part, Transform):
            raise TypeError(
                f"{caller}: expected a transform, found {type(part).__name__}. Call its factory, "
                "for example sam_perturb(0.05)."
            )
    if len({kind.is_update_rule for kind in transform.kinds}) > 1:
        raise TypeError(
            f"{caller}: {transform.name!r} may be an update rule or follow one, and stepping "
            "around it would mean different things. Use freeze(names) after the update rule."
        )
    kinds = transform.kinds
    if otherwise is not None:
        kinds = tuple(kind for kind in kinds if kind in otherwise.kinds)
        if not kinds:
            raise TypeError(
                f"{caller}: expected two transforms of one kind, found {transform.kind!r} and "
                f"{otherwise.kind!r}. Make both take and give the same."
            )
    parts = {
        "transform": transform.rules,
        "otherwise": None if otherwise is None else otherwise.rules,
    }
    rules = CounterRules(runs, PartRules.of(parts) or PartRules({}))
    name = transform.name or caller
    chosen = _SomeCalls(name, transform, otherwise, rules)
    others = frozenset[str]() if otherwise is None else otherwise.publishes
    publishes = transform.publishes | others
    if otherwise is not None and Kind.ROWS_TO_TREE in kinds:  # weights in some calls only are none
        publishes -= {"weights"} - (transform.publishes & others)
    needs = transform.needs | (frozenset() if otherwise is None else otherwise.needs)
    return replace(
        transform,
        name=name,
        kinds=kinds,
        init=chosen.init,
        compute=chosen,
        needs=needs,
        publishes=publishes,
        rules=rules,
        row_rules=_row_rules(transform, otherwise),
        recombines=transform.recombines or (otherwise is not None and otherwise.recombines),
    )


def _row_rules(transform: Transform, otherwise: Transform | None) -> RowRules | None:
    """Return the rules of both transforms, if they join what both publish in the same way."""
    found = [part.row_rules for part in (transform, otherwise) if part is not None]
    rules = [part for part in found if part is not None]
    if len(rules) < len(found) or Kind.ROWS_TO_TREE in transform.kinds:  # a bypass has no divisor
        return None
    if any(part.observe for part in rules):
        return None
    first, last = rules[0].joins, rules[-1].joins
    if any(first[name] != last[name] for name in first.keys() & last.keys()):
        return None
    return RowRules({**first, **last}, reads_of(rules))


@dataclass(frozen=True, eq=False)
class _SomeCalls:
    """A transform, another one or none for the calls in which it rests, and the counter."""

    name: str
    transform: Transform
    otherwise: Transform | None
    rules: CounterRules

    def init(self, params: Params) -> State:
        rest = {} if self.otherwise is None else self.otherwise.init(params)
        return {
            COUNTER: new_counter(),
            "transform": self.transform.init(params),
            "otherwise": rest,
        }

    def __call__(
        self, grads: Any, state: State, params: Params, context: Context
    ) -> tuple[Any, State, Out]:
        grads = convert_grads(self.name, self.transform.kinds, grads, params)
        runs, counter = self.rules.call(state)
        new = state | counter
        part, key = (self.transform, "transform") if runs else (self.otherwise, "otherwise")
        if part is None:
            found, out = bypass(self.transform, grads, params)
        else:
            found, new[key], out = part.compute(grads, state[key], params, context)
        return found, new, out


def bypass(transform: Transform, grads: Any, params: Params) -> tuple[Any, Out]:
    """Return the result and the global names of a transform that does not run."""
    if transform.is_update_rule:
        return _tree.no_update(params), {}
    out: Out = {"clean_grads": grads} if "clean_grads" in transform.publishes else {}
    reduces = not any(kind.takes == kind.gives for kind in transform.kinds)
    if reduces and isinstance(grads, GradStack):
        weights = mean_weights(grads)
        out |= {"weights": weights} if "weights" in transform.publishes else {}
        return grads.combine(weights), out
    return grads, out
