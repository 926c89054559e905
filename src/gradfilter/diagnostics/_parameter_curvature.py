"""The loss as a function of the parameters: Hessian eigenvalue and trace, and sharpness."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfilter import _products, _tree
from gradfilter._types import Params, Tree
from gradfilter.diagnostics._derivative import plain_attention
from gradfilter.diagnostics._input_checks import check_at_least
from gradfilter.diagnostics._spectra import normals, top_eigenvalue, trace
from gradfilter.grads._call_context import CallContext, random_state_restored
from gradfilter.grads._normalized_loss import NormalizedLoss

# --- A pure loss at one batch, and its gradient ---


@dataclass(frozen=True, eq=False)
class LossAt:
    """The loss as a function of the parameters alone."""

    loss: NormalizedLoss
    batch: Any
    buffers: Tree

    @classmethod
    def of(cls, loss: Callable[..., Any], batch: Any, buffers: Tree | None) -> LossAt:
        """Return a module's loss, or a plain one without buffers."""
        if not callable(loss):
            raise TypeError(
                f"Expected `loss` to be a function (params, batch) -> scalar, found "
                f"{type(loss).__name__}. gradfilter.model_loss(model, criterion) makes one."
            )
        any_loss = NormalizedLoss.of(loss, has_aux=False)
        return cls(any_loss, batch, any_loss.incoming(buffers))

    def value(self, params: Params) -> Tensor:
        """Compute f(w). ()."""
        self.loss.check_params(params)
        return self.loss.pure(params, self.batch, self.buffers)[0]

    def module_state(self, leaves: Tree) -> AbstractContextManager[None]:
        """Return a context in which checkpointed parts run forward again at these leaves."""
        return self.loss.module_state(leaves, self.buffers)

    def gradient(self, params: Params, *, twice: bool = False) -> tuple[Tensor, Tree, Tree]:
        """Compute f(w), ∇f(w) and the leaves; with ``twice`` the gradient is differentiable.

        A parameter that the loss does not use has a zero gradient.
        """
        with torch.enable_grad():
            leaves = {name: self.loss.leaf(name, p) for name, p in params.items()}
            _tree.device_of(leaves)  # refuses an empty dict
            value = self.value(leaves)
            self.loss.check_reaches(value, leaves.values())
            with self.module_state(leaves):
                slopes = torch.autograd.grad(
                    value, list(leaves.values()), create_graph=twice, materialize_grads=True
                )
        return value, dict(zip(leaves, slopes, strict=True)), leaves


# --- The Hessian ---


class HessianTop(NamedTuple):
    """The result of `hessian_top`.

    Attributes:
        value: The largest eigenvalue, ().
        residual: ‖H u − λ u‖ / max |λ| for the unit vector u found with it, ().
    """

    value: Tensor
    residual: Tensor


class HessianTrace(NamedTuple):
    """The result of `hessian_trace`.

    Attributes:
        value: The trace, ().
        standard_error: The standard error of the mean over the probes, (); 0 if the trace is exact.
    """

    value: Tensor
    standard_error: Tensor


def hessian_top(
    loss: Callable[..., Any],
    params: Params,
    batch: Any,
    *,
    buffers: Tree | None = None,
    iterations: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> HessianTop:
    r"""Return the largest eigenvalue of the Hessian ∂²f/∂w² over all parameters together.

    It is the largest in value, not in size: the direction of strongest upward curvature. The
    Lanczos method takes one product H v per step, each about the time of two gradients, and holds
    one vector like the parameters per step.

    Args:
        loss: The result of `gradfilter.model_loss`, or a plain ``loss(params, batch) -> scalar``,
            twice differentiable. Put a module into evaluation mode, unless you want the curvature
            in training, with BatchNorm on batch statistics.
        params: ``dict[str, Tensor]``, from `gradfilter.extract`. They are not changed.
        batch: The batch of the loss.
        buffers: The buffers for a module's loss; None takes the module's own.
        iterations: The largest number of products, >= 1.
        tolerance: The relative residual at which to stop, at least 0.
        seed: The seed of the first vector.

    Returns:
        A `HessianTop`: value and residual, both (), float64.

    Raises:
        ValueError: iterations < 1, tolerance < 0; the loss does not depend on the parameters or
            is not a scalar.
        TypeError: The loss does not return a tensor.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> loss = lambda params, batch: (batch * params["w"] ** 2).sum()  # H = 2 diag(batch)
        >>> gd.hessian_top(loss, {"w": torch.ones(3)}, torch.tensor([1.0, 4.0, -9.0])).value.round()
        tensor(8., dtype=torch.float64)

    References:
        Lanczos, "An iteration method for the solution of the eigenvalue problem", 1950.
        Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via Hessian
        Eigenvalue Density", 2019, https://arxiv.org/abs/1901.10159
    """
    check_at_least("iterations", iterations, 1, "Ten to fifty are usual.")
    check_at_least("tolerance", tolerance, 0, "1e-3 is usual.")
    product = HessianProduct.of(loss, params, batch, buffers)
    start = normals(seed, product.like)
    top = top_eigenvalue(product, start, iterations=iterations, tolerance=tolerance)
    return HessianTop(top.values[0], top.residuals[0])


def hessian_trace(
    loss: Callable[..., Any],
    params: Params,
    batch: Any,
    *,
    buffers: Tree | None = None,
    probes: int = 32,
    seed: int = 0,
) -> HessianTrace:
    r"""Return the trace of the Hessian ∂²f/∂w² over all parameters together.

    It is the mean of vᵀ H v over random vectors v of ±1 (Hutchinson), and exact with at least as
    many probes as parameters.

    Args:
        loss: See `hessian_top`, also for the next three.
        params: ``dict[str, Tensor]``.
        batch: The batch of the loss.
        buffers: The buffers for a module's loss.
        probes: The number of probes, at least 2.
        seed: The seed of the probes.

    Returns:
        A `HessianTrace`: value and standard error, both (), float64.

    Raises:
        ValueError: probes < 2; the loss does not depend on the parameters or is not a scalar.
        TypeError: The loss does not return a tensor.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> loss = lambda params, batch: (batch * params["w"] ** 2).sum()  # H = 2 diag(batch)
        >>> gd.hessian_trace(loss, {"w": torch.ones(3)}, torch.tensor([1.0, 4.0, -9.0])).value
        tensor(-8., dtype=torch.float64)

    References:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
        Yao, Gholami, Keutzer, Mahoney, "PyHessian", 2020, https://arxiv.org/abs/1912.07145
    """
    check_at_least("probes", probes, 2, "Two are needed for a standard error.")
    product = HessianProduct.of(loss, params, batch, buffers)
    values, errors = trace(product, product.like, probes=probes, seeds=seed)
    return HessianTrace(values[0], errors[0])


@dataclass(frozen=True, eq=False)
class HessianProduct:
    """The function v -> H v for v (1, P); one graph of the gradient serves all v.

    Attributes:
        at: The loss.
        leaves: The parameters at which H is taken.
        gradient: The gradient with respect to them, differentiable.
    """

    at: LossAt
    leaves: Tree
    gradient: Tree

    @classmethod
    def of(
        cls, loss: Callable[..., Any], params: Params, batch: Any, buffers: Tree | None
    ) -> HessianProduct:
        """Compute the gradient that all products differentiate."""
        at = LossAt.of(loss, batch, buffers)
        with plain_attention(), random_state_restored(_tree.device_of(params)):
            _, gradient, leaves = at.gradient(params, twice=True)
        return cls(at, leaves, gradient)

    @property
    def like(self) -> Tensor:
        """An empty tensor of the shape, dtype and device of v. (1, P)."""
        size = sum(leaf.numel() for leaf in self.leaves.values())
        first = _tree.at_least_float32(next(iter(self.leaves.values())))
        return first.new_empty((1, size))

    def __call__(self, v: Tensor) -> Tensor:
        """Compute H v. (1, P)."""
        parts = torch.split(v[0], [leaf.numel() for leaf in self.leaves.values()])
        along = {
            name: part.view(leaf.shape).to(leaf.dtype)
            for part, (name, leaf) in zip(parts, self.leaves.items(), strict=True)
        }
        # H of a linear part is 0.
        slopes = {name: g for name, g in self.gradient.items() if g.requires_grad}
        moved = [torch.zeros_like(leaf) for leaf in self.leaves.values()]
        if slopes:
            # Checkpointed parts of the module run again.
            with plain_attention(), self.at.module_state(self.leaves):
                moved = list(
                    torch.autograd.grad(
                        list(slopes.values()),
                        list(self.leaves.values()),
                        [along[name] for name in slopes],
                        retain_graph=True,
                        materialize_grads=True,
                    )
                )
        return torch.cat([m.reshape(-1).to(v.dtype) for m in moved])[None]


# --- Sharpness: the rise of the loss at the worst point nearby ---


DELTA = 1e-12  # keeps a zero gradient finite


def sharpness(
    loss: Callable[..., Any],
    params: Params,
    batch: Any,
    rho: float = 0.05,
    *,
    buffers: Tree | None = None,
) -> Tensor:
    r"""Return the rise of the loss over one SAM step, f(w + e) − f(w) with e = ρ g / (‖g‖ + 1e-12).

    g = ∇f(w), the norm over all parameters together. It takes one gradient and one more forward
    pass, with the same random numbers. In half precision w + e would mostly round to w, so the
    parameters must be float32 or wider; autocast may compute in half precision.

    Args:
        loss: The result of `gradfilter.model_loss`, or a plain ``loss(params, batch) -> scalar``.
        params: ``dict[str, Tensor]``, from `gradfilter.extract`. They are not changed.
        batch: The batch of the loss.
        rho: The radius ρ >= 0, in units of the parameters' norm; 0.05 is usual.
        buffers: The buffers for a module's loss; None takes the module's own.

    Returns:
        (), float64.

    Raises:
        ValueError: rho < 0; a parameter is in half precision; the loss does not depend on the
            parameters or is not a scalar.
        TypeError: The loss does not return a tensor.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> loss = lambda params, batch: (params["w"] ** 2).sum()
        >>> gd.sharpness(loss, {"w": torch.tensor([3.0, 4.0])}, None, rho=1.0)  # 6² − 5²
        tensor(11., dtype=torch.float64)

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", 2021, https://arxiv.org/abs/2010.01412
    """
    check_at_least("rho", rho, 0, "0.05 is usual.")
    at = LossAt.of(loss, batch, buffers)
    device = _tree.device_of(params)
    _check_precision(params)
    # Both passes use the same random numbers and module state, which are restored afterwards.
    moment = CallContext.now(device, at.loss.modules, attributes=at.loss.attributes)
    with moment.restored():
        value, gradient, _ = at.gradient(params)
    with moment.restored(), torch.no_grad():
        step = rho / (_products.norm(gradient) + DELTA)
        near = {
            name: (p + step * gradient[name]).to(p.dtype)  # a leaf of shape () is promoted
            for name, p in params.items()
        }
        return (at.value(near).to(step.dtype) - value.detach().to(step.dtype)).detach()


def _check_precision(params: Params) -> None:
    """Refuse parameters whose precision is too low for the step."""
    for name, p in params.items():
        if torch.promote_types(p.dtype, torch.float32) != p.dtype:
            raise ValueError(
                f"Expected parameters in float32 or wider, found {name!r} in {p.dtype}, where a "
                "step to a point nearby is mostly rounded away. Use float32 parameters, and "
                "torch.autocast to compute in half precision."
            )
