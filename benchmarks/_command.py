"""Options and facts that the command lines of all benchmarks share."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks._machine import machine

RESULTS = Path(__file__).parent / "results"


def parser(
    description: str, parts: Iterable[str], *, called: str = "models", rounds: int = 20
) -> argparse.ArgumentParser:
    """Return a parser for the device, the parts of a benchmark, the rounds and the output."""
    parts = list(parts)
    command = argparse.ArgumentParser(description=description.splitlines()[0])
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument(f"--{called}", nargs="+", choices=parts, default=parts)
    command.add_argument("--rounds", type=int, help=f"timed rounds ({rounds}; with --quick 3)")
    command.add_argument("--quick", action="store_true", help="use few rounds and small sizes")
    command.add_argument("--out", type=Path, default=RESULTS)
    command.set_defaults(usual_rounds=rounds)
    return command


def rounds_of(options: argparse.Namespace) -> int:
    """Return the number of timed rounds."""
    return options.rounds or (3 if options.quick else options.usual_rounds)


def facts(benchmark: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the facts about the run and the machine for the head of the JSON."""
    return {
        "benchmark": benchmark,
        **machine(torch.device(options.device)),
        "rounds": rounds_of(options),
        "quick": options.quick,
    }


def caption(facts: dict[str, Any]) -> str:
    """Return the line under a table."""
    return "{device_name}, {threads} threads, torch {torch}, {rounds} rounds".format(**facts)
