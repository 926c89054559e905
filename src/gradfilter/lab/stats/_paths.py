"""A metric averaged along the way from an image to its anchors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradfilter.lab.stats._strategies import Anchors


@dataclass(frozen=True)
class Along:
    """A metric at an image and at its anchors, and how far these are apart.

    Attributes:
        values: m(x), m(x_1), ..., m(x_n) in each of K directions. (N, K, n + 1) float64
        distances: ‖x_1 − x‖, ‖x_2 − x_1‖, ..., of whole images. (N, K, n) float64
    """

    values: Tensor
    distances: Tensor


def along(measure: Callable[[Tensor], Tensor], images: Tensor, anchors: Anchors) -> Along:
    """Evaluate a metric at images and at their anchors, 1 + K · n times.

    Args:
        measure: Images (N, c, h, w) -> (N,); called once with the images themselves.
        images: (N, c, h, w).
        anchors: How K x n anchors are made of them.

    Returns:
        All of it on the host, in float64.
    """
    base = measure(images)
    values, distances = [], []
    for row in anchors(images):  # (n, N, c, h, w), K times
        values.append(torch.stack([base, *(measure(anchor) for anchor in row)]))
        distances.append(torch.stack([_distance(a, b) for a, b in pairwise([images, *row])]))
    return Along(*(torch.stack(t).cpu().double().movedim(-1, 0) for t in (values, distances)))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    apart: Tensor = torch.linalg.vector_norm((a.to(wide) - b.to(wide)).flatten(1), dim=1)
    return apart  # (N,)


def path_means(along: Along) -> Tensor:
    """The mean over K paths of the metric's mean along each, up to every anchor.

    A path's mean is the trapezoid rule over its segments, divided by its length,
    Σ_j ½ (m_j + m_{j+1}) d_j / Σ_j d_j, and m(x) where the length is 0. With one anchor it is
    ½ [m(x) + m(x_1)], the published Euclidean mean.

    Args:
        along: n anchors in K directions.

    Returns:
        The running value at every anchor; the last one is that of whole paths. (N, n)

    Examples:
        >>> path = Along(torch.tensor([[[0.0, 1.0, 3.0]]]), torch.tensor([[[1.0, 2.0]]]))
        >>> path_means(path)
        tensor([[0.5000, 1.5000]])
    """
    values, distances = along.values, along.distances
    areas = ((values[..., :-1] + values[..., 1:]) / 2 * distances).cumsum(-1)
    lengths = distances.cumsum(-1)
    some = lengths > 0
    means = torch.where(some, areas / torch.where(some, lengths, 1.0), values[..., :1])
    return means.mean(1)
