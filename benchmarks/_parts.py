"""The parts of `python -m benchmarks`: scripts of this folder; each writes one file."""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """A script and its arguments.

    Attributes:
        script: The module in this folder.
        arguments: The arguments of every run.
        quick: The further arguments of a quick run; None if there is no quick version.
        study: True for a study, which takes hours, and runs only on CPUs.
        only_cuda: True if the part needs a GPU.
    """

    script: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = ("--quick",)
    study: bool = False
    only_cuda: bool = False

    def runs_on(self, device: str) -> bool:
        """Return whether the part runs on a device."""
        return device == "cuda" if self.only_cuda else device == "cpu" or not self.study


# The key is the name of the file: NAME-cpu.json. A quick run omits the models and the sizes that
# take longest.
PARTS = {
    "fused_vs_looped": Part(
        "fused_vs_looped", quick=("--quick", "--models", "mlp", "lenet", "gpt")
    ),
    "growth": Part("growth"),
    "memory": Part("memory"),
    "rules": Part("rules"),
    "per_sample": Part("per_sample"),
    "layers": Part("layers"),
    "rows_along": Part(
        "rows_along", quick=("--quick", "--models", "mlp-small", "--backend", "graph")
    ),
    "padded": Part("padded", quick=("--quick", "--models", "bert-32")),
    "language": Part("language", quick=("--quick", "--models", "gpt2", "--rounds", "1")),
    "sharpness": Part("sharpness", quick=("--quick", "--models", "mlp")),
    "update": Part("update"),
    "compiled": Part("compiled", quick=("--quick", "--models", "mlp", "--backend", "graph")),
    "python_calls": Part("python_calls"),
    "distributed": Part("distributed", quick=("--quick", "--models", "mlp-0.1M", "--worlds", "2")),
    "stats": Part("stats", quick=("--quick", "--classes", "10", "--rounds", "1")),
    "gpu": Part("gpu", only_cuda=True),
    "label_noise": Part("label_noise", ("--part", "rules"), quick=None, study=True),
    "default_rule": Part("label_noise", ("--part", "default"), quick=None, study=True),
    "clean_labels": Part("label_noise", ("--part", "clean"), quick=None, study=True),
    "one_sam": Part("label_noise", ("--part", "one_sam"), quick=None, study=True),
    "rule_search": Part("rule_search", quick=None, study=True),
    "double_descent_features": Part("double_descent", ("--part", "features"), study=True),
    "double_descent_widths": Part("double_descent", ("--part", "widths"), study=True),
}


def command(
    part: Part, *, device: str, out: Path, quick: bool = False, rounds: int | None = None
) -> list[str]:
    """Return the command that runs a part in its own process."""
    line = [sys.executable, "-m", f"benchmarks.{part.script}", "--out", str(out), *part.arguments]
    line += (part.quick or ()) if quick else ()
    if not part.study:
        line += ["--device", device, *(["--rounds", str(rounds)] if rounds else [])]
    return line
