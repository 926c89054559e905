"""Helpers for tests of data sets."""

import pytest
import torch

from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._load import load_data

CPU = torch.device("cpu")


def everything(samples):
    """Return all images, normalised."""
    return samples.images.fetch(torch.arange(len(samples)))


def refused(message, *args, **kwargs):
    with pytest.raises(UsageError, match=message) as caught:
        load_data(*args, **kwargs, device=CPU)
    assert "\n" not in str(caught.value)
