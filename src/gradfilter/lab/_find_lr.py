"""``gradfilter find-lr``: train with rising learning rates, and suggest one of them."""

from __future__ import annotations

import io
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import gradfilter as gf
from gradfilter import _tree
from gradfilter._types import State
from gradfilter.lab._device import usable_device
from gradfilter.lab._find_lr_config import FindLrCommand, check_rates
from gradfilter.lab._plot import GREY
from gradfilter.lab._processes import started_processes
from gradfilter.lab._run_files import named_directory, printable, write_bytes, write_json
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._batches import batches
from gradfilter.lab.train._build_training import build_training
from gradfilter.lab.train._config_checks import check_values
from gradfilter.lab.train._progress import progress_bar
from gradfilter.lab.train._run_place import plain_settings
from gradfilter.lab.train._train_config import TrainConfig
from gradfilter.lab.train._training import Training, precision

# --- The test, for any step ---


WORSE = 2.0
"""Factor between neighbouring groups of losses at which the loss has diverged."""
LOST = 4.0
"""The loss has also diverged at this multiple of the first losses."""
GROUP = 5
"""Number of losses in a group."""
ERRORS = 4.0
"""Number of standard errors by which a loss has to fall."""
STATE = TypeVar("STATE")
Step = Callable[[STATE, int, float], tuple[STATE, float]]
"""``step(state, number, rate) -> (state, loss)``: a step, and the loss before it."""


@dataclass(frozen=True)
class RateTest:
    """The result of a learning rate range test.

    Attributes:
        rates: The rates that were tried, rising.
        losses: The loss of every step, before its update.
        smoothed: Means of the losses of neighbouring steps.
        lowest: The rate at which the smoothed loss is smallest.
        suggested: A tenth of `lowest`; None if the loss does not fall.
        diverged: The rate at which the loss diverged; None if it did not.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    lowest: float
    suggested: float | None
    diverged: float | None


def rising_rates(low: float, high: float, count: int) -> list[float]:
    """Return rates at equal ratios.

    Args:
        low: First rate, above 0.
        high: Last rate, above ``low``.
        count: Number of rates, at least 20.

    Raises:
        UsageError: There is no such range.

    Examples:
        >>> [f"{rate:.3g}" for rate in rising_rates(1e-4, 1, 21)[::5]]
        ['0.0001', '0.001', '0.01', '0.1', '1']
    """
    check_rates(low, high, count)
    first, last = math.log(low), math.log(high)  # high / low may overflow
    parts = (number / (count - 1) for number in range(1, count - 1))
    return [low, *(math.exp(first + (last - first) * part) for part in parts), high]


def find_learning_rate(step: Step[STATE], state: STATE, rates: Sequence[float]) -> RateTest:
    """Take one step per rate, until the loss diverges, and choose one of the rates.

    The losses are smoothed by centred means over a tenth of the steps. The
    suggested rate is a tenth of the one at which the smoothed loss is smallest: there it no longer
    falls, because the largest stable rate is near. The loss has diverged where it is not finite,
    where each of five losses is more than twice the mean of the five before them, or where their
    mean is four times that of the first five.

    Args:
        step: ``step(state, number, rate) -> (state, loss)``, the loss before the update.
        state: The state before the first step; `step` returns new ones.
        rates: Rising rates, such as those of `rising_rates`.

    Raises:
        UsageError: The first loss is not finite.

    Examples:
        The loss 4 x² / 2 is stable below the rate 2 / 4:

        >>> def step(x, number, rate):
        ...     return x - rate * 4 * x, 4 * x * x / 2
        >>> found = find_learning_rate(step, 1.0, rising_rates(1e-3, 10, 1000))
        >>> f"{found.lowest:.1f} {found.suggested:.2f} {found.diverged:.1f}"
        '0.5 0.05 0.6'

    References:
        Smith, "Cyclical Learning Rates for Training Neural Networks", 2017 (the range test of
        section 3.3), https://arxiv.org/abs/1506.01186; Howard, Gugger, "fastai: A Layered API for
        Deep Learning", 2020 (the tenth), https://arxiv.org/abs/2002.04688
    """
    reach = max(1, len(rates) // 20)
    losses: list[float] = []
    diverged = None
    for number, rate in enumerate(rates):
        state, loss = step(state, number, rate)
        if not math.isfinite(loss):
            diverged = rate
            break
        losses.append(loss)
        if _has_diverged(losses, GROUP):
            diverged = rate
            break
    if not losses:
        raise UsageError(
            "the loss before the first step is not finite, so no learning rate can help. Look at "
            "the data, the labels and the initial parameters."
        )
    smoothed = _centred_means(losses, reach)
    # The ends are means of fewer losses, and the lowest of many noisy numbers is no minimum.
    side = min(max(1, reach // 2), (len(losses) - 1) // 2)
    lowest = min(range(side, len(losses) - side), key=smoothed.__getitem__)
    start = losses[: max(10, 2 * reach + 1)]
    error = statistics.pstdev(start) / math.sqrt(2 * side + 1)
    falls = _mean(start) - smoothed[lowest] > ERRORS * error
    return RateTest(
        tuple(rates[: len(losses)]),
        tuple(losses),
        tuple(smoothed),
        rates[lowest],
        rates[lowest] / 10 if falls else None,
        diverged,
    )


def _has_diverged(losses: Sequence[float], count: int) -> bool:
    """Return whether the last `count` losses are far above those before, or above the first."""
    if len(losses) < 2 * count:
        return False
    last, before, first = losses[-count:], losses[-2 * count : -count], losses[:count]
    mean, old, begin = (
        math.fsum(part / count for part in group) for group in (last, before, first)
    )
    # Distances, because a loss may be negative.
    lost = mean - begin > (LOST - 1) * abs(begin)
    return lost or min(last) - old > (WORSE - 1) * abs(old)


def _mean(values: Sequence[float]) -> float:
    """Return the mean, also where the sum is too large for a float."""
    return math.fsum(value / len(values) for value in values)


def _centred_means(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and up to `reach` neighbours, as many on both sides."""
    means = []
    for place in range(len(values)):
        side = min(reach, place, len(values) - 1 - place)
        means.append(_mean(values[place - side : place + side + 1]))
    return means


# --- The test of a training ---


def run_rate_test(command: FindLrCommand, tick: Callable[[], None]) -> tuple[RateTest, int]:
    """Test the rule that the options describe; return also the number of skipped steps.

    Args:
        command: Options of find-lr.
        tick: Called after every step.

    Raises:
        UsageError: A value is wrong, or the first loss is not finite.
    """
    rates = rising_rates(command.low, command.high, command.rates)
    config = replace(
        command.settings,
        steps=command.rates,
        schedule="constant",
        learning_rate=command.high,
        lr_min=0.0,
        lr_warmup_epochs=0.0,
        rho_schedule="constant",
        rho_min=0.0,
        ema=None,
    )
    check_values(config)
    run = build_training(config, usable_device(config.device), lr=_schedule(rates))
    run.model.train()
    step = _CountedStep(run, tick)
    with precision(config, run.device):
        found = find_learning_rate(step, run.state, rates)
    return found, step.skipped


@dataclass
class _CountedStep:
    """The step of a training, for `find_learning_rate`.

    Attributes:
        run: The training, with a schedule of the rates.
        tick: Called after every step.
        skipped: The number of steps that were skipped so far.
    """

    run: Training
    tick: Callable[[], None]
    skipped: int = 0

    def __call__(self, state: State, number: int, rate: float) -> tuple[State, float]:
        """Run one step; the schedule has its rate."""
        self.run.state = state
        state, info = self.run.take_step(self._batch(number), number)
        self.skipped += not info["keep"].item()
        self.tick()
        return state, info["loss"].item()

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        (batch,) = batches(
            self.run.data.train,
            self.run.order(number, number + 1),
            augment=self.run.augment,
            seed=self.run.config.seed,
            first_step=number,
        )
        return batch


def _schedule(rates: Sequence[float]) -> gf.Schedule:
    def at(count: Tensor, state: State, **extra: Any) -> tuple[Tensor, State]:
        k = _tree.scalar(count, count)
        return torch.as_tensor(rates, dtype=k.dtype, device=k.device).take(count), state

    return gf.Schedule(at, rates[-1], rates[0])


# --- What is printed and written ---


ROWS = 12
"""Number of rates in the table, in addition to the one with the lowest loss."""
REASON = "a tenth of the rate with the lowest smoothed loss (range test, Smith 2017)"


def table_of(found: RateTest) -> Table:
    """Build a table of some of the rates, with the one of the lowest smoothed loss."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("learning rate", "loss", "smoothed"):
        table.add_column(heading, justify="right")
    table.add_column("")
    every = max(1, len(found.rates) // ROWS)
    for place, numbers in enumerate(zip(found.rates, found.losses, found.smoothed, strict=True)):
        rate, loss, smoothed = numbers
        lowest = rate == found.lowest
        if place % every == 0 or lowest:
            mark = "lowest smoothed loss" if lowest else ""
            table.add_row(f"{rate:.2e}", f"{loss:.4g}", f"{smoothed:.4g}", mark)
    if found.diverged is not None:
        table.add_row(f"{found.diverged:.2e}", "", "", "diverged")
    return table


def suggestion_text(found: RateTest, high: float, skipped: int) -> str:
    """Return the suggestion and its reason in one or two sentences."""
    if skipped == len(found.losses):
        return (
            "no suggestion: the filter skipped every step, so no rate had an effect. Loosen the "
            "filter (--agree, --consensus)."
        )
    if found.suggested is None:
        return (
            "no suggestion: the smoothed loss does not fall. Give a smaller --low, or more --rates."
        )
    said = f"suggested: --learning-rate {found.suggested:.2g}, {REASON}."
    if found.diverged is None:
        said += f" The loss did not diverge up to --high {high:g}: a larger one may be lower still."
    return said


def picture(found: RateTest, title: str) -> bytes:
    """Draw the losses against the rates as a PNG."""
    figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, ".", color="#56B4E9", markersize=4, label="one batch")
    axes.plot(found.rates, found.smoothed, color="#0072B2", linewidth=2, label="smoothed")
    marks = (("suggested", found.suggested, "#D55E00"), ("diverged", found.diverged, GREY))
    for label, rate, colour in marks:
        if rate is not None:
            axes.axvline(rate, color=colour, linestyle="--", label=f"{label}: {rate:.2g}")
    high = max(found.losses[: max(2, len(found.losses) // 10)])
    axes.set_ylim(min(0.0, *found.smoothed), 1.5 * high if high > 0 else None)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="loss before the step", title=title)
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def find_lr(command: FindLrCommand) -> int:
    """Run ``gradfilter find-lr``.

    Returns:
        The exit code: 0, or 1 without a suggestion.

    Raises:
        UsageError: A value is wrong, or the first loss is not finite.
    """
    if started_processes() > 1:
        raise UsageError("torchrun: find-lr needs one process. Run gradfilter find-lr alone.")
    out = None if command.out is None else named_directory(command.out)
    with progress_bar(Console(stderr=True), "rates", command.rates, 0) as tick:
        found, skipped = run_rate_test(command, tick)
    # A file or pipe has no width, and 80 columns would break the lines.
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(found))
    if skipped:
        print(f"{skipped} of {len(found.losses)} steps were skipped by the filter")
    if skipped == len(found.losses):
        found = replace(found, suggested=None)  # the differences of the losses are noise
    said = suggestion_text(found, command.high, skipped)
    print(said)
    if out is not None:
        write_json(out / "find-lr.json", {**_facts(command, found, skipped), "verdict": said})
        write_bytes(out / "find-lr.png", picture(found, _title(command.settings)))
        print(f"wrote {printable(out)}/: find-lr.json and find-lr.png")
    return 0 if found.suggested is not None else 1


def _facts(command: FindLrCommand, found: RateTest, skipped: int) -> dict[str, Any]:
    return {
        "command": "find-lr",
        **{name: getattr(command, name) for name in ("low", "high")},
        "settings": plain_settings(command.settings),
        **asdict(found),
        "skipped": skipped,
        "versions": {"gradfilter": gf.__version__, "torch": torch.__version__},
    }


def _title(config: TrainConfig) -> str:
    return f"{printable(config.model)} on {printable(config.data)}, {config.optimizer}"
