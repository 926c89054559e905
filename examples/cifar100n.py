"""Train ResNet34 on CIFAR-100 with the labels that people gave (CIFAR-100N Fine).

    python examples/cifar100n.py --cifarn_noisy_data_file_path CIFAR-100_human.pt --momentum 0.9 \
        --optimizer "SGD+Nesterov+val_plateau" --cos_distance_thresh 0.97

It has the flags and defaults of `3_cifar_100N_Fine_train_loop_exposed.py`, published with gradient
agreement filtering, and the loop of `cifar100_step.py`. The file of labels is that of
https://github.com/UCSC-REAL/cifar-10-100n; it is read without executing code. Unlike there,
`--cifarn False` and `--dummy False` mean False. Copy `_cifar.py` and `cifar100_step.py` too. Needs
torchvision (`pip install "gradfilter[lab]"`), and the package wandb for `--wandb True`.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torchvision import models

from _cifar import add_flags, load, published_flags
from cifar100_step import train


def human_labels(path: str) -> list[int]:
    """Return the labels of a file that may hold tensors and arrays of integers, nothing else."""
    rebuild = np.zeros(0).__reduce__()[0]  # what NumPy writes, under its old and new name
    names = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*names, np.ndarray, np.dtype, type(np.dtype("int64"))]):
        return torch.load(path, weights_only=True)["noisy_label"].tolist()


def network(classes: int) -> nn.Module:
    """Return the ResNet34 for images of 32 pixels: no stride and no pooling before the blocks."""
    model = models.resnet34(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Train on CIFAR-100N."""
    parser = published_flags(__doc__.splitlines()[0])
    add_flags(parser, {"cifarn": True})
    parser.add_argument("--cifarn_noisy_data_file_path", default="./examples/CIFAR-100_human.pt")
    args = parser.parse_args(argv)
    random.seed(0)
    torch.manual_seed(0)
    data, labels, test = load(args.dummy)
    classes = max(labels) + 1
    if args.cifarn and not args.dummy:
        labels = human_labels(args.cifarn_noisy_data_file_path)
    train(args, network(classes), data, labels, test, "cifar100n")


if __name__ == "__main__":
    main()
