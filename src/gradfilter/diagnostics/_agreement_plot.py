"""Plot the cosines between the rows of a gradient stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradfilter._types import Tree
from gradfilter.grads._stack import GradStack, as_stack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 40


def plot_agreement(rows: GradStack | Tree | Tensor, *, threshold: float | None = None) -> Figure:
    """Draw the cosines between all rows as a heat map, and those of all pairs as a histogram.

    It needs matplotlib and waits for the device.

    Args:
        rows: A GradStack, a stacked dict with leading axis M on every leaf, or the Gram (M, M) of
            the rows. M >= 2. A row that is zero or not finite has no cosine: it is left grey.
        threshold: A cosine distance 1 - cos in [0, 2], such as that of `agree_filter`. The
            histogram shows where it is, and the share of the pairs that are at most so far apart.

    Returns:
        A matplotlib figure that is not registered with pyplot: show it as the last value of a cell,
        or call ``figure.savefig("agreement.png")``.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: There is no stack or Gram of at least two rows, or the threshold is
            out of range.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.5]])}
        >>> figure = gd.plot_agreement(rows, threshold=0.97)
        >>> figure.axes[1].get_xlabel()
        'cosine of two rows'
    """
    if threshold is not None and not 0 <= threshold <= 2:
        raise ValueError(
            f"plot_agreement: expected 0 <= threshold <= 2, found threshold={threshold!r}. It is "
            "a cosine distance, 1 - cos, as in agree_filter."
        )
    cosines = _cosines(rows)
    count = len(cosines)
    upper = torch.ones(count, count, dtype=torch.bool).triu(1)
    pairs = cosines[upper & ~cosines.isnan()]
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"plot_agreement: expected the package {missing.name!r}, which it draws with, found "
            'none. Install it with the extra: pip install "gradfilter[lab]".'
        ) from missing
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    heat, histogram = figure.subplots(1, 2)
    image = heat.imshow(cosines.tolist(), vmin=-1, vmax=1, cmap="RdBu", interpolation="nearest")
    heat.set_facecolor("0.6")  # shows where there is no cosine
    figure.colorbar(image, ax=heat, label="cosine")
    heat.set(xlabel="row", ylabel="row", title=f"{count} rows")
    histogram.hist(pairs.tolist(), bins=BINS, range=(-1, 1), color="#4051b5")
    title = f"{len(pairs)} pairs"
    if len(pairs):
        title += f", mean cosine {pairs.mean().item():.3f}"
    if threshold is not None:
        histogram.axvline(1 - threshold, color="#b00020", linestyle="--")
        near = int((1 - pairs <= threshold).sum())
        title += f"\n{near} at most {threshold:g} apart (dashed line)"
    histogram.set(xlabel="cosine of two rows", ylabel="pairs", title=title)
    return figure


def _cosines(rows: GradStack | Tree | Tensor) -> Tensor:
    """Return the cosines on the host, NaN where there is none. (M, M) float64."""
    if isinstance(rows, Tensor):
        gram = rows
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise ValueError(
                f"plot_agreement: expected the Gram (M, M) of the rows, found shape "
                f"{tuple(gram.shape)}. Rows of one leaf are a dict: {{'w': rows}}."
            )
        live = torch.ones(len(gram), dtype=torch.bool)
    else:
        stack = as_stack(rows)
        gram, live = stack.gram(), stack.live.cpu()
    if len(gram) < 2:
        raise ValueError(
            f"plot_agreement: expected at least two rows, found {len(gram)}. Cut the batch into "
            "more microbatches."
        )
    gram = gram.detach().to("cpu", torch.float64)
    squares = gram.diagonal()
    usable = live & squares.isfinite() & (squares > 0)
    inverse = torch.where(usable, squares, torch.nan).rsqrt()
    return (gram * inverse[:, None] * inverse).clamp(-1, 1)
