"""The setting of one training, and its options on the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from data import Data, load
from model import Classifier, new_model
from rules import RULES


@dataclass(frozen=True)
class Setting:
    """Everything that one training depends on.

    Attributes:
        rule: A name in `RULES`.
        data: "newsgroups", or "made-up" texts, which need no package.
        wrong: Fraction of wrong labels in the training.
        corrupted: Fraction of corrupted sequences in the training.
        lr: Learning rate of AdamW.
        seed: Seed of the splits, the noise, the parameters and the batches.
        steps: Number of steps.
        batch: Sequences per step, of all processes together.
        length: Words per sequence.
        words: Size of the vocabulary.
        every: Number of steps between two evaluations.
    """

    rule: str = "plain"
    data: str = "newsgroups"
    wrong: float = 0.0
    corrupted: float = 0.0
    lr: float = 0.004
    seed: int = 0
    steps: int = 300
    batch: int = 32
    length: int = 32
    words: int = 4000
    every: int = 50

    def load(self) -> Data:
        """Return the data."""
        return load(self.data, self.seed, self.wrong, self.corrupted, self.length, self.words)

    def model(self, data: Data) -> Classifier:
        """Return the model before the first step."""
        return new_model(data.words, data.classes, self.length, self.seed)


def parsed(about: str, argv: Sequence[str] | None) -> Setting:
    """Return the setting that a command line asks for."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    for field in fields(Setting):
        chosen = {"choices": [*RULES]} if field.name == "rule" else {}
        default = field.default
        parser.add_argument(f"--{field.name}", type=type(default), default=default, **chosen)
    return Setting(**vars(parser.parse_args(argv)))
