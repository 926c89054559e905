"""Wrappers for training loops on the fake accelerator, and what waits by design.

A wait that the documentation promises is an answer: `guarded(answers=...)` gives the number, and
fails if there are more reads or fewer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _accelerator import Accelerator, ensure_there, module_moved
from _accelerator_chains import Case, samples, small
from gradfilter import interop

SGD = torch.optim.SGD
OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, centered=True),
}
NEVER_SKIPS = partial(gf.chain, gf.clip_per_row(1.0), gf.sam_perturb(0.05), gf.mean_rows())
MAY_SKIP = partial(gf.chain, gf.agree_filter(1.2), gf.agc_clip(0.01))


def grads_there(model: nn.Module) -> None:
    named = dict(model.named_parameters())
    ensure_there({name: p.grad for name, p in named.items()}, "the gradients")
    ensure_there([{name: p.detach() for name, p in named.items()}, dict(model.named_buffers())], "")


def filtered(
    accelerator: Accelerator,
    chain: Any = NEVER_SKIPS,
    optimizer: str = "sgd",
    answers: tuple[Any, ...] = (),
    accumulated: int = 0,
    **options: Any,
) -> None:
    """Run a step of `Filtered`, behind accumulated batches."""
    model = small()
    host = interop.Filtered(
        model, F.cross_entropy, chain(), OPTIMIZERS[optimizer](model.parameters()), 4, **options
    )
    batches = [samples() for _ in range(accumulated + 1)]
    with accelerator.guarded(answers):
        for batch in batches[:-1]:
            host.accumulate(*batch)
        result = host.step(*batches[-1])
    ensure_there([result.loss, result.info], "the result")
    grads_there(model)


def filtered_skips(accelerator: Accelerator) -> None:
    """Skip a step: the optimizer is not called, and the state of the chain is settled."""
    model = small()
    update = gf.chain(gf.every(2, gf.agree_filter(1.2)), gf.every(2, gf.agc_clip(0.01)))
    optimizer = SGD(model.parameters(), lr=0.1)
    host = interop.Filtered(model, F.cross_entropy, update, optimizer, 4)
    batch = samples()
    with accelerator.guarded([False]):  # in the second step no transform can skip
        results = [host.step(*batch) for _ in range(2)]
    ensure_there([result.info for result in results], "the result")


def closures(make: Any, accelerator: Accelerator, steps: int = 2) -> None:
    """Run steps of an optimizer with a closure."""
    model = small()
    optimizer = make(model)
    x, y = samples()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with accelerator.guarded():
        for _ in range(steps):
            optimizer.step(closure)
    grads_there(model)


def constant() -> Any:
    """Return a scheduler of rho as the published package has them."""
    return interop.LinearScheduler(T_max=10, max_value=0.1, min_value=0.1, init_value=0.1)


def clipped(name: str, accelerator: Accelerator) -> None:
    """Run ordinary steps of an optimizer inside AGC."""
    model = small()
    optimizer = interop.AGC(OPTIMIZERS[name](model.parameters()), 0.01)
    x, y = samples()
    with accelerator.guarded():
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    grads_there(model)


def published_step(accelerator: Accelerator) -> None:
    """Run `step_gaf`, which returns numbers: whether to keep, loss, distance, count, accuracy."""
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1)
    parts = [samples() for _ in range(3)]
    with accelerator.guarded(NUMBERS):
        interop.step_gaf(model, optimizer, F.cross_entropy, parts, device="accel")
    grads_there(model)


NUMBERS = (True, 0.5, 0.5, 2, 3.0, 4.0)


# --- Modules that read a number themselves ---


def cumulative(plan: str, reads: int, accelerator: Accelerator) -> None:
    """Train BatchNorm with momentum=None: torch divides by ``float(num_batches_tracked)``."""
    layers = nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 3)
    model = module_moved(nn.Sequential(*layers))
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 2, plan=plan)
    with accelerator.guarded([1.0] * reads):
        rows = grads_of(params, samples(), buffers=buffers)
        ensure_there([rows.gram(), rows.buffers], "the answers")


CASES: dict[str, Case] = {
    **{f"Filtered {name}": partial(filtered, optimizer=name) for name in OPTIMIZERS},
    "Filtered accumulates": partial(filtered, accumulated=2),
    "Filtered accumulates, part by part": partial(
        filtered, chain=partial(gf.chain, gf.clip_per_row(1.0), gf.mean_rows()), accumulated=2
    ),
    "Filtered graph": partial(filtered, compile="graph"),
    # "To read `keep`, it waits for the device once per step, but only for a chain that can skip."
    "Filtered that may skip, one wait": partial(filtered, chain=MAY_SKIP, answers=(True,)),
    "Filtered graph that may skip, one wait": partial(
        filtered, chain=MAY_SKIP, answers=(True,), compile="graph"
    ),
    "Filtered that skips": filtered_skips,
    "SAM": partial(closures, lambda model: interop.SAM(model.parameters(), SGD, lr=0.1)),
    "SAM adaptive, with its model": partial(
        closures,
        lambda model: interop.SAM(
            model.parameters(), SGD, adaptive=True, model=model, lr=0.1, momentum=0.9
        ),
    ),
    "GSAM": partial(
        closures,
        lambda model: interop.GSAM(
            model.parameters(), SGD(model.parameters(), lr=0.1), model, 0.4, constant()
        ),
    ),
    **{f"AGC around {name}": partial(clipped, name) for name in ("sgd", "adamw")},
    "step_gaf": published_step,
    "batch-norm-cumulative fused": partial(cumulative, "fused", 1),
    "batch-norm-cumulative loop": partial(cumulative, "loop", 2),
}
