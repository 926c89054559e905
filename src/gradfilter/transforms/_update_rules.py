"""Update rules with the exact semantics and keywords of torch.optim: SGD, Adam, RMSprop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._readable import followed
from gradfilter._types import (
    Context,
    Kind,
    Out,
    Params,
    State,
    Transform,
    Tree,
    all_keep,
    apply_updates,
)
from gradfilter.schedules._schedules import Schedule, as_schedule
from gradfilter.transforms._blocks import blocks
from gradfilter.transforms._transform import (
    check_leaves,
    check_number,
    is_off,
    transform_in_context,
)

# --- One fused kernel per update rule reads and writes every number once ---


Leaves = list[Tensor]

# kernel(params, grads, buffers by name, t, lr, skip) works in place. If skip is 1, no bit
# changes, for any gradients.
Kernel = Callable[[Leaves, Leaves, dict[str, Leaves], Tensor, Tensor, Tensor | None], None]

BLOCK = 1 << 19
WIDE = (torch.float32, torch.float64)
KERNEL_DTYPES = (*WIDE, torch.bfloat16, torch.float16)


def fits_kernel(params: Tree, trees: Iterable[Any], cpu_dtypes: Collection[torch.dtype]) -> bool:
    """Return whether kernels can run: plain contiguous tensors, and trees like the params."""
    # A compiler optimises formulas better, and vmap does not support the kernels.
    if followed():
        return False
    dtypes = {"cpu": cpu_dtypes, "cuda": KERNEL_DTYPES}
    return all(
        p.dtype in dtypes.get(p.device.type, ()) and _is_plain(p) for p in params.values()
    ) and all(
        isinstance(tree, dict)
        and tree.keys() == params.keys()
        and all(_is_plain(leaf) and _alike(leaf, params[name]) for name, leaf in tree.items())
        for tree in trees
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def run_kernel(
    kernel: Kernel,
    params: Tree,
    grads: Tree,
    buffers: dict[str, Tree],
    t: Tensor,
    lr: Tensor,
    keep: Tensor | None,
    donate: bool,
) -> tuple[Tree, dict[str, Tree]]:
    """Return new parameters and buffers: the old tensors if they are donated, else copies."""
    # On a GPU the kernels read their scalars as float32; on a CPU they read an lr of any dtype.
    t = t.to(torch.float32)
    lr = lr if lr.device.type == "cpu" else lr.to(torch.float32)
    skip = None if keep is None else keep.logical_not().to(torch.float32)
    old = [params, *buffers.values()]
    new: list[Tree] = [{} for _ in old]
    for names in blocks(params, BLOCK):
        lists = [[tree[n] if donate else tree[n].clone() for n in names] for tree in old]
        own = dict(zip(buffers, lists[1:], strict=True))
        kernel(lists[0], [grads[n] for n in names], own, t, lr, skip)
        if donate:  # tell autograd, which may have saved these tensors; the kernels do not
            changed = [leaf for leaves in lists for leaf in leaves if not leaf.is_inference()]
            torch.autograd.graph.increment_version(changed)
        for tree, leaves in zip(new, lists, strict=True):
            tree.update(zip(names, leaves, strict=True))
    new = [{n: tree[n] for n in params} for tree in new]
    return new[0], dict(zip(buffers, new[1:], strict=True))


# --- The frame of an update rule: step count, learning rate, sign and L2 decay ---


# step(gradient, parameter, the leaf's buffers by name, t, lr) -> (update, buffers), t = 1, 2, ...
LeafStep = Callable[
    [Tensor, Tensor, dict[str, Tensor], Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]
]


def new_count(params: Params) -> Tensor:
    """Return the initial number of applied steps, 0, on the device of the parameters."""
    return torch.zeros((), dtype=torch.int64, device=_tree.device_of(params))


def schedule_value(
    schedule: Schedule, own: Tensor, state: State, context: Context
) -> tuple[Tensor, State]:
    """Return the value of a schedule at the caller's ``count=``, else at the own count."""
    given = context.count
    if given is None:
        count = own
    elif isinstance(given, Tensor):
        count = given.to(own.device)
    else:
        count = torch.full_like(own, given)
    return schedule.at(count, state, **{k: v for k, v in context.values.items() if k != "count"})


def update_rule(
    name: str,
    lr: float | Schedule,
    buffers: tuple[str, ...],
    step: LeafStep,
    *,
    weight_decay: float = 0.0,
    maximize: bool = False,
    kernel: Kernel | None = None,
    cpu_dtypes: Collection[torch.dtype] = KERNEL_DTYPES,
) -> Transform:
    """Return a ``tree -> update`` transform from its action on one leaf.

    Args:
        name: The transform's name.
        lr: A number, a 0-d tensor or a Schedule.
        buffers: The names of the tensors kept per leaf, initially zero.
        step: The action on one leaf after the sign and L2.
        weight_decay: L2 decay, g ← g + λ p. The step itself applies decoupled decay.
        maximize: True to flip the sign, before L2.
        kernel: A fused kernel of all this and the addition to the parameters, if there is one.
        cpu_dtypes: The dtypes for which the kernel is correct on a CPU.
    """
    if not isinstance(lr, Schedule):
        check_number(name, "lr", lr, low=0, fix="A Schedule such as cosine(...) also fits.")
    check_number(name, "weight_decay", weight_decay, low=0, fix="0 switches it off.")
    schedule = as_schedule(lr)

    def init(params: Params) -> State:
        count = new_count(params)
        state = {buffer: _tree.zeros_like(params) for buffer in buffers}
        return {**state, "count": count, "lr": schedule.init(count)}

    def begin(state: State, context: Context) -> tuple[Tensor, Tensor, State]:
        """Return the lr of this step, t and the schedule's state after it."""
        value, lr_state = schedule_value(schedule, state["count"], state["lr"], context)
        return value, state["count"] + 1, lr_state

    def update(
        grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        for buffer in buffers:
            check_leaves(f"{name}: state {buffer!r}", state[buffer], params)
        value, t, lr_state = begin(state, context)
        updates: Tree = {}
        kept: dict[str, Tree] = {buffer: {} for buffer in buffers}
        for leaf, g in grads.items():
            p = params[leaf]
            g = -g if maximize else g
            g = g if is_off(weight_decay) else g + weight_decay * p
            own = {buffer: state[buffer][leaf] for buffer in buffers}
            updates[leaf], own = step(g, p, own, t, value)
            for buffer in buffers:
                kept[buffer][leaf] = own[buffer]
        return updates, {**kept, "count": t, "lr": lr_state}, {"lr": value}

    formulas = transform_in_context(name, Kind.TREE_TO_UPDATE, update, init=init, publishes=("lr",))
    if kernel is None:
        return formulas

    def apply(
        grads: Any, state: State, params: Params, context: Context, *, donate: bool
    ) -> tuple[Params, State, Out]:
        keep = all_keep(params, context.keep)
        own = {buffer: state[buffer] for buffer in buffers}
        if not fits_kernel(params, (grads, *own.values()), cpu_dtypes):
            updates, new_state, out = formulas.compute(grads, state, params, context)
            return *apply_updates(params, state, updates, new_state, keep), out
        value, t, lr_state = begin(state, context)
        rest = {"count": t, "lr": lr_state}
        if keep is not None:
            rest = _tree.select(keep, rest, {key: state[key] for key in rest})
        new, kept = run_kernel(kernel, params, grads, own, t, value, keep, donate)
        return new, {**kept, **rest}, {"lr": value}

    return formulas.with_apply(apply)


# --- Adam and AdamW ---


Leaf = dict[str, Tensor]
Lists = dict[str, Leaves]


@factory
def adam(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Apply Adam with L2 decay, as `torch.optim.Adam`.

    g ← ±g + λ p;  m ← β1 m + (1 − β1) g;  v ← β2 v + (1 − β2) g²;
    p ← p − lr / (1 − β1^t) · m / (√v / √(1 − β2^t) + eps). AMSGrad takes the largest v so far.

    Args:
        lr: The learning rate, at least 0, or a Schedule.
        betas: (β1, β2), each in [0, 1).
        eps: Added outside the root, after bias correction.
        weight_decay: The L2 factor λ >= 0.
        amsgrad: True to use the maximum of the raw v.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.adam(0.1), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.9000])}

    References:
        Kingma, Ba, "Adam", 2015, https://arxiv.org/abs/1412.6980
    """
    return _adam("adam", lr, betas, eps, amsgrad, maximize, l2=weight_decay, decoupled=0.0)


@factory
def adamw(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Apply AdamW, as `torch.optim.AdamW`: p ← (1 − lr λ) p, then Adam without L2.

    Args:
        lr: The learning rate, at least 0, or a Schedule.
        betas: (β1, β2), each in [0, 1).
        eps: Added outside the root, after bias correction.
        weight_decay: The decoupled factor λ >= 0.
        amsgrad: True to use the maximum of the raw v.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.adamw(0.1, weight_decay=1.0), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.8000])}

    References:
        Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019,
        https://arxiv.org/abs/1711.05101
    """
    check_number("adamw", "weight_decay", weight_decay, low=0, fix="0 switches it off.")
    return _adam("adamw", lr, betas, eps, amsgrad, maximize, l2=0.0, decoupled=weight_decay)


def _adam(
    name: str,
    lr: float | Schedule,
    betas: tuple[float, float],
    eps: float,
    amsgrad: bool,
    maximize: bool,
    *,
    l2: float,
    decoupled: float,
) -> Transform:
    beta1, beta2 = betas
    for beta in betas:
        argument = "betas" if isinstance(beta, Schedule) else "beta"
        fix = "(0.9, 0.999) is usual."
        check_number(name, argument, beta, low=0, high=1, open_high=True, fix=fix)
    check_number(name, "eps", eps, low=0, fix="1e-8 is usual.")
    buffers = ("m", "v", "max_v") if amsgrad else ("m", "v")

    def step(g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        m = beta1 * own["m"] + (1 - beta1) * g
        v = beta2 * own["v"] + (1 - beta2) * g.square()
        new = {"m": m, "v": v}
        if amsgrad:
            v = new["max_v"] = torch.maximum(own["max_v"], v)
        # The corrections are 0-d and wide, so that 1 − β2^t does not cancel in half precision.
        steps = t.to(lr.dtype)
        denominator = v.sqrt() / (1 - beta2**steps).sqrt() + eps
        update = -(lr / (1 - beta1**steps)) * (m / denominator)
        return update if is_off(decoupled) else update - (lr * decoupled) * p, new

    def kernel(
        p: Leaves, g: Leaves, own: Lists, t: Tensor, lr: Tensor, skip: Tensor | None
    ) -> None:
        # The kernels of torch's own optimizers.
        plain, decayed = torch._fused_adam_, torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]
        fused = plain if is_off(decoupled) else decayed
        fused(
            p,
            g,
            own["m"],
            own["v"],
            own.get("max_v", []),
            [t] * len(p),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=l2 if is_off(decoupled) else decoupled,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            found_inf=skip,
        )

    plain = not any(isinstance(h, Tensor) for h in (beta1, beta2, eps, l2, decoupled))
    return update_rule(
        name,
        lr,
        buffers,
        step,
        weight_decay=l2,
        maximize=maximize,
        kernel=kernel if plain else None,
    )


# --- SGD and RMSprop ---


@factory
def sgd(
    lr: float | Schedule,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Transform:
    """Apply stochastic gradient descent, as `torch.optim.SGD`.

    g ← ±g + λ p;  b ← μ b + (1 − dampening) g, with b = g in the first step;  p ← p − lr · b
    (Nesterov: p − lr (g + μ b)). The lr is applied at the end and does not enter a buffer.

    Args:
        lr: The learning rate, at least 0, or a Schedule.
        momentum: The factor μ >= 0.
        dampening: Usually 0.
        weight_decay: The L2 factor λ >= 0.
        nesterov: Needs momentum > 0 and dampening = 0.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range; nesterov without momentum or with dampening.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.sgd(0.1), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.9000])}
    """
    check_number("sgd", "momentum", momentum, low=0, fix="0.9 is usual.")
    if nesterov and (is_off(momentum) or not is_off(dampening)):
        raise ValueError(
            "sgd: expected momentum > 0 and dampening = 0 with nesterov, found "
            f"momentum={momentum}, dampening={dampening}."
        )
    buffers = () if is_off(momentum) else ("momentum",)

    def step(g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        if buffers:
            b = momentum * own["momentum"]
            # Without dampening the first buffer equals the gradient, because it starts from zeros.
            b = b + g if is_off(dampening) else torch.where(t == 1, g, b + (1 - dampening) * g)
            own = {"momentum": b}
            g = g + momentum * b if nesterov else b
        return -lr * g, own

    def kernel(
        p: Leaves, g: Leaves, own: Lists, t: Tensor, lr: Tensor, skip: Tensor | None
    ) -> None:
        fused = torch._fused_sgd_  # pyright: ignore[reportPrivateImportUsage]  # the kernel of torch's SGD
        fused(
            p,
            g,
            own.get("momentum", []),
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=nesterov,
            maximize=maximize,
            is_first_step=False,  # with a buffer of zeros the first step is correct
            found_inf=skip,
        )

    plain = is_off(dampening) and not any(isinstance(h, Tensor) for h in (momentum, weight_decay))
    return update_rule(
        "sgd",
        lr,
        buffers,
        step,
        weight_decay=weight_decay,
        maximize=maximize,
        kernel=kernel if plain else None,
        # Up to torch 2.13 the CPU kernel skips most of half precision: pytorch/pytorch issue
        # 191763.
        cpu_dtypes=WIDE,
    )


@factory
def rmsprop(
    lr: float | Schedule = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Transform:
    """Apply RMSprop, as `torch.optim.RMSprop`.

    g ← ±g + λ p;  v ← α v + (1 − α) g²;  s = √v + eps, centered: √(v − ḡ²) + eps with
    ḡ ← α ḡ + (1 − α) g;  p ← p − lr g/s, with momentum b ← μ b + g/s and p ← p − lr b.

    Args:
        lr: The learning rate, at least 0, or a Schedule.
        alpha: The decay α of v, in [0, 1]; v starts from 0 without bias correction.
        eps: Added outside the root.
        weight_decay: The L2 factor λ >= 0.
        momentum: The factor μ >= 0.
        centered: True to normalise by the variance.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.rmsprop(0.1, alpha=0.0), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.9000])}

    References:
        Tieleman, Hinton, "Lecture 6.5 — RMSprop", 2012; Graves, 2013,
        https://arxiv.org/abs/1308.0850
    """
    check_number("rmsprop", "alpha", alpha, low=0, high=1, fix="0.99 is usual.")
    check_number("rmsprop", "eps", eps, low=0, fix="1e-8 is usual.")
    check_number("rmsprop", "momentum", momentum, low=0, fix="0 switches it off.")
    buffers = ("v",) + ("mean",) * centered + ("momentum",) * (not is_off(momentum))

    def step(g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        new = {"v": alpha * own["v"] + (1 - alpha) * g.square()}
        variance = new["v"]
        if centered:
            new["mean"] = alpha * own["mean"] + (1 - alpha) * g
            variance = variance - new["mean"].square()
        direction = g / (variance.sqrt() + eps)
        if "momentum" in buffers:
            new["momentum"] = direction = momentum * own["momentum"] + direction
        return -lr * direction, new

    return update_rule("rmsprop", lr, buffers, step, weight_decay=weight_decay, maximize=maximize)
