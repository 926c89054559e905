"""Random cases: a module, a loss, a batch, a plan, a chain and questions, all named.

A case is data: its `repr` is a program that makes it again. A case becomes smaller when parts are
removed from its tuples.
"""

import random
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from _random_habits import HABITS
from _random_layers import LAYERS, SHAPES, VOCABULARY, Between, LayerKind

CLASSES = 3

# Losses of logits (B, 3) and labels (B,); -100 among the labels only where it is understood.


def one_hot(y, like):
    return (y[:, None] == torch.arange(CLASSES)).to(like.dtype)


def ramp(like):
    return torch.arange(1, CLASSES + 1, dtype=like.dtype)


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "weighted cross_entropy": lambda o, y: F.cross_entropy(o, y, weight=ramp(o)),
    "smoothed cross_entropy": lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    "summed cross_entropy": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "cross_entropy ignoring a class": lambda o, y: F.cross_entropy(o, y, ignore_index=2),
    "cross_entropy of probabilities": lambda o, y: F.cross_entropy(o, one_hot(y, o) * 0.7 + 0.1),
    "nll_loss": lambda o, y: F.nll_loss(o.log_softmax(1), y),
    "mse_loss": lambda o, y: F.mse_loss(o, one_hot(y, o)),
    "huber_loss": lambda o, y: F.huber_loss(o, one_hot(y, o), delta=0.5),
    "smooth_l1_loss": lambda o, y: F.smooth_l1_loss(o, one_hot(y, o)),
    "bce": lambda o, y: F.binary_cross_entropy_with_logits(o, one_hot(y, o)),
    "kl_div": lambda o, y: F.kl_div(
        o.log_softmax(1), one_hot(y, o) * 0.7 + 0.1, reduction="batchmean"
    ),
    "hinge": lambda o, y: (1 - o.gather(1, y[:, None]) + o).relu().square().mean(),
    "focal": lambda o, y: _focal(o, y),
    "cosine": lambda o, y: (1 - F.cosine_similarity(o, one_hot(y, o) + 0.1)).mean(),
    "logsumexp": lambda o, y: (o.logsumexp(1) - o[torch.arange(len(y)), y]).mean(),
    "contrastive": lambda o, y: F.cross_entropy(o @ o.T + 0.1 * o.sum(), torch.arange(len(y))),
    "wavy": lambda o, y: (o.tanh() * torch.cos(ramp(o) + y[:, None])).sum(1).mean(),
}


def _focal(o, y):
    p = o.softmax(1).gather(1, y[:, None])
    return (-((1 - p) ** 2) * p.log()).mean()


SMOOTH_LOSSES = [name for name in LOSSES if name not in ("cosine", "hinge")]
BATCHES = ("tuple", "several inputs", "keywords", "dict", "dataclass", "object", "list")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Samples:
    """A batch of a class that pytree knows."""

    x: torch.Tensor
    scale: torch.Tensor


torch.utils._pytree.register_pytree_node(
    Samples, lambda s: ([s.x, s.scale], None), lambda parts, _: Samples(*parts)
)


class Unknown:
    """A batch of a class that pytree does not know."""

    def __init__(self, x, scale):
        self.x, self.scale = x, scale


class RandomModel(nn.Module):
    """Layers and habits.

    They are handed over, not looked up by name: what the code of a loss refers to is watched in
    every pass, and the table of all habits is large.
    """

    def __init__(self, kind, layers, habits, criterion):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(6, CLASSES)
        self.kind, self.habits, self.own_criterion = kind, habits, criterion
        self.probe = inputs(kind, 2, torch.Generator().manual_seed(7))
        for habit in habits:
            if hasattr(habit, "install"):
                habit.install(self)

    def once_more(self):
        """Return the logits of a constant input, without the habits."""
        probe = self.probe
        if probe.is_floating_point():
            probe = probe.to(self.head.weight.dtype)
        return self.run(probe)

    def run(self, x, stages=False):
        for layer in self.layers:
            x = layer(x)
        if stages:
            x = self.stage("middle", x)
        x = self.head(x)
        return self.stage("exit", x) if stages else x

    def stage(self, name, value):
        for habit in self.habits:
            if hasattr(habit, name):
                value = getattr(habit, name)(self, value)
        return value

    def forward(self, x, scale=None, labels=None):
        if isinstance(x, (Samples, Unknown)):
            x, scale = x.x, x.scale
        output = self.run(self.stage("entry", x), stages=True)
        if scale is not None:
            output = output * scale[:, None]
        if labels is None:
            return output
        return type("Output", (), {"loss": self.own_criterion[0](output, labels)})()


class Criterion:
    """A loss with the terms of the model's habits."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, output, y):
        value = self.loss(output, y)
        for habit in self.model[0].habits:
            if hasattr(habit, "criterion"):
                value = value + habit.criterion(self.model[0], output, y)
        return value


def inputs(kind, count, generator):
    if kind == "tokens":
        return torch.randint(0, VOCABULARY, (count, *SHAPES[kind]), generator=generator)
    return torch.randn(count, *SHAPES[kind], generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """All parts of one random case, by name.

    Args:
        seed: The seed of the weights, the batch and the arguments of the questions.
        layers: Names in `LAYERS`, put together in this order.
        habits: Names in `HABITS`.
        loss: A name in `LOSSES`.
        batch: A name in `BATCHES`.
        rows: M.
        samples: B, samples per row.
        plan: As in `gf.microbatch_grads`.
        dtype: A name in `DTYPES`.
        questions: Names of `_random_check.QUESTIONS`, behind "scaled.", "columns.", "first.",
            "at.", "at_rows." or "along." in any number.
        chain: Names in `_random_check.TRANSFORMS`, or none.
        host: "pure", or "Filtered": the same chain around a torch.optim optimizer.
        training: The mode of the model.
    """

    seed: int
    layers: tuple[str, ...] = ()
    habits: tuple[str, ...] = ()
    loss: str = "cross_entropy"
    batch: str = "tuple"
    rows: int = 3
    samples: int = 2
    plan: str = "auto"
    dtype: str = "float64"
    questions: tuple[str, ...] = ("stacked",)
    chain: tuple[str, ...] = ()
    host: str = "pure"
    training: bool = True

    @property
    def kind(self) -> str:
        """Return the kind of input of the first layer."""
        return LAYERS[self.layers[0]].takes if self.layers else "vector"

    @property
    def parts(self) -> list[Any]:
        """Return the entries of all names."""
        return [*(LAYERS[n] for n in self.layers), *(HABITS[n] for n in self.habits)]

    @property
    def random(self) -> bool:
        """Return whether a forward pass draws from torch's default generator."""
        return any(
            part.random == "always" or (part.random == "training" and self.training)
            for part in self.parts
        )

    @property
    def refuse(self) -> str:
        """Return the plans that may refuse the case."""
        levels = [part.refuse for part in self.parts]
        # Rows that answer the host alike draw together: what was drawn cannot be drawn elsewhere
        # for other groups of rows.
        # A second call of the model meets the running statistics that the first one has written.
        twice = any("called again" in name or "teacher" in name for name in self.habits)
        if twice and any("norm" in name or name == "channels last" for name in self.layers):
            levels.append("fused")
        if self.batch == "object" or (self.random and "fused" in levels):
            levels.append("all")
        return next((level for level in ("all", "fused", "vmap") if level in levels), "never")

    def without(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    def build(self, dtype: torch.dtype | None = None) -> tuple[RandomModel, Criterion]:
        """Build the model and its criterion, the same at every call."""
        with default_dtype(torch.float64):
            return self._build(dtype or DTYPES[self.dtype])

    def _build(self, dtype: torch.dtype) -> tuple[RandomModel, Criterion]:
        seed_default(self.seed)
        made, kind = [], self.kind
        for name in self.layers:
            entry: LayerKind = LAYERS[name]
            if entry.takes != kind:
                made.append(Between(kind, entry.takes))
            made.append(entry.make())
            kind = entry.gives
        if kind != "vector":
            made.append(Between(kind, "vector"))
        criterion = Criterion(LOSSES[self.loss])
        model = RandomModel(self.kind, made, tuple(map(HABITS.get, self.habits)), [criterion])
        criterion.model = [model]
        model.train(self.training)
        layers = [m for m in made if not isinstance(m, Between)]
        for layer, name in zip(layers, self.layers, strict=True):
            if "eval" in name or not self.training:
                layer.eval()
        with torch.no_grad():
            for p in model.parameters():
                spread = p.std(correction=0)
                p.add_(torch.randn_like(p) * torch.where(spread == 0, 0.1, 0.1 * spread))
            for name, b in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    b.add_(torch.rand_like(b))
        if dtype != torch.float64:
            # Through the case's own dtype, so that every precision starts from the same numbers.
            model.to(dtype)
        elif self.dtype != "float64":
            model.to(DTYPES[self.dtype]).double()
        return model, criterion

    def make_batch(self, dtype: torch.dtype | None = None) -> Any:
        """Make the batch of rows · samples."""
        dtype, count = dtype or DTYPES[self.dtype], self.rows * self.samples
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = inputs(self.kind, count, generator)
        scale = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
        y = torch.randint(0, CLASSES, (count,), generator=generator)
        y.view(self.rows, self.samples)[:, 0] = torch.arange(self.rows) % 2  # no row is ignored
        x, scale = (
            t.to(DTYPES[self.dtype]).to(dtype) if t.is_floating_point() else t for t in (x, scale)
        )
        if self.batch == "several inputs":
            return (x, scale), y
        if self.batch == "keywords":
            return {"x": x, "scale": scale}, y
        if self.batch == "dict":
            return {"x": x, "scale": scale, "labels": y}
        if self.batch == "dataclass":
            return Samples(x, scale), y
        if self.batch == "object":
            return Unknown(x, scale), y
        return [x, y] if self.batch == "list" else (x, y)

    def describe(self) -> str:
        """Describe the case in words, for readers of a failure."""
        model, _ = self.build()
        lines = [
            f"{self!r}",
            f"input: {self.batch} of {self.rows} x {self.samples} x {self.kind}{SHAPES[self.kind]}",
            f"model: {model}",
            *(f"habit: {name}" for name in self.habits),
        ]
        return "\n".join(lines)


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Make new tensors of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def seed_default(seed: int) -> None:
    """Seed torch's generator of the CPU.

    Without a GPU, a torch that was built for one notes every call of ``torch.manual_seed`` with its
    stack, which takes longer than a small forward pass.
    """
    torch.default_generator.manual_seed(seed)


def reseed(seed: int) -> None:
    """Set every global generator."""
    seed_default(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


PREFIXES = ("scaled.", "columns.", "first.", "at.", "at_rows.", "along.")
ELSEWHERE = PREFIXES[3:]
"""Prefixes that evaluate the rows at other parameters; a question has one of them at most."""
ASKED = ("gram", "combine", "dot", "sq_norms", "stacked")


def draw_questions(pick: random.Random, exact: bool) -> tuple[str, ...]:
    """Draw questions; only exact rows say exactly which points lie along them."""
    questions = []
    for _ in range(pick.randint(1, 4)):
        derived = pick.sample(PREFIXES, pick.choice((0, 0, 1, 1, 2)))
        if not exact and "along." in derived:
            derived.remove("along.")
        if len([prefix for prefix in derived if prefix in ELSEWHERE]) > 1:
            derived.pop()
        questions.append("".join(derived) + pick.choice(ASKED))
    return tuple(questions)


def draw(
    seed: int,
    chains: tuple[tuple[str, ...], ...] = (),
    dtypes: bool = True,
    without: Collection[str] = (),
) -> Case:
    """Draw a random case.

    Args:
        seed: Determines the case.
        chains: The chains to choose from.
        dtypes: Whether lower precisions are also drawn.
        without: Names of layers and habits that are omitted.
    """
    pick = random.Random(seed)
    dtype = (
        pick.choice(("float64",) * 5 + ("float32", "bfloat16", "float16")) if dtypes else "float64"
    )
    smooth = dtype != "float64"
    layers, kind = [], None
    for _ in range(pick.choice((0, 1, 1, 2, 2, 3))):
        fits = [
            name
            for name, entry in LAYERS.items()
            if name not in without
            and (entry.takes != "tokens" or kind is None)
            and (entry.smooth or not smooth)
        ]
        layers.append(pick.choice(fits))
        kind = LAYERS[layers[-1]].gives
    tokens = bool(layers) and LAYERS[layers[0]].takes == "tokens"
    fits = [
        name
        for name, h in HABITS.items()
        if name not in without and not (h.floats and tokens) and (h.smooth or not smooth)
    ]
    # What every plan may refuse tries little else.
    likely = [name for name in fits if HABITS[name].refuse != "all" or pick.random() < 0.4]
    habits = pick.sample(likely, pick.choice((0, 0, 1, 1, 1, 2, 3)))
    if not layers and habits:
        layers = ["linear"]  # many habits ask for a graph
    chain = pick.choice(chains) if chains and not smooth and pick.random() < 0.35 else ()
    agrees = any("agree" in name for name in chain)
    averages = any(name.startswith("batch norm") for name in layers)
    return Case(
        seed=seed,
        layers=tuple(layers),
        habits=tuple(habits),
        loss=pick.choice(SMOOTH_LOSSES if smooth else list(LOSSES)),
        batch=pick.choice(("tuple",) * 6 + BATCHES),
        rows=pick.choice((2, 3, 3, 4, 5) if agrees else (1, 2, 3, 3, 4, 5)),
        samples=pick.choice((2, 2, 3) if averages else (1, 2, 2, 3)),
        plan=pick.choice(("auto", "auto", "auto", "fused", "fused", "loop", "vmap")),
        dtype=dtype,
        questions=draw_questions(pick, not smooth),
        chain=chain,
        host=pick.choice(("pure", "Filtered")) if chain else "pure",
        training=pick.random() < 0.85,
    )
