"""Run one random case and return its outcome; find a smaller case with the same outcome."""

import copy
import io
import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradfilter as gf
from _random_cases import DTYPES, Case, default_dtype, reseed
from _random_habits import HABITS
from _random_oracle import PlainRows, PlainTraining, _copied, _global_states
from gradfilter.interop import Filtered

OURS = str(Path(gf.__file__).parent)
FALLBACK = 'Fell back to plan "loop": '
# Words of torch's internals, which say nothing to the author of a model.
INTERNAL = (
    *("escaped", "BatchedTensorImpl", "GradTrackingTensor", "TensorWrapper", "INTERNAL ASSERT"),
    *("NotImplementedType", "NoneType", "has no attribute", "not subscriptable", "unpack"),
)

REFUSALS = {
    "never": (),
    "vmap": ("vmap",),
    "fused": ("vmap", "fused"),
    "all": ("vmap", "fused", "auto", "loop"),
}

TRANSFORMS: dict[str, Callable[[], gf.Transform]] = {
    "mean_rows": gf.mean_rows,
    "agree_filter(2)": lambda: gf.agree_filter(2.0),
    "agree_filter(1)": lambda: gf.agree_filter(1.0),
    "agree_filter(0.97)": lambda: gf.agree_filter(0.97),
    "agree_filter(1, first, halving)": lambda: gf.agree_filter(
        1.0, against="first", average="halving"
    ),
    "consensus_filter": gf.consensus_filter,
    "consensus_filter(hard)": lambda: gf.consensus_filter(0.9, soft=False),
    "aggregate": lambda: gf.aggregate(lambda gram: gram.diagonal().add(1).reciprocal()),
    "sign_agreement": lambda: gf.sign_agreement(0.6),
    "clip_per_row": lambda: gf.clip_per_row(0.5),
    "budget_clip": lambda: gf.budget_clip(0.3),
    "finite_filter": gf.finite_filter,
    "agc_clip": lambda: gf.agc_clip(0.05),
    "clip_by_global_norm": lambda: gf.clip_by_global_norm(0.5),
    "sam": lambda: gf.sam_perturb(0.05),
    "asam": lambda: gf.sam_perturb(0.3, adaptive="asam"),
    "sam per row": lambda: gf.sam_perturb(0.05, per_microbatch=True),
    "gsam": lambda: gf.gsam_decompose(0.4),
}
ON_ROWS = ("clip_per_row", "budget_clip", "finite_filter", "sam", "asam", "sam per row")
REDUCING = tuple(TRANSFORMS)[:9]
ON_TREES = ("agc_clip", "clip_by_global_norm", "finite_filter", "sam", "asam")


def chains() -> tuple[tuple[str, ...], ...]:
    """Draw some transforms before a reducer, the reducer, and some after it."""
    pick, found = random.Random(0), []
    for reducer in REDUCING:
        found.append((reducer,))
        for _ in range(6):
            before = tuple(pick.sample(ON_ROWS, pick.choice((0, 1, 1))))
            after = tuple(pick.sample(ON_TREES, pick.choice((0, 1, 1, 2))))
            if sum("sam" in name or "asam" in name for name in before + after) > 1:
                continue
            if "sam" in after and pick.random() < 0.5:
                after = (*after, "gsam")
            found.append((*before, reducer, *after))
    return tuple(found)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Args:
        kind: "equal", "refused", "void" (the plain loop fails), or a failure: "wrong", "unclear",
            "not refusable", "changed".
        text: More about it.
        fell_back: ``auto`` took the loop.
    """

    kind: str
    text: str = ""
    fell_back: bool = False

    @property
    def failed(self) -> bool:
        return self.kind not in ("equal", "refused", "void")


class Wrong(AssertionError):
    """A number differs from that of the plain loop."""


class Changed(AssertionError):
    """A pass changed something outside of it, or left it unusable."""


class Unclear(AssertionError):
    """A warning names internals of torch."""


def run(case: Case) -> Outcome:
    """Compare a case with the plain loop."""
    with default_dtype(torch.float64 if case.dtype == "float64" else torch.float32):
        return _run(case)


def _run(case: Case) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = _Reference(case)
    except Exception as error:
        return Outcome("void", f"{type(error).__name__}: {error}".splitlines()[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            (_check_chain if case.chain else _check_rows)(case, reference, caught)
            return Outcome("equal", fell_back=bool(_fallbacks(caught)))
        except Wrong as error:
            return Outcome("wrong", str(error))
        except Changed as error:
            return Outcome("changed", str(error))
        except Unclear as error:
            return Outcome("unclear", str(error))
        except Exception as error:
            return _refusal(case, error)


def _refusal(case: Case, error: Exception) -> Outcome:
    """Judge an error: it has words or a note of this library, and the case may be refused."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{text}   ({Path(place.filename).name}:{place.lineno})"
    ours = place.filename.startswith(OURS) or any(
        'plan="loop"' in note for note in getattr(error, "__notes__", ())
    )
    clear = (
        isinstance(error, (ValueError, TypeError, RuntimeError))
        and ours
        and not any(word in text for word in INTERNAL)
    )
    if not clear:
        return Outcome("unclear", where)
    return Outcome("refused" if case.plan in REFUSALS[case.refuse] else "not refusable", where)


def _fallbacks(caught: list[warnings.WarningMessage]) -> list[str]:
    texts = [str(w.message) for w in caught]
    return [text.removeprefix(FALLBACK) for text in texts if text.startswith(FALLBACK)]


class _Reference:
    """The plain loop in the case's dtype, and also in float64 if that is another dtype."""

    def __init__(self, case: Case):
        self.plain = PlainTraining(case)
        before = _copied(self.plain.state())["buffers"]
        self.buffers = before
        if case.chain:
            self.steps = _plain_steps(case)
            return
        self.rows = self.plain.rows(case.seed)
        self.wide = (
            self.rows
            if case.dtype == "float64"
            else PlainTraining(case, torch.float64).rows(case.seed)
        )
        self.worst = {
            name: _worst_row(leaf, self.wide.leaves[name])
            for name, leaf in self.rows.leaves.items()
        }
        self.answers = []
        for question in case.questions:
            arguments = Arguments(case, self.rows)
            got = arguments.ask(self.rows, question)
            want = got if self.wide is self.rows else arguments.ask(self.wide, question)
            self.answers.append((got, want, arguments.scale(self.wide, question)))
        finite = all(torch.isfinite(leaf).all() for leaf in self.rows.leaves.values())
        if not finite or not torch.isfinite(self.rows.losses).all():
            raise ArithmeticError("the plain loop gives numbers that are not finite")
        if case.dtype != "float64":
            total = self.wide.sq_norms()
            if bool((self.rows.sq_norms() - total).abs().gt(0.5 * total).any()):
                raise ArithmeticError("the plain loop is nowhere near float64")


def _worst_row(plain: Tensor, wide: Tensor) -> float:
    """Return the largest error of a row of a leaf, relative to the row's largest number."""
    if not wide[0].numel():
        return 0.0
    size, error = (t.abs().reshape(len(t), -1).amax(1) for t in (wide, plain - wide))
    return float(torch.where(size > 0, error / size, 0.0).max().clamp(max=0.1))


class Arguments:
    """The arguments of the questions, from the case's seed, the same for every stack."""

    def __init__(self, case: Case, rows: PlainRows):
        self.case, self.shapes, self.count = case, rows.shapes, len(rows)
        generator = torch.Generator().manual_seed(case.seed + 2)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.weights, self.factors = draw(self.count), draw(self.count)
        self.steps = 0.1 * torch.linspace(-1, 2, self.count, dtype=torch.float64)
        if self.count > 2:
            self.weights[1] = 0.0
            self.factors[-1] = 0.0
        dtype = DTYPES[case.dtype]
        self.tree = {name: draw(shape).to(dtype) for name, shape in self.shapes.items()}
        self.noise = {name: draw(self.count, *shape) for name, shape in self.shapes.items()}
        self.names = sorted(self.shapes)[::2]
        self.cut = max(1, self.count - 1)
        model, _ = case.build()
        own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.near = {n: (p + 0.1 * self.noise[n][0].to(dtype)) for n, p in own.items()}
        self.near_rows = {n: p + 0.1 * self.noise[n].to(dtype) for n, p in own.items()}

    def derive(self, rows: gf.GradStack, question: str) -> gf.GradStack:
        for step in question.split(".")[:-1]:
            if step == "scaled":
                rows = rows.scaled(self.factors[: len(rows)])
            elif step == "columns":
                rows = rows.columns([n for n in self.names if n in rows.shapes])
            elif step == "first":
                rows = rows.first(min(self.cut, len(rows)))
            elif step == "at":
                rows = rows.at(self.near)
            elif step == "along":
                rows = rows.along(self.steps[: len(rows)])
            else:
                rows = rows.at_rows({n: p[: len(rows)] for n, p in self.near_rows.items()})
        return rows

    def ask(self, rows: gf.GradStack, question: str) -> Any:
        rows, asked = self.derive(rows, question), question.split(".")[-1]
        if asked == "combine":
            return rows.combine(self.weights[: len(rows)])
        if asked == "dot":
            return rows.dot({name: self.tree[name] for name in rows.shapes})
        return getattr(rows, asked)()

    def scale(self, wide: PlainRows, question: str) -> Tensor:
        """Return the magnitude that errors are relative to, for every number of the answer."""
        rows, asked = self.derive(wide, question), question.split(".")[-1]
        norms = rows.sq_norms().sqrt()
        if self.case.dtype != "float64":
            # A loss subtracts numbers of the order of one (a probability from 1), divided by the
            # number of samples: in its derivative their rounding stays, however little is left.
            norms = norms + 1 / self.case.samples
        if asked == "gram":
            return norms[:, None] * norms
        if asked == "sq_norms":
            return norms.square()
        if asked == "dot":
            trees = [self.tree[name].double().square().sum() for name in rows.shapes]
            return norms * sum(trees).sqrt()
        if asked == "combine":
            return (norms * self.weights[: len(rows)].abs()).sum()
        return norms


def _check_rows(case: Case, reference: _Reference, caught: list[Any]) -> None:
    model, criterion = case.build()
    batch = case.make_batch()
    watch = _Watch(model)
    params, buffers = gf.extract(model)
    given = {name: p.clone() for name, p in params.items()}
    loss = gf.model_loss(model, None if case.batch == "dict" else criterion)
    grads_of = (
        gf.per_sample_grads(loss, plan=case.plan)
        if case.samples == 1
        else gf.microbatch_grads(loss, case.rows, plan=case.plan)
    )
    reseed(case.seed)
    rows = grads_of(params, batch, buffers=buffers)
    _check_fallbacks(case, caught)
    by_loop = case.plan == "loop" or bool(_fallbacks(caught))
    compare = _Compare(case, reference.worst)
    arguments = Arguments(case, reference.rows)
    want, wide, answers = reference.rows, reference.wide, reference.answers
    if case.random and not by_loop:
        want = wide = _itself(rows, params)
        answers = []
        for question in case.questions:
            answer = arguments.ask(want, question)
            answers.append((answer, answer, arguments.scale(want, question)))
        if case.dtype == "float64":
            _check_slopes(case, rows, params, arguments)
    elif rows.losses is not None:
        compare("losses", rows.losses, want.losses, wide.losses, wide.losses.double().abs() + 1)
        _check_buffers(compare, rows.buffers, want.buffers, wide.buffers)
    for question, (plain, exact, scale) in zip(case.questions, answers, strict=True):
        reseed(case.seed + 99)
        states = _global_states()
        got = arguments.ask(rows, question)
        if not _same_states(states, _global_states()):
            raise Changed(f"{question} moved a global random generator")
        compare(question, got, plain, exact, scale)
        _check_fallbacks(case, caught)
    for name, value in given.items():
        if not torch.equal(value, params[name]):
            raise Changed(f"the caller's params[{name!r}]")
    watch.check(model)
    for name in case.habits:
        happened = getattr(HABITS[name], "happened", None)
        if happened and happened(reference.plain.model) and not happened(model):
            raise Wrong(f"{name}: did not happen")
    _check_stash(case, model, reference.plain.model)


def _itself(rows: gf.GradStack, params: dict[str, Tensor]) -> PlainRows:
    """Evaluate held rows of a stack at other parameters."""

    def held(stack: gf.GradStack) -> PlainRows:
        return PlainRows(stack.stacked(), stack.losses, stack.buffers, evaluate)

    def evaluate(params: Any, per_row: bool) -> PlainRows:
        if not per_row:
            return held(rows.at(params))
        count = len(next(iter(params.values())))
        return held((rows if count == len(rows) else rows.first(count)).at_rows(params))

    evaluate.incoming = params
    return held(rows)


def _check_slopes(case: Case, rows: gf.GradStack, params: Any, arguments: Arguments) -> None:
    """Check that rows of random layers are the slopes of their losses, for equal random numbers."""
    if not all(_is_differentiable(part) for part in (*case.layers, *case.habits)):
        return
    step, tree = 1e-6, arguments.tree
    ahead, behind = (
        rows.at({n: p + sign * step * tree[n] for n, p in params.items()}).losses
        for sign in (1, -1)
    )
    slope, got = (ahead - behind) / (2 * step), rows.dot(tree)
    norms = rows.sq_norms().sqrt() * sum(t.square().sum() for t in tree.values()).sqrt()
    error = ((slope - got).abs() / (norms + 1e-3)).max()
    if not error < 1e-4:
        raise Wrong(f"rows against slopes of the losses: off by {error:.1e}")


def _is_differentiable(part: str) -> bool:
    words = ("hook", "detach", "teacher", "no_grad", "asks", "data", "in forward", "stash")
    more = (
        "running",
        "buffer",
        "memory",
        "padding",
        "frequency",
        "renormed",
        "clips",
        "state_dict",
        "spectral",  # whose singular vectors move along
        "reentrant",  # which gives nothing where its input has no gradient
    )
    return not any(word in part for word in (*words, *more))


def _check_buffers(compare, got, plain, wide) -> None:
    if set(got) != set(plain):
        raise Wrong(f"buffers {sorted(set(got) ^ set(plain))}")
    for name, value in plain.items():
        if got[name].shape != value.shape or got[name].dtype != value.dtype:
            raise Wrong(f"buffer {name}: {got[name].dtype} {tuple(got[name].shape)}")
        scale = wide[name].double().abs().max() + 1 if value.numel() else 1.0
        compare(f"buffer {name}", got[name], value, wide[name], scale)


def _check_fallbacks(case: Case, caught: list[Any]) -> None:
    for reason in _fallbacks(caught):
        if any(word in reason for word in INTERNAL):
            raise Unclear(f"fallback: {reason}")
        if case.refuse in ("never", "vmap"):
            raise Unclear(f"no reason to fall back: {reason}")


class _Compare:
    """Comparison with the plain loop; in low precision, within a few times its error.

    float64: one part in 10^9 of the leaf, and one in 10^12 of the whole row. Lower precisions:
    four times the error of the plain loop in the same precision against float64, plus eps times
    the root of the width for every layer. The plain loop may be near float64 in one answer by luck,
    so the error of a leaf is at least that of its worst row, relative to the leaf: BatchNorm of two
    samples keeps the fourth digit of a gradient in some rows and the fifth in others.
    """

    def __init__(self, case: Case, worst: dict[str, float] | None = None):
        self.exact = case.dtype == "float64"
        self.worst = worst or {}
        self.eps = torch.finfo(DTYPES[case.dtype]).eps
        self.floor = 2 * self.eps * 6**0.5 * (len(case.layers) + 2)

    def __call__(self, what: str, got: Any, plain: Any, wide: Any, scale: Any) -> None:
        if isinstance(plain, dict):
            if set(got) != set(plain):
                raise Wrong(f"{what}: leaves {sorted(set(got) ^ set(plain))}")
            for name in plain:
                worst = self.worst.get(name, 0.0)
                self.one(f"{what}, {name}", got[name], plain[name], wide[name], scale, worst)
        else:
            self.one(what, got, plain, wide, scale)

    def one(
        self,
        what: str,
        got: Tensor,
        plain: Tensor,
        wide: Tensor,
        scale: Any,
        worst_row: float = 0.0,
    ) -> None:
        if got.shape != plain.shape or got.dtype != plain.dtype:
            raise Wrong(
                f"{what}: {got.dtype} {tuple(got.shape)} for {plain.dtype} {tuple(plain.shape)}"
            )
        if got.requires_grad:
            raise Wrong(f"{what}: carries a graph")
        got, plain, wide = got.double(), plain.double(), wide.double()
        scale = torch.as_tensor(scale, dtype=torch.float64)
        scale = scale.reshape([*scale.shape, *[1] * (wide.ndim - scale.ndim)])
        error = (got - wide).abs()
        if self.exact:
            bound = 1e-9 * wide.abs() + 1e-11 * scale
        else:
            own = torch.maximum((plain - wide).abs().max(), worst_row * wide.abs().max())
            bound = 4 * own + self.floor * scale
        worst = (error - bound).nan_to_num(nan=float("inf"))
        if worst.numel() and worst.max() > 0:
            size = float(error.max() / (wide.abs().max() + 1e-300))
            raise Wrong(f"{what}: off by {size:.1e}\nfound {_short(got)}\nplain {_short(wide)}")


def _short(value: Tensor) -> str:
    return str([float(f"{v:.4g}") for v in value.flatten()[:8].tolist()])


class _Watch:
    """The parts of a module that a pass must not change."""

    def __init__(self, model: torch.nn.Module):
        self.tensors = [*model.named_parameters(), *model.named_buffers()]
        self.values = [t.detach().clone() for _, t in self.tensors]
        self.flags = [t.requires_grad for _, t in self.tensors]
        self.modes = [m.training for m in model.modules()]

    def check(self, model: torch.nn.Module) -> None:
        now = [*model.named_parameters(), *model.named_buffers()]
        if [name for name, _ in now] != [name for name, _ in self.tensors]:
            raise Changed("the names of the module's tensors")
        was = zip(self.tensors, self.values, self.flags, now, strict=True)
        for (name, old), value, flag, (_, new) in was:
            if new is not old:
                raise Changed(f"{name} of the module is another object")
            if new.requires_grad != flag or new.grad is not None:
                raise Changed(f"requires_grad or grad of {name} of the module")
            if not torch.equal(new, value):
                raise Changed(f"the value of {name} of the module")
        if [m.training for m in model.modules()] != self.modes:
            raise Changed("a training mode")


def _check_stash(case: Case, model: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Check that remembered tensors are as usable as those of a plain model."""
    tries = {
        "deepcopy": copy.deepcopy,
        "torch.save": lambda module: torch.save(module, io.BytesIO()),
        "read": lambda module: [_read(t) for t in _remembered(module)],
    }
    for name, attempt in tries.items():
        try:
            attempt(plain)
        except Exception:
            continue
        try:
            attempt(model)
        except Exception as error:
            raise Changed(f"{name} of the module: {type(error).__name__}: {error}") from error


def _read(tensor: Tensor) -> float:
    repr(tensor)
    value = tensor.detach().double().sum().item()
    if value != value:
        raise ValueError("a tensor on the module is NaN")
    tensor.detach().clone().mul_(2)
    return value


def _remembered(module: torch.nn.Module) -> list[Tensor]:
    found = []

    def walk(value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict) and depth < 4:
            for item in value.values():
                walk(item, depth + 1)
        elif isinstance(value, (list, tuple)) and depth < 4:
            for item in value:
                walk(item, depth + 1)

    for m in module.modules():
        walk({k: v for k, v in vars(m).items() if not k.startswith("_")})
    return found


def _same_states(one: Any, other: Any) -> bool:
    same_numpy = all(np.array_equal(a, b) for a, b in zip(one[2], other[2], strict=True))
    return torch.equal(one[0], other[0]) and one[1] == other[1] and same_numpy


STEPS = 2


def _chain_of(case: Case) -> gf.Transform:
    return gf.chain(*(TRANSFORMS[name]() for name in case.chain))


def _plain_steps(case: Case) -> list[dict[str, Any]]:
    """Run the same chain on the rows of the plain loop, followed by torch.optim."""
    # `Filtered` runs hooks on parameters on the filtered gradient, once per step.
    training, chain = PlainTraining(case, hooks=case.host == "pure"), _chain_of(case)
    named = {n: p for n, p in training.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=0.1, momentum=0.9)
    state = chain.init({name: p.detach().clone() for name, p in named.items()})
    hooks = []
    if case.host == "Filtered":
        hooks = [h.filtered for n in case.habits if hasattr(h := HABITS[n], "filtered")]
    steps = []
    for step in range(STEPS):
        rows = training.rows(case.seed + step)
        params = {name: p.detach().clone() for name, p in named.items()}
        grads, new, out = chain.update(rows, state, params)
        if bool(torch.as_tensor(out.get("keep", True))):
            state = new
            for hook in hooks:
                grads = hook(grads)
            for name, p in named.items():
                p.grad = grads[name].detach().clone()
            optimizer.step()
        after = {name: p.detach().clone() for name, p in named.items()}
        steps.append({"params": after, "losses": rows.losses, "buffers": rows.buffers})
    return steps


def _check_chain(case: Case, reference: _Reference, caught: list[Any]) -> None:
    model, criterion = case.build()
    compare = _Compare(case)
    criterion = None if case.batch == "dict" else criterion
    run = _filtered_steps if case.host == "Filtered" else _pure_steps
    for step, (params, losses, buffers) in enumerate(run(case, model, criterion, caught)):
        if case.random and not (case.plan == "loop" or _fallbacks(caught)):
            return
        want = reference.steps[step]
        scale = 1 + max(float(p.abs().max()) for p in want["params"].values())
        compare(f"step {step}, loss", losses.mean(), want["losses"].mean(),
                want["losses"].mean(), 1.0)  # fmt: skip
        compare(f"step {step}, params", params, want["params"], want["params"], scale)
        _check_buffers(compare, buffers, want["buffers"], want["buffers"])
        _check_fallbacks(case, caught)


def _pure_steps(case: Case, model, criterion, caught):
    loss = gf.model_loss(model, criterion)
    grads_of = gf.microbatch_grads(loss, case.rows, plan=case.plan)
    update = gf.chain(_chain_of(case), gf.sgd(0.1, momentum=0.9))
    params, buffers = gf.extract(model)
    state = update.init(params)
    for step in range(STEPS):
        reseed(case.seed + step)
        rows = grads_of(params, case.make_batch(), buffers=buffers)
        params, state, _ = update(params, state, rows)
        buffers = rows.buffers
        yield params, rows.losses, buffers


def _filtered_steps(case: Case, model, criterion, caught):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    filtered = Filtered(model, criterion, _chain_of(case), optimizer, case.rows, plan=case.plan)
    for step in range(STEPS):
        reseed(case.seed + step)
        batch = case.make_batch()
        x, y = (batch, None) if case.batch == "dict" else batch
        result = filtered.step(x, y)
        named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        yield named, result.loss, {name: b.detach() for name, b in model.named_buffers()}


def shrink(case: Case, kind: str, attempts: int = 60) -> Case:
    """Find a smaller case with the same kind of failure."""
    smaller = True
    while smaller and attempts > 0:
        smaller = False
        for candidate in _smaller(case):
            attempts -= 1
            if attempts <= 0:
                break
            if run(candidate).kind == kind:
                case, smaller = candidate, True
                break
    return case


def _smaller(case: Case):
    for name in ("layers", "habits", "questions", "chain"):
        parts = getattr(case, name)
        if name == "questions" and len(parts) == 1:
            continue
        for i in range(len(parts)):
            if name == "chain" and parts[i] in REDUCING:
                continue
            yield case.without(**{name: parts[:i] + parts[i + 1 :]})
    if case.chain:
        yield case.without(chain=(), host="pure")
    if case.batch != "tuple":
        yield case.without(batch="tuple")
    if case.loss != "mse_loss":
        yield case.without(loss="mse_loss")
    if case.rows > 2:
        yield case.without(rows=2)
    if not case.training:
        yield case.without(training=True)
    if case.dtype != "float64":
        yield case.without(dtype="float64")
