"""The shape of the images that a model takes."""

from __future__ import annotations

from gradfilter.lab._usage import check

Shape = tuple[int, int, int]
"""(channels, height, width)."""


def check_side(model: str, shape: Shape, least: int) -> None:
    """Refuse images of which the model's pools would leave nothing.

    Args:
        model: What to call it.
        shape: Of one image.
        least: Pixels that each side needs.

    Raises:
        UsageError: A side is smaller.
    """
    _, height, width = shape
    check(
        min(height, width) >= least,
        "--model",
        f"images of at least {least} x {least} pixels for {model}",
        f"{height} x {width}",
        "resnet18_K, wrn_D_W and mlp_H take images of any size.",
    )
