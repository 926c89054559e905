"""Run all benchmarks, collect their results in one file per device, and write the page of them.

Every part is a script of this folder and runs in a process of its own: what one leaves in the
memory allocator, in torch's settings or in other libraries' hooks does not reach the next, and
each may choose its own number of threads. A part that fails is reported at the end, and the others
run all the same. The file of the device is written anew after every part, the page at the end; what
stands in which file, and why, is said in _collected.py.

    python -m benchmarks                              # about an hour on two cores
    python -m benchmarks --only update sharpness
    python -m benchmarks --quick                      # under five minutes; says nothing about speed
    python -m benchmarks --device cuda
    python -m benchmarks --studies                    # label noise and double descent too: hours
    python -m benchmarks --page                       # nothing is measured

The studies are science rather than timing. They run when they are named, with ``--studies``, and,
those that have a small version, in a quick run. What a quick run finds goes into a temporary
folder, or into ``--out``.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._collected import collect, folder_of_parts
from benchmarks._command import RESULTS
from benchmarks._machine import machine
from benchmarks._page import write_page
from benchmarks._parts import PARTS, command

ROOT = Path(__file__).parents[1]
Run = Callable[[Sequence[str]], int]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", default=[],
                        help=f"some parts: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--studies", action="store_true", help="the long studies, too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--rounds", type=int, help="timed rounds (each script has its usual number)"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes")
    parser.add_argument("--out", type=Path, help="folder of the results; the page goes there, too")
    parser.add_argument("--page", action="store_true", help="write the page, measure nothing")
    options = parser.parse_args(arguments)
    for name in options.only:
        if not PARTS[name].runs_on(options.device):
            parser.error(f"{name} does not run with --device {options.device}.")
        if options.quick and PARTS[name].quick is None:
            parser.error(f"{name} has no quick version. Leave --quick out; it takes hours.")
    return options


def chosen(options: argparse.Namespace) -> list[str]:
    """The names of the parts to run."""
    if options.page:
        return []
    usual = [
        name
        for name, part in PARTS.items()
        if part.runs_on(options.device)
        and (part.quick is not None if options.quick else options.studies or not part.study)
    ]
    return [name for name in PARTS if name in options.only] if options.only else usual


def run(line: Sequence[str]) -> int:
    """Run a part, whose output goes to the terminal."""
    return subprocess.run(line, cwd=ROOT, check=False).returncode


def main(arguments: list[str] | None = None, run: Run = run) -> int:
    """Returns 1 if a part failed."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("Expected a CUDA device, found none. Leave --device out to measure this CPU.")
    console = Console()
    out = _folder(options)
    target = ROOT / "docs" if out == RESULTS else out
    device_name = machine(torch.device(options.device))["device_name"]
    folder = folder_of_parts(out, options.device, device_name)
    took: dict[str, tuple[float, int]] = {}
    names = chosen(options)
    for number, name in enumerate(names, 1):
        console.rule(f"{name} ({number} of {len(names)})")
        line = command(
            PARTS[name],
            device=options.device,
            out=folder,
            quick=options.quick,
            rounds=options.rounds,
        )
        start = time.perf_counter()
        code = run(line)
        took[name] = time.perf_counter() - start, code
        if code == 0:
            collect(out, options.device, device_name)
    failed = [name for name, (_, code) in took.items() if code]
    if took:
        console.print(_table(took))
    if options.page:
        collect(out, options.device, device_name)
    if options.page or len(failed) < len(took):
        console.print(f"results: {out}\npage: {write_page(out, target)}", highlight=False)
    return int(bool(failed))


def _folder(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return Path(options.out).resolve()
    # Sizes that say nothing must not take the place of numbers that are cited.
    return Path(tempfile.mkdtemp(prefix="gradfilter-benchmarks-")) if options.quick else RESULTS


def _table(took: dict[str, tuple[float, int]]) -> Table:
    table = Table("part", "seconds", "")
    for name, (seconds, code) in took.items():
        table.add_row(
            name, f"{seconds:.0f}", f"[red]failed, exit code {code}[/red]" if code else ""
        )
    table.add_section()
    table.add_row("all", f"{sum(seconds for seconds, _ in took.values()):.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
