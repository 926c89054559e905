"""What can be measured, what each metric listens to, and what its numbers are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricName = Literal[
    "crossentropy",
    "accuracy",
    "confidence",
    "jacobian",
    "jacobian_operator_norm",
    "tangent_jacobian",
    "tangent_hessian",
    "loss_gradient",
    "loss_hessian_trace",
    "loss_hessian_top",
    "agreement",
    "sharpness",
]


@dataclass(frozen=True)
class Metric:
    """One of them.

    Attributes:
        takes: The settings that change its numbers, beside those that every metric has.
        columns: What its numbers are, where there are several.
        per_batch: It has one row per batch, not one number per sample.
        draws: It has random numbers, of its own for every sample (or batch).
        chunked: It is computed class by class, in chunks unless there is memory enough.
        lipschitz: √(mean m²) is the empirical Lipschitz constant.
    """

    takes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    per_batch: bool = False
    draws: bool = False
    chunked: bool = False
    lipschitz: bool = False


_OUTPUT = ("normalization", "target_logit_only")

METRICS: dict[MetricName, Metric] = {
    "crossentropy": Metric(),
    "accuracy": Metric(),
    "confidence": Metric(),
    "jacobian": Metric(_OUTPUT, chunked=True),
    "jacobian_operator_norm": Metric(
        (*_OUTPUT, "method", "num_power_iters"), draws=True, chunked=True, lipschitz=True
    ),
    "tangent_jacobian": Metric((*_OUTPUT, "legacy_scale"), draws=True),
    "tangent_hessian": Metric((*_OUTPUT, "legacy_scale"), draws=True, chunked=True),
    "loss_gradient": Metric(),
    "loss_hessian_trace": Metric(("num_probes",), draws=True),
    "loss_hessian_top": Metric(("num_power_iters",), draws=True),
    "agreement": Metric(
        ("batch_size", "microbatches"),
        ("mean_pairwise_cosine", "simple_noise_scale", "noise_trace", "gradient_sq_norm"),
        per_batch=True,
    ),
    "sharpness": Metric(
        ("batch_size", "rho", "num_power_iters", "num_probes"),
        ("sharpness", "hessian_top", "hessian_trace"),
        per_batch=True,
        draws=True,
    ),
}
