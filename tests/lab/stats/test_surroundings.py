"""Points around an image: shifted images, and images without some singular values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradfilter.lab.stats._stats_config import is_path
from gradfilter.lab.stats._surroundings import (
    STRATEGIES,
    moved,
    scaled,
    shift_anchors,
    shift_offsets,
    strategy,
    svd_anchors,
    svd_window,
)

STRENGTHS = [5, 10, 15, 20, 22, 25]


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Shifts


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    down=st.integers(-7, 7),
    right=st.integers(-7, 7),
)
def test_moved_is_a_crop_of_the_edge_padded_image(height, width, down, right):
    image = images(2, 3, height, width)
    padded = np.pad(image.numpy(), [(0, 0), (0, 0), (7, 7), (7, 7)], mode="edge")
    crop = padded[..., 7 - down : 7 - down + height, 7 - right : 7 - right + width]
    assert np.array_equal(moved(image, down, right).numpy(), crop)


def test_moved_down_and_right_is_down_and_right():
    image = torch.zeros(1, 1, 5, 5)
    image[..., 1, 1] = 1
    assert moved(image, 2, 1).nonzero().tolist() == [[0, 0, 3, 2]]


@given(radius=st.integers(1, 9), directions=st.integers(1, 24))
def test_offsets_lie_on_the_circle(radius, directions):
    offsets = torch.tensor(shift_offsets(radius, directions), dtype=torch.float64)
    angles = 2 * torch.pi * torch.arange(directions, dtype=torch.float64) / directions
    circle = radius * torch.stack([angles.sin(), angles.cos()], 1)
    assert (offsets - circle).abs().max() <= 0.5 + 1e-6
    if directions % 4 == 0:  # what is a quarter turn for the angles is one for the offsets
        turned = torch.stack([offsets[:, 1], -offsets[:, 0]], 1)
        assert torch.equal(offsets.roll(-directions // 4, 0), turned)


def test_offsets_of_eight_directions():
    assert shift_offsets(1, 8) == [
        *((0, 1), (1, 1), (1, 0), (1, -1)),
        *((0, -1), (-1, -1), (-1, 0), (-1, 1)),
    ]


def test_shift_anchors_are_direction_by_radius():
    image = images(2, 3, 32, 32)
    anchors = shift_anchors(image, (1, 2, 3, 4), 8)
    assert anchors.shape == (8, 4, 2, 3, 32, 32)
    for k in range(8):
        for n, radius in enumerate((1, 2, 3, 4)):
            assert torch.equal(anchors[k, n], moved(image, *shift_offsets(radius, 8)[k]))


# Singular values


def without(image, start, end):
    """One channel, slowly."""
    left, values, right = np.linalg.svd(image.numpy(), full_matrices=False)
    values[start:end] = 0
    return torch.from_numpy(left @ np.diag(values) @ right)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_svd_zeroes_the_window_at_32_pixels(strength):
    image = images(2, 3, 32, 32)
    anchors = svd_anchors(image, [strength], 8)
    assert anchors.shape == (8, 1, 2, 3, 32, 32)
    for i in (0, 3, 7):
        for sample in range(2):
            for channel in range(3):
                expected = without(image[sample, channel], 32 - strength - i, 32 - i)
                assert (anchors[i, 0, sample, channel] - expected).abs().max() < 1e-12


def test_windows_at_32_pixels_are_those_of_the_definition():
    for strength in STRENGTHS:
        assert [svd_window(strength, i, 32) for i in range(8)] == [
            (32 - strength - i, 32 - i) for i in range(8)
        ]


@given(
    strength=st.sampled_from(STRENGTHS), direction=st.integers(0, 40), values=st.integers(1, 100)
)
def test_windows_stay_inside_and_are_never_empty_without_reason(strength, direction, values):
    start, end = svd_window(strength, direction, values)
    assert 0 <= start <= end <= values
    if direction < 8 and values >= 4:
        # As large a part of the spectrum, to a rounding of each end.
        assert abs((end - start) / values - strength / 32) <= 1.5 / values
        assert end > start


@given(st.sampled_from([(5, 7), (7, 5), (4, 4)]))
def test_svd_of_images_that_are_not_square(sides):
    image = images(2, 1, *sides)
    anchors = svd_anchors(image, [15], 2)
    start, end = svd_window(15, 0, min(sides))
    assert (anchors[0, 0, 1, 0] - without(image[1, 0], start, end)).abs().max() < 1e-12


def test_half_precision_is_decomposed_in_float32():
    image = images(1, 1, 32, 32).to(torch.bfloat16)
    anchor = svd_anchors(image, [5], 1)[0, 0]
    assert anchor.dtype == torch.bfloat16
    expected = without(image[0, 0].double(), 27, 32)
    assert (anchor[0, 0].double() - expected).abs().max() < 0.02


# Both


def test_strengths_are_for_32_pixels():
    assert [scaled(4, side) for side in (1, 8, 16, 32, 64)] == [1, 1, 2, 4, 8]
    assert [scaled(s, 8) for s in STRENGTHS] == [1, 2, 4, 5, 6, 6]
    assert [scaled(s, 32) for s in STRENGTHS] == STRENGTHS


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "none"])
def test_every_strategy_is_a_pure_function_of_each_image(name):
    image = images(3, 2, 8, 8)
    before = image.clone()
    anchors = strategy(name, 3)(image)
    length = {"shifts-path": 4, "svd-path": 6}.get(name, 1)
    assert anchors.shape == (3, length, 3, 2, 8, 8)
    assert is_path(name) == (length > 1)
    assert torch.equal(image, before)
    alone = strategy(name, 3)(image[1:2])
    assert (anchors[:, :, 1:2] - alone).abs().max() < 1e-12
    assert not torch.equal(anchors[0, 0], image)  # never a strength of nothing


def test_named_strengths_reach_their_strategy():
    image = images(1, 1, 32, 32)
    assert torch.equal(strategy("svd-22", 2)(image), svd_anchors(image, [22], 2))
    assert torch.equal(strategy("svd-path", 2)(image), svd_anchors(image, STRENGTHS, 2))
    assert torch.equal(strategy("1px-shifts", 2)(image), shift_anchors(image, [1], 2))
    assert torch.equal(strategy("4px-shifts", 2)(image), shift_anchors(image, [4], 2))
    assert torch.equal(strategy("shifts-path", 2)(image), shift_anchors(image, [1, 2, 3, 4], 2))
    assert strategy("none") is None
