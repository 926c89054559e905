"""Habits of random modules and losses: behaviours of forward passes in published code.

A habit is a class with any of the functions

    install(model)                      once, after the layers are made
    entry(model, x) -> x                before the first layer
    middle(model, h) -> h               on a vector (B, 6), before the head
    exit(model, output) -> output       on the logits (B, 3)
    criterion(model, output, y) -> ()   a term of the loss
    happened(model) -> bool             whether the expected event took place
    filtered(grads) -> grads            the effect of its hooks on filtered gradients
"""

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from _random_layers import Clipped

HABITS = {}


def habit(name, *, refuse="never", random="", smooth=True, floats=False, stash=False):
    """Register a habit.

    Args:
        name: Its behaviour.
        refuse: Plans that may refuse it: "never", "fused" (and "vmap"), or "all".
        random: When it draws from torch's default generator, so that plans differ in the
            numbers: "training", "always", or "" for never.
        smooth: Its answer in low precision is near that in float64.
        floats: It needs an input of floating-point numbers.
        stash: It leaves a tensor on the module.
    """

    def register(kind):
        kind.title, kind.refuse, kind.random, kind.smooth = name, refuse, random, smooth
        kind.floats, kind.stash = floats, stash
        HABITS[name] = kind
        return kind

    return register


# Own parameters, by every route.


@habit("criterion: L2 over model.parameters()")
class _:
    def criterion(model, output, y):
        return 0.1 * sum(p.square().sum() for p in model.parameters())


@habit("criterion: L1 where requires_grad", smooth=False)
class _:
    def criterion(model, output, y):
        return 0.05 * sum(p.abs().sum() for p in model.parameters() if p.requires_grad)


@habit("criterion: orthogonality of the head")
class _:
    def criterion(model, output, y):
        w = model.head.weight
        return 0.1 * (w @ w.T - torch.eye(3, dtype=w.dtype)).square().sum()


@habit("criterion: EWC with anchors in buffers")
class _:
    def install(model):
        model.register_buffer("anchor", model.head.weight.detach() * 0.5)

    def criterion(model, output, y):
        return (model.head.weight - model.anchor).square().sum()


@habit("criterion: EWC with anchors in a dict")
class _:
    def install(model):
        model.anchors = {n: p.detach() * 0.5 for n, p in model.named_parameters()}

    def criterion(model, output, y):
        pairs = [(p, model.anchors[n]) for n, p in model.named_parameters() if n in model.anchors]
        return 0.1 * sum((p - anchor).square().sum() for p, anchor in pairs)


@habit("criterion: the model called again")
class _:
    def criterion(model, output, y):
        return 0.1 * model.once_more().square().mean()


@habit("criterion: the model as its own teacher")
class _:
    def criterion(model, output, y):
        with torch.no_grad():
            teacher = model.once_more()
        return (output.mean(0) - teacher.mean(0)).square().sum()


@habit("criterion: the head on its own")
class _:
    def criterion(model, output, y):
        return model.head(torch.ones(2, 6, dtype=output.dtype)).square().sum()


@habit("forward: penalty where requires_grad")
class _:
    def exit(model, output):
        terms = [p.square().sum() for p in model.parameters() if p.requires_grad]
        return output * (1 + 0.1 * sum(terms))


@habit("own parameters in a list", refuse="all")
class _:
    def install(model):
        model.side = nn.Linear(6, 6)
        model.cached = [model.side.weight, model.side.bias]

    def middle(model, h):
        return F.linear(h, *model.cached).tanh()


@habit("own parameters in a list, and by their names", refuse="all")
class _:
    def install(model):
        model.both = nn.Linear(6, 6)
        model.twice = [model.both.weight]

    def middle(model, h):
        return model.both(h).tanh() @ model.twice[0]


@habit("criterion: penalty over a cached list", refuse="all")
class _:
    def install(model):
        model.listed = list(model.parameters())

    def criterion(model, output, y):
        return 0.1 * sum(p.square().sum() for p in model.listed if p.requires_grad)


@habit("own parameters of an unregistered module", refuse="all")
class _:
    def install(model):
        helper = nn.Linear(6, 3)
        helper.weight, helper.bias = model.head.weight, model.head.bias
        model.helpers = [helper]

    def exit(model, output):
        return output + model.helpers[0](torch.ones(1, 6, dtype=output.dtype))


@habit("own submodule in a list")
class _:
    def install(model):
        model.side_list = nn.Linear(6, 6)
        model.unregistered = [model.side_list]

    def middle(model, h):
        return model.unregistered[0](h).tanh()


@habit("foreign trainable module in a list")
class _:
    def install(model):
        model.foreign = [nn.Linear(6, 6)]

    def middle(model, h):
        return h + model.foreign[0](h).tanh()


@habit("closure over a parameter", refuse="all")
class _:
    def install(model):
        w = model.closed = nn.Parameter(torch.randn(6))
        model.apply_closed = lambda h: h * w

    def middle(model, h):
        return model.apply_closed(h)


@habit("scripted linear", refuse="all")
class _:
    def install(model):
        model.scripted = torch.jit.script(nn.Linear(6, 6))

    def middle(model, h):
        return model.scripted(h).tanh()


class LastOfLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, h):
        return self.lstm(h[:, None])[0][:, 0]


@habit("scripted LSTM", refuse="all")
class _:
    def install(model):
        model.scripted_lstm = torch.jit.script(LastOfLSTM())

    def middle(model, h):
        return model.scripted_lstm(h)


@habit("traced linear", refuse="all")
class _:
    def install(model):
        dtype = torch.get_default_dtype()
        model.traced = torch.jit.trace(nn.Linear(6, 6), torch.zeros(2, 6, dtype=dtype))

    def middle(model, h):
        return model.traced(h).tanh()


@habit("parametrize.cached", refuse="all")
class _:
    def install(model):
        model.unit = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def middle(model, h):
        with parametrize.cached():
            return model.unit(model.unit(h).tanh())


@habit("isinstance of a parameter")
class _:
    def exit(model, output):
        good = isinstance(model.head.weight, nn.Parameter)
        return output * (1.0 if good else 2.0)


@habit("parameter groups by isinstance")
class _:
    def exit(model, output):
        own = [m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
        return output + 0.1 * sum(m.weight.square().sum() for m in own)


@habit("state_dict read in forward", refuse="fused")
class _:
    def exit(model, output):
        return output * (1 + model.state_dict()["head.weight"].square().mean())


@habit("functional_call in forward", refuse="fused")
class _:
    def exit(model, output):
        near = {name: 1.1 * p for name, p in model.head.named_parameters()}
        ones = torch.ones(1, 6, dtype=output.dtype)
        return output + torch.func.functional_call(model.head, near, (ones,))


@habit("vmap in forward", refuse="fused")
class _:
    def exit(model, output):
        return torch.func.vmap(lambda row: row * model.head.bias)(output)


@habit("grad in forward", refuse="fused")
class _:
    def middle(model, h):
        return h + 0.1 * torch.func.grad(lambda z: model.head(z).square().sum())(h)


@habit("autograd.grad in forward", refuse="fused")
class _:
    def middle(model, h):
        (slope,) = torch.autograd.grad(model.head(h).square().sum(), h, create_graph=True)
        return h + 0.1 * slope


@habit("gradient penalty at the input", refuse="fused", floats=True)
class _:
    def entry(model, x):
        model.at_input = x = x.detach().requires_grad_()
        return x

    def criterion(model, output, y):
        (slope,) = torch.autograd.grad(output.square().sum(), model.at_input, create_graph=True)
        model.at_input = None
        return slope.square().sum()


# Hooks.


def halve(module, grads, *_):
    return tuple(None if g is None else 0.5 * g for g in grads)


def quarter(p):
    p.grad.mul_(0.25)


@habit("forward hook")
class _:
    def install(model):
        model.head.register_forward_hook(lambda module, args, output: output * 1.5)


@habit("forward pre-hook")
class _:
    def install(model):
        model.head.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


@habit("forward hook that looks only", refuse="fused")
class _:
    def install(model):
        seen = model.seen_shapes = []
        model.head.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))

    def happened(model):
        return bool(model.seen_shapes) and set(model.seen_shapes) <= {(b, 3) for b in range(9)}


@habit("full backward hook", refuse="fused")
class _:
    def install(model):
        model.head.register_full_backward_hook(halve)


@habit("full backward pre-hook", refuse="fused")
class _:
    def install(model):
        model.head.register_full_backward_pre_hook(halve)


@habit("full backward hook that looks only", refuse="fused")
class _:
    def install(model):
        norms = model.seen_norms = []
        model.head.register_full_backward_hook(
            lambda m, into, out: norms.append(float(out[0].norm()))
        )

    def happened(model):
        return bool(model.seen_norms)


@habit("guarded tensor hook", refuse="fused")
class _:
    def middle(model, h):
        h = h * 1.5
        if h.requires_grad:
            h.register_hook(lambda g: -0.5 * g)
        return h


@habit("tensor hook", refuse="fused")
class _:
    def middle(model, h):
        h = h.sin()
        h.register_hook(lambda g: 2 * g)
        return h


@habit("tensor hook that clips by the norm", refuse="fused")
class _:
    def middle(model, h):
        h = h.sin()
        if h.grad_fn is not None:
            h.register_hook(lambda g: g / (1 + g.norm()))
        return h


@habit("function that clips the gradient of the logits", refuse="fused")
class _:
    def exit(model, output):
        return Clipped.apply(output)


@habit("hook on the node", refuse="fused")
class _:
    def middle(model, h):
        h = h.sin()
        if h.grad_fn is not None:
            h.grad_fn.register_prehook(lambda grads: tuple(0.3 * g for g in grads))
        return h


@habit("retain_grad", refuse="fused", stash=True)
class _:
    def middle(model, h):
        model.kept = h.sin()
        if model.kept.requires_grad:
            model.kept.retain_grad()
        return model.kept


@habit("hook on a parameter", refuse="all")
class _:
    def install(model):
        mask = torch.arange(18).view(3, 6) % 2
        model.parameter_hook = model.head.weight.register_hook(lambda g: g * mask)

    def filtered(grads):
        mask = torch.arange(18).view(3, 6) % 2
        return {**grads, "head.weight": grads["head.weight"] * mask}


@habit("hook on a parameter, set in forward", refuse="all")
class _:
    def exit(model, output):
        if model.head.bias.requires_grad:
            handle = model.head.bias.register_hook(lambda g: 3 * g)
            model.handles = [*getattr(model, "handles", []), handle]
        return output

    def criterion(model, output, y):
        return 0.0 * output.sum()


@habit("post-accumulate hook", refuse="all")
class _:
    def install(model):
        model.late_hook = model.head.bias.register_post_accumulate_grad_hook(quarter)

    def filtered(grads):
        return {**grads, "head.bias": grads["head.bias"] * 0.25}


@habit("saved tensors hooks", refuse="fused")
class _:
    def middle(model, h):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return h.sin() * h


# What the module remembers.


@habit("stash, detached", stash=True)
class _:
    def middle(model, h):
        model.last = h.detach()
        return h


@habit("stash with its graph", stash=True)
class _:
    def middle(model, h):
        model.last_live = h.sin()
        return model.last_live


@habit("stash in a list", refuse="fused", stash=True)
class _:
    def install(model):
        model.history = []

    def middle(model, h):
        model.history.append(h.detach().mean())
        return h


@habit("stash in a dict of a submodule", refuse="fused", stash=True)
class _:
    def install(model):
        model.head.features = {}

    def exit(model, output):
        model.head.features["logits"] = (output.detach(), [output.detach().sum()])
        return output


@habit("stash by a forward hook", refuse="fused", stash=True)
class _:
    def install(model):
        kept = model.caught = {}
        model.head.register_forward_hook(lambda m, args, out: kept.update(out=out.detach()))


@habit("stash of the loss in the criterion", stash=True)
class _:
    def criterion(model, output, y):
        model.last_term = output.square().mean()
        return model.last_term


@habit("stash of a parameter's view", stash=True)
class _:
    def exit(model, output):
        model.seen_weight = model.head.weight.T
        return output + 0.1 * model.seen_weight.sum()


@habit("constant made at the first call")
class _:
    def middle(model, h):
        if not hasattr(model, "table"):
            model.table = torch.cos(torch.arange(6, dtype=h.dtype))
        return h * model.table


@habit("constant like the input, made at the first call", refuse="all")
class _:
    def middle(model, h):
        if not hasattr(model, "ones_of"):
            model.ones_of = torch.full_like(h, 1.5)
        return h * model.ones_of


@habit("memory of the last batch", refuse="all", stash=True)
class _:
    def middle(model, h):
        before = getattr(model, "memory", None)
        model.memory = h.detach().mean(0)
        return h if before is None else h + 0.5 * before


# Buffers.


@habit("buffer counted in place", refuse="fused")
class _:
    def install(model):
        model.register_buffer("calls", torch.zeros(()))

    def middle(model, h):
        model.calls.add_(1)
        return h


@habit("buffer counted by assignment", refuse="fused")
class _:
    def install(model):
        model.register_buffer("count", torch.zeros((), dtype=torch.long))

    def middle(model, h):
        model.count = model.count + 1
        return h


@habit("counter that scales the output", refuse="fused")
class _:
    def install(model):
        model.register_buffer("age", torch.zeros(()))

    def middle(model, h):
        model.age += 1
        return h * (1 + 0.2 * model.age)


@habit("running mean in place", refuse="fused")
class _:
    def install(model):
        model.register_buffer("mean", torch.zeros(6))

    def middle(model, h):
        model.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h


@habit("running mean by assignment", refuse="fused")
class _:
    def install(model):
        model.register_buffer("center", torch.zeros(6))

    def middle(model, h):
        model.center = 0.9 * model.center + 0.1 * h.detach().mean(0)
        return h


@habit("running mean that is read", refuse="fused")
class _:
    def install(model):
        model.register_buffer("baseline", torch.zeros(6))

    def middle(model, h):
        h = h - model.baseline
        with torch.no_grad():
            model.baseline.lerp_(h.mean(0), 0.3)
        return h


@habit("buffer through .data", refuse="all")
class _:
    def install(model):
        model.register_buffer("level", torch.zeros(6))

    def middle(model, h):
        model.level.data.add_(1)
        return h


@habit("buffer's .data replaced", refuse="all")
class _:
    def install(model):
        model.register_buffer("height", torch.zeros(6))

    def middle(model, h):
        model.height.data = model.height.data + 1
        return h


@habit("buffer through .data, from the activations", refuse="all")
class _:
    def install(model):
        model.register_buffer("slow", torch.zeros(6))

    def middle(model, h):
        model.slow.data.lerp_(h.detach().mean(0), 0.3)
        return h + model.slow


@habit("buffer through .numpy()", refuse="all", smooth=False)
class _:
    def install(model):
        model.register_buffer("array", torch.zeros(6))

    def middle(model, h):
        model.array.numpy()[1] += 1
        return h


@habit("buffer through detach()", refuse="all")
class _:
    def install(model):
        model.register_buffer("depth", torch.zeros(6))

    def middle(model, h):
        model.depth.detach()[2:4].add_(1)
        return h


@habit("buffer copied from the activations", refuse="fused")
class _:
    def install(model):
        model.register_buffer("latest", torch.zeros(6))

    def middle(model, h):
        model.latest.copy_(h.detach().mean(0))
        return h


@habit("buffer queue", refuse="fused")
class _:
    def install(model):
        model.register_buffer("queue", torch.zeros(4, 6))
        model.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def middle(model, h):
        at = int(model.place)
        model.queue[at] = h.detach().mean(0)
        model.place[0] = (at + 1) % 4
        return h + 0.1 * model.queue.mean(0)


@habit("buffer filled in forward", refuse="all")
class _:
    def install(model):
        model.register_buffer("later", None)

    def middle(model, h):
        if model.later is None:
            model.later = torch.ones(6, dtype=h.dtype)
        return h * model.later


@habit("buffer replaced by another shape", refuse="all")
class _:
    def install(model):
        model.register_buffer("grown", torch.zeros(1))

    def middle(model, h):
        if model.grown.shape[0] != h.shape[-1]:
            model.grown = torch.ones(h.shape[-1], dtype=h.dtype)
        return h * model.grown


@habit("buffer in the criterion", refuse="fused")
class _:
    def install(model):
        model.register_buffer("total", torch.zeros(()))

    def criterion(model, output, y):
        model.total += 1
        return model.total * output.square().mean()


# Writes in place.


@habit("batch written in forward", refuse="all", floats=True)
class _:
    def entry(model, x):
        return x.sub_(x.mean()).div_(2)


@habit("in-place relu on the batch", refuse="all", floats=True, smooth=False)
class _:
    def entry(model, x):
        return F.relu(x.mul_(2).add_(0.3), inplace=True)


@habit("batch written through .data", refuse="all", floats=True)
class _:
    def entry(model, x):
        x.data.mul_(0.5)
        return x


@habit("targets written in the criterion", refuse="all")
class _:
    def criterion(model, output, y):
        late = F.mse_loss(output[:, 0], y.to(output.dtype))
        y.copy_((y + 1) % 3)
        return 0.3 * late + 0.0 * y.sum()


@habit("parameters clamped in forward", refuse="all", smooth=False)
class _:
    def entry(model, x):
        with torch.no_grad():
            model.head.weight.clamp_(-0.2, 0.2)
        return x


@habit("parameters clamped through .data", refuse="all", smooth=False)
class _:
    def entry(model, x):
        model.head.weight.data.clamp_(-0.2, 0.2)
        return x


@habit("parameters decayed in forward", refuse="all")
class _:
    def entry(model, x):
        with torch.no_grad():
            model.head.weight.mul_(0.9)
        return x


@habit("parameters' .data replaced", refuse="all")
class _:
    def entry(model, x):
        model.head.weight.data = model.head.weight.data * 0.9
        return x


# Random numbers and counters.


@habit("noise in the criterion", random="always")
class _:
    def criterion(model, output, y):
        return (output + 0.1 * torch.randn_like(output)).square().mean()


@habit("torch.rand, asked by the host", refuse="fused", random="always")
class _:
    def middle(model, h):
        return h * 2 if torch.rand(()).item() > 0.5 else h


@habit("random.uniform", refuse="fused")
class _:
    def middle(model, h):
        return h * random.uniform(0.5, 2)


@habit("random choice of a layer", refuse="fused")
class _:
    def middle(model, h):
        return h if random.random() < 0.5 else h.tanh()


@habit("numpy.random", refuse="fused")
class _:
    def middle(model, h):
        return h * torch.from_numpy(np.random.uniform(0.5, 2, 6)).to(h.dtype)


@habit("numpy.random in the criterion", refuse="fused")
class _:
    def criterion(model, output, y):
        return float(np.random.rand()) * output.square().mean()


@habit("numpy Generator of the module", refuse="all")
class _:
    def install(model):
        model.numpy_rng = np.random.default_rng(3)

    def middle(model, h):
        return h * float(model.numpy_rng.uniform(0.5, 2))


@habit("random.Random of the module", refuse="all")
class _:
    def install(model):
        model.python_rng = random.Random(3)

    def middle(model, h):
        return h * model.python_rng.uniform(0.5, 2)


@habit("torch.Generator of the module", refuse="fused")
class _:
    def install(model):
        model.generator = torch.Generator().manual_seed(5)

    def middle(model, h):
        return h * torch.rand(6, generator=model.generator, dtype=h.dtype)


@habit("torch.Generator of a submodule, in place", refuse="fused")
class _:
    def install(model):
        model.head.rng = torch.Generator().manual_seed(5)

    def middle(model, h):
        return h * torch.empty(6, dtype=h.dtype).uniform_(0.5, 2, generator=model.head.rng)


@habit("python counter that scales", refuse="all")
class _:
    def install(model):
        model.steps = 0

    def middle(model, h):
        model.steps += 1
        return h * (1 + 0.2 * model.steps)


@habit("python counter without effect", refuse="fused")
class _:
    def install(model):
        model.looked = 0

    def middle(model, h):
        model.looked += 1
        return h


@habit("python list cycled through", refuse="all")
class _:
    def install(model):
        model.cycle = [0.5, 1.0, 2.0]

    def middle(model, h):
        model.cycle.append(model.cycle.pop(0))
        return h * model.cycle[0]


# Questions about graphs.


def asked(name, question):
    """Make a habit that doubles the output where a question is not answered as outside."""

    @habit(f"asks {name}")
    class _:
        def middle(model, h):
            h = h.sin()
            return h if question(model, h) else 2 * h


asked("h.requires_grad", lambda model, h: h.requires_grad)
asked("h.grad_fn", lambda model, h: h.grad_fn is not None)
asked("h.is_leaf", lambda model, h: not h.is_leaf)
asked("p.requires_grad", lambda model, h: model.head.weight.requires_grad)
asked("p.is_leaf", lambda model, h: model.head.weight.is_leaf)
asked("p.grad_fn", lambda model, h: model.head.weight.grad_fn is None)
asked("p.grad", lambda model, h: model.head.weight.grad is None)
asked("is_grad_enabled", lambda model, h: torch.is_grad_enabled())
asked("requires_grad of a detached tensor", lambda model, h: not h.detach().requires_grad)
asked("requires_grad of a frozen product", lambda model, h: not (h.detach() * 2).requires_grad)
asked("requires_grad under no_grad", lambda model, h: not _under_no_grad(h).requires_grad)
asked("the shape", lambda model, h: h.dim() == 2 and h.size(1) == 6 and h.numel() % 6 == 0)
asked("the type", lambda model, h: type(h) is torch.Tensor and isinstance(h, torch.Tensor))


@habit("asks the stride")
class _:
    """A habit that reads the strides of the plan's memory; no number depends on them."""

    def middle(model, h):
        flat = h.is_contiguous() and h.stride(1) == 1
        return h.sin().flatten().view_as(h) if flat else h.contiguous().sin()


def _under_no_grad(h):
    with torch.no_grad():
        return h * 2


@habit("frozen where not trained")
class _:
    def middle(model, h):
        trained = [p for p in model.parameters() if p.requires_grad]
        return h * (1 + 0.1 * len(trained))


@habit("no_grad around a part")
class _:
    def middle(model, h):
        with torch.no_grad():
            center = h.mean(0)
        return h - center


@habit("requires_grad switched in forward", refuse="all")
class _:
    def middle(model, h):
        model.head.bias.requires_grad_(True)
        return h


# Questions of the host about data.


@habit("asks the sign of the data", refuse="fused", smooth=False)
class _:
    def middle(model, h):
        return h * 2 if h.sum() > 0 else h


@habit("asks whether anything is large", refuse="fused", smooth=False)
class _:
    def middle(model, h):
        return h.clamp(-1, 1) if bool((h.abs() > 1).any()) else h


@habit("asks what is true of all rows", refuse="vmap")
class _:
    def middle(model, h):
        if not torch.isfinite(h).all():
            raise ValueError("not finite")
        return h


@habit("item() of the data", refuse="fused", smooth=False)
class _:
    def middle(model, h):
        return h * (1 + abs(h.mean().item()))


@habit("tolist() of the data", refuse="fused", smooth=False)
class _:
    def middle(model, h):
        return h + max(h.flatten().tolist())


@habit("boolean mask of the data", refuse="fused", smooth=False)
class _:
    def exit(model, output):
        chosen = output[output.sum(1) > 0]
        return output * (1 + chosen.shape[0])


@habit("boolean mask in the criterion", refuse="fused", smooth=False)
class _:
    def criterion(model, output, y):
        chosen = output[y > 0]
        return chosen.square().sum()


@habit("nonzero of the data", refuse="fused", smooth=False)
class _:
    def middle(model, h):
        (at,) = torch.nonzero(h[:, 0] > 0, as_tuple=True)
        return h.index_add(0, at, h[at] * 0.5)


@habit("unique labels in the criterion", refuse="fused", smooth=False)
class _:
    def criterion(model, output, y):
        if y.is_floating_point():
            return output.square().mean()
        return sum(output[y == label].mean() for label in y.unique())


@habit("numpy of the data", refuse="fused", smooth=False)
class _:
    def middle(model, h):
        scale = 1 + np.abs(h.detach().numpy()).max()
        return h / float(scale)


@habit("a branch on whether the output is wide")
class _:
    def middle(model, h):
        return h.relu() + 0.1 * h if len(h) > 100 else h


@habit("deepcopy in forward", refuse="all")
class _:
    def exit(model, output):
        teacher = copy.deepcopy(model.head)
        return output + teacher(torch.ones(1, 6, dtype=output.dtype)).detach()


@habit("training mode asked and changed")
class _:
    def middle(model, h):
        was = model.head.training
        model.head.eval()
        h = h * (1.5 if model.head.training else 1.0)
        model.head.train(was)
        return h
