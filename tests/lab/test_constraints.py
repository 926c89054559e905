"""The constraints of an option, and the text that help shows for it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from gradfilter.lab._constraints import (
    USUAL,
    Constraint,
    at_least,
    at_most,
    below_one,
    check_fields,
    positive,
)
from gradfilter.lab._demo_config import DemoConfig
from gradfilter.lab._help import COLUMN, help_text, options_of
from gradfilter.lab._runs_config import RunsConfig
from gradfilter.lab._usage import UsageError, option_name
from gradfilter.lab.report._report_config import ReportConfig
from gradfilter.lab.stats._stats_config import StatsConfig
from gradfilter.lab.sweep._sweep_config import SweepConfig
from gradfilter.lab.train._train_config import TrainConfig

CONFIGS = [TrainConfig, StatsConfig, SweepConfig, DemoConfig, ReportConfig, RunsConfig]
EVEN = Constraint("even numbers", lambda n: n % 2 == 0, "2 is one.", each=True, shown=repr)


@dataclass(frozen=True)
class Example:
    """Do something.

    In a second paragraph.
    """

    rate: Annotated[float, positive(USUAL), at_most(9.0)] = 0.5
    """A rate."""
    decay: Annotated[float | None, below_one("a decay")] = None
    """A decay."""
    workers: Annotated[int, at_least(0)] = 0
    """A number of workers."""
    kinds: Annotated[tuple[int, ...], EVEN] = ()
    """Kinds."""
    way: Literal["short", "long"] = "short"
    """A way."""
    place: Path | None = None
    """A place."""
    quick: bool = False
    """Be quick, whatever the cost of a long sentence that takes more than one line of the help."""


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_are_allowed(config):
    check_fields(config())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rate": 0.0}, "--rate: expected a positive number, found 0.0. 0.5 is the default."),
        ({"rate": float("nan")}, "--rate: expected a positive number, found nan"),
        ({"rate": float("inf")}, "--rate: expected a positive number, found inf"),
        ({"rate": 9.5}, "--rate: expected at most 9, found 9.5."),
        ({"decay": 1.0}, "--decay: expected a decay in [0, 1), found 1.0."),
        ({"workers": -1}, "--workers: expected at least 0, found -1."),
        ({"kinds": (2, 3)}, "--kinds: expected even numbers, found 3. 2 is one."),
        ({"workers": -1, "rate": -1.0}, "--rate: expected"),  # the first field comes first
    ],
)
def test_a_value_that_is_not_allowed_is_named(settings, said):
    with pytest.raises(UsageError) as refused:
        check_fields(Example(**settings))
    assert str(refused.value).startswith(said)


def test_none_is_always_allowed():
    check_fields(Example(decay=None, kinds=()))


def test_help_lists_names_values_and_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert help_text(Example, "try", {"speed": ["quick", "way"]}) == (
        "usage: try [-h] [OPTIONS]\n"
        "\n"
        "Do something.\n"
        "\n"
        "In a second paragraph.\n"
        "\n"
        " options\n"
        f" {'-' * 58}\n"
        "  -h, --help             Show this help and exit.\n"
        "  --rate FLOAT           A rate. (default: 0.5)\n"
        "  --decay FLOAT          A decay.\n"
        "  --workers INT          A number of workers. (default: 0)\n"
        "  --kinds [INT ...]      Kinds.\n"
        "  --place PATH           A place.\n"
        "\n"
        " speed\n"
        f" {'-' * 58}\n"
        "  --way {short,long}     A way. (default: short)\n"
        "  --quick, --no-quick    Be quick, whatever the cost of a\n"
        "                         long sentence that takes more than\n"
        "                         one line of the help.\n"
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_has_a_text(config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = help_text(config, "gradfilter", {})
    assert [found.field for found in options_of(config)] == [
        field.name for field in dataclasses.fields(config)
    ]
    for found in options_of(config):
        assert found.text.endswith(tuple(".)*")), found
        assert found.positional or f"\n  {option_name(found.field)}" in text
        assert f"{' ' * (COLUMN - 24)}{found.text[:15]}" in text
