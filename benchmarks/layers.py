"""Measure layers for which torch.func.vmap alone would be slower than a loop over rows.

Each model is one such layer or loss: bags of embeddings, recurrent cells, products with a bare
parameter, and losses without a rule for vmap. The benchmark measures rows, agreement filter and
weighted sum with each plan; the base is one plain forward and backward pass. No warning of torch
about vmap may reach a user of plan "auto": one fails the contender.

    python benchmarks/layers.py
"""

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Without this the memory profiler prints a line at every start. torch reads it when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

if not __package__:  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradfilter as gf
from benchmarks._command import caption, facts, parser, rounds_of
from benchmarks._race import race
from benchmarks._report import by_contender
from benchmarks._results import Contest, Workload, save
from benchmarks._setting import THRESHOLD
from benchmarks._timing import Contender

NAME = Path(__file__).stem
UNITS, LENGTH, WIDTH, CLASSES, STEPS = 5000, 20, 256, 10, 8
ROWS, FEW = 32, 4  # the second with --quick

Criterion = Callable[[Tensor, Tensor], Tensor]
Maker = Callable[[int], Tensor]


class Bag(nn.Module):
    """A bag of tokens and a linear layer."""

    def __init__(self, *, by_offsets: bool = False) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(UNITS, 64), nn.Linear(64, CLASSES)
        self.by_offsets = by_offsets

    def forward(self, tokens: Tensor) -> Tensor:
        bags: tuple[Tensor, Tensor | None] = tokens, None
        if self.by_offsets:
            starts = torch.arange(0, tokens.numel(), LENGTH, device=tokens.device)
            bags = tokens.flatten(), starts
        found: Tensor = self.out(self.bag(*bags))
        return found


class Unrolled(nn.Module):
    """A recurrent cell over a sequence."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = cell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        last: Tensor = state[0] if isinstance(state, tuple) else state
        return last


class Product(nn.Module):
    """A product of the input with a bare parameter."""

    def __init__(self, run: Callable[..., Tensor], *, bias: bool = False) -> None:
        super().__init__()
        self.run = run
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.zeros(WIDTH)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.run(x, self.weight) if self.bias is None else self.run(x, self.weight, self.bias)
        )


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the layer of GPT-2 that is called Conv1D."""
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(x.shape)


def mean_square(output: Tensor, _: Tensor) -> Tensor:
    return output.square().mean()


def divergence(output: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(labels, output.shape[-1]).to(output.dtype) * 0.8 + 0.2 / output.shape[-1]
    return F.kl_div(output.log_softmax(-1), target, reduction="batchmean")


def tokens(count: int) -> Tensor:
    return torch.randint(UNITS, (count, LENGTH))


def vectors(count: int) -> Tensor:
    return torch.randn(count, WIDTH)


def sequences(count: int) -> Tensor:
    return torch.randn(count, STEPS, WIDTH)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


@dataclass(frozen=True)
class Layer:
    """A model, its inputs and its loss."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Maker
    criterion: Criterion


LAYERS = {
    "linear": Layer("Linear", lambda: nn.Linear(WIDTH, WIDTH), sequences, mean_square),
    "bag": Layer("EmbeddingBag", Bag, tokens, F.cross_entropy),
    "offsets": Layer(
        "EmbeddingBag, offsets", lambda: Bag(by_offsets=True), tokens, F.cross_entropy
    ),
    "rnn": Layer("RNNCell", lambda: Unrolled(nn.RNNCell), sequences, mean_square),
    "gru": Layer("GRUCell", lambda: Unrolled(nn.GRUCell), sequences, mean_square),
    "lstm": Layer("LSTMCell", lambda: Unrolled(nn.LSTMCell), sequences, mean_square),
    "addmm": Layer("addmm", lambda: Product(conv1d, bias=True), sequences, mean_square),
    "matmul": Layer("x @ w", lambda: Product(torch.matmul), sequences, mean_square),
    "kl_div": Layer("kl_div", classifier, vectors, divergence),
    "multi_margin": Layer("multi_margin_loss", classifier, vectors, F.multi_margin_loss),
}


def contenders(layer: Layer, count: int, device: torch.device) -> tuple[int, dict[str, Contender]]:
    """Return the number of parameters; a plain pass, and the rows with each plan."""
    torch.manual_seed(0)
    model = layer.build().to(device)
    batch = layer.inputs(count).to(device), torch.randint(CLASSES, (count,)).to(device)
    params, buffers = gf.extract(model)
    filter_ = gf.agree_filter(THRESHOLD)
    state = filter_.init(params)

    def plain() -> None:
        torch.autograd.grad(layer.criterion(model(batch[0]), batch[1]), [*model.parameters()])

    def planned(plan: gf.Plan) -> Contender:
        grads_of = gf.microbatch_grads(gf.model_loss(model, layer.criterion), count, plan=plan)

        def run() -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "There is a performance drop")
                filter_.update(grads_of(params, batch, buffers=buffers), state, params)

        return run

    parameters = sum(p.numel() for p in model.parameters())
    plans: dict[str, gf.Plan] = {"loop": "loop", "fused": "auto"}
    return parameters, {
        "plain": plain,
        **{name: planned(plan) for name, plan in plans.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, LAYERS, rounds=10).parse_args(arguments)
    device = torch.device(options.device)
    count = FEW if options.quick else ROWS
    workloads: list[Contest] = []
    for name in track(options.models, "Measuring", console=Console(stderr=True)):
        parameters, entrants = contenders(LAYERS[name], count, device)
        results, _ = race(entrants, rounds_of(options), device, base="plain")
        workloads.append(
            Workload(
                model=name,
                title=LAYERS[name].title,
                parameters=parameters,
                results=results,
                microbatches=count,
                samples_per_microbatch=1,
            )
        )
    head = facts(NAME, options)
    save(options.out / f"{NAME}-{device.type}.json", head, workloads)
    by_contender(workloads, caption(head))


if __name__ == "__main__":
    main()
