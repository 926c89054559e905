"""Adaptive gradient clipping in front of an optimizer of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradfilter import _tree
from gradfilter._types import Tree
from gradfilter.transforms._clip import agc_clip
from gradfilter.transforms._link import check_number, check_predicate, is_off

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
Clipping = float | Tensor | None
Exclude = Callable[[str], bool]


def AGC(
    optimizer: AnyOptimizer,
    clipping: Clipping = 0.01,
    agc_eps: float = 1e-3,
    exclude: Exclude | None = None,
) -> AnyOptimizer:
    r"""Let an optimizer clip the gradients, unit by unit, before each of its steps.

    Per unit i:  G_i ← G_i · min(1, clipping · max(‖W_i‖, agc_eps) / ‖G_i‖), the rule of
    `gradfilter.agc_clip`, written into ``p.grad``; then the optimizer's own step.

    It is the same optimizer that comes back, with a hook on its step: schedulers, `GradScaler` and
    whoever asks for its type find what they expect. ``clipping`` and ``agc_eps`` are entries of its
    parameter groups like ``lr``: give them per group (what a group has stays), change, save and
    load them. A closure is called as often as the optimizer calls it, and the gradients are clipped
    each time. Copies (`copy.deepcopy`, pickle) lose hooks: use AGC on the copy.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        clipping: λ >= 0. None or 0 switches clipping off, and nothing is touched.
        agc_eps: > 0, floors the norm of the weight.
        exclude: Predicate on names; true means not clipped. Names are those of
            ``named_parameters()``, if the optimizer was given that, else places: "0.3" is the
            fourth parameter of the first group.

    Raises:
        TypeError: Not an optimizer, or ``exclude`` is not a function.
        ValueError: clipping < 0 or agc_eps <= 0, here or in a group; a sparse gradient, at a step.

    Example:
        >>> import torch
        >>> from gradfilter.interop import AGC
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))  # norms 5 and 0.5
        >>> optimizer = AGC(torch.optim.Adagrad([("w", w)], lr=0.1), clipping=0.1)
        >>> w.grad = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> optimizer.step()
        >>> w.grad
        tensor([[0.0000, 0.5000],
                [0.0000, 0.0500]])

    References:
        Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
        Normalization", 2021, https://arxiv.org/abs/2102.06171
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"AGC: expected a torch.optim.Optimizer, found {type(optimizer).__name__}. Make it "
            "first: AGC(torch.optim.SGD(params, lr=0.1), 0.01)."
        )
    if exclude is not None:
        check_predicate("AGC", "exclude", exclude)
    own = {"clipping": clipping, "agc_eps": agc_eps}

    def complete(optimizer: Optimizer) -> None:
        """Every group has valid values; a state dictionary of a plain optimizer brings none."""
        for group in (optimizer.defaults, *optimizer.param_groups):
            _check(own | group)
            for name, value in own.items():
                group.setdefault(name, value)

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            _clip(optimizer, exclude)
            return None

        def clipped() -> Any:
            with torch.enable_grad():
                loss = closure()
            _clip(optimizer, exclude)
            return loss

        by_name = {**kwargs, "closure": clipped}
        return (args, by_name) if len(args) == 1 else ((args[0], clipped, *args[2:]), kwargs)

    _check(own)
    complete(optimizer)
    optimizer.register_load_state_dict_post_hook(complete)
    # A step of one's own around the optimizer's would run the hooks of both.
    optimizer.register_step_pre_hook(before_step)
    return optimizer


def _check(values: dict[str, Any]) -> None:
    clipping, eps = values["clipping"], values["agc_eps"]
    if clipping is not None:
        check_number("AGC", "clipping", clipping, low=0, fix="Use None (or 0) to switch it off.")
    check_number("AGC", "agc_eps", eps, low=0, open_low=True, fix="The paper has 1e-3.")


def _clip(optimizer: Optimizer, exclude: Exclude | None) -> None:
    """Clip the gradients that the optimizer is about to use, in place."""
    for index, group in enumerate(optimizer.param_groups):
        _check(group)
        clipping = group["clipping"]
        off = clipping is None or is_off(clipping)
        params, grads = ({}, {}) if off else _clippable(index, group, exclude)
        if not params:
            continue
        # A fused optimizer under GradScaler unscales in its kernel: the limit is scaled instead.
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            clipping = clipping * _tree.scalar(scale, next(iter(params.values())))
        link = agc_clip(clipping, eps=group["agc_eps"])
        with torch.set_grad_enabled(group.get("differentiable", False)):
            if torch.is_grad_enabled():  # the step writes into the parameters: clones for autograd
                clones = {place: p.clone() for place, p in params.items()}
                for place, g in link.update(grads, {}, clones)[0].items():
                    params[place].grad = g
            else:  # in place: DistributedDataParallel's gradients are views of its buckets
                clipped, _, _ = link.update(grads, {}, params)
                torch._foreach_copy_(list(grads.values()), [clipped[place] for place in grads])


def _clippable(index: int, group: dict[str, Any], exclude: Exclude | None) -> tuple[Tree, Tree]:
    """The parameters of a group to clip, and their gradients, by place: names may repeat."""
    params, grads = {}, {}
    for i, p in enumerate(group["params"]):
        place = f"{index}.{i}"
        name = group["param_names"][i] if "param_names" in group else place
        if p.grad is None or (exclude is not None and exclude(name)):
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(
                f"AGC: expected dense gradients, found a sparse one for {name!r}. Use sparse=False "
                "in the layer, or leave it unclipped with exclude=lambda name: ..."
            )
        params[place], grads[place] = p, p.grad
    return params, grads
