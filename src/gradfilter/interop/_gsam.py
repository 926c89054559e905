"""Run GSAM around an optimizer of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from typing_extensions import override

from gradfilter._types import Transform
from gradfilter.interop._published_schedulers import ProportionScheduler
from gradfilter.interop._sam import TwoPassOptimizer, sharpness
from gradfilter.transforms._chain import chain
from gradfilter.transforms._sharpness_aware import gsam_decompose


class GSAM(TwoPassOptimizer):
    r"""Surrogate gap guided sharpness-aware minimisation in place.

    With the clean gradient g and the gradient h at the perturbed point (see `SAM`), the base
    optimizer gets d = h − α g_⊥, where g_⊥ is the part of g orthogonal to h, as in
    `gsam_decompose`.

    The radius ``rho_t`` comes from the scheduler: the first value when this object is made, the
    next ones by ``update_rho_t()`` after each step, next to the lr scheduler's ``step()``. A
    ProportionScheduler is read at every step, so that ρ always belongs to the lr of that step.

    Accumulation, AMP and closures work as in `SAM`. DDP works without changes, on synchronised
    gradients; with ``no_sync=ddp_model.no_sync`` each rank has its own g, h and d, and the mean of
    the d is applied, so that the same parameters must have gradients on all ranks.

    Args:
        params: The parameters of the base optimizer.
        base_optimizer: Any `torch.optim.Optimizer`.
        model: The module that `set_closure` calls; only the first pass changes its buffers.
        gsam_alpha: The factor α >= 0; the paper uses 0.1 to 0.4 (and up to 1). 0 is SAM.
        rho_scheduler: An object whose ``step()`` returns ρ, such as
            LinearScheduler(T, rho_max, rho_min) or ProportionScheduler.
        adaptive: True for ASAM's perturbation with η = 0.
        scaler: The GradScaler.
        no_sync: A function that makes the context of both passes.
        grad_reduce: The reduction of d over ranks under ``no_sync``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: gsam_alpha < 0 or ρ < 0; ``rho`` or ``adaptive`` in a parameter group, as
            there is only one of each; ``grad_reduce="sum"`` without no_sync; the errors of `SAM`.
        TypeError: A rho_scheduler whose ``step()`` returns None; the errors of `SAM`.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import GSAM
        >>> from gradfilter.interop import LinearScheduler
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> lr = LinearScheduler(T_max=10, max_value=0.1, optimizer=base)
        >>> rho = LinearScheduler(T_max=10, max_value=0.05, min_value=0.01)
        >>> optimizer = GSAM(model.parameters(), base, model, gsam_alpha=0.4, rho_scheduler=rho)
        >>> for x, y in [(torch.ones(4, 2), torch.zeros(4, 1))]:
        ...     optimizer.set_closure(torch.nn.functional.mse_loss, x, y)
        ...     predictions, loss = optimizer.step()
        ...     _ = lr.step(), optimizer.update_rho_t()
        >>> round(lr.lr(), 3), round(optimizer.rho_t, 3)
        (0.09, 0.046)

    References:
        Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", 2022,
        https://arxiv.org/abs/2203.08065
    """

    alpha: float
    rho_scheduler: Any
    adaptive: bool
    rho_t: float

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Optimizer,
        model: nn.Module,
        gsam_alpha: float,
        rho_scheduler: Any,
        adaptive: bool = False,
        *,
        scaler: torch.amp.GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        grad_reduce: Literal["mean", "sum"] = "mean",
    ) -> None:
        if grad_reduce not in ("mean", "sum"):
            raise ValueError(f'GSAM: expected grad_reduce "mean" or "sum", found {grad_reduce!r}.')
        if grad_reduce == "sum" and no_sync is None:
            raise ValueError(
                'GSAM: expected no_sync=ddp_model.no_sync with grad_reduce="sum", found none: '
                "gradients that are synchronised are a mean already. Give it, or leave the mean."
            )
        super().__init__(params, base_optimizer, model, scaler, no_sync)
        self.alpha, self.rho_scheduler, self.adaptive = gsam_alpha, rho_scheduler, adaptive
        self._local, self._mean = no_sync is not None, grad_reduce == "mean"
        self.update_rho_t()
        self._transform()  # refuses impossible numbers here rather than at the first step

    def update_rho_t(self) -> float:
        """Advance to the scheduler's next radius and return it."""
        rho = self.rho_scheduler.step()
        if rho is None:
            raise TypeError(
                f"GSAM: expected ρ from rho_scheduler.step(), found None of a "
                f"{type(self.rho_scheduler).__name__}. Use ProportionScheduler(lr_scheduler, ...) "
                "to follow one of torch.optim.lr_scheduler."
            )
        self.rho_t = float(rho)
        return self.rho_t

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state with ``rho_t`` and the scheduler's state, if any."""
        state = {**super().state_dict(), "rho_t": self.rho_t}
        if hasattr(self.rho_scheduler, "state_dict"):
            state["rho_scheduler"] = self.rho_scheduler.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`, or a state of the base optimizer (which keeps ρ)."""
        state = dict(state_dict)
        rho, scheduler = state.pop("rho_t", self.rho_t), state.pop("rho_scheduler", None)
        super().load_state_dict(state)  # refuses the state of another optimizer
        self.rho_t = rho
        if scheduler is not None:
            self.rho_scheduler.load_state_dict(scheduler)

    @override
    def _transform(self) -> Transform:
        for group in self.param_groups:
            if found := sorted({"rho", "adaptive"} & set(group) - set(self.defaults)):
                raise ValueError(
                    f"GSAM: expected one radius and one form for all groups, found {found[0]!r} in "
                    "a parameter group. Use rho_scheduler= and adaptive=, or SAM, which has them "
                    "per group."
                )
        if isinstance(self.rho_scheduler, ProportionScheduler):
            self.update_rho_t()
        return chain(sharpness(self.rho_t, self.adaptive), gsam_decompose(self.alpha))

    @override
    def _second_sync(self) -> AbstractContextManager[Any]:
        return self.no_sync()

    @override
    def _prepare_gradients(self, params: list[Tensor]) -> None:
        if not self._local:
            return
        for p in params:
            if p.grad is not None:
                if self._mean:
                    p.grad /= distributed.get_world_size()
                distributed.all_reduce(p.grad)
