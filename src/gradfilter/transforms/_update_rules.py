"""Update rules with the exact semantics and keywords of torch.optim: SGD, Adam, RMSprop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradfilter import _tree
from gradfilter._factory import factory
from gradfilter._readable import followed
from gradfilter._row_rules import IGNORES_ROWS
from gradfilter._scaled_tree import ScaledTree
from gradfilter._types import (
    Compute,
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
    check_predicate,
    is_off,
    transform_in_context,
)

# --- An update rule: what it does to one leaf, and a fused kernel of it if there is one ---


Leaf = dict[str, Tensor]
"""The buffers of one leaf, by name."""


class LeafRule(Protocol):
    """An update rule with its hyperparameters.

    Attributes:
        weight_decay: The L2 decay, g ← g + λ p. Decoupled decay is part of `step`.
        maximize: True to flip the sign of the gradient, before L2.
    """

    @property
    def weight_decay(self) -> float: ...

    @property
    def maximize(self) -> bool: ...

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of the tensors that are kept per leaf, initially zero."""
        ...

    def step(self, g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        """Return the update of one leaf and its new buffers.

        Args:
            g: The gradient after the sign and L2.
            p: The parameter.
            own: The buffers before the step.
            t: The number of the step, 1, 2, ...
            lr: The learning rate.
        """
        ...

    @property
    def kernel(self) -> FusedKernel | None:
        """A kernel that computes and applies the update, if torch has one for these numbers."""
        ...

    def without_decay(self) -> LeafRule:
        """Return the rule for leaves without weight decay."""
        ...


Decay = Callable[[str], bool]
"""A predicate on the names of leaves: true for those that weight decay applies to."""


Leaves = list[Tensor]
Lists = dict[str, Leaves]

BLOCK = 1 << 19
WIDE = (torch.float32, torch.float64)
KERNEL_DTYPES = (*WIDE, torch.bfloat16, torch.float16)


KernelFunction = Callable[[Leaves, Leaves, Lists, Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True, eq=False)
class FusedKernel:
    """A kernel that reads and writes every number once.

    Attributes:
        function: ``function(params, grads, buffers by name, t, lr, skip)`` works in place. If skip
            is 1, no bit changes, for any gradients.
        cpu_dtypes: The dtypes for which it is correct on a CPU.
    """

    function: KernelFunction
    cpu_dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES

    def fits(self, params: Tree, trees: Iterable[Any]) -> bool:
        """Return whether it can run: plain contiguous tensors, and trees like the params."""
        # A compiler optimises formulas better, and vmap does not support the kernels.
        if followed():
            return False
        dtypes = {"cpu": self.cpu_dtypes, "cuda": KERNEL_DTYPES}
        for p in params.values():
            if p.dtype not in dtypes.get(p.device.type, ()) or not _is_plain(p):
                return False
        for tree in trees:
            if not isinstance(tree, dict) or tree.keys() != params.keys():
                return False
            for name, leaf in tree.items():
                if not _is_plain(leaf) or not _is_like(leaf, params[name]):
                    return False
        return True

    def run(
        self,
        params: Tree,
        grads: Tree | ScaledTree,
        buffers: dict[str, Tree],
        t: Tensor,
        lr: Tensor,
        keep: Tensor | None,
        donate: bool,
        others: tuple[Decay, KernelFunction] | None = None,
    ) -> tuple[Tree, dict[str, Tree]]:
        """Return new parameters and buffers: the old tensors if they are donated, else copies.

        ``others`` is a predicate and the function for the leaves for which it is false.
        """
        # On a GPU the kernels read their scalars as float32; on a CPU they read an lr of any dtype.
        t = t.to(torch.float32)
        lr = lr if lr.device.type == "cpu" else lr.to(torch.float32)
        skip = None if keep is None else keep.logical_not().to(torch.float32)
        old = [params, *buffers.values()]
        new: list[Tree] = [{} for _ in old]
        for function, names in self._calls(params, others):
            lists = [[tree[n] if donate else tree[n].clone() for n in names] for tree in old]
            own = dict(zip(buffers, lists[1:], strict=True))
            read = grads.read(names) if isinstance(grads, ScaledTree) else grads
            function(lists[0], [read[n] for n in names], own, t, lr, skip)
            del read  # before the next products are computed
            if donate:  # tell autograd, which may have saved these tensors; the kernels do not
                changed = [leaf for leaves in lists for leaf in leaves if not leaf.is_inference()]
                torch.autograd.graph.increment_version(changed)
            for tree, leaves in zip(new, lists, strict=True):
                tree.update(zip(names, leaves, strict=True))
        new = [{n: tree[n] for n in params} for tree in new]
        return new[0], dict(zip(buffers, new[1:], strict=True))

    def _calls(
        self, params: Tree, others: tuple[Decay, KernelFunction] | None
    ) -> Iterator[tuple[KernelFunction, list[str]]]:
        """Yield the leaves of every call of a kernel with the function for them."""
        for names in blocks(params, BLOCK):
            if others is None:
                yield self.function, names
                continue
            decays, function = others
            chosen = {name: decays(name) for name in names}
            for own, wanted in ((self.function, True), (function, False)):
                found = [name for name in names if bool(chosen[name]) is wanted]
                if found:
                    yield own, found


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()


def _is_like(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _share_an_address(read: Tree, written: Iterable[Tree]) -> bool:
    """Return whether a gradient is a tensor that a kernel overwrites, perhaps before it is read."""
    addresses = {leaf.data_ptr() for tree in written for leaf in tree.values() if leaf.numel()}
    return any(leaf.data_ptr() in addresses for leaf in read.values())


# --- The transform of an update rule: all leaves, the step count and the learning rate ---


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


@dataclass(frozen=True, eq=False)
class _Updates:
    """The updates of all leaves by one rule. Its state: buffers, ``count`` and ``lr``.

    Attributes:
        name: The name of the transform.
        schedule: The learning rate.
        rule: The rule.
        decays: Which leaves decay; None for all.
    """

    name: str
    schedule: Schedule
    rule: LeafRule
    decays: Decay | None

    def init(self, params: Params) -> State:
        """Return buffers of zeros, the count 0, and the state of the schedule."""
        if self.decays is not None and not any(self.decays(name) for name in params):
            raise ValueError(
                f"{self.name}: expected decays to choose a leaf, found none among "
                f"{sorted(params)}. Use weight_decay=0 to switch it off for all leaves."
            )
        count = new_count(params)
        state = {buffer: _tree.zeros_like(params) for buffer in self.rule.buffers}
        return {**state, "count": count, "lr": self.schedule.init(count)}

    def begin(self, state: State, context: Context) -> tuple[Tensor, Tensor, State]:
        """Return the lr of this step, t and the schedule's state after it."""
        value, lr_state = schedule_value(self.schedule, state["count"], state["lr"], context)
        return value, state["count"] + 1, lr_state

    def __call__(
        self, grads: Tree, state: State, params: Params, context: Context
    ) -> tuple[Tree, State, Out]:
        """Return the updates by the formulas of the rule."""
        buffers = self.rule.buffers
        plain = self.rule.without_decay()
        for buffer in buffers:
            check_leaves(f"{self.name}: state {buffer!r}", state[buffer], params)
        value, t, lr_state = self.begin(state, context)
        updates: Tree = {}
        kept: dict[str, Tree] = {buffer: {} for buffer in buffers}
        for leaf, g in grads.items():
            p = params[leaf]
            rule = self.rule if self.decays is None or self.decays(leaf) else plain
            g = -g if rule.maximize else g
            g = g if is_off(rule.weight_decay) else g + rule.weight_decay * p
            own = {buffer: state[buffer][leaf] for buffer in buffers}
            updates[leaf], own = rule.step(g, p, own, t, value)
            for buffer in buffers:
                kept[buffer][leaf] = own[buffer]
        return updates, {**kept, "count": t, "lr": lr_state}, {"lr": value}


@dataclass(frozen=True, eq=False)
class _FusedUpdates:
    """Compute and apply the updates by a kernel; by formulas where the kernel does not fit."""

    updates: _Updates
    kernel: FusedKernel
    formulas: Compute

    def __call__(
        self, grads: Any, state: State, params: Params, context: Context, *, donate: bool
    ) -> tuple[Params, State, Out]:
        keep = all_keep(params, context.keep)
        own = {buffer: state[buffer] for buffer in self.updates.rule.buffers}
        leaves = grads.leaves if isinstance(grads, ScaledTree) else grads
        fits = self.kernel.fits(params, (leaves, *own.values()))
        if not fits or (donate and _share_an_address(leaves, (params, *own.values()))):
            if isinstance(grads, ScaledTree):
                grads = _tree.in_dtypes_of(params, grads.wide(params))
            updates, new_state, out = self.formulas(grads, state, params, context)
            return *apply_updates(params, state, updates, new_state, keep), out
        value, t, lr_state = self.updates.begin(state, context)
        rest = {"count": t, "lr": lr_state}
        if keep is not None:
            rest = _tree.select(keep, rest, {key: state[key] for key in rest})
        new, kept = self.kernel.run(params, grads, own, t, value, keep, donate, self._others())
        return new, {**kept, **rest}, {"lr": value}

    def _others(self) -> tuple[Decay, KernelFunction] | None:
        """Return which leaves decay, and the kernel for the others; None if all decay."""
        kernel = self.updates.rule.without_decay().kernel
        if self.updates.decays is None or kernel is None:
            return None
        return self.updates.decays, kernel.function


def update_rule(
    name: str, lr: float | Schedule, rule: LeafRule, decays: Decay | None = None
) -> Transform:
    """Return a ``tree -> update`` transform from its action on one leaf.

    Args:
        name: The transform's name.
        lr: A number, a 0-d tensor or a Schedule.
        rule: The action on one leaf, with the other hyperparameters.
        decays: A predicate on names: the leaves that decay; None for all.
    """
    if decays is not None:
        check_predicate(name, "decays", decays)
    if not isinstance(lr, Schedule):
        check_number(name, "lr", lr, low=0, fix="A Schedule such as cosine(...) also fits.")
    check_number(name, "weight_decay", rule.weight_decay, low=0, fix="0 switches it off.")
    updates = _Updates(name, as_schedule(lr), rule, decays)
    made = transform_in_context(
        name,
        Kind.TREE_TO_UPDATE,
        updates,
        init=updates.init,
        publishes=("lr",),
        row_rules=IGNORES_ROWS,
    )
    if rule.kernel is None:
        return made
    return made.with_apply(
        _FusedUpdates(updates, rule.kernel, made.compute),
        takes_scaled=updates.schedule.depends_on_count_alone,
    )


def check_decays(name: str, weight_decay: Any, decays: Any) -> None:
    """Refuse a choice of leaves for a decay that is off."""
    if decays is not None and is_off(weight_decay):
        raise ValueError(
            f"{name}: expected weight_decay > 0 with decays, found weight_decay=0. Give both, or "
            "neither."
        )


def updates_of(caller: str, rule: Any) -> _Updates:
    """Return how an update rule computes its updates, for a wrapper around it.

    Raises:
        TypeError: `update_rule` did not make it, so that nothing is known about its parts.
    """
    updates = getattr(rule.compute, "compute", None) if isinstance(rule, Transform) else None
    if isinstance(updates, _Updates):
        return updates
    found = repr(rule) if isinstance(rule, Transform) else type(rule).__name__
    raise TypeError(
        f"{caller}: expected one update rule of this package, such as sgd(0.1, momentum=0.9) or "
        f"adamw(1e-3), found {found}. In a chain, a partition or a gate, wrap the rule alone. "
        f"Other numbers than its lr follow schedules by scheduled(f, ...) with a function f that "
        f"returns {caller}(...) of a rule."
    )


# --- Adam and AdamW ---


@factory
def adam(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: Callable[[str], bool] | None = None,
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
        decays: Predicate on names: the leaves that weight decay applies to; None for all leaves.
        amsgrad: True to use the maximum of the raw v.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range; ``decays`` without weight decay, or for no leaf.

    Examples:
        >>> import torch, gradfilter as gf
        >>> update, params = gf.adam(0.1), {"w": torch.ones(1)}
        >>> update(params, update.init(params), {"w": torch.ones(1)})[0]
        {'w': tensor([0.9000])}

    References:
        Kingma, Ba, "Adam", 2015, https://arxiv.org/abs/1412.6980
    """
    check_decays("adam", weight_decay, decays)
    rule = _adam_rule("adam", betas, eps, amsgrad, maximize)
    return update_rule("adam", lr, replace(rule, weight_decay=weight_decay), decays)


@factory
def adamw(
    lr: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decays: Callable[[str], bool] | None = None,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Apply AdamW, as `torch.optim.AdamW`: p ← (1 − lr λ) p, then Adam without L2.

    Args:
        lr: The learning rate, at least 0, or a Schedule.
        betas: (β1, β2), each in [0, 1).
        eps: Added outside the root, after bias correction.
        weight_decay: The decoupled factor λ >= 0.
        decays: Predicate on names: the leaves that weight decay applies to; None for all leaves.
        amsgrad: True to use the maximum of the raw v.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range; ``decays`` without weight decay, or for no leaf.

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
    check_decays("adamw", weight_decay, decays)
    rule = _adam_rule("adamw", betas, eps, amsgrad, maximize)
    return update_rule("adamw", lr, replace(rule, decoupled_decay=weight_decay), decays)


def _adam_rule(
    name: str, betas: tuple[float, float], eps: float, amsgrad: bool, maximize: bool
) -> _Adam:
    """Return Adam without decay."""
    beta1, beta2 = betas
    for beta in betas:
        argument = "betas" if isinstance(beta, Schedule) else "beta"
        fix = "(0.9, 0.999) is usual."
        check_number(name, argument, beta, low=0, high=1, open_high=True, fix=fix)
    check_number(name, "eps", eps, low=0, fix="1e-8 is usual.")
    return _Adam(beta1, beta2, eps, amsgrad, maximize)


@dataclass(frozen=True, eq=False)
class _Adam:
    """Adam and AdamW. At most one of the two decays is not 0."""

    beta1: float
    beta2: float
    eps: float
    amsgrad: bool
    maximize: bool
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0

    def without_decay(self) -> _Adam:
        return replace(self, weight_decay=0.0, decoupled_decay=0.0)

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("m", "v", "max_v") if self.amsgrad else ("m", "v")

    def step(self, g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        m = self.beta1 * own["m"] + (1 - self.beta1) * g
        v = self.beta2 * own["v"] + (1 - self.beta2) * g.square()
        new = {"m": m, "v": v}
        if self.amsgrad:
            v = new["max_v"] = torch.maximum(own["max_v"], v)
        # The corrections are 0-d and wide, so that 1 − β2^t does not cancel in half precision.
        steps = t.to(lr.dtype)
        denominator = v.sqrt() / (1 - self.beta2**steps).sqrt() + self.eps
        update = -(lr / (1 - self.beta1**steps)) * (m / denominator)
        decay = self.decoupled_decay
        return update if is_off(decay) else update - (lr * decay) * p, new

    @property
    def kernel(self) -> FusedKernel | None:
        numbers = (self.beta1, self.beta2, self.eps, self.weight_decay, self.decoupled_decay)
        return None if any(isinstance(n, Tensor) for n in numbers) else FusedKernel(self._fused)

    def _fused(
        self, p: Leaves, g: Leaves, own: Lists, t: Tensor, lr: Tensor, skip: Tensor | None
    ) -> None:
        # The kernels of torch's own optimizers.
        plain, decayed = torch._fused_adam_, torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]
        decouples = not is_off(self.decoupled_decay)
        fused = decayed if decouples else plain
        fused(
            p,
            g,
            own["m"],
            own["v"],
            own.get("max_v", []),
            [t] * len(p),
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.decoupled_decay if decouples else self.weight_decay,
            eps=self.eps,
            amsgrad=self.amsgrad,
            maximize=self.maximize,
            found_inf=skip,
        )


# --- SGD ---


@factory
def sgd(
    lr: float | Schedule,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    decays: Callable[[str], bool] | None = None,
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
        decays: Predicate on names: the leaves that weight decay applies to; None for all leaves.
        nesterov: Needs momentum > 0 and dampening = 0.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range; nesterov without momentum or with dampening; ``decays``
            without weight decay, or for no leaf.

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
    check_decays("sgd", weight_decay, decays)
    rule = _SGD(momentum, dampening, nesterov, weight_decay, maximize)
    return update_rule("sgd", lr, rule, decays)


@dataclass(frozen=True, eq=False)
class _SGD:
    """SGD with momentum; without it there is no buffer."""

    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    maximize: bool

    def without_decay(self) -> _SGD:
        return replace(self, weight_decay=0.0)

    @property
    def buffers(self) -> tuple[str, ...]:
        return () if is_off(self.momentum) else ("momentum",)

    def step(self, g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        if self.buffers:
            b = self.momentum * own["momentum"]
            # Without dampening the first buffer equals the gradient, because it starts from zeros.
            if is_off(self.dampening):
                b = b + g
            else:
                b = torch.where(t == 1, g, b + (1 - self.dampening) * g)
            own = {"momentum": b}
            g = g + self.momentum * b if self.nesterov else b
        return -lr * g, own

    @property
    def kernel(self) -> FusedKernel | None:
        numbers = (self.momentum, self.weight_decay)
        if not is_off(self.dampening) or any(isinstance(n, Tensor) for n in numbers):
            return None
        # Up to torch 2.13 the CPU kernel skips most of half precision: pytorch/pytorch issue
        # 191763.
        return FusedKernel(self._fused, cpu_dtypes=WIDE)

    def _fused(
        self, p: Leaves, g: Leaves, own: Lists, t: Tensor, lr: Tensor, skip: Tensor | None
    ) -> None:
        fused = torch._fused_sgd_  # pyright: ignore[reportPrivateImportUsage]  # the kernel of torch's SGD
        fused(
            p,
            g,
            own.get("momentum", []),
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=self.maximize,
            is_first_step=False,  # with a buffer of zeros the first step is correct
            found_inf=skip,
        )


# --- RMSprop ---


@factory
def rmsprop(
    lr: float | Schedule = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: Callable[[str], bool] | None = None,
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
        decays: Predicate on names: the leaves that weight decay applies to; None for all leaves.
        momentum: The factor μ >= 0.
        centered: True to normalise by the variance.
        maximize: True to ascend.

    Publishes: ``lr`` ().

    Raises:
        ValueError: A number out of range; ``decays`` without weight decay, or for no leaf.

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
    check_decays("rmsprop", weight_decay, decays)
    rule = _RMSprop(alpha, eps, weight_decay, momentum, centered, maximize)
    return update_rule("rmsprop", lr, rule, decays)


@dataclass(frozen=True, eq=False)
class _RMSprop:
    """RMSprop, centered or not, with or without momentum."""

    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    centered: bool
    maximize: bool

    def without_decay(self) -> _RMSprop:
        return replace(self, weight_decay=0.0)

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("v",) + ("mean",) * self.centered + ("momentum",) * (not is_off(self.momentum))

    def step(self, g: Tensor, p: Tensor, own: Leaf, t: Tensor, lr: Tensor) -> tuple[Tensor, Leaf]:
        new = {"v": self.alpha * own["v"] + (1 - self.alpha) * g.square()}
        variance = new["v"]
        if self.centered:
            new["mean"] = self.alpha * own["mean"] + (1 - self.alpha) * g
            variance = variance - new["mean"].square()
        direction = g / (variance.sqrt() + self.eps)
        if not is_off(self.momentum):
            new["momentum"] = direction = self.momentum * own["momentum"] + direction
        return -lr * direction, new

    @property
    def kernel(self) -> None:
        return None  # torch has none
