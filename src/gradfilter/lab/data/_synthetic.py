"""Stand-ins without a pattern: images of noise, in floating point, with balanced random labels."""

from __future__ import annotations

from math import sqrt
from typing import Literal, get_args

import numpy as np
import torch

from gradfilter.lab.data._origin import Origin, Part
from gradfilter.lab.data._random import random_for

Kind = Literal["uniform", "normal", "hypersphere"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SHAPE = (3, 32, 32)
CLASSES = 10
TRAIN, TEST = 1000, 200


def synthetic(kind: Kind) -> Origin:
    """1000 training and 200 test images of 3 x 32 x 32, 10 classes; the same in every run.

    There is nothing to learn but by heart: test accuracy is chance. Normalised, every kind has
    about mean 0 and standard deviation 1 per pixel:

    | kind | raw pixels |
    |---|---|
    | uniform | U[0, 1), normalised with mean 1/2 and deviation 1/√12 |
    | normal | N(0, 1) |
    | hypersphere | uniform on the sphere of radius √3072 around 0: all images are equally long |
    """
    random = random_for(KINDS.index(kind), "images")
    n, d = TRAIN + TEST, int(np.prod(SHAPE))
    images = random.random((n, d)) if kind == "uniform" else random.standard_normal((n, d))
    if kind == "hypersphere":
        images *= sqrt(d) / np.linalg.norm(images, axis=1, keepdims=True)
    mean, std = (0.5, 1 / sqrt(12)) if kind == "uniform" else (0.0, 1.0)
    raw = torch.from_numpy(images).view(n, *SHAPE)
    labels = np.concatenate([random.permutation(np.arange(k) % CLASSES) for k in (TRAIN, TEST)])
    train, test = (
        Part(raw[part], labels[part], np.arange(len(labels[part])))
        for part in (slice(TRAIN), slice(TRAIN, n))
    )
    name = f"synthetic-{kind}"
    return Origin(name, CLASSES, train, None, test, 1, [mean] * 3, [std] * 3, augmentable=False)
