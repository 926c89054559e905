"""Adaptive gradient clipping in front of an optimizer of PyTorch."""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import ref

import torch
from torch.optim import Optimizer

from gradfilter.interop._agc_step import Clipping, Exclude, check_values, clip_gradients
from gradfilter.interop._sam_base import TwoPassOptimizer
from gradfilter.transforms._link import check_predicate

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


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
    each time. What `copy.deepcopy` and pickle make of it clips as well.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        clipping: λ >= 0. None or 0 switches clipping off, and nothing is touched.
        agc_eps: Above 0, floors the norm of the weight.
        exclude: Predicate on names; true means not clipped. Names are those of
            ``named_parameters()``, if the optimizer was given that, else places: "0.3" is the
            fourth parameter of the first group.

    Raises:
        TypeError: Not an optimizer, SAM or GSAM, or a wrapper without hooks (Lookahead, OrthoGrad):
            give it a base optimizer that clips; ``exclude`` is not a function.
        ValueError: clipping < 0 or agc_eps <= 0, here or in a group; the optimizer clips already;
            a sparse gradient, at a step.

    Examples:
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
    if isinstance(optimizer, TwoPassOptimizer):
        raise TypeError(
            f"AGC: expected the optimizer that applies the gradients, found "
            f"{type(optimizer).__name__}. Put AGC around its base optimizer."
        )
    inner = [part for part in vars(optimizer).values() if isinstance(part, Optimizer)]
    if inner and not _runs_hooks(optimizer):
        kind = type(optimizer).__name__
        raise TypeError(
            f"AGC: expected an optimizer whose step runs hooks, found {kind}, a wrapper of "
            f"{type(inner[0]).__name__} that does not. Put AGC around its base optimizer: "
            f"{kind}(AGC({type(inner[0]).__name__}(...)), ...)."
        )
    if _MARK in vars(optimizer):
        raise ValueError(
            f"AGC: expected an optimizer that does not clip yet, found a {type(optimizer).__name__}"
            " that does. Change the clipping of its parameter groups instead."
        )
    if exclude is not None:
        check_predicate("AGC", "exclude", exclude)
    own = {"clipping": clipping, "agc_eps": agc_eps}
    check_values(own)
    for group in (optimizer.defaults, *optimizer.param_groups):
        check_values(own | group)
        for name, value in own.items():
            group.setdefault(name, value)
    return _clipping(optimizer, exclude)


_MARK = "__reduce_ex__"
"""What `copy.deepcopy` and pickle ask an object for; an optimizer that clips has its own."""


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer was made by ``Optimizer.__init__``, which some wrappers leave out."""
    tables = ("_optimizer_step_pre_hooks", "_optimizer_load_state_dict_pre_hooks")
    patched = getattr(type(optimizer).step, "hooked", False)
    return patched and all(hasattr(optimizer, table) for table in tables)


def _clipping(optimizer: AnyOptimizer, exclude: Exclude | None) -> AnyOptimizer:
    """The optimizer, with hooks. Its groups have their values."""

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            clip_gradients(optimizer, exclude)
            return None

        def clipped() -> Any:
            with torch.enable_grad():
                loss = closure()
            clip_gradients(optimizer, exclude)
            return loss

        by_name = {**kwargs, "closure": clipped}
        return (args, by_name) if len(args) == 1 else ((args[0], clipped, *args[2:]), kwargs)

    def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A plain optimizer's state says nothing of clipping: every group keeps its own."""
        groups = list(state_dict["param_groups"])
        for i, group in enumerate(optimizer.param_groups[: len(groups)]):
            groups[i] = {name: group[name] for name in ("clipping", "agc_eps")} | groups[i]
        return {**state_dict, "param_groups": groups}

    # A step of one's own around the optimizer's would run the hooks of both.
    optimizer.register_step_pre_hook(before_step)
    optimizer.register_load_state_dict_pre_hook(before_load)
    this = ref(optimizer)  # the optimizer should not keep itself alive

    def reduce(protocol: Any) -> tuple[Any, ...]:
        """Hooks are no part of what PyTorch copies, so that clipping would end in silence."""
        original = this()
        assert original is not None  # it is being copied
        return _copied, (type(original), original.__getstate__(), exclude)

    vars(optimizer)[_MARK] = reduce
    return optimizer


def _copied(kind: type[AnyOptimizer], state: dict[str, Any], exclude: Exclude | None) -> Any:
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    return _clipping(optimizer, exclude)
