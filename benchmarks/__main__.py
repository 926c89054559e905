"""Run all benchmarks, collect their results in one file per device, and write a page with them.

Every part is a script of this folder and runs in its own process. So the memory allocator, the
settings of torch and hooks of other libraries are new for every part, and every part can choose its
number of threads. If a part fails, the others still run, and the failure is reported at the end.
The file of the device is written again after every part, the page at the end. _collected.py
explains the files.

    python -m benchmarks                              # about an hour on two cores
    python -m benchmarks --only update sharpness
    python -m benchmarks --quick                      # minutes; a test, its times mean nothing
    python -m benchmarks --device cuda
    python -m benchmarks --studies                    # also label noise and double descent: hours
    python -m benchmarks --page                       # writes the page and measures nothing

The studies measure accuracy and not time. A study runs if it is named with ``--only``, or with
``--studies``, or in a quick run if it has a small version. A quick run writes its results into a
temporary folder, or into ``--out``.
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
                        help=f"run only these parts: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--studies", action="store_true", help="run also the long studies")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--rounds", type=int, help="timed rounds (default: the usual number of each script)"
    )
    parser.add_argument("--quick", action="store_true", help="use few rounds and small sizes")
    parser.add_argument("--out", type=Path, help="folder for the results and the page")
    parser.add_argument("--page", action="store_true", help="write the page and measure nothing")
    options = parser.parse_args(arguments)
    for name in options.only:
        if not PARTS[name].runs_on(options.device):
            parser.error(f"{name} does not run with --device {options.device}.")
        if options.quick and PARTS[name].quick is None:
            parser.error(f"{name} has no quick version. Omit --quick; it takes hours.")
    return options


def chosen(options: argparse.Namespace) -> list[str]:
    """Return the names of the parts to run."""
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
    """Run a part; its output goes to the terminal."""
    return subprocess.run(line, cwd=ROOT, check=False).returncode


def main(arguments: list[str] | None = None, run: Run = run) -> int:
    """Run the chosen parts; return 1 if a part failed, and otherwise 0."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("Expected a CUDA device, found none. Omit --device to measure this CPU.")
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
    # Results of small sizes must not replace the committed results, which pages cite.
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
