"""Print help and version of `python -m gradfilter`, with or without the extras."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib import metadata

import gradfilter

HELP = """\
usage: gradfilter COMMAND [options]

commands:
  demo         digits with wrong labels, trained in three ways, in a minute
  train        one training: data, model, filters, schedules, checkpoints
  find-lr      a learning rate for the rule of a training
  stats        measure its checkpoints: Jacobians, sharpness, agreement
  sweep        many trainings, by several workers or machines
  report       tables and figures of finished runs
  runs         list trainings: state, epoch, loss, accuracy

options:
  -h, --help   this text; after a command, the options of that command
  --version    the version
"""


def answer(args: Sequence[str]) -> str | None:
    """Return the text for no arguments, help or version; None for a command."""
    match list(args):
        case []:
            return about()
        case ["-h" | "--help", *_]:
            return HELP
        case ["--version", *_]:
            return f"gradfilter {gradfilter.__version__}\n"
    return None


def about() -> str:
    """Describe the program, the installation and the next steps on one screen."""
    import torch  # takes seconds, which help and version do not need

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads, no CUDA"
    )
    here = f"torch {torch.__version__}, Python {platform.python_version()}, {device}"
    return "\n".join(
        [
            f"gradfilter {gradfilter.__version__}: choose which gradients a network follows.",
            "",
            "    update = chain(agree_filter(0.97), agc_clip(0.01), sgd(lr))",
            "",
            f"Found here: {here}.",
            *_extras(),
            "",
            HELP,
        ]
    )


def _extras() -> list[str]:
    """Return the extras that are complete according to the package's metadata."""
    try:
        requirements = metadata.requires("gradfilter") or []
    except metadata.PackageNotFoundError:  # the program runs from a source tree
        return []
    needs: dict[str, list[str]] = {"lab": [], "interop": []}
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", requirement)
        if found and found[2] in needs:
            needs[found[2]].append(found[1])
    lines = []
    for extra, purpose in (("lab", "the commands below"), ("interop", "Lightning, transformers")):
        missing = [name for name in needs[extra] if not _installed(name)]
        state = f'not installed: pip install "gradfilter[{extra}]"' if missing else "installed"
        lines.append(f"Extra {extra}, for {purpose}: {state}.")
    return lines


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
