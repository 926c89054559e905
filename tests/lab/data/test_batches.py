"""The samples of a step, and the number of steps of an epoch."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._batches import class_balanced, shuffled, steps_until
from gradfilter.lab.data._random import random_for


def test_more_draws_for_one_purpose_change_nothing_for_another():
    numbers = [random_for(3, "noise").random(4), random_for(3, "split").random(4)]
    numbers += [random_for(3, "balanced", c, r).random(4) for c in range(3) for r in range(3)]
    numbers += [random_for(4, "noise").random(4)]
    assert len({tuple(n) for n in numbers}) == len(numbers)
    random_for(3, "noise").random(100)
    np.testing.assert_array_equal(random_for(3, "split").random(4), numbers[1])


# Orders


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_every_pass_covers_everything_but_its_tail(n, batch_size, seed):
    if batch_size > n:
        with pytest.raises(UsageError, match=f"--batch-size: expected at most {n}"):
            shuffled(n, batch_size=batch_size, seed=seed)
        return
    indices, steps = shuffled(n, batch_size=batch_size, seed=seed), n // batch_size
    table = indices(0, 3 * steps)
    assert table.shape == (3 * steps, batch_size) and table.dtype == torch.int64
    for one_pass in table.split(steps):
        assert one_pass.unique().numel() == steps * batch_size
        assert one_pass.min() >= 0 and one_pass.max() < n


def test_passes_and_seeds_differ_and_no_sample_is_always_the_tail():
    indices = shuffled(10, batch_size=4, seed=0)
    table = indices(0, 80)
    assert len({tuple(row) for row in table.view(40, 8).tolist()}) == 40
    assert not torch.equal(table, shuffled(10, batch_size=4, seed=1)(0, 80))
    left_out = 40 - torch.bincount(table.flatten(), minlength=10)
    assert left_out.min() >= 1 and left_out.max() <= 20  # 8 expected


@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_microbatches_hold_every_class_alike_and_classes_go_through_their_samples(
    data, microbatches, per_class, seed
):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    labels = torch.from_numpy(
        np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    )
    classes, steps = len(sizes), 5
    options = {"classes": classes, "microbatches": microbatches, "per_class": per_class}
    table = class_balanced(labels, **options, seed=seed)(0, steps)
    assert table.shape == (steps, microbatches * classes * per_class)
    rows = table.view(steps * microbatches, classes, per_class)
    expected = torch.arange(classes)[:, None].expand(classes, per_class)
    assert (labels[rows] == expected).all()
    for c, size in enumerate(sizes):
        drawn = rows[:, c].flatten()
        for one_round in drawn.split(size):
            assert one_round.unique().numel() == len(one_round)


def test_classes_are_shuffled_anew_and_each_for_itself():
    labels = torch.arange(40) % 2
    indices = class_balanced(labels, classes=2, microbatches=1, per_class=1, seed=0)
    table = indices(0, 200).view(10, 20, 2) // 2  # (round, place, class): which of the class
    assert len({tuple(order) for order in table.transpose(1, 2).reshape(20, 20).tolist()}) == 20
    assert not torch.equal(
        indices(0, 9), class_balanced(labels, classes=2, microbatches=1, per_class=1, seed=1)(0, 9)
    )


@pytest.mark.parametrize("kind", ["shuffled", "balanced"])
@given(st.integers(0, 50), st.integers(0, 20), st.integers(0, 20))
def test_steps_are_the_same_wherever_one_starts(kind, start, first, second):
    if kind == "shuffled":
        indices = shuffled(23, batch_size=5, seed=1)
    else:
        labels = torch.tensor([0, 1, 1, 0, 2, 1, 1])
        indices = class_balanced(labels, classes=3, microbatches=2, per_class=2, seed=1)
    whole = indices(0, start + first + second)
    middle = start + first
    found = [indices(0, start), indices(start, middle), indices(middle, middle + second)]
    assert torch.equal(torch.cat(found), whole)


def test_a_class_without_samples_is_named():
    labels = torch.tensor([0, 1, 3, 3])
    with pytest.raises(UsageError, match="every class, found none of class 2"):
        class_balanced(labels, classes=4, microbatches=1, per_class=1, seed=0)
    for change, option in (({"microbatches": 0}, "--microb"), ({"per_class": 0}, "--samples-per")):
        values = {"microbatches": 1, "per_class": 1} | change
        with pytest.raises(UsageError, match=option):
            class_balanced(labels, classes=2, seed=0, **values)
    with pytest.raises(UsageError, match="--batch-size: expected at least 1"):
        shuffled(4, batch_size=0, seed=0)


# Epochs


@given(st.integers(0, 500), st.integers(0, 99), st.integers(1, 2000), st.integers(1, 600))
def test_an_epoch_is_n_samples(whole, hundredths, n, batch_size):
    epochs = whole + hundredths / 100
    steps, wanted = steps_until(epochs, n, batch_size), (whole + Fraction(hundredths, 100)) * n
    assert isinstance(steps, int)
    assert wanted <= steps * batch_size < wanted + batch_size


def test_samples_seen_are_the_same_for_every_number_of_microbatches():
    n, classes = 1257, 10
    labels = torch.arange(n) % classes
    steps = steps_until(3, n, 240)
    for microbatches in (1, 2, 3, 4, 6, 8, 12, 24):
        per_class = 240 // classes // microbatches
        options = {"microbatches": microbatches, "per_class": per_class}
        indices = class_balanced(labels, classes=classes, seed=0, **options)
        seen = indices(0, steps_until(3, n, indices(0, 1).shape[1])).numel()
        assert seen == steps * 240 and 3 * n <= seen < 3 * n + 240
    assert shuffled(n, batch_size=240, seed=0)(0, steps).numel() == steps * 240


@pytest.mark.parametrize("epochs", [-1, -0.5, float("nan"), float("inf")])
def test_impossible_epochs_are_refused(epochs):
    with pytest.raises(UsageError, match="--epochs: expected a number of at least 0"):
        steps_until(epochs, 10, 2)
    assert steps_until(0, 10, 2) == 0
