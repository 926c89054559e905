"""Hold what the three scripts for CIFAR-100 share: flags, images, microbatches and optimizers.

The flags are those of the scripts that were published with gradient agreement filtering. With
`--dummy True` there are small images of four classes, which need no download.
"""

import argparse
import random
from ast import literal_eval
from math import ceil

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import CIFAR100

OPTIMIZERS = ["SGD", "SGD+Nesterov", "SGD+Nesterov+val_plateau", "Adam", "AdamW", "RMSProp"]
DEFAULTS = {
    **{"GAF": True, "num_batches_to_force_agreement": 2, "num_samples_per_class_per_batch": 1},
    **{"cos_distance_thresh": 1.0, "label_error_percentage": 0.0, "batch_size": 128},
    **{"epochs": 10000, "num_val_epochs": 2, "learning_rate": 0.01, "weight_decay": 0.01},
    **{"momentum": 0.0, "nesterov": False, "eps": 1e-8, "alpha": 0.99, "centered": False},
    **{"scheduler_patience": 100, "scheduler_factor": 0.1, "wandb": False, "verbose": False},
}
Data = Dataset[tuple[Tensor, int]]


def add_flags(parser: argparse.ArgumentParser, defaults: dict[str, bool | int | float]) -> None:
    """Add a flag per default; booleans are written as True or False."""
    for name, default in defaults.items():
        kind = literal_eval if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default: {default}")


def published_flags(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of the first script, and `--dummy`."""
    parser = argparse.ArgumentParser(description=description)
    add_flags(parser, {**DEFAULTS, "dummy": False})
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="SGD")
    return parser


def load(dummy: bool, augment: bool = True) -> tuple[Data, list[int], Data]:
    """Return the training data, their labels, and the test data."""
    if dummy:  # the class is the brightness
        labels = torch.arange(60) % 4
        images = torch.randn(60, 3, 8, 8) + labels.view(-1, 1, 1, 1)
        data = TensorDataset(images, labels)
        return Subset(data, range(40)), labels[:40].tolist(), Subset(data, range(40, 60))
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    plain = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    varied = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    change = transforms.Compose([*varied, *plain] if augment else plain)
    train = CIFAR100("data", train=True, download=True, transform=change)
    test = CIFAR100("data", train=False, download=True, transform=transforms.Compose(plain))
    return train, [*train.targets], test


def flipped(labels: list[int], fraction: float, classes: int) -> list[int]:
    """Return the labels, a fraction of them replaced by another class."""
    if not 0 <= fraction < 1:
        raise ValueError(
            f"Expected 0 <= label_error_percentage < 1, found {fraction}. Give a fraction: 0.15."
        )
    wrong = {*random.sample(range(len(labels)), int(fraction * len(labels)))}
    return [
        (y + random.randrange(1, classes)) % classes if i in wrong else y
        for i, y in enumerate(labels)
    ]


def draw(members: list[list[int]], microbatches: int, per_class: int) -> list[list[int]]:
    """Draw microbatches of indices, with as many samples of every class in each."""
    drawn: list[list[int]] = [[] for _ in range(microbatches)]
    needed = microbatches * per_class
    for own in members:
        some = random.sample(own * ceil(needed / len(own)), needed)
        for m, microbatch in enumerate(drawn):
            microbatch += some[m * per_class : (m + 1) * per_class]
    return drawn


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return the optimizer that the flags describe."""
    params, weight_decay = model.parameters(), args.weight_decay
    if args.optimizer.startswith("SGD"):
        nesterov = args.nesterov or "Nesterov" in args.optimizer
        return torch.optim.SGD(
            params, args.learning_rate, args.momentum, 0.0, weight_decay, nesterov
        )
    options = {"lr": args.learning_rate, "eps": args.eps, "weight_decay": weight_decay}
    if args.optimizer == "RMSProp":
        options |= {"alpha": args.alpha, "momentum": args.momentum, "centered": args.centered}
        return torch.optim.RMSprop(params, **options)
    adam = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[args.optimizer]
    return adam(params, betas=tuple(args.betas), **options)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, batch_size: int) -> tuple[float, float]:
    """Return the mean loss and the accuracy over the samples."""
    model.eval()
    device, total = next(model.parameters()).device, torch.zeros(2)
    for x, y in DataLoader(data, batch_size):
        logits = model(x.to(device)).cpu()
        loss = nn.functional.cross_entropy(logits, y, reduction="sum")
        total += torch.stack([loss, (logits.argmax(1) == y).sum()])
    model.train()
    return float(total[0] / len(data)), float(total[1] / len(data))
