"""LookSAM: the second pass of SAM in some of the steps, and its effect in all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._state_rules import COUNTER, CounterRules, PartRules, new_counter
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.transforms._sharpness_aware import Perturbation
from gradfilter.transforms._transform import (
    COUNTED,
    check_number,
    check_whole,
    transform_in_context,
)


@factory
def look_sam(
    rho: float,
    k: int = 5,
    alpha: float = 0.7,
    *,
    adaptive: Literal["asam", "gsam"] | None = None,
    eta: float = 0.01,
) -> Transform:
    r"""Make the second pass of SAM in every k-th step, and reuse what it changed (LookSAM).

    With the gradient g at w and h = ∇f(w + e) of `sam_perturb`, norms and products over all leaves
    together:

        calls 0, k, 2k, ...:  h,              and u = v / ‖v‖ with v = h − (⟨g, h⟩ / ‖g‖²) g
        the others:           g + α ‖g‖ u

    v is the part of h that is orthogonal to g. It changes more slowly than g, so an old one is of
    use. u is 0 before the first of these steps is applied, and where v is 0 up to rounding.

    Calls are counted as by `every`, skipped steps included, by a tensor on the CPU that the host
    reads without waiting for a device. The other steps make no second pass, and a compiled step has
    a graph for each of the two kinds. If a step with a second pass is skipped, the old u stays for
    the next k − 1 steps.

    Args:
        rho: The radius ρ, >= 0.
        k: The number of steps from one second pass to the next, >= 1; 1 is SAM.
        alpha: α >= 0; 0.7 is usual. With 0 the other steps take the plain gradient.
        adaptive: Scale the perturbation by the weights, in the form of ASAM or of GSAM.
        eta: η >= 0, for ASAM.

    Needs: in steps with a second pass what `sam_perturb` needs on a tree: a reducer before it in
    the chain, or the keyword ``grad_fn``.

    Publishes: ``clean_grads``, the incoming gradients; in steps with a second pass
    ``surrogate_gap`` () = f(w+e) − f(w), NaN if the losses are not known.

    Cost: 1/k of the second passes; in memory u, P numbers in float32 or wider.

    Raises:
        ValueError: An argument is out of range; an unknown form; rows without `at` and no grad_fn.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, batch: (params["w"] ** 2 @ batch.mT).mean()
        >>> grads_of = gf.microbatch_grads(loss, 2)
        >>> update = gf.chain(gf.mean_rows(), gf.look_sam(0.5, k=2), gf.sgd(0.1))
        >>> params, batch = {"w": torch.ones(2)}, torch.tensor([[1.0, 3.0], [1.0, 3.0]])
        >>> state = update.init(params)
        >>> for _ in range(3):
        ...     params, state, info = update(params, state, grads_of(params, batch))
        ...     "look_sam/surrogate_gap" in info
        True
        False
        True

    References:
        Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware Minimization",
        2022, https://arxiv.org/abs/2203.02714
    """
    perturbation = Perturbation.checked("look_sam", rho, adaptive, eta)
    check_whole("look_sam", "k", k, low=1, fix=COUNTED)
    check_number("look_sam", "alpha", alpha, low=0, fix="0.7 is usual.")
    rules = CounterRules(lambda call: call % k == 0, PartRules({}))
    compute = _LookSAM(perturbation, alpha, rules)
    made = transform_in_context(
        "look_sam",
        "tree -> tree",
        compute,
        init=compute.init,
        publishes=("clean_grads", "surrogate_gap"),
        recombines=True,
    )
    return replace(made, rules=rules)


@dataclass(frozen=True, eq=False)
class _LookSAM:
    """The transform, with arguments of `look_sam`, and the counter."""

    perturbation: Perturbation
    alpha: float | Tensor
    rules: CounterRules

    def init(self, params: Params) -> State:
        direction = {
            name: torch.zeros_like(_tree.at_least_float32(p)) for name, p in params.items()
        }
        return {COUNTER: new_counter(), "direction": direction}

    def __call__(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        runs, counter = self.rules.call(state)
        if not runs:
            found = self._bent(grads, state["direction"])
            return found, state | counter, {"clean_grads": grads}
        again, out = self.perturbation.second_pass(grads, grads, None, params, context)
        assert isinstance(again, dict)
        return again, state | counter | {"direction": _orthogonal(grads, again)}, out

    def _bent(self, grads: Tree, direction: Tree) -> Tree:
        """Return g + α ‖g‖ u."""
        norm = _products.norm(grads)
        scale = _tree.scalar(self.alpha, norm) * norm
        return {
            name: torch.addcmul(grads[name].to(u.dtype), u, scale.to(u.dtype))
            for name, u in direction.items()
        }


def _orthogonal(g: Tree, h: Tree) -> Tree:
    """Return the unit vector of the part of h that is orthogonal to g; 0 if there is none."""
    gg, gh, hh = _products.products(g, h).unbind()
    back = -torch.where(gg == 0, 0.0, gh / torch.where(gg == 0, 1.0, gg))

    def part(g: Tensor, h: Tensor) -> Tensor:
        g, h = _tree.at_least_float32(g), _tree.at_least_float32(h)
        return torch.addcmul(h, g, back.to(g.dtype))

    found = {name: part(g[name], leaf) for name, leaf in h.items()}
    norm = _products.norm(found)
    # A remainder of the rounding of h has no direction, and would become a vector of length 1.
    rounding = max(torch.finfo(leaf.dtype).eps for leaf in h.values()) * hh.sqrt()
    inverse = torch.where(norm <= rounding, 0.0, 1 / norm)
    # In place: memory for a second tree would take longer to get than the product to compute.
    return {name: v.mul_(inverse.to(v.dtype)) for name, v in found.items()}
