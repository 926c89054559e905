"""Momentum-SAM: gradients at a point ahead along the momentum, without a second pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._types import Context, Kind, Out, Params, State, Transform, Tree
from gradfilter.transforms._evaluated import AHEAD, behind, new_number, refuse_followers
from gradfilter.transforms._sharpness_aware import DELTA
from gradfilter.transforms._transform import check_number, transform_in_context
from gradfilter.transforms._update_rules import updates_of

BUFFERS = ("momentum", "m")
"""The names of momentum buffers."""


@factory
def msam(rule: Transform, rho: float) -> Transform:
    """Take gradients at parameters that are perturbed along the momentum (Momentum-SAM).

    With the momentum v of the update rule (its mean m for Adam), and norms over all leaves:

        g = ∇f(w + e);   w and v ← the update rule at w with g;   e = −ρ v / (‖v‖ + δ)

    δ = 1e-12, and e = 0 at the start. −v is the direction of the next step: the perturbation is one
    of length ρ ahead, as in Nesterov's method, but of a length that does not depend on the lr.
    The parameters of the training are w + e, and the loss of a step is that at w + e. Those to
    evaluate and to save are w: `evaluated_params`. Unlike `sam_perturb` it needs no second pass.

    Weight decay acts at w, and Nesterov's momentum works as in the rule alone. With these three
    exceptions the steps are those of the authors' code: its SGD takes the L2 decay at w + e, for
    which a transform before this one can add λ · params to the gradients; its ``nesterov`` has no
    effect; and its AdamW decays after the step, w ← (1 − lr λ)(w − lr d), which is the step of the
    rate lr (1 − lr λ) with the decay λ / (1 − lr λ) here. With rho=0 it is the rule alone.

    Args:
        rule: An update rule of this package with momentum, such as ``sgd(lr, momentum=0.9)``,
            ``adamw(lr)`` or ``lion(lr)``.
        rho: The radius ρ >= 0. The authors' code has 0.3 for SGD and 1 for AdamW by default; radii
            of SAM do not carry over.

    Publishes: ``lr`` ().

    Cost: in addition to the rule, one number, one norm and elementwise operations.

    Raises:
        TypeError: ``rule`` is not an update rule of this package.
        ValueError: rho < 0; a rule without momentum; at ``init``, a transform of updates behind it
            in the chain.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update = gf.msam(gf.sgd(1.0, momentum=0.9), rho=0.5)
        >>> params = {"w": torch.zeros(2)}
        >>> grads = {"w": torch.tensor([3.0, 4.0])}
        >>> params, state, _ = update(params, update.init(params), grads)
        >>> params, gf.evaluated_params(params, state)
        ({'w': tensor([-3.3000, -4.4000])}, {'w': tensor([-3., -4.])})

    References:
        Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational
        Overhead", 2024, https://arxiv.org/abs/2401.12033
    """
    check_number("msam", "rho", rho, low=0, fix="0.3 is the authors' default for SGD.")
    buffers = updates_of("msam", rule).rule.buffers
    momentum = next((name for name in BUFFERS if name in buffers), None)
    if momentum is None:
        raise ValueError(
            f"msam: expected an update rule with momentum, found {rule!r}. Write sgd(lr, "
            "momentum=0.9) or adamw(lr)."
        )
    perturbed = _Perturbed(rule, rho, momentum)
    return transform_in_context(
        "msam",
        Kind.TREE_TO_UPDATE,
        perturbed.compute,
        init=perturbed.init,
        publishes=("lr",),
        row_rules=IGNORES_ROWS,
    )


@dataclass(frozen=True, eq=False)
class _Perturbed:
    """An update rule, the radius, and the name of the momentum in its state.

    The state has e as its factor: e = factor · v. So w follows the parameters, whatever else
    changes them between two steps.
    """

    rule: Transform
    rho: float | Tensor
    momentum: str

    def init(self, params: Params) -> State:
        refuse_followers("msam")
        return {"rule": self.rule.init(params), AHEAD: {self.momentum: new_number(0.0, params)}}

    def compute(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        old, v = state[AHEAD][self.momentum], state["rule"][self.momentum]
        at = behind(params, old, v)
        changes, inner, out = self.rule.compute(grads, state["rule"], at, context)
        new_v = inner[self.momentum]
        new = new_number(-self.rho / (_products.norm(new_v) + DELTA), params)
        updates = {
            name: _tree.at_least_float32(change) + new * new_v[name] - old * v[name]
            for name, change in changes.items()
        }
        return updates, {"rule": inner, AHEAD: {self.momentum: new}}, {"lr": out["lr"]}
