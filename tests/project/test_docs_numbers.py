"""Every measured number in the documentation equals the number in the file that it cites."""

import json
import re
from pathlib import Path

import pytest
from benchmarks.cited import CITATION, citations, main

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_numbers_are_those_of_the_files(page):
    wrong = {cited.link: cited.right for cited in citations(page) if cited.right != cited.text}
    assert not wrong, "python -m benchmarks.cited --write docs puts the files' values in"


PERCENT = re.compile(r"(?<!\[)\b\d+(?:\.\d+)? %")


def test_every_accuracy_of_the_readme_is_cited():
    text = CITATION.sub("", (ROOT / "README.md").read_text())
    columns = {"0 %", "30 %", "50 %"}  # of wrong labels: settings, not results
    assert set(PERCENT.findall(text)) <= columns


def test_there_are_numbers():
    assert sum(len(list(citations(page))) for page in PAGES) > 50


@pytest.fixture
def page(tmp_path):
    contents = {
        "models": [
            {
                "name": "mlp",
                "size": 8,
                "ratio": 1.684,
                "share": 0.9444,
                "a b": 1234.5,
                "a / b": 3.21,
            },
            {"name": "mlp", "size": 32, "bytes": 50_400_000, "low": 0.473},
        ]
    }
    (tmp_path / "x.json").write_text(json.dumps(contents))
    (tmp_path / "page.md").write_text("")
    return tmp_path / "page.md"


@pytest.mark.parametrize(
    ("text", "walk", "right"),
    [
        ("1.7", "0/ratio", "1.7"),
        ("9.99 times", "name=mlp&size=8/ratio", "1.68 times"),
        ("94.4 %", "0/share", "94.4 %"),
        ("3 MB", "1/bytes", "50 MB"),
        ("1,000", "0/a%20b", "1,234"),
        ("4.0", "0/a%20%2F%20b", "3.2"),
        (".5", "1/low", ".5"),
    ],
)
def test_a_citation_is_rounded_as_it_is_written(page, text, walk, right):
    page.write_text(f"So [{text}](x.json#/models/{walk}) it is.")
    assert [cited.right for cited in citations(page)] == [right]


@pytest.mark.parametrize("walk", ["name=mlp/ratio", "0/speed", "name=vit/ratio", "7/ratio"])
def test_a_citation_that_leads_nowhere_is_an_error_that_names_page_and_link(page, walk):
    page.write_text(f"[1](x.json#/models/{walk})")
    with pytest.raises(KeyError, match=r"page\.md: .*x\.json"):
        list(citations(page))


def test_the_command_says_what_is_wrong_and_mends_it(page, capsys):
    page.write_text("[1.70](x.json#/models/0/ratio) and [93.0 %](x.json#/models/0/share)")
    assert main([str(page.parent)]) == 1
    assert "1.70, the file says 1.68" in capsys.readouterr().out
    assert main(["--write", str(page.parent)]) == 0
    assert page.read_text().startswith("[1.68](") and "[94.4 %](" in page.read_text()
    assert main([str(page.parent)]) == 0
