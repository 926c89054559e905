"""What training arguments have to be for filtered gradients, in errors that say what to do."""

from __future__ import annotations

from typing import Any


def check_arguments(args: Any) -> None:
    """Refuse arguments under which gradients would not be filtered, or not rightly.

    Args:
        args: Of type `transformers.TrainingArguments`.

    Raises:
        ValueError: Several devices, loss scaling, or an optimizer inside the backward pass.
    """
    if (devices := max(args.world_size, args.n_gpu)) > 1:
        raise ValueError(
            f"FilteredTrainer: expected one device, found {devices}, which would not see each "
            "other's rows. Make one visible, with CUDA_VISIBLE_DEVICES=0, and start one process."
        )
    if args.fp16:
        raise ValueError(
            "FilteredTrainer: expected full precision or bf16, found fp16=True, whose scaler "
            "wants to scale the losses itself. Use bf16=True."
        )
    if "lomo" in str(args.optim).lower():
        raise ValueError(
            f"FilteredTrainer: expected an optimizer that takes gradients, found {args.optim}, "
            "which steps inside the backward pass, unfiltered. Use another one."
        )
