"""Means of a metric along paths."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradfilter.lab.stats._recorder import AnchoredMetric, measure_at_anchors, path_means
from gradfilter.lab.stats._surroundings import STRATEGIES, strategy

AROUND = [name for name in STRATEGIES if name != "none"]


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def naive(values, distances):
    """One sample, loops only: the mean over directions up to the last anchor."""
    means = []
    for m, d in zip(values, distances, strict=True):
        area = sum((m[j] + m[j + 1]) / 2 * d[j] for j in range(len(d)))
        means.append(area / sum(d) if sum(d) else m[0])
    return sum(means) / len(means)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 100))
def test_means_are_trapezoids_by_length(samples, directions, n, seed):
    values = images(samples, directions, n + 1, seed=seed)
    distances = images(samples, directions, n, seed=seed + 1).abs()
    distances[..., 0] *= seed % 2  # paths that begin with, or are, a point
    found = path_means(AnchoredMetric(values, distances))
    assert found.shape == (samples, n)
    for i in range(samples):
        for j in range(n):
            part = naive(values[i, :, : j + 2].tolist(), distances[i, :, : j + 1].tolist())
            assert found[i, j].item() == pytest.approx(part, abs=1e-12)


@pytest.mark.parametrize("name", AROUND)
def test_constant_metric_gives_itself(name):
    constant = torch.tensor([2.0, -3.0], dtype=torch.float64)
    found = path_means(
        measure_at_anchors(lambda x: constant, images(2, 1, 8, 8), strategy(name, 4))
    )
    assert torch.allclose(found, constant[:, None], rtol=1e-14)


@pytest.mark.parametrize("name", AROUND)
def test_linear_metric_gives_the_exact_trapezoid(name):
    image, weight = images(2, 1, 32, 32), images(1, 32, 32, seed=1)

    def linear(x):
        return (x * weight).sum((1, 2, 3))

    anchors = strategy(name, 3)
    found = path_means(measure_at_anchors(linear, image, anchors))[:, -1]
    # The integral of a linear function over a segment is its value at the middle.
    for i in range(2):
        expected = 0
        for row in anchors(image[i : i + 1]):
            stops = [image[i : i + 1], *row]
            parts = [((b - a).norm(), linear((a + b) / 2)) for a, b in pairwise(stops)]
            expected += sum(d * m for d, m in parts) / sum(d for d, _ in parts) / 3
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("name", ["1px-shifts", "svd-10"])
def test_one_anchor_gives_the_euclidean_mean(name):
    image = images(2, 3, 32, 32)
    metric = lambda x: (x**2).mean((1, 2, 3)).sin()
    anchors = strategy(name, 5)
    expected = sum((metric(image) + metric(a[0])) / 2 for a in anchors(image)) / 5
    found = path_means(measure_at_anchors(metric, image, anchors))
    assert torch.allclose(found[:, 0], expected, rtol=1e-12)


def test_paths_of_no_length_give_the_value_at_the_image():
    flat = torch.ones(2, 1, 8, 8, dtype=torch.float64)  # shifts do not change it
    flat[1] *= 7
    found = path_means(
        measure_at_anchors(lambda x: x.sum((1, 2, 3)), flat, strategy("shifts-path", 4))
    )
    assert torch.equal(found, torch.tensor([[64.0] * 4, [448.0] * 4], dtype=torch.float64))


def test_the_image_itself_is_evaluated_once():
    image, seen = images(2, 1, 32, 32), []

    def metric(x):
        seen.append(x)
        return x.sum((1, 2, 3))

    found = measure_at_anchors(metric, image, strategy("svd-path", 3))
    assert len(seen) == 1 + 3 * 6
    assert sum(torch.equal(x, image) for x in seen) == 1
    assert found.values.shape == (2, 3, 7) and found.distances.shape == (2, 3, 6)
    assert torch.equal(found.values[:, 0, 0], found.values[:, 2, 0])


def test_values_and_distances_are_in_order():
    image = images(2, 1, 32, 32)
    anchors = strategy("shifts-path", 2)(image)
    found = measure_at_anchors(lambda x: x[:, 0, 3, 4], image, strategy("shifts-path", 2))
    assert found.values[1, 1, 3] == anchors[1, 2, 1, 0, 3, 4]
    assert found.distances[1, 1, 0] == (anchors[1, 0, 1] - image[1]).norm()
    assert found.distances[1, 1, 3] == (anchors[1, 3, 1] - anchors[1, 2, 1]).norm()


def test_running_means_end_with_the_mean_of_shorter_paths():
    path = measure_at_anchors(
        lambda x: (x**2).sum((1, 2, 3)), images(2, 1, 32, 32), strategy("svd-path", 2)
    )
    running = path_means(path)
    for n in range(1, 7):
        shorter = AnchoredMetric(path.values[..., : n + 1], path.distances[..., :n])
        assert torch.equal(path_means(shorter)[:, -1], running[:, n - 1])


def test_a_value_that_is_no_number_stays_in_its_sample():
    def metric(x):
        return torch.tensor([float("nan"), 1.0], dtype=torch.float64)

    found = path_means(measure_at_anchors(metric, images(2, 1, 8, 8), strategy("1px-shifts", 2)))
    assert found[0].isnan().all() and found[1] == pytest.approx(1.0)
