"""SAM and ASAM around an optimizer of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradfilter import _products, _tree
from gradfilter._types import Out, Params, State, Transform, Tree
from gradfilter.interop._sam_base import TwoPassOptimizer
from gradfilter.transforms._link import link
from gradfilter.transforms._sharpness import DELTA, sam_perturb


class SAM(TwoPassOptimizer):
    r"""Sharpness-aware minimisation in place: the base optimizer at w, with gradients from w + e.

        SAM:            e = ρ g / (‖g‖ + δ)
        adaptive=True:  e = ρ w² g / (‖|w| g‖ + δ), ASAM with η = 0

    as `sam_perturb` has it. ``step`` runs the closure twice: on the same dropout masks, with the
    second pass's buffer updates (BatchNorm) dropped, and with the old parameters copied back, also
    when the closure raises. ``p.grad`` then holds the gradient that was applied.

    Accumulation: a closure may call backward several times, ``step`` sets gradients to None before
    each of its two runs. AMP: give the GradScaler, and call ``scaler.update()`` after ``step`` as
    always; a gradient with Inf or NaN skips the step. `torch.autocast` may be inside the closure or
    around ``step``. DDP: all works unchanged; with ``no_sync=ddp_model.no_sync`` each rank perturbs
    along its own gradient (m-sharpness) and saves the first synchronisation.

    ``rho`` and ``adaptive`` are entries of the parameter groups, as ``lr`` is: give them per group
    (what a group has stays), change them between steps, save and load them. There is one norm over
    all groups. For an optimizer with a rho of its own (Adadelta) the entry is ``sam_rho``.

    Args:
        params: Those of the base optimizer.
        base_optimizer: Any `torch.optim.Optimizer`; or its class, made with ``**kwargs``.
        rho: ρ >= 0; 0.05 is usual for SAM, 0.5 to 2 for ASAM.
        adaptive: ASAM.
        model: What `set_closure` calls. Its buffers are kept, and those of a ``loss_fn`` that is a
            module; without it, those of the modules that the closure calls (for a compiled one
            torch warns of the hook that finds them).
        scaler: The GradScaler; a closure of your own scales the loss itself.
        no_sync: Makes the context of the first pass.
        **kwargs: For the base optimizer's class.

    Raises:
        ValueError: rho < 0; parameters of the base optimizer are not in ``params``; both scaler
            and no_sync.
        TypeError: ``**kwargs`` for an optimizer that is made already, or one whose step needs a
            closure.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import SAM
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> base = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> optimizer = SAM(model.parameters(), base, rho=0.5, model=model)
        >>> square = lambda predictions, targets: (predictions - targets).square().sum()
        >>> optimizer.set_closure(square, torch.ones(1, 1), torch.zeros(1, 1))
        >>> predictions, loss = optimizer.step()
        >>> loss.item(), model.weight.item()  # 3 - 2 (3 + 0.5)
        (9.0, -4.0)

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", 2021, https://arxiv.org/abs/2010.01412
        Kwon, Kim, Park, Choi, "ASAM", 2021, https://arxiv.org/abs/2102.11600
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Optimizer | type[Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        params = list(params)
        if isinstance(base_optimizer, type):
            base_optimizer = base_optimizer(params, **kwargs)
        elif kwargs:
            raise TypeError(
                f"Expected no arguments for a base optimizer that is made already, found "
                f"{sorted(kwargs)}. Give them to {type(base_optimizer).__name__} itself."
            )
        sharpness(rho, adaptive)  # refuses an impossible radius here rather than at the first step
        super().__init__(params, base_optimizer, model, scaler, no_sync)
        own = signature(type(base_optimizer)).parameters
        self._entries = {
            f"sam_{name}" if name in own else name: value
            for name, value in (("rho", rho), ("adaptive", adaptive))
        }
        # What an earlier SAM around the same optimizer filled in is nobody's own.
        earlier = {name: self.defaults[name] for name in self._entries if name in self.defaults}
        self.defaults.update(self._entries)
        for group in self.param_groups:
            for name, value in self._entries.items():
                if name not in group or (name in earlier and group[name] == earlier[name]):
                    group[name] = value
        self._transform()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` or the base optimizer's gave; a group keeps what that lacks."""
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before, strict=True):
            for name in self._entries.keys() & own.keys():
                group.setdefault(name, own[name])

    def _transform(self) -> Transform:
        rho, adaptive = self._entries.items()
        values = [(group.get(*rho), group.get(*adaptive)) for group in self.param_groups]
        if len(set(values)) == 1:
            return sharpness(*values[0])
        sizes = [len(group["params"]) for group in self.param_groups]
        leaves = [own for own, size in zip(values, sizes, strict=True) for _ in range(size)]
        return _sharpness_by_leaf({str(i): own for i, own in enumerate(leaves)})


def sharpness(rho: float, adaptive: bool) -> Transform:
    """The perturbation in the published meaning of ``adaptive``."""
    return sam_perturb(rho, adaptive="asam" if adaptive else None, eta=0.0)


def _sharpness_by_leaf(forms: dict[str, tuple[float, bool]]) -> Transform:
    """SAM whose radius and form differ by leaf: e_i = ρ_i T_i² g_i / (‖T g‖ + δ), T_i 1 or |w_i|.

    Args:
        forms: (ρ, adaptive) of every leaf.
    """
    for rho, adaptive in set(forms.values()):
        sharpness(rho, adaptive)  # refuses impossible ones

    def update(
        grads: Tree, state: State, params: Params, /, *, grad_fn: Callable[[Params], Tree], **_: Any
    ) -> tuple[Tree, State, Out]:
        def scaled(name: str, g: Tensor) -> Tensor:
            g = _tree.at_least_float32(g)
            return params[name].abs() * g if forms[name][1] else g

        along = {name: scaled(name, g) for name, g in grads.items()}
        size = _products.norm(along) + DELTA
        near = {}
        for name, g in along.items():
            w = _tree.at_least_float32(params[name])
            step = (forms[name][0] / size).to(g.dtype)
            near[name] = torch.addcmul(w, scaled(name, g), step).to(params[name].dtype)
        with torch.enable_grad():
            return grad_fn(near), state, {"clean_grads": grads}

    return link("sam_perturb", "tree -> tree", update, publishes=("clean_grads",))
