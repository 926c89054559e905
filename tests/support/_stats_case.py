"""A small network on random images, as a restored checkpoint without a training."""

from pathlib import Path

import torch
from torch import nn

from gradfilter.lab.data._samples import Data, Images, Normalise, Samples
from gradfilter.lab.train._archive import Checkpoint
from gradfilter.lab.train._restore import Restored
from gradfilter.lab.train._train_config import TrainConfig

CLASSES, CHANNELS, SIDE = 5, 3, 4


def network(activation=nn.Tanh):
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(CHANNELS, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        activation(),
        nn.Flatten(),
        nn.Linear(6 * SIDE * SIDE, CLASSES),
    ).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 3)
    return model.eval()


def samples(n, first_id=100):
    generator = torch.Generator().manual_seed(n)
    mean = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)[:, None, None]
    raw = torch.rand((n, CHANNELS, SIDE, SIDE), generator=generator, dtype=torch.float64)
    clean = torch.arange(n) % CLASSES
    labels = clean.clone()
    labels[::3] = (labels[::3] + 1) % CLASSES
    images = Images(raw, Normalise(1.0, mean, std), resident=True)
    return Samples(images, labels, clean, torch.arange(n) * 7 + first_id), mean, std


def restored(model=None, n=10, checkpoint=2):
    train, mean, std = samples(n)
    test, *_ = samples(4)
    nothing = Samples(train.images, *(t[:0] for t in (train.labels, train.clean, train.ids)))
    data = Data("random", CLASSES, (CHANNELS, SIDE, SIDE), train, nothing, test, mean, std, False)
    return Restored(
        network() if model is None else model,
        data,
        TrainConfig(data="synthetic-uniform", model="none", label_noise=0.3),
        Checkpoint(checkpoint, 80 * checkpoint, 5.0 * checkpoint),
        Path("nowhere"),
    )
