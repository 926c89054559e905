"""What a training that went wrong without an error says about it."""

from __future__ import annotations

import math

from gradfilter.lab.train._config import TrainConfig
from gradfilter.lab.train._evaluation import Evaluation
from gradfilter.lab.train._run import Run


def why_not_finite(run: Run, evaluation: Evaluation) -> str | None:
    """Since when there is no loss, and what that may come from; None while there is one.

    A batch whose loss is no number does not count where a filter has skipped it: what counts is the
    loss of the parameters that were left.

    Args:
        run: Where it was evaluated.
        evaluation: Made there.
    """
    if run.done == 0 or math.isfinite(evaluation.train_loss):
        return None
    since = int(run.finite_until) + 1
    if since == 0:
        return "the loss is not finite from the start: look at the data and the initial parameters"
    return f"the loss is not finite since step {since}; is --learning-rate too large?"


def why_all_skipped(run: Run) -> str | None:
    """Why no step was applied; None where one was, or none has been done."""
    if run.done == 0 or int(run.skipped) < run.done:
        return None
    if int(run.finite_until) < 0:
        return "every step was skipped: the loss was never finite"
    return f"every step was skipped: {_about_the_filter(run.config)}"


def _about_the_filter(config: TrainConfig) -> str:
    name = "agree" if config.agree is not None else "consensus"
    distance = getattr(config, name)
    if distance is None:  # no filter of the options
        return "no gradient was accepted"
    if distance < 0.5:  # as small as a similarity is large
        return f"--{name} is a cosine distance, 1 - cos; did you mean {1 - distance:g}?"
    return f"no rows agreed at --{name} {distance:g}; a larger cosine distance, up to 2, takes more"
