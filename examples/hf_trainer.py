"""Train a model of Hugging Face transformers with filtered gradients.

    python examples/hf_trainer.py

`FilteredTrainer` is a `Trainer` with a chain: it takes `transforms` and `microbatches` in addition,
and computes one gradient per microbatch. Arguments, scheduler, evaluation, callbacks and
checkpoints are those of the `Trainer`. The data are sequences of numbers of two kinds, some with
wrong labels. Replace `sequences()` by your tokenized
data and the model by `AutoModelForSequenceClassification.from_pretrained(...)`. Needs transformers
(`pip install "gradfilter[interop]"`).
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import gradfilter as gf
from gradfilter.interop import FilteredTrainer

WORDS, LENGTH, CLASSES = 16, 12, 2


def sequences(count: int, wrong: float, seed: int) -> list[dict[str, Any]]:
    """Return sequences and their class, the half of the words that most of theirs are from."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    typical = torch.rand(count, LENGTH, generator=generator) < 0.75
    halves = torch.where(typical, labels[:, None], 1 - labels[:, None])
    words = halves * (WORDS // 2) + torch.randint(WORDS // 2, (count, LENGTH), generator=generator)
    flipped = (torch.rand(count, generator=generator) < wrong).long()
    return [
        {"input_ids": w, "labels": y}
        for w, y in zip(words, (labels + flipped) % CLASSES, strict=True)
    ]


def accuracy(predictions: EvalPrediction) -> dict[str, float]:
    """Return the fraction of sequences whose class is predicted."""
    right = predictions.predictions.argmax(-1) == predictions.label_ids
    return {"accuracy": float(right.mean())}


class Printer(TrainerCallback):
    """Print a line per evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the last numbers of the training and of the evaluation."""
        if not state.is_world_process_zero:
            return
        found = {key: value for entry in state.log_history for key, value in entry.items()}
        print(
            f"epoch {round(found['epoch'])}: loss {found['loss']:.4f}, eval accuracy "
            f"{found['eval_accuracy']:.4f}, accepted {found['agree_filter/accepted']:.4f}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate, and keep a checkpoint per epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--wrong", type=float, default=0.1, help="fraction of wrong labels")
    parser.add_argument("--threshold", type=float, default=0.97, help="largest accepted 1 - cosine")
    parser.add_argument("--out", default="runs/hf", help="folder for the checkpoints")
    args = parser.parse_args(argv)

    set_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
    )
    trainer = FilteredTrainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            args.out,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            per_device_train_batch_size=64,
            dataloader_drop_last=True,  # every batch has four microbatches of one size
            logging_strategy="epoch",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=sequences(args.samples, args.wrong, seed=1),
        eval_dataset=sequences(512, 0.0, seed=2),
        compute_metrics=accuracy,
        callbacks=[Printer()],
        transforms=gf.agree_filter(args.threshold),
        microbatches=4,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    main()
