"""Files of results become pages on which every value has its own anchor."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from docs._results import anchors, at, locate, page

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
CONTENTS = {
    "benchmark": "rules",
    "torch": "2.14.1",
    "peers": {"optax": "0.2"},
    "rates": [0.1, 0.01],
    "ratio": {"a b": 1.5, "a / b": 2.5, "a_b": 3.5},
    "rules": [
        {"rule": "plain", "rate": 0.1, "noise": {"0.3": {"mean": 0.94444, "values": [0.9, None]}}},
        {"rule": "<clip> *1*", "rate": 0.1, "noise": {"0.3": {"mean": 0.5, "values": [True]}}},
    ],
    "times": {"loop": {"s": {"median": 1.0}}, "fused": {"s": {"median": 0.25}, "bytes": 4096}},
}


def identified(text):
    """Return what is shown at every anchor of a page."""
    return {
        anchor: shown
        for kind in ("td", "span")
        for anchor, shown in re.findall(rf'<{kind} id="([^"]+)"[^>]*>(.*?)</{kind}>', text)
    }


def leaves(value, place=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for step, item in inner:
        if isinstance(item, (dict, list)) and item:
            yield from leaves(item, (*place, step))
        else:
            yield (*place, step), item


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(CONTENTS))
    return page(path)


def test_a_value_is_shown_at_its_anchor(written):
    shown = identified(written)
    for walk, text in {
        "/ratio/a%20b": "1.5",
        "/ratio/a%20%2F%20b": "2.5",
        "/rules/rule=plain/noise/0.3/mean": "0.9444",
        "/rules/1/noise/0.3/mean": "0.5",
        "/times/fused/s/median": "0.25",
        "/times/fused/bytes": "4,096",
        "/rates/1": "0.01",
        "/rules/rule=plain/noise/0.3/values/1": "–",
        "/rules/1/noise/0.3/values/0": "yes",
        "/peers/optax": "0.2",
    }.items():
        assert shown[anchors(CONTENTS)[locate(CONTENTS, walk)]] == text, walk
    assert 'title="0.94444"' in written  # the exact value of a rounded one


def test_names_that_look_alike_have_different_anchors():
    names = anchors(CONTENTS)
    assert len(set(names.values())) == len(names)
    assert names[("ratio", "a b")] != names[("ratio", "a / b")]


def test_markup_in_names_is_shown_as_it_is(tmp_path):
    rules = [{"rule": "<clip> *1*", "rate": {str(n): n for n in range(20)}}]  # a section, no table
    (tmp_path / "y.json").write_text(json.dumps(CONTENTS | {"wide": rules}))
    written = page(tmp_path / "y.json")
    assert "wide, &lt;clip&gt; \\*1\\* {#wide.0}" in written
    assert '<td id="rules.1.rule">&lt;clip&gt; *1*</td>' in written


@pytest.mark.parametrize("walk", ["/rules/rule=loop", "/rules/rate=0.1/rule", "/rules/7", "/speed"])
def test_a_walk_that_leads_nowhere_is_refused(walk):
    with pytest.raises(LookupError):
        at(CONTENTS, locate(CONTENTS, walk))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_value_of_a_file_is_once_on_its_page(path):
    contents, text = json.loads(path.read_text()), page(path)
    names = anchors(contents)
    ids = Counter(re.findall(r'\bid="([^"]+)"', text) + re.findall(r"\{#(\S+)\}", text))
    assert set(ids.values()) == {1}
    missing = {
        names[place]
        for place, _ in leaves(contents)
        if place != ("benchmark",) and not ids[names[place]]  # which is the title
    }
    assert not missing
