"""Friendly-SAM: perturb along what is new in a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._sharpness_aware import Perturbation, mean_of_finite
from gradfilter.transforms._transform import check_number, transform_in_context
from gradfilter.transforms._update_rules import new_count


@factory
def friendly_sam(
    rho: float,
    *,
    sigma: float = 1.0,
    decay: float = 0.9,
    adaptive: Literal["asam", "gsam"] | None = None,
    eta: float = 0.01,
) -> Transform:
    r"""Replace gradients by those at a point along the noise of this batch (Friendly-SAM).

    The gradient g of a batch is what all batches have in common, which an average m of earlier
    gradients estimates, and noise. The perturbation of `sam_perturb` follows the noise:

        d = g − σ m,   e = ρ d / (‖d‖ + δ),   h = ∇f(w + e),   m ← λ m + (1 − λ) g,

    δ = 1e-12, and with d in place of g in the adaptive forms. The first step has d = g, and m is g
    after it, as in the authors' code. If m took in g before it is subtracted, σ = 1 would give the
    same directions: g − (λ m + (1 − λ) g) = λ (g − m).

    The order in the chain matters as for `sam_perturb`: after a reducer g is the reduced gradient;
    before one g is the mean of the finite rows, and the rows at w + e are given. In a skipped step
    m does not change: it is an average of the gradients of applied steps. A gradient that is not
    finite would stay in it; `finite_filter` before this transform prevents that.

    Where gradients hardly differ from step to step, as with the whole data set in a batch, d is
    rounding error, and e a random direction of length ρ.

    Args:
        rho: The radius ρ, >= 0.
        sigma: The part σ of the average that is subtracted, >= 0; the authors use 1, and 0 is SAM.
        decay: λ, in [0, 1); the authors use 0.9 by default, and 0.6 and 0.95.
        adaptive: Scale the perturbation by the weights, in the form of ASAM or of GSAM.
        eta: η >= 0, for ASAM.

    Needs: rows that can answer `at`, or the keyword ``grad_fn``, as `sam_perturb` does.

    Publishes: ``clean_grads``, the incoming gradients; ``surrogate_gap`` () = f(w+e) − f(w),
    NaN if the losses are not known.

    Cost: a second pass, as SAM; in memory the average, P numbers in float32 or wider. Rows are
    asked for their norms and one combination.

    Raises:
        ValueError: An argument is out of range; an unknown form; rows without `at` and no grad_fn.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, batch: (params["w"] ** 2 * batch).sum()
        >>> grads_of = gf.microbatch_grads(loss, 2)
        >>> update = gf.chain(gf.mean_rows(), gf.friendly_sam(0.5), gf.sgd(0.25))
        >>> params = {"w": torch.tensor([3.0])}
        >>> state = update.init(params)
        >>> for _ in range(2):  # 3 - 2 (3 + 0.5) / 4; the second gradient 2.5 is below 6: e = -0.5
        ...     rows = grads_of(params, torch.ones(2, 1))
        ...     params, state, _ = update(params, state, rows)
        ...     params["w"]
        tensor([1.2500])
        tensor([0.8750])

    References:
        Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization", 2024,
        https://arxiv.org/abs/2403.12350
    """
    perturbation = Perturbation.checked("friendly_sam", rho, adaptive, eta)
    check_number("friendly_sam", "sigma", sigma, low=0, fix="The authors use 1.")
    check_number(
        "friendly_sam", "decay", decay, low=0, high=1, open_high=True, fix="0.9 is the default."
    )
    compute = _FriendlySAM(perturbation, sigma, decay)
    return transform_in_context(
        "friendly_sam",
        ("rows -> rows", "tree -> tree"),
        compute,
        init=compute.init,
        publishes=("clean_grads", "surrogate_gap"),
        recombines=True,
    )


@dataclass(frozen=True, eq=False)
class _FriendlySAM:
    """The transform, with the arguments of `friendly_sam`."""

    perturbation: Perturbation
    sigma: float | Tensor
    decay: float | Tensor

    def init(self, params: Params) -> State:
        # In half precision small changes of the average would be rounded away.
        average = {name: torch.zeros_like(_tree.at_least_float32(p)) for name, p in params.items()}
        return {"count": new_count(params), "average": average}

    def __call__(
        self, grads: GradStack | Tree, state: State, params: Params, context: Context
    ) -> tuple[Any, State, Out]:
        g, weights = mean_of_finite(grads)
        average, count = state["average"], state["count"]
        found, out = self.perturbation.second_pass(
            grads, self._noise(g, average), weights, params, context
        )
        fresh = torch.where(count == 0, 1.0, _tree.scalar(1 - self.decay, count))
        new = {
            name: torch.lerp(m, g[name].to(m.dtype), fresh.to(m.dtype))
            for name, m in average.items()
        }
        return found, {"count": count + 1, "average": new}, out

    def _noise(self, g: Tree, average: Tree) -> Tree:
        """Return g − σ m."""
        back = _tree.scalar(-self.sigma, next(iter(average.values())))
        return {
            name: torch.addcmul(g[name].to(m.dtype), m, back.to(m.dtype))
            for name, m in average.items()
        }
