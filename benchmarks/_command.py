"""What the command lines of all benchmarks have in common."""

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
    """Which device, which parts of the benchmark, how many rounds, and where the JSON goes."""
    parts = list(parts)
    command = argparse.ArgumentParser(description=description.splitlines()[0])
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument(f"--{called}", nargs="+", choices=parts, default=parts)
    command.add_argument("--rounds", type=int, help=f"timed rounds ({rounds}; with --quick 3)")
    command.add_argument("--quick", action="store_true", help="few rounds, small sizes")
    command.add_argument("--out", type=Path, default=RESULTS)
    command.set_defaults(usual_rounds=rounds)
    return command


def rounds_of(options: argparse.Namespace) -> int:
    return options.rounds or (3 if options.quick else options.usual_rounds)


def facts(benchmark: str, options: argparse.Namespace) -> dict[str, Any]:
    """What was run where, for the head of the JSON."""
    return {
        "benchmark": benchmark,
        **machine(torch.device(options.device)),
        "rounds": rounds_of(options),
        "quick": options.quick,
    }


def caption(facts: dict[str, Any]) -> str:
    """One line under a table."""
    return "{device_name}, {threads} threads, torch {torch}, {rounds} rounds".format(**facts)
