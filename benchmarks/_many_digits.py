"""Run many trainings on digits as one batch of matrices, so that a rule takes seconds.

The network 64-256-256-10 is written out. Norms and products of the gradients are computed from the
inputs and cotangents of each layer, as in the fused plan of the library. Before any rule is tried,
the result is compared with a training of the lab.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks._noise_rules import STEPS, Rule
from benchmarks._noise_runs import CPU, Task, build_run
from gradfilter.lab.data._batches import class_balanced
from gradfilter.lab.data._load import load_data
from gradfilter.lab.models._build import build_model
from gradfilter.lab.train._training import advance

EVALUATIONS = 30
MOMENTUM = 0.9


@dataclass(frozen=True)
class Runs:
    """R trainings before the first step, each with its own noise and seed.

    Attributes:
        images: (R, N, 64).
        labels: (R, N), some of which are wrong.
        clean: (R, N).
        test_images: (R, T, 64).
        test_labels: (R, T).
        batches: (R, steps, M), the indices of the samples.
        weights: Weight and bias of every layer, (R, ...).
    """

    images: Tensor
    labels: Tensor
    clean: Tensor
    test_images: Tensor
    test_labels: Tensor
    batches: Tensor
    weights: list[Tensor]


@dataclass(frozen=True)
class Batch:
    """The arguments of a rule: M rows in each of R trainings.

    Attributes:
        layers: The inputs and the cotangents of each layer, (R, M, width).
        own: The probability that the network gives each row's label, (R, M).
        labels: (R, M).
        memory: Values that the rule keeps between steps.
    """

    layers: list[tuple[Tensor, Tensor]]
    own: Tensor
    labels: Tensor
    memory: dict[str, Tensor]

    @cached_property
    def gram(self) -> Tensor:
        """The inner products of all rows, (R, M, M)."""
        return torch.stack([(h @ h.mT + 1) * (g @ g.mT) for h, g in self.layers]).sum(0)

    @cached_property
    def norms(self) -> Tensor:
        """The norms of all rows, (R, M)."""
        parts = [(h.square().sum(-1) + 1) * g.square().sum(-1) for h, g in self.layers]
        return torch.stack(parts).sum(0).sqrt().clamp(min=1e-12)

    @cached_property
    def unit_gram(self) -> Tensor:
        """The inner products of all unit rows, (R, M, M)."""
        return self.gram / self.norms[:, :, None] / self.norms[:, None]

    @cached_property
    def cosines(self) -> Tensor:
        """The cosine of each row with the sum of the other unit rows, (R, M)."""
        sums = self.unit_gram.sum(-1)
        others = sums.sum(-1, keepdim=True) - 2 * sums + 1
        return (sums - 1) / others.clamp(min=1e-6).sqrt()


Weigh = Callable[[Batch], Tensor]
"""Compute the weights (R, M) of the rows in the gradient."""


@dataclass(frozen=True)
class Tried:
    """A rule and the hyperparameters of its training.

    Attributes:
        name: The name of the rule.
        weigh: The rule.
        lr: The learning rate.
        average: The decay of the averaged parameters; 0 measures the last parameters.
        weight_decay: The L2 weight decay.
        cosine: Whether the learning rate falls to 0 along a cosine.
    """

    name: str
    weigh: Weigh
    lr: float = 0.05
    average: float = 0.0
    weight_decay: float = 0.0
    cosine: bool = False


def load(noises: tuple[float, ...], seeds: tuple[int, ...], steps: int = STEPS) -> Runs:
    """Load the data for every noise with every seed, in this order."""
    columns: dict[str, list[Tensor]] = {}
    weights = []
    for noise in noises:
        for seed in seeds:
            data = load_data(
                "digits", data_split_seed=seed, label_noise=noise, label_seed=seed, device=CPU
            )
            batches = class_balanced(
                data.train.labels, classes=10, microbatches=1, per_class=8, seed=seed
            )
            found = {
                "images": data.train.images.fetch(torch.arange(len(data.train))).flatten(1),
                "labels": data.train.labels,
                "clean": data.train.clean,
                "test_images": data.test.images.fetch(torch.arange(len(data.test))).flatten(1),
                "test_labels": data.test.labels,
                "batches": batches(0, steps).flatten(1),
            }
            for name, value in found.items():
                columns.setdefault(name, []).append(value)
            model = build_model("mlp_256", classes=10, shape=(1, 8, 8), seed=seed)
            weights.append([parameter.detach() for parameter in model.parameters()])
    stacked = {name: torch.stack(column) for name, column in columns.items()}
    return Runs(**stacked, weights=[torch.stack(leaf) for leaf in zip(*weights, strict=True)])


def outputs(weights: list[Tensor], images: Tensor) -> list[Tensor]:
    """Compute the inputs of the three layers, and the logits."""
    values = [images]
    for i in (0, 2, 4):
        linear = torch.baddbmm(weights[i + 1][:, None], values[-1], weights[i].mT)
        values.append(linear.relu() if i < 4 else linear)
    return values


def train(runs: Runs, tried: Tried) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train; return the last weights, and final, best and memorised of each training (R,)."""
    weights = [leaf.clone() for leaf in runs.weights]
    velocity = [torch.zeros_like(leaf) for leaf in weights]
    averaged = [leaf.clone() for leaf in weights]
    memory: dict[str, Tensor] = {}
    which = torch.arange(len(runs.labels))[:, None]
    best, steps = torch.zeros(len(runs.labels)), runs.batches.shape[1]
    measured = averaged if tried.average else weights
    for step in range(steps):
        picked = runs.batches[:, step]
        labels = runs.labels[which, picked]
        *inputs, logits = outputs(weights, runs.images[which, picked])
        probability = logits.softmax(-1)
        cotangent = probability - torch.nn.functional.one_hot(labels, 10)
        layers = [(inputs[2], cotangent)]
        for i in (1, 0):
            cotangent = (cotangent @ weights[2 * i + 2]) * (inputs[i + 1] > 0)
            layers.insert(0, (inputs[i], cotangent))
        own = probability.gather(2, labels[..., None])[..., 0]
        share = tried.weigh(Batch(layers, own, labels, memory))[..., None]
        rate = tried.lr * (0.5 + 0.5 * math.cos(math.pi * step / steps) if tried.cosine else 1)
        for i, (h, g) in enumerate(layers):
            for j, gradient in ((2 * i, (g * share).mT @ h), (2 * i + 1, (g * share).sum(1))):
                velocity[j].mul_(MOMENTUM).add_(gradient + tried.weight_decay * weights[j])
                weights[j].sub_(rate * velocity[j])
        if tried.average:
            for leaf, new in zip(averaged, weights, strict=True):
                leaf.lerp_(new, 1 - tried.average)
        if (step + 1) % max(1, steps // EVALUATIONS) == 0:
            best = torch.maximum(best, accuracy(measured, runs.test_images, runs.test_labels))
    wrong = runs.labels != runs.clean
    answers = outputs(measured, runs.images)[-1].argmax(-1)
    return measured, {
        "final": accuracy(measured, runs.test_images, runs.test_labels),
        "best": best,
        "memorised": ((answers == runs.labels) & wrong).sum(1) / wrong.sum(1),
    }


def accuracy(weights: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of images that get these labels, (R,)."""
    return (outputs(weights, images)[-1].argmax(-1) == labels).float().mean(1)


def check_against_the_lab(tried: Tried, rule: Rule, steps: int = 30) -> None:
    """Check that the lab reaches the same parameters; otherwise the search has no meaning."""
    run = build_run(rule, Task(rule.name, tried.lr, 0.3, 0, False))
    advance(run, steps)
    ours, _ = train(load((0.3,), (0,), steps), tried)
    for leaf, theirs in zip(ours, run.state["params"].values(), strict=True):
        torch.testing.assert_close(leaf[0], theirs, rtol=1e-3, atol=1e-4)
