"""Compute statistics of a gradient stack: agreement of the rows, and gradient noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gradfilter import _products
from gradfilter._types import Tree
from gradfilter.diagnostics._input_checks import check_at_least
from gradfilter.grads._stack import GradStack, as_stack


def agreement(rows: GradStack | Tree) -> Tensor:
    r"""Return the mean cosine over all pairs of rows.

    With unit rows u_i = g_i / ‖g_i‖, over the m rows that are finite and not zero,

        (‖Σ u_i‖² − m) / (m (m − 1)) = mean of cos(g_i, g_j) over i ≠ j.

    It takes the Gram if the stack has a cheap one, else the norms and one `combine`, without an M x
    M matrix.

    Args:
        rows: A GradStack, or a stacked dict with leading axis M on every leaf.

    Returns:
        (), in [−1/(m − 1), 1], float64; NaN if fewer than two rows can be compared. The host
        does not wait for it.

    Raises:
        TypeError, ValueError: A dict is not a stack of rows.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> gd.agreement({"w": torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]])})  # 1, 0, 0
        tensor(0.3333, dtype=torch.float64)

    References:
        Chaubard, Eddy, Kochenderfer, "Beyond Gradient Averaging in Parallel Optimization: Improved
        Robustness through Gradient Agreement Filtering", 2024, https://arxiv.org/abs/2412.18052
    """
    stack = as_stack(rows)
    gram = stack.gram() if stack.gram_is_cheap() else None
    squares = stack.sq_norms() if gram is None else gram.diagonal()
    usable = stack.live & squares.isfinite() & (squares > 0)
    inverse = torch.where(usable, torch.where(usable, squares, 1.0).rsqrt(), 0.0)
    count = usable.sum().to(squares.dtype)
    pairs = count * (count - 1)
    if gram is None:
        total = _products.sq_norm(stack.combine(inverse)) - count
    else:
        itself = torch.eye(len(usable), dtype=torch.bool, device=usable.device)
        both = usable[:, None] & usable & ~itself
        total = (torch.where(both, gram, 0.0) * inverse[:, None] * inverse).sum()
    mean = (total / torch.where(pairs > 0, pairs, 1.0)).clamp(-1, 1)
    return torch.where(pairs > 0, mean, torch.nan)


class NoiseScale(NamedTuple):
    """The result of `noise_scale`, all (), float64.

    Attributes:
        samples: B · trΣ / ‖G‖²: the batch size above which more samples help little.
        trace: trΣ, the variance of one row, summed over the parameters.
        sq_norm: ‖G‖², the squared norm of the true gradient, without bias; it can be negative.
        sq_norm_of_mean: ‖ḡ‖², the squared norm of the mean row, larger by trΣ/M on average.
    """

    samples: Tensor
    trace: Tensor
    sq_norm: Tensor
    sq_norm_of_mean: Tensor


def noise_scale(rows: GradStack | Tree, batch_size: int) -> NoiseScale:
    r"""Estimate the noise of the rows, and the batch size that fits it.

    With the mean row ḡ of the M rows that are finite (its norm from their products, not from a
    mean rounded to half precision),

        trΣ = (Σ ‖g_i‖² − M ‖ḡ‖²) / (M − 1),    ‖G‖² = ‖ḡ‖² − trΣ/M,    samples = B · trΣ / ‖G‖².

    With few rows this is a rough estimate: average trace and sq_norm over several steps, and divide
    the averages.

    Args:
        rows: A GradStack, or a stacked dict with leading axis M on every leaf; each row the mean
            over its samples.
        batch_size: B >= 1, samples per row.

    Returns:
        A `NoiseScale`. ``samples`` is inf if the noise hides the gradient (‖G‖² <= 0 < trΣ);
        all are NaN with fewer than two finite rows.

    Raises:
        ValueError: batch_size < 1, or a dict is not a stack of rows.
        TypeError: A dict is not a stack of rows.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> rows = {"w": torch.tensor([[3.0, 1.0], [3.0, -1.0]])}  # ḡ = (3, 0), trΣ = 2
        >>> found = gd.noise_scale(rows, batch_size=4)
        >>> [round(value.item(), 4) for value in found]  # samples = 4 · 2 / 8
        [1.0, 2.0, 8.0, 9.0]

    References:
        McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018,
        https://arxiv.org/abs/1812.06162
    """
    check_at_least("batch_size", batch_size, 1, "It is the number of samples per row.")
    stack = as_stack(rows)
    gram = stack.gram() if stack.gram_is_cheap() else None
    squares = stack.sq_norms() if gram is None else gram.diagonal()
    usable = stack.live & squares.isfinite()
    count = usable.sum().to(squares.dtype)
    weights = usable.to(squares.dtype) / count.clamp(min=1)
    if gram is None:
        # The mean m has the dtype of the parameters: ‖ḡ‖² = 2 <ḡ, m> − ‖m‖² + ‖ḡ − m‖². The
        # last term is omitted: rounding adds as much to the variance of every row anyway.
        mean = stack.combine(weights)
        along = torch.where(usable, stack.dot(mean), 0.0).sum() / count.clamp(min=1)
        of_mean = 2 * along - _products.sq_norm(mean)
    else:
        both = usable[:, None] & usable
        of_mean = (torch.where(both, gram, 0.0) * weights[:, None] * weights).sum()
    enough = count > 1
    total = torch.where(usable, squares, 0.0).sum()
    # With equal rows, rounding could give a small negative number.
    spread = (total - count * of_mean).clamp(min=0) / torch.where(enough, count - 1, 1.0)
    sq_norm = of_mean - spread / count.clamp(min=1)
    no_signal = torch.where(spread > 0, torch.inf, torch.nan)
    ratio = spread / torch.where(sq_norm > 0, sq_norm, 1.0)
    samples = batch_size * torch.where(sq_norm > 0, ratio, no_signal)
    return NoiseScale(
        *(torch.where(enough, value, torch.nan) for value in (samples, spread, sq_norm, of_mean))
    )


def influence(rows: GradStack | Tree, reference: Mapping[str, Tensor]) -> Tensor:
    r"""Return how much a step along each row lowers the loss behind a reference gradient.

    With the reference r = ∇L at the same parameters, a small step −lr · g_i changes L by about
    −lr ⟨g_i, r⟩; the products ⟨g_i, r⟩ are returned. Rows with a negative one raise the loss of the
    reference: wrong labels often do, if the reference comes from right ones.

    Args:
        rows: A GradStack, or a stacked dict with leading axis M on every leaf.
        reference: A gradient with the leaves of the rows, for example of a clean batch:
            ``gf.microbatch_grads(loss, 1)(params, clean).combine(torch.ones(1))``.

    Returns:
        (M,), float64. It asks the rows one ``dot``, so no rows are made.

    Raises:
        TypeError, ValueError: A dict is not a stack of rows, or the leaves differ.

    Examples:
        >>> import torch, gradfilter.diagnostics as gd
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [0.0, -2.0]])}
        >>> gd.influence(rows, {"w": torch.tensor([1.0, 1.0])})
        tensor([ 1., -2.], dtype=torch.float64)

    References:
        Pruthi, Liu, Kale, Sundararajan, "Estimating Training Data Influence by Tracing Gradient
        Descent", 2020, https://arxiv.org/abs/2002.08484
    """
    return as_stack(rows).dot(reference)
