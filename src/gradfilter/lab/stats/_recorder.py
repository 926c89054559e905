"""From a stretch of a split to its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfilter.lab.data._samples import Samples
from gradfilter.lab.stats._config import StatsConfig
from gradfilter.lab.stats._paths import along, path_means
from gradfilter.lab.stats._records import Nested, Record, without_nan
from gradfilter.lab.stats._strategies import strategy


@dataclass(frozen=True)
class Values:
    """What a metric says about a batch.

    Attributes:
        numbers: One of every sample (N,), or all there is to say about the batch (1, columns).
        residual: The relative error that an iteration left, or None. Any shape.
    """

    numbers: Tensor
    residual: Tensor | None = None


Measure = Callable[[Tensor, Tensor, Tensor], Values]
"""(images (N, c, h, w), labels (N,), ids (N,)) -> values; sample by sample where it can be."""


def recorder(
    config: StatsConfig, samples: Samples, measure: Measure
) -> Callable[[int, int], Record]:
    """The function that measures the samples start .. stop − 1 of a split.

    Args:
        config: Where around the images, and about which labels.
        samples: The split.
        measure: The metric.
    """
    anchors = strategy(config.gen_strategy, config.num_directions)
    labels = samples.clean if config.restored_targets else samples.labels

    def record(start: int, stop: int) -> Record:
        places = torch.arange(start, stop, device=labels.device)
        images, targets, ids = samples.images.fetch(places), labels[places], samples.ids[places]
        residuals: list[Tensor] = []

        def numbers(around: Tensor) -> Tensor:
            values = measure(around, targets, ids)
            if values.residual is not None:
                residuals.append(values.residual.max())
            return values.numbers

        distances: Nested = None
        if anchors is None:
            stats = numbers(images)
        else:
            path = along(numbers, images, anchors)
            if config.raw_path:
                stats, distances = path.values, without_nan(path.distances.tolist())
            else:
                means = path_means(path)
                stats = means if config.cumulative else means[:, -1]
        worst = torch.stack(residuals).max().item() if residuals else None
        return Record(
            start,
            stop,
            ids.tolist(),
            targets.tolist(),
            samples.clean[places].tolist(),
            without_nan(stats.tolist()),
            distances,
            None if worst is None else without_nan(worst),
        )

    return record
