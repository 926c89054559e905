"""Adaptive gradient clipping for optimizers of PyTorch: as a wrapper, and built in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradfilter import _tree
from gradfilter._types import Tree
from gradfilter.interop._sam import TwoPassOptimizer
from gradfilter.transforms._clipping import agc_clip
from gradfilter.transforms._transform import check_number, check_predicate, is_off

# --- The clipping before a step ---


Clipping = float | Tensor | None
Exclude = Callable[[str], bool]


def check_values(values: dict[str, Any]) -> None:
    """Refuse an impossible ``clipping`` or ``agc_eps``."""
    clipping, eps = values["clipping"], values["agc_eps"]
    if clipping is not None:
        check_number("AGC", "clipping", clipping, low=0, fix="Use None (or 0) to switch it off.")
    check_number("AGC", "agc_eps", eps, low=0, open_low=True, fix="The paper has 1e-3.")


def clip_gradients(optimizer: Optimizer, exclude: Exclude | None) -> None:
    """Clip the gradients that the optimizer is about to use, in place."""
    for index, group in enumerate(optimizer.param_groups):
        check_values(group)
        clipping = group["clipping"]
        if clipping is None or is_off(clipping):
            continue
        params, grads = _clippable(index, group, exclude)
        if not params:
            continue
        # A fused optimizer under GradScaler unscales in its kernel, so the limit is scaled instead.
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            clipping = clipping * _tree.scalar(scale, next(iter(params.values())))
        clip = agc_clip(clipping, eps=group["agc_eps"])
        with torch.set_grad_enabled(group.get("differentiable", False)):
            if torch.is_grad_enabled():  # clone, because the step writes into the parameters
                clones = {place: p.clone() for place, p in params.items()}
                for place, g in clip.update(grads, {}, clones)[0].items():
                    params[place].grad = g
            else:  # in place, because DistributedDataParallel's gradients are views of its buckets
                clipped, _, _ = clip.update(grads, {}, params)
                copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]  # as torch's optimizers
                copy(list(grads.values()), [clipped[place] for place in grads])


def _clippable(index: int, group: dict[str, Any], exclude: Exclude | None) -> tuple[Tree, Tree]:
    """Return the parameters of a group to clip and their gradients, by position."""
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


# --- The wrapper ---


AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def AGC(
    optimizer: AnyOptimizer,
    clipping: Clipping = 0.01,
    agc_eps: float = 1e-3,
    exclude: Exclude | None = None,
) -> AnyOptimizer:
    r"""Let an optimizer clip the gradients, unit by unit, before each of its steps.

    Per unit i:  G_i ← G_i · min(1, clipping · max(‖W_i‖, agc_eps) / ‖G_i‖), as in
    `gradfilter.agc_clip`, written into ``p.grad``; then the optimizer's own step.

    The result is the same optimizer with a hook on its step, so schedulers, `GradScaler` and type
    checks work as before. ``clipping`` and ``agc_eps`` are entries of its
    parameter groups like ``lr``: set them per group (the values of a group stay), change, save and
    load them. A closure is called as often as the optimizer calls it, and the gradients are clipped
    each time. Copies by `copy.deepcopy` and pickle also clip.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        clipping: The factor λ >= 0. None or 0 switches clipping off.
        agc_eps: The smallest norm used for a weight, above 0.
        exclude: Predicate on names; true means not clipped. Names are those of
            ``named_parameters()``, if the optimizer was given those, else positions: "0.3" is the
            fourth parameter of the first group.

    Raises:
        TypeError: Not an optimizer; SAM, GSAM or a wrapper without hooks (Lookahead, OrthoGrad),
            which need a base optimizer that clips; ``exclude`` is not a function.
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
"""The method that `copy.deepcopy` and pickle call; an optimizer that clips has its own."""


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Return whether ``Optimizer.__init__`` made an optimizer; some wrappers do not call it."""
    tables = ("_optimizer_step_pre_hooks", "_optimizer_load_state_dict_pre_hooks")
    has_hooks = getattr(type(optimizer).step, "hooked", False)
    return has_hooks and all(hasattr(optimizer, table) for table in tables)


def _clipping(optimizer: AnyOptimizer, exclude: Exclude | None) -> AnyOptimizer:
    """Add the hooks to an optimizer whose groups have their values."""

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            clip_gradients(optimizer, exclude)
            return None

        clipped = partial(_run_and_clip, closure, optimizer, exclude)
        by_name = {**kwargs, "closure": clipped}
        return (args, by_name) if len(args) == 1 else ((args[0], clipped, *args[2:]), kwargs)

    def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Add the clipping values of the groups to the state of a plain optimizer."""
        groups = list(state_dict["param_groups"])
        for i, group in enumerate(optimizer.param_groups[: len(groups)]):
            groups[i] = {name: group[name] for name in ("clipping", "agc_eps")} | groups[i]
        return {**state_dict, "param_groups": groups}

    # A new step around the optimizer's own would run the hooks twice.
    optimizer.register_step_pre_hook(before_step)
    optimizer.register_load_state_dict_pre_hook(before_load)
    this = ref(optimizer)  # avoid a reference cycle of the optimizer

    def reduce(protocol: Any) -> tuple[Any, ...]:
        """Reduce with the hooks, because PyTorch does not copy them and clipping would be lost."""
        original = this()
        assert original is not None  # the optimizer exists while it is copied
        return _copied, (type(original), original.__getstate__(), exclude)

    vars(optimizer)[_MARK] = reduce
    return optimizer


def _run_and_clip(closure: Callable[[], Any], optimizer: Optimizer, exclude: Exclude | None) -> Any:
    """Run the closure of a step, and clip the gradients that it computed."""
    with torch.enable_grad():
        loss = closure()
    clip_gradients(optimizer, exclude)
    return loss


def _copied(kind: type[AnyOptimizer], state: dict[str, Any], exclude: Exclude | None) -> Any:
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    return _clipping(optimizer, exclude)


# --- SGD, Adam, AdamW and RMSprop with clipping built in ---


def _signature(base: type) -> inspect.Signature:
    """Return the optimizer's own signature, extended by the keywords of `AGC`."""
    _, *own = inspect.signature(AGC).parameters.values()
    theirs = inspect.signature(base)
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    return theirs.replace(parameters=[*theirs.parameters.values(), *keywords])


class _Clips(torch.optim.Optimizer):
    """A base class whose instances are optimizers wrapped in `AGC`."""

    def __init__(
        self,
        *args: Any,
        clipping: Clipping = 0.01,
        agc_eps: float = 1e-3,
        exclude: Exclude | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        AGC(self, clipping, agc_eps, exclude)


class SGD_AGC(_Clips, torch.optim.SGD):
    """`torch.optim.SGD` that clips the gradients, unit by unit, before each step.

    Per unit i:  G_i ← G_i · min(1, clipping · max(‖W_i‖, agc_eps) / ‖G_i‖), written into
    ``p.grad``; then b ← μ b + G and p ← p − lr · b, with all options of `torch.optim.SGD`.

    Args:
        *args: See `torch.optim.SGD`. Groups may have their own ``clipping`` and ``agc_eps``.
        clipping: The factor λ >= 0; None or 0 switches clipping off, with the same bits as SGD.
        agc_eps: The smallest norm used for a weight, above 0.
        exclude: Predicate on names, given ``named_parameters()``; true means not clipped. See
            `AGC`.
        **kwargs: See `torch.optim.SGD`.

    Raises:
        ValueError: The errors of `torch.optim.SGD`; clipping < 0 or agc_eps <= 0.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import SGD_AGC
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        >>> head = lambda name: name == "1.weight"
        >>> optimizer = SGD_AGC(model.named_parameters(), lr=0.1, clipping=0.02, exclude=head)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()

    References:
        Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without
        Normalization", 2021, https://arxiv.org/abs/2102.06171
    """

    __signature__: inspect.Signature = _signature(torch.optim.SGD)


class Adam_AGC(_Clips, torch.optim.Adam):
    """`torch.optim.Adam` that clips the gradients, unit by unit, before each step.

    G ← the clipped gradient;  p ← p − lr · m̂ / (√v̂ + eps), m̂ and v̂ of G.
    Arguments, errors and references are those of `SGD_AGC`, with those of `torch.optim.Adam` in
    place of SGD's.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import Adam_AGC
        >>> optimizer = Adam_AGC(torch.nn.Linear(3, 2).parameters(), lr=1e-3, clipping=0.02)
        >>> optimizer.param_groups[0]["clipping"]
        0.02
    """

    __signature__: inspect.Signature = _signature(torch.optim.Adam)


class AdamW_AGC(_Clips, torch.optim.AdamW):
    """`torch.optim.AdamW` that clips the gradients, unit by unit, before each step.

    G ← the clipped gradient;  p ← (1 − lr λ) p − lr · m̂ / (√v̂ + eps), m̂ and v̂ of G.
    Arguments, errors and references are those of `SGD_AGC`, with those of `torch.optim.AdamW` in
    place of SGD's.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import AdamW_AGC
        >>> optimizer = AdamW_AGC(torch.nn.Linear(3, 2).parameters(), lr=1e-3, clipping=0.02)
        >>> optimizer.param_groups[0]["clipping"]
        0.02
    """

    __signature__: inspect.Signature = _signature(torch.optim.AdamW)


class RMSprop_AGC(_Clips, torch.optim.RMSprop):
    """`torch.optim.RMSprop` that clips the gradients, unit by unit, before each step.

    G ← the clipped gradient;  p ← p − lr · G / (√v + eps), v the running mean of G².
    Arguments, errors and references are those of `SGD_AGC`, with those of `torch.optim.RMSprop` in
    place of SGD's.

    Examples:
        >>> import torch
        >>> from gradfilter.interop import RMSprop_AGC
        >>> optimizer = RMSprop_AGC(torch.nn.Linear(3, 2).parameters(), lr=1e-3, clipping=0.02)
        >>> optimizer.param_groups[0]["clipping"]
        0.02
    """

    __signature__: inspect.Signature = _signature(torch.optim.RMSprop)
