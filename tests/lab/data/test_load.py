"""Data sets without files: their content, their splits, and their wrong labels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from _lab_data import CPU, everything, refused
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._load import load_data, split

# Splits


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 99),
)
def test_both_splits_are_stratified_disjoint_and_of_the_size_asked_for(sizes, part, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(labels)
    held_out = max(1, min(n - 1, round(part * n)))
    train, val = split(labels, None, held_out, seed=seed)
    assert len(val) == held_out and sorted([*train, *val]) == list(range(n))
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
    # Exact shares are not whole numbers; rounding them together to a given sum costs up to this.
    shares = held_out * np.array(sizes) / n
    off = abs(np.bincount(labels[val], minlength=len(sizes)) - shares)
    assert (off <= 1 + len(sizes) * np.array(sizes) / n).all()


def test_the_size_of_one_split_changes_nothing_for_the_other():
    labels = np.arange(100) % 7
    train, val = split(labels, 40, 10, seed=3)
    assert (split(labels, 40, 30, seed=3)[0] == train).all()
    assert (split(labels, 90, 10, seed=3)[1] == val).all()
    assert {*val} < {*split(labels, 40, 30, seed=3)[1]}
    assert (split(labels, 0.4, 0.1, seed=3)[0] == train).all()
    assert (split(labels, 40, 10, seed=4)[1] != val).any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, None), "--train-split: expected a whole number"),
        ((1.0, None), "--train-split"),
        ((1.5, None), "--train-split"),
        ((-3, None), "--train-split"),
        ((None, 0), "--val-split"),
        ((None, 0.001), "--val-split"),
        ((None, 100), "found 0 [+] 100"),
        ((60, 41), "found 60 [+] 41"),
        ((101, None), "found 101 [+] 0"),
    ],
)
def test_impossible_splits_are_refused(sizes, message):
    with pytest.raises(UsageError, match=message):
        split(np.arange(100) % 7, *sizes, seed=0)


# Digits


def test_digits_are_standardised_by_the_training_part_and_split_by_the_seed():
    data = load_data("digits", device=CPU, dtype=torch.float64)
    pixels, labels = load_digits(return_X_y=True)
    assert (len(data.train), len(data.val), len(data.test)) == (1257, 0, 540)
    assert (data.name, data.classes, data.shape) == ("digits", 10, (1, 8, 8))
    train = everything(data.train)
    assert torch.allclose(train.mean(), torch.zeros(()).double(), atol=1e-12)
    assert torch.allclose(train.std(correction=0), torch.ones(()).double())
    ids = [*data.train.ids.tolist(), *data.test.ids.tolist()]
    assert sorted(ids) == list(range(1797))
    for part in (data.train, data.test):
        raw = everything(part) * data.std + data.mean
        original = torch.from_numpy(pixels[part.ids].reshape(-1, 1, 8, 8)) / 16
        assert torch.allclose(raw, original)
        assert (part.labels.numpy() == labels[part.ids]).all()
        shares = np.bincount(part.labels) / np.bincount(labels)
        assert shares.max() - shares.min() < 0.01
    assert everything(data.val).shape == (0, 1, 8, 8)
    other = load_data("digits", data_split_seed=1, device=CPU)
    assert not torch.equal(other.test.ids, data.test.ids)


def test_validation_is_taken_from_the_training_part_and_leaves_images_as_they_are():
    whole = load_data("digits", device=CPU)
    data = load_data("digits", val_split=0.2, train_split=500, device=CPU)
    assert (len(data.train), len(data.val)) == (500, round(0.2 * 1257))
    assert torch.equal(data.test.ids, whole.test.ids) and torch.equal(data.mean, whole.mean)
    used = torch.cat([data.train.ids, data.val.ids])
    assert used.unique().numel() == len(used) and torch.isin(used, whole.train.ids).all()
    for part in (data.train, data.val):
        at = torch.searchsorted(whole.train.ids, part.ids)
        assert torch.equal(everything(part), everything(whole.train)[at])


@pytest.mark.parametrize("kind", ["symmetric", "pairflip", "class-concentrated"])
def test_only_training_labels_are_corrupted_and_the_same_wherever_they_are_asked_for(kind):
    options = {"label_noise": 0.3, "noise_type": kind, "label_seed": 5, "val_split": 100}
    data = load_data("digits", **options, device=CPU)
    assert data.train.wrong.sum() == round(0.3 * 1157)
    for part in (data.val, data.test):
        assert not part.wrong.any()
    clean = load_data("digits", val_split=100, device=CPU)
    assert torch.equal(clean.train.labels, data.train.clean)
    assert torch.equal(everything(clean.train), everything(data.train))
    # As stats asks for them: in another precision, not resident, with other images fetched.
    again = load_data("digits", **options, device=CPU, dtype=torch.float64, resident=False)
    assert torch.equal(again.train.labels, data.train.labels)
    other = load_data("digits", **options | {"label_seed": 6}, device=CPU)
    assert not torch.equal(other.train.labels, data.train.labels)
    assert torch.equal(other.train.ids, data.train.ids)


# Synthetic


@pytest.mark.parametrize("kind", ["uniform", "normal", "hypersphere"])
def test_synthetic_images_are_what_their_name_says(kind):
    data = load_data(f"synthetic-{kind}", device=CPU, dtype=torch.float64)
    assert (len(data.train), len(data.test), data.shape) == (1000, 200, (3, 32, 32))
    images = everything(data.train).flatten(1)
    assert abs(images.mean()) < 0.01 and abs(images.std() - 1) < 0.01
    lengths = images.norm(dim=1)
    if kind == "hypersphere":
        assert torch.allclose(lengths, torch.full_like(lengths, 3072**0.5))
    else:
        assert lengths.std() > 0.1
    assert (images.max() < 3**0.5 + 1e-6) == (kind == "uniform")
    assert not data.augmentable
    # No rounding to bytes: hardly a value appears twice.
    assert images.unique().numel() == images.numel()
    assert (torch.bincount(data.train.labels) == 100).all()
    assert not torch.equal(data.train.labels, torch.arange(1000) % 10)
    assert not set(everything(data.test)[:, 0, 0, 0].tolist()) & set(images[:, 0].tolist())
    single = load_data(f"synthetic-{kind}", device=CPU)
    assert torch.allclose(everything(single.train).double().flatten(1), images, atol=1e-5)
    assert single.mean.dtype == everything(single.train).dtype == torch.float32


def test_synthetic_alone_is_uniform_and_the_same_in_every_run():
    one, two = load_data("synthetic", device=CPU), load_data("synthetic-uniform", device=CPU)
    assert torch.equal(everything(one.train), everything(two.train))
    normal = load_data("synthetic-normal", device=CPU)
    assert not torch.equal(normal.train.labels, one.train.labels)


# Names


def test_unknown_names_and_bad_values_are_refused():
    refused("--data: expected one of digits, cifar10, .*, found 'mnist'", "mnist")
    refused("found 'digits:here'", "digits:here")
    refused("--label-noise", "digits", label_noise=1.5)
    refused("--label-noise", "cifar100", label_noise=1.5)  # before the data set is looked for
    refused("--data-split-seed", "digits", data_split_seed=-1)
    refused("--label-seed", "digits", label_seed=-1)
