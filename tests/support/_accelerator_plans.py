"""Plans, questions of stacks and options of a step on the fake accelerator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
import gradfilter.schedules as gs
from _accelerator import DEVICE, Accelerator, ensure_there, module_moved, moved
from _accelerator_chains import Case, trained

PLANS = ("auto", "fused", "vmap", "loop")


class Flat(nn.Module):
    """A model of the tokens' states, by its classes."""

    def __init__(self, inner: nn.Module, width: int, *before: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = nn.Sequential(*before), inner
        self.out = nn.Linear(width, 3)

    def forward(self, x: Any) -> Any:
        found = self.inner(self.before(x))
        return self.out((found[0] if isinstance(found, tuple) else found).flatten(1))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": 11, "n_positions": 4, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=2, use_cache=False))


def next_token(output: Any, labels: Any) -> Any:
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def numbers(*shape: int) -> Callable[[], Any]:
    return lambda: moved((torch.randn(4, *shape), torch.randint(3, (4,))))


def words(length: int = 4, labels: tuple[int, ...] = ()) -> Callable[[], Any]:
    return lambda: moved((torch.randint(11, (4, length)), torch.randint(3, (4, *labels))))


Model = tuple[Callable[[], nn.Module], Callable[[], Any], Any]
MODELS: dict[str, Model] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
        numbers(6),
        F.cross_entropy,
    ),
    "cnn": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()), nn.Flatten(), nn.Linear(8, 3)
        ),
        numbers(1, 4, 4),
        F.cross_entropy,
    ),
    "lstm": (
        lambda: Flat(nn.LSTM(5, 3, batch_first=True), 12, nn.Embedding(11, 5, padding_idx=0)),
        words(),
        F.cross_entropy,
    ),
    "transformer": (
        lambda: Flat(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True), 12),
        numbers(3, 4),
        F.cross_entropy,
    ),
    "gpt2": (gpt2, words(4, (4,)), next_token),
    "bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(11, 4, mode="mean"), nn.Linear(4, 3)),
        words(),
        F.cross_entropy,
    ),
}


def long_chain() -> gf.Transform:
    return gf.chain(
        gf.agree_filter(1.2),
        gf.sam_perturb(0.05),
        gf.agc_clip(0.01),
        gf.sgd(gs.cosine(0.1, 20, warmup_steps=2), momentum=0.9),
        gf.ema_params(0.99),
    )


def plan_of(name: str, accelerator: Accelerator, **options: Any) -> None:
    """Train one of the models for a step."""
    make, batch, criterion = MODELS[name]
    trained(
        options.pop("chain", long_chain),
        accelerator,
        model=lambda: module_moved(make()),
        batch=batch,
        criterion=criterion,
        **{"microbatches": 2, "steps": 1, **options},
    )


# --- Options of a step ---


def sharp_rows() -> gf.Transform:
    """Return SAM along the gradient of each row."""
    return gf.chain(gf.sam_perturb(0.05, per_microbatch=True), gf.mean_rows(), gf.sgd(0.1))


def by_rows() -> gf.Transform:
    """Return a chain that can be reduced part by part."""
    return gf.chain(gf.finite_filter(), gf.clip_per_row(1.0), gf.mean_rows(), gf.sgd(0.1))


def autocast(accelerator: Accelerator, **options: Any) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        plan_of("cnn", accelerator, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "sam-of-rows mlp": {"chain": sharp_rows},
    "sam-of-rows cnn": {"chain": sharp_rows},
    "sam-of-rows lstm": {"chain": sharp_rows},
    "sam-of-rows transformer": {"chain": sharp_rows},
    "sam-of-rows bag": {"chain": sharp_rows},
    "parts-of-rows mlp": {"chain": by_rows, "microbatches": 4, "rows_at_once": 2},
    "samples mlp": {"chain": by_rows, "microbatches": None},
    "lean mlp": {"memory_budget": 0},
    "half-of-memory mlp": {"memory_budget": 1 << 30},
}


def gpt2_under_vmap(accelerator: Accelerator) -> None:
    """Train GPT-2, whose own code reads whether sequences are packed; not under "fused"."""
    make, batch, criterion = MODELS["gpt2"]
    model = module_moved(make())
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, criterion)
    with accelerator.guarded([True]):
        gf.microbatch_grads(loss, 2, plan="vmap")(params, batch(), buffers=buffers).gram()


# --- Questions of a stack ---


def questions(make: Callable[[], Any], params: Any, count: int) -> None:
    """Ask a fresh stack every question, and refuse answers on the CPU."""
    weights = torch.full((count,), 0.5, device=DEVICE)
    rows = make()
    answers = {
        "losses": rows.losses,
        "live": rows.live,
        "mean_loss": rows.mean_loss(),
        "gram": rows.gram(),
        "sq_norms": rows.sq_norms(),
        "combine": rows.combine(weights),
        "dot": rows.dot(params),
        "sum_squares": rows.sum_squares(weights),
        "scaled": rows.scaled(weights).combine(weights),
        "columns": rows.columns([*params][:1]).gram(),
        "first": make().first(1).sq_norms(),
        "along": rows.along(weights).combine(weights),
        "at": rows.at(params).gram(),
        "stacked": rows.stacked(),
        "buffers": dict(rows.buffers or {}),
    }
    for name, answer in answers.items():
        ensure_there(answer, name)


def stack_of(name: str, plan: Any, accelerator: Accelerator) -> None:
    make, batch, criterion = MODELS[name]
    model, given = module_moved(make()), batch()
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, criterion), 2, plan=plan)
    with accelerator.guarded():
        questions(lambda: grads_of(params, given, buffers=buffers), params, 2)


def rows_of_other_sizes(kind: str, plan: Any, accelerator: Accelerator) -> None:
    """Ask for rows of weighted samples, of groups of samples and of an uneven batch."""
    model = module_moved(MODELS["mlp"][0]())
    x, y = moved((torch.randn(5, 6), torch.randint(3, (5,))))
    batch = (x, y) if kind == "uneven" else (x[:4], y[:4])
    weights = moved(torch.tensor([0.5, 1.0, 0.0, 0.0, 2.0]))[: len(batch[0])]
    groups = moved(torch.tensor([1, 0, 1, 1])) if kind == "groups" else None
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, partial(F.cross_entropy, reduction="none"))
    grads_of = gf.microbatch_grads(loss, 2, plan=plan, uneven=True)
    with accelerator.guarded():
        make = partial(grads_of, params, batch, sample_weights=weights, groups=groups)
        questions(make, params, 2)


CASES: dict[str, Case] = {
    **{
        f"{kind} {plan}": partial(rows_of_other_sizes, kind, plan)
        for kind in ("weights", "groups", "uneven")
        for plan in PLANS[1:]
    },
    **{f"{name} {plan}": partial(plan_of, name, plan=plan) for name in MODELS for plan in PLANS},
    "gpt2 vmap": gpt2_under_vmap,
    **{f"{name} graph": partial(plan_of, name, compiled=True) for name in MODELS},
    **{
        f"{name}{how}": partial(plan_of, name.split()[1], **options, **more)
        for name, options in OPTIONS.items()
        for how, more in {"": {}, " graph": {"compiled": True}}.items()
    },
    "autocast cnn": autocast,
    "autocast cnn graph": partial(autocast, compiled=True),
    **{
        f"questions {name} {plan}": partial(stack_of, name, plan)
        for name in ("mlp", "cnn", "transformer")
        for plan in PLANS[1:]
    },
}
