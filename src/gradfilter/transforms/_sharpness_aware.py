"""Sharpness-aware minimisation: SAM, ASAM and GSAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._factory import factory
from gradfilter._readable import readable
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._types import Context, Out, Params, State, Transform, Tree
from gradfilter.grads._stack import GradStack, as_stack
from gradfilter.transforms._transform import check_leaves, check_number, transform_in_context

T = TypeVar("T")

DELTA = 1e-12  # keeps a zero gradient finite


@factory
def sam_perturb(
    rho: float,
    *,
    adaptive: Literal["asam", "gsam"] | None = None,
    eta: float = 0.01,
    per_microbatch: bool = False,
) -> Transform:
    r"""Replace gradients by those at a nearby point with a higher loss.

    With the gradient g at w, h = ∇f(w + e) on the same batch, random numbers and buffers, and

        SAM:              e = ρ g / (‖g‖ + δ)
        adaptive="asam":  e = ρ T² g / (‖T g‖ + δ),  T = |w| + η
        adaptive="gsam":  e = ρ |w| g / (‖g‖ + δ)

    norms over all leaves together, δ = 1e-12. The order in the chain matters. After a reducer it
    perturbs along the reduced gradient, and the second gradients are combined with the same
    weights. Before a reducer it perturbs along the mean of the finite rows and gives the rows at w
    + e.

    Args:
        rho: The radius, >= 0; 0.05 is usual for SAM, 0.5 to 2 for ASAM. Forms need different radii.
        adaptive: Scale the perturbation by the weights, in the form of ASAM or of GSAM.
        eta: η >= 0, for ASAM.
        per_microbatch: True to perturb every row along its own gradient (m-sharpness); takes rows.

    Needs: rows that can answer `at` (from microbatch_grads or per_sample_grads), or the extra
    keyword ``grad_fn(params) -> rows``. On a tree that no reducer made, grad_fn returns a tree.

    Publishes: ``clean_grads``, the incoming gradients; ``surrogate_gap`` () = f(w+e) − f(w),
    NaN if the losses are not known.

    Raises:
        ValueError: rho < 0 or eta < 0; an unknown form; rows without `at` and no grad_fn.

    Examples:
        >>> import torch, gradfilter as gf
        >>> loss = lambda params, batch: (params["w"] ** 2 * batch).sum()
        >>> params = {"w": torch.tensor([3.0])}
        >>> rows = gf.microbatch_grads(loss, 2)(params, torch.ones(2, 1))
        >>> update = gf.chain(gf.mean_rows(), gf.sam_perturb(0.5), gf.sgd(1.0))
        >>> update(params, update.init(params), rows)[0]  # 3 - 2 (3 + 0.5)
        {'w': tensor([-4.])}

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", 2021, https://arxiv.org/abs/2010.01412
        Kwon, Kim, Park, Choi, "ASAM", 2021, https://arxiv.org/abs/2102.11600
    """
    perturbation = Perturbation.checked("sam_perturb", rho, adaptive, eta)

    def update(
        grads: GradStack | Tree, state: State, params: Params, context: Context
    ) -> tuple[Any, ...]:
        if isinstance(grads, GradStack) and per_microbatch:
            rows, out = perturbation.second_pass_by_row(grads, params)
            return rows, state, out
        along, weights = mean_of_finite(grads)
        again, out = perturbation.second_pass(grads, along, weights, params, context)
        return again, state, out

    return transform_in_context(
        "sam_perturb",
        "rows -> rows" if per_microbatch else ("rows -> rows", "tree -> tree"),
        update,
        publishes=("clean_grads", "surrogate_gap"),
        recombines=True,
    )


def mean_of_finite(grads: GradStack | Tree) -> tuple[Tree, Tensor | None]:
    """Return the mean of the finite rows and their weights (M,); a tree as it is, and None."""
    if not isinstance(grads, GradStack):
        return grads, None
    weights = _weights_of_finite(grads, grads.sq_norms())
    return grads.combine(weights), weights


def _weights_of_finite(rows: GradStack, sq_norms: Tensor) -> Tensor:
    finite = rows.live & sq_norms.isfinite()
    return finite / finite.sum().clamp(min=1).to(_tree.sum_dtype(finite))


@dataclass(frozen=True, eq=False)
class Perturbation:
    """The perturbation e of a transform, and the second pass at w + e.

    Attributes:
        caller: The name of the transform in errors.
        rho: The radius.
        adaptive: The form of e.
        eta: The smallest scale of a weight, for ASAM.
    """

    caller: str
    rho: float | Tensor
    adaptive: Literal["asam", "gsam"] | None
    eta: float | Tensor

    @classmethod
    def checked(cls, caller: str, rho: Any, adaptive: Any, eta: Any) -> Perturbation:
        """Return the perturbation, or refuse arguments that are out of range."""
        check_number(caller, "rho", rho, low=0, fix="0.05 is usual.")
        check_number(caller, "eta", eta, low=0, fix="ASAM has 0.01.")
        if adaptive not in (None, "asam", "gsam"):
            raise ValueError(
                f'{caller}: expected adaptive None, "asam" or "gsam", found {adaptive!r}.'
            )
        return cls(caller, rho, adaptive, eta)

    def second_pass(
        self,
        grads: GradStack | Tree,
        along: Tree,
        weights: Tensor | None,
        params: Params,
        context: Context,
    ) -> tuple[GradStack | Tree, Out]:
        """Return the gradients at w + e in the form of those at w, and what is published.

        Args:
            grads: The gradients at w.
            along: The direction of e.
            weights: The weights (M,) of rows for the surrogate gap; None for a tree.
            params: w.
            context: It has the weights of a tree, its rows, or a grad_fn.
        """
        near = self._perturbed(params, along)
        if isinstance(grads, GradStack):
            assert weights is not None
            again = self._rows_at(near, grads, context)
            gap = _surrogate_gap(grads, again, weights)
            return again, {"clean_grads": grads, "surrogate_gap": gap}
        rows, weights = context.rows, context.weights
        unknown = next(iter(grads.values())).new_full((), torch.nan)
        if weights is None and rows is None and context.grad_fn is not None:
            with torch.enable_grad():
                found: Tree = context.grad_fn(near)
            check_leaves(f"{self.caller}: grad_fn", found, params)
            return found, {"clean_grads": grads, "surrogate_gap": unknown}
        if weights is None:
            raise ValueError(
                f"{self.caller}: expected the weights that made this gradient from its rows, or "
                "grad_fn(params) -> gradients as an extra keyword, found neither. Put "
                f"{self.caller} behind a reducer in the same chain, or call update(..., "
                "grad_fn=...)."
            )
        stack = self._rows_at(near, rows, context)
        gap = unknown if rows is None else _surrogate_gap(rows, stack, weights)
        return stack.combine(weights), {"clean_grads": grads, "surrogate_gap": gap}

    def second_pass_by_row(self, rows: GradStack, params: Params) -> tuple[GradStack, Out]:
        """Return the rows, each at its own w + e_m, and what is published."""
        sq_norms = rows.sq_norms()
        if self.adaptive is None:
            # Each row along its own gradient; no M sets of parameters where they are not needed.
            again = self._named_errors(rows.along, self._step(sq_norms.sqrt()))
        else:
            near = torch.vmap(self._perturbed, in_dims=(None, 0))(params, rows.stacked())
            again = self._named_errors(rows.at_rows, near)
        gap = _surrogate_gap(rows, again, _weights_of_finite(rows, sq_norms))
        return again, {"clean_grads": rows, "surrogate_gap": gap}

    def _step(self, norm: Tensor) -> Tensor:
        """Return ρ / (norm + δ): 1/δ at most, which half precision cannot hold."""
        return self.rho / (norm + DELTA)

    def _perturbed(self, params: Params, along: Tree) -> Params:
        """Return w + e."""
        shape, scale = self._shape_and_scale(params, along)
        step = self._step(_products.norm(scale))
        moves = {name: _tree.at_least_float32(s) for name, s in shape.items()}
        # addcmul makes one pass over memory, a product and a sum would make two.
        return {
            name: torch.addcmul(_tree.at_least_float32(params[name]), move, step.to(move.dtype)).to(
                params[name].dtype
            )
            for name, move in moves.items()
        }

    def _shape_and_scale(self, params: Params, along: Tree) -> tuple[Tree, Tree]:
        """Return the direction of e, and the tree whose norm divides it."""
        if self.adaptive is None:
            return along, along
        if self.adaptive == "gsam":
            return {name: params[name].abs() * d for name, d in along.items()}, along
        size = {name: params[name].abs() + self.eta for name in along}
        scale = {name: size[name] * d for name, d in along.items()}
        return {name: size[name] * s for name, s in scale.items()}, scale

    def _rows_at(self, params: Params, rows: GradStack | None, context: Context) -> GradStack:
        """Return the rows at other parameters, from the caller's grad_fn if it is given."""
        if context.grad_fn is not None:
            with torch.enable_grad():
                fresh = as_stack(context.grad_fn(params))
            # Rows that were clipped or removed stay clipped or removed, as in `at`.
            return fresh if rows is None else rows.like(fresh)
        if rows is None:
            raise ValueError(
                f"{self.caller}: expected the rows in the chain, or grad_fn(params) -> rows as an "
                "extra keyword, found neither. Start the chain from rows, or call update(..., "
                "grad_fn=...)."
            )
        return self._named_errors(rows.at, params)

    def _named_errors(self, question: Callable[[T], GradStack], given: T) -> GradStack:
        try:
            return question(given)
        except ValueError as error:
            raise ValueError(f"{self.caller}: {error}") from error


def _surrogate_gap(clean: GradStack, again: GradStack, weights: Tensor) -> Tensor:
    """Compute Σ w_m (f_m(w + e) − f_m(w)) over the rows that have a weight."""
    if clean.losses is None or again.losses is None:
        return weights.new_full((), torch.nan)
    rise = (again.losses - clean.losses).to(weights.dtype)
    return torch.where(weights != 0, weights * rise, 0.0).sum()


@factory
def gsam_decompose(alpha: float) -> Transform:
    r"""Lower the loss at the perturbed point and the surrogate gap together (GSAM).

    With the clean gradient g, the perturbed one h, a = ⟨g, h⟩ and b = ⟨h, h⟩, the part of g that
    lowers the gap without changing the perturbed loss is g_⊥ = g − (a/b) h, and

        d = h − α g_⊥ = (1 + α a/b) h − α g,        d = h if b = 0.

    Args:
        alpha: α >= 0; the paper uses 0.1 to 0.4 (and up to 1). 0 is SAM.

    Needs: ``clean_grads``, and ``weights`` if those are rows. Publishes: ``cosine`` () of g, h.

    Raises:
        ValueError: alpha < 0; at the call, rows as clean_grads without weights.

    Examples:
        >>> import torch, gradfilter as gf
        >>> clean = {"w": torch.tensor([1.0, 1.0])}
        >>> h, params = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.zeros(2)}
        >>> gf.gsam_decompose(0.5).update(h, {}, params, clean_grads=clean)[0]
        {'w': tensor([ 2.0000, -0.5000])}

    References:
        Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", 2022,
        https://arxiv.org/abs/2203.08065
    """
    check_number("gsam_decompose", "alpha", alpha, low=0, fix="The paper has 0.4 for ResNets.")

    def update(
        grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        clean = context.clean_grads
        if isinstance(clean, GradStack):
            if context.weights is None:
                raise ValueError(
                    "gsam_decompose: expected the weights that combine the clean rows, found none. "
                    "Put mean_rows() or another reducer that publishes weights before it."
                )
            clean = clean.combine(context.weights)
        if clean is None:
            raise ValueError(
                "gsam_decompose: expected clean_grads, found none. Put sam_perturb(rho) before it."
            )
        b, a, g2 = _products.products(grads, clean).unbind()
        ratio = torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
        along, back = 1 + alpha * ratio, _tree.scalar(-alpha, b)

        def decomposed(h: Tensor, g: Tensor) -> Tensor:
            h, g = _tree.at_least_float32(h), _tree.at_least_float32(g)
            return (along.to(h.dtype) * h).addcmul_(g, back.to(h.dtype))

        found = {name: decomposed(h, clean[name]).to(h.dtype) for name, h in grads.items()}
        if not readable(b) or 0 in b.reshape(1).tolist():
            found = _tree.select(b == 0, grads, found)
        cosine = a / (b.sqrt() * g2.sqrt() + DELTA)
        return found, state, {"cosine": cosine}

    return transform_in_context(
        "gsam_decompose",
        "tree -> tree",
        update,
        needs=("clean_grads",),
        publishes=("cosine",),
        row_rules=IGNORES_ROWS,
        recombines=True,
    )
