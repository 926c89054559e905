"""An exponential moving average of the parameters."""

from __future__ import annotations

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.transforms._transform import check_number, transform_in_context

KEY = "ema_average"


@factory
def ema_params(decay: float = 0.999) -> Transform:
    """Keep an average of the parameters in the state; updates pass unchanged.

    average ← decay · average + (1 − decay) · (params + update), starting from the first params,
    in float32 or wider.

    Args:
        decay: The weight of the old average, in [0, 1].

    Raises:
        ValueError: decay outside [0, 1].

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.chain(gf.sgd(1.0), gf.ema_params(0.5))
        >>> params = {"w": torch.zeros(1)}
        >>> params, state, _ = update(params, update.init(params), {"w": torch.ones(1)})
        >>> params, gf.ema_of(state)
        ({'w': tensor([-1.])}, {'w': tensor([-0.5000])})

    References:
        Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992,
        https://doi.org/10.1137/0330046
    """
    check_number("ema_params", "decay", decay, low=0, high=1, fix="0.999 is usual.")

    def init(params: Params) -> State:
        # In half precision small steps of the average would be rounded away.
        return {KEY: {name: _tree.at_least_float32(p).clone() for name, p in params.items()}}

    def update(
        updates: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        average = {
            name: decay * state[KEY][name] + (1 - decay) * (p + updates[name])
            for name, p in params.items()
        }
        return updates, {KEY: average}, {}

    return transform_in_context(
        "ema_params", "update -> update", update, init=init, row_rules=IGNORES_ROWS
    )


def ema_of(state: State) -> Tree:
    """Return the averaged parameters in the state of a chain that has an `ema_params` transform.

    Args:
        state: The state of a chain, or of `train_step`. Averages in several branches of a
            partition are joined.

    Raises:
        ValueError: There is no average in the state, or two of the same leaf.
    """
    found = _averages(state)
    names = [name for average in found for name in average]
    if not found or len(set(names)) < len(names):
        raise ValueError(
            f"ema_of: expected one ema_params average in the state, found {len(found)}. Put "
            "ema_params(decay) once at the end of the chain."
        )
    return {name: leaf for average in found for name, leaf in average.items()}


def _averages(state: State) -> list[Tree]:
    if not isinstance(state, dict):
        return []
    if KEY in state:
        return [state[KEY]]
    return [average for value in state.values() for average in _averages(value)]
