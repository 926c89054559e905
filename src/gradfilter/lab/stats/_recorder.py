"""Compute a metric on a range of a split, at each sample or averaged along paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from gradfilter.lab.data._samples import Samples
from gradfilter.lab.stats._stats_config import StatsConfig
from gradfilter.lab.stats._stats_files import Nested, StatsRecord, without_nan
from gradfilter.lab.stats._surroundings import Anchors, strategy

# --- A metric averaged along the path from an image to its anchors ---


@dataclass(frozen=True)
class AnchoredMetric:
    """A metric at an image and at its anchors, and the distances between them.

    Attributes:
        values: m(x), m(x_1), ..., m(x_n) in each of K directions. (N, K, n + 1) float64
        distances: ‖x_1 − x‖, ‖x_2 − x_1‖, ..., over whole images. (N, K, n) float64
    """

    values: Tensor
    distances: Tensor


def measure_at_anchors(
    measure: Callable[[Tensor], Tensor], images: Tensor, anchors: Anchors
) -> AnchoredMetric:
    """Evaluate a metric at images and at their anchors, 1 + K · n times.

    Args:
        measure: Maps images (N, c, h, w) to (N,); called once with the images themselves.
        images: Images. (N, c, h, w)
        anchors: Maps images to K x n anchors.

    Returns:
        Values and distances, on the host, in float64.
    """
    base = measure(images)
    values, distances = [], []
    for row in anchors(images):  # (n, N, c, h, w), K times
        values.append(torch.stack([base, *(measure(anchor) for anchor in row)]))
        distances.append(torch.stack([_distance(a, b) for a, b in pairwise([images, *row])]))
    return AnchoredMetric(
        *(torch.stack(t).cpu().double().movedim(-1, 0) for t in (values, distances))
    )


def _distance(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    apart: Tensor = torch.linalg.vector_norm((a.to(wide) - b.to(wide)).flatten(1), dim=1)
    return apart  # (N,)


def path_means(path: AnchoredMetric) -> Tensor:
    """Compute the mean over K paths of the metric's mean along each, up to every anchor.

    A path's mean is the trapezoid rule over its segments, divided by its length,
    Σ_j ½ (m_j + m_{j+1}) d_j / Σ_j d_j, and m(x) where the length is 0. With one anchor it is
    ½ [m(x) + m(x_1)], the published Euclidean mean.

    Args:
        path: Values at n anchors in K directions.

    Returns:
        The running mean at every anchor; the last one covers the whole path. (N, n)

    Examples:
        >>> values, distances = torch.tensor([[[0.0, 1.0, 3.0]]]), torch.tensor([[[1.0, 2.0]]])
        >>> path = AnchoredMetric(values, distances)
        >>> path_means(path)
        tensor([[0.5000, 1.5000]])
    """
    values, distances = path.values, path.distances
    areas = ((values[..., :-1] + values[..., 1:]) / 2 * distances).cumsum(-1)
    lengths = distances.cumsum(-1)
    some = lengths > 0
    means = torch.where(some, areas / torch.where(some, lengths, 1.0), values[..., :1])
    return means.mean(1)


# --- The recorder ---


@dataclass(frozen=True)
class Values:
    """The numbers of a metric for a batch.

    Attributes:
        numbers: One number per sample (N,), or one row for the batch (1, columns).
        residual: Remaining relative error of an iteration, or None. Any shape.
    """

    numbers: Tensor
    residual: Tensor | None = None


Measure = Callable[[Tensor, Tensor, Tensor], Values]
"""(images (N, c, h, w), labels (N,), ids (N,)) -> values; sample by sample where possible."""


def recorder(
    config: StatsConfig, samples: Samples, measure: Measure
) -> Callable[[int, int], StatsRecord]:
    """Return the function that measures the samples start .. stop − 1 of a split.

    Args:
        config: Settings: where around the images, and against which labels.
        samples: Samples of the split.
        measure: The metric.
    """
    anchors = strategy(config.gen_strategy, config.num_directions)
    labels = samples.clean if config.restored_targets else samples.labels
    return _Recorder(config, samples, labels, measure, anchors)


@dataclass(frozen=True, eq=False)
class _Recorder:
    """The function that `recorder` returns.

    Attributes:
        config: Settings.
        samples: Samples of the split.
        labels: The labels to measure against.
        measure: The metric.
        anchors: Maps images to their anchors; None to measure at the images themselves.
    """

    config: StatsConfig
    samples: Samples
    labels: Tensor
    measure: Measure
    anchors: Anchors | None

    def __call__(self, start: int, stop: int) -> StatsRecord:
        places = torch.arange(start, stop, device=self.labels.device)
        images, ids = self.samples.images.fetch(places), self.samples.ids[places]
        metric = _OfImages(self.measure, self.labels[places], ids)
        distances: Nested = None
        if self.anchors is None:
            stats = metric(images)
        else:
            path = measure_at_anchors(metric, images, self.anchors)
            if self.config.raw_path:
                stats, distances = path.values, without_nan(path.distances.tolist())
            else:
                means = path_means(path)
                stats = means if self.config.cumulative else means[:, -1]
        worst = torch.stack(metric.residuals).max().item() if metric.residuals else None
        return StatsRecord(
            start,
            stop,
            ids.tolist(),
            metric.labels.tolist(),
            self.samples.clean[places].tolist(),
            without_nan(stats.tolist()),
            distances,
            None if worst is None else without_nan(worst),
        )


@dataclass(frozen=True, eq=False)
class _OfImages:
    """A metric as a function of the images alone.

    Attributes:
        measure: The metric.
        labels: Labels of the samples. (N,)
        ids: Indices of the samples. (N,)
        residuals: The largest residual of every call that had one.
    """

    measure: Measure
    labels: Tensor
    ids: Tensor
    residuals: list[Tensor] = field(default_factory=list)

    def __call__(self, images: Tensor) -> Tensor:
        values = self.measure(images, self.labels, self.ids)
        if values.residual is not None:
            self.residuals.append(values.residual.max())
        return values.numbers
