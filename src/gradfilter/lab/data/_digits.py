"""scikit-learn's digits: 1797 images of 8 x 8 pixels, bundled, no download."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from gradfilter.lab.data._origin import Origin, Part
from gradfilter.lab.data._random import random_for

FULL = 16
TEST_FRACTION = 0.3


def digits(seed: int) -> Origin:
    """A stratified 70/30 split by ``seed``, standardised with one mean and one deviation.

    Both are those of all pixels of the training part, before validation samples are taken from it,
    so that images do not change with the size of the validation split.
    """
    pixels, labels = load_digits(return_X_y=True)
    ids = train_test_split(
        np.arange(len(labels)),
        test_size=TEST_FRACTION,
        stratify=labels,
        random_state=int(random_for(seed, "split").integers(2**31)),
    )
    raw = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 8, 8)
    train, test = (Part(raw, labels.astype(np.int64), np.arange(len(raw))).take(i) for i in ids)
    seen = pixels[train.ids] / FULL
    return Origin(
        "digits", 10, train, None, test, FULL, [seen.mean()], [seen.std()], augmentable=False
    )
