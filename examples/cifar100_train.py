"""Train ResNet18 on CIFAR-100 with one call of `train_GAF`.

    python examples/cifar100_train.py

It has the settings of `2_cifar_100_trainer.py`, published with gradient agreement filtering, as
flags with the same names and defaults (there they are constants), except `--wandb`, which is off.
`--dummy True` trains on small images without a download. Needs torchvision
(`pip install "gradfilter[lab]"`), and the package wandb for `--wandb True`. Copy `_cifar.py` too.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torchvision import models

from _cifar import add_flags, load
from gradfilter.interop import train_GAF

DEFAULTS = {
    **{"epochs": 100, "batch_size": 128, "num_batches_to_force_agreement": 2},
    **{"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.01, "cos_distance_thresh": 0.98},
    **{"wandb": False, "verbose": True},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the result of every epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, {**DEFAULTS, "dummy": False})
    args = parser.parse_args(argv)
    if args.wandb:
        import wandb

        wandb.init(project="gradfilter", name="cifar100_train", config=vars(args))
    torch.manual_seed(0)
    data, labels, test = load(args.dummy, augment=False)
    model = models.resnet18(num_classes=max(labels) + 1)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=True,
    )
    train_GAF(
        model,
        args,  # epochs, batch_size (of a microbatch) and num_batches_to_force_agreement
        data,
        test,
        optimizer,
        nn.CrossEntropyLoss(),
        cos_distance_thresh=args.cos_distance_thresh,
        wandb=args.wandb,
        verbose=args.verbose,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )


if __name__ == "__main__":
    main()
