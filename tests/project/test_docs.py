"""The documentation builds, contains every public name, and shows the current architecture."""

import inspect
import math
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from benchmarks.cited import citations
from docs import _architecture, _badges, _idea
from docs import _costs as costs

import gradfilter as gf
from _cases import CASES
from gradfilter import diagnostics, distributed, interop, schedules, testing

ROOT = Path(__file__).parents[2]
API = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
PUBLIC = {
    f"{package.__name__}.{name}": thing
    for package in (gf, diagnostics, distributed, interop, schedules, testing)
    for name, thing in inspect.getmembers(package, callable)
    if not name.startswith("_") and name not in ("Info", "Params", "Plan", "Tree", "link")
} | {
    f"gradfilter.interop.{name}": getattr(interop, name)
    for name in ("FilteredModule", "FilteredTrainer")
}

SOURCES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built without a network, where every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_strictly_with_all_that_it_links_to(site):
    assert (site / "index.html").exists()
    for link in re.findall(r'href="([^"#:]+)["#]', (site / "choosing.html").read_text()):
        assert (site / link).exists(), link


def test_numbers_lead_to_their_value_in_a_table(site):
    """Links to numbers on all pages of the site, compared with the citations of the sources."""
    tables = {
        path.name: dict(re.findall(r'<td id="([^"]+)"(?: title="[^"]*")?>([^<]*)</td>', text))
        for path in (site / "benchmarks" / "results").glob("*.html")
        if (text := path.read_text())
    }
    wrong, seen = [], 0
    for source in sorted((ROOT / "docs").rglob("*.md")):
        built = site / source.relative_to(ROOT / "docs").with_suffix(".html")
        links = r'<a href="[^"]*benchmarks/results/([^"/#]+\.html)#([^"]+)">([^<]+)</a>'
        found = re.findall(links, built.read_text())
        cited = list(citations(source))
        assert len(found) == len(cited), source
        for (table, anchor, text), citation in zip(found, cited, strict=True):
            seen += 1
            shown = tables[table].get(unescape(anchor))
            value = None if shown is None else float(shown.replace(",", ""))
            if text != citation.text or value != pytest.approx(citation.value, rel=1e-3):
                wrong.append((source.name, text, table, anchor, shown))
    assert not wrong
    assert seen > 500


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_blocks_are_apart_from_the_text_around_them(source):
    """Some readers of Markdown see a table, a heading or code only between empty lines."""
    lines, in_code = ["", *source.read_text().splitlines(), ""], False
    near = zip(lines[:-2], lines[1:-1], lines[2:], strict=True)
    for number, (before, line, after) in enumerate(near, start=1):
        if line.startswith("```"):
            assert not (after if in_code else before).strip(), number
            in_code = not in_code
        elif not in_code:
            if line.startswith("#"):
                assert not before.strip() and not after.strip(), number
            if line.startswith("|"):
                assert all(other[:1] in ("", "|") for other in (before, after)), number
                assert not set(before + line) <= set("|- :") or not before.strip(), number


def test_no_page_shows_markup_that_only_a_builder_reads(site):
    """Pages are read on a code host, where ``[name][]`` is no link, and docstrings on the site."""
    for source in SOURCES:
        prose = re.sub(r"^```.*?^```|`[^`]*`", "", source.read_text(), flags=re.DOTALL | re.M)
        assert not re.search(r"\]\[\w*\]", prose), source
    for built in set(site.rglob("*.html")) - set((site / "benchmarks").rglob("*.html")):
        article = re.search(r"<article.*?</article>", built.read_text(), re.DOTALL)
        blocks = r"<(pre|code|script|style|math)\b.*?</\1>"
        prose = re.sub(blocks, "", article[0] if article else "", flags=re.DOTALL)
        text = unescape(re.sub(r"<[^>]+>", " ", prose))
        assert not re.search(r".{0,40}(::|\]\[|``).{0,40}", text), built


def test_the_site_needs_nothing_from_the_net(site):
    pages = "\n".join(page.read_text() for page in site.rglob("*.html"))
    sources = re.findall(r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="(https?://[^"]+)"', pages)
    assert not sources


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_its_place_in_the_reference(name, site):
    assert API.count(f"::: {name}\n") == 1
    assert any(f'id="{name}"' in page.read_text() for page in (site / "api").glob("*.html"))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    text = inspect.getdoc(PUBLIC[name])
    first = text.splitlines()[0]
    assert len(first.split()) >= 3 and first.endswith(".")


def test_the_reference_has_no_name_that_is_not_public():
    listed = set(re.findall(r"^::: (\S+)$", API, re.MULTILINE))
    types = {f"gradfilter.{name}" for name in ("Info", "Params", "Plan", "Tree")}
    assert listed == set(PUBLIC) | types


def test_the_picture_of_the_architecture_is_the_codes():
    assert _architecture.TARGET.read_text() == _architecture.drawn(), "python docs/_architecture.py"


def test_the_picture_of_the_idea_is_computed():
    assert _idea.TARGET.read_text() == _idea.drawn(), "python docs/_idea.py"


def test_the_picture_of_the_idea_shows_the_filter_at_work():
    steps, plain, weights, chosen, half = _idea.computed()
    total = (steps / steps.norm(dim=1, keepdim=True)).sum(0)
    axis = math.atan2(*total.flip(0).tolist())
    for angle, has_weight in ((half - 0.01, True), (half + 0.01, False)):  # at the edge of the cone
        row = torch.tensor([math.cos(axis + angle), math.sin(axis + angle)], dtype=torch.float64)
        rows = {"w": torch.stack([row, total - row])}
        out = gf.consensus_filter(min_accepted=1).update(rows, {}, {"w": torch.zeros(2).double()})[
            2
        ]
        assert bool(out["weights"][0] > 0) == has_weight
    assert (weights == 0).nonzero().flatten().tolist() == [7, 8]  # the wrong labels
    assert chosen.norm() > 2 * plain.norm()


@pytest.mark.parametrize("name", _badges.facts())
def test_the_badges_say_what_is_so(name):
    badge = (_badges.TARGET / f"badge-{name}.svg").read_text()
    assert badge == _badges.drawn(name, _badges.facts()[name]), "python docs/_badges.py"


COMBINE = {"scheduled", "masked", "partition", "freeze", "gate", "named", "every", "late", "chain"}


def test_the_table_of_costs_is_that_of_the_code():
    page = costs.PAGE.read_text()
    assert costs.with_table(page) == page, "python docs/_costs.py writes it"


def test_the_table_of_costs_has_every_transform():
    shown = {name for call in costs.SHOWN for name in re.findall(r"\w+(?=\()", call)}
    assert shown >= set(CASES) - COMBINE - {"transform"}
