"""Sequences of numbers from texts, with wrong labels and corrupted sequences on purpose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradfilter.lab.data._newsgroups import PADDING, Vocabulary
from texts import KINDS, corrupt, sources

CLEAN, VALIDATION, TEST = 50, 400, 800


@dataclass(frozen=True)
class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences of words as numbers, with what is wrong with them.

    Attributes:
        inputs: input_ids and attention_mask (n, T), and labels (n,), which may be wrong.
        wrong: Whether the label is wrong. (n,) bool.
        kinds: What happened to the sequence, a place in `KINDS`. (n,)
    """

    inputs: dict[str, Tensor]
    wrong: Tensor
    kinds: Tensor

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.wrong)

    def __getitem__(self, chosen: Any) -> dict[str, Tensor]:
        """Return a sequence, or a batch, as the arguments of the model."""
        return {name: values[chosen] for name, values in self.inputs.items()}

    @property
    def bad(self) -> Tensor:
        """Return which sequences say nothing right about their label. (n,) bool."""
        return self.wrong | (self.kinds > KINDS.index("shuffled"))


@dataclass(frozen=True)
class Data:
    """All sequences of an experiment; ``validation`` is as wrong as ``train``."""

    words: int
    classes: int
    train: Sequences
    validation: Sequences
    clean: Sequences
    test: Sequences


def load(name: str, seed: int, wrong: float, corrupted: float, length: int, words: int) -> Data:
    """Return the data of an experiment: all draws depend on the seed only.

    Args:
        name: "newsgroups" or "made-up".
        seed: Seed of the splits, of the wrong labels and of the corrupted sequences.
        wrong: Fraction of wrong labels in ``train`` and ``validation``; each other class is equally
            probable.
        corrupted: Fraction of corrupted sequences there, a third of each kind.
        length: Number of words that are read of each text.
        words: Size of the vocabulary, from ``train`` and ``clean`` as they are.
    """
    (texts, labels), (test_texts, test_labels), foreign = sources(name)
    random, classes, n = np.random.default_rng(seed), int(labels.max()) + 1, len(texts)
    order, cut = random.permutation(n), min(VALIDATION, n // 5)
    is_wrong = random.random(n) < wrong
    offsets, draws = random.integers(1, classes, n), random.random(n)
    kinds = np.where(random.random(n) < corrupted, 1 + (3 * draws).astype(int), 0)
    clean, validation, train = order[:CLEAN], order[CLEAN : CLEAN + cut], order[CLEAN + cut :]
    is_wrong[clean], kinds[clean] = False, 0
    seen = [corrupt(t, KINDS[k], foreign, random) for t, k in zip(texts, kinds, strict=True)]
    given = np.where(is_wrong, (labels + offsets) % classes, labels)
    known = Vocabulary.of((seen[i] for i in (*clean, *train)), words)

    def part(
        chosen: np.ndarray, texts: Sequence[str], labels: np.ndarray, *rest: np.ndarray
    ) -> Sequences:
        ids = torch.from_numpy(known.encode([texts[i] for i in chosen], length))
        inputs = {"input_ids": ids, "attention_mask": (ids != PADDING).long()}
        inputs["labels"] = torch.from_numpy(labels[chosen])
        return Sequences(inputs, *(torch.from_numpy(values[chosen]) for values in rest))

    noisy = seen, given, is_wrong, kinds
    m = len(test_texts)
    fixed = np.random.default_rng(0).permutation(m)[:TEST]  # the same for every seed
    right = test_texts, test_labels, np.zeros(m, dtype=bool), np.zeros(m, dtype=int)
    parts = (part(chosen, *noisy) for chosen in (train, validation, clean))
    return Data(len(known), classes, *parts, part(fixed, *right))


def order(n: int, batch: int, steps: int, seed: int) -> Tensor:
    """Return which sequences each step takes, in shuffled passes over all. (steps, batch)."""
    random = torch.Generator().manual_seed(seed)
    passes = -(-steps * batch // n)
    drawn = torch.cat([torch.randperm(n, generator=random) for _ in range(passes)])
    return drawn[: steps * batch].view(steps, batch)
