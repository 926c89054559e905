"""How the published values of parts of the rows are joined, and what rules are refused."""

import pytest
import torch

import gradfilter as gf
from gradfilter._row_rules import RowRules, joined_rules


def test_values_of_parts_are_joined():
    rules = RowRules(
        {
            **{"norm": "rows", "fraction": "mean", "keep": "any", "lr": "same", "w": "shares"},
            "total": "sum",
        }
    )
    outs = [
        {"norm": torch.tensor([1.0]), "fraction": torch.tensor(0.0), "keep": torch.tensor(False)},
        {"norm": torch.tensor([2.0, 3, 4]), "fraction": torch.tensor(1.0)},
    ]
    outs[1]["keep"] = torch.tensor(True)
    for out in outs:
        out |= {"lr": torch.tensor(0.5), "w": torch.ones(2), "total": torch.tensor(1.5)}
    found = rules.joined(outs, [1, 3])
    assert list(found) == ["norm", "fraction", "keep", "lr", "total"]
    assert found["norm"].tolist() == [1, 2, 3, 4] and found["fraction"] == 0.75
    assert found["keep"] and found["lr"] == 0.5 and found["total"] == 3
    assert not rules.joined(outs[:1], [1])["keep"]


def test_what_a_transform_sees_of_a_part():
    rules = RowRules({"norm": "rows", "keep": "any", "lr": "same"}, frozenset({"late"}))
    assert rules.seen({"late": 1, "other": 2}) == {"late": 1}
    assert RowRules({}, None).seen({"late": 1, "other": 2}) == {"late": 1, "other": 2}
    assert rules.for_later({"norm": 1, "keep": 2, "lr": 3}) == {"norm": 1, "lr": 3}


def test_rules_of_a_nested_chain():
    a, b = RowRules({"keep": "any"}, frozenset({"x"})), RowRules({"norm": "rows"})
    joined = joined_rules({"a": a, "b": b}, keeps=1)
    assert joined == RowRules({"keep": "any", "b/norm": "rows"}, frozenset({"x"}))
    assert joined_rules({"a": a, "b": RowRules({}, None)}, keeps=1).reads is None
    assert joined_rules({"a": a, "b": None}, keeps=1) is None
    assert joined_rules({"a": a, "b": b}, keeps=2) is None  # (a or b) and (c or d)
    assert joined_rules({"a": a, "b": RowRules({}, divisor=len)}, keeps=1) is None


def test_a_value_without_a_join_is_refused():
    make = lambda **given: gf.transform("mine", "rows -> rows", lambda *a, **k: a, **given)
    with pytest.raises(ValueError, match=r"one join for each published value \['norm'\], found"):
        make(publishes=("norm",), joins={})
    with pytest.raises(ValueError, match="one join for each published value"):
        make(joins={"norm": "rows"})
    with pytest.raises(ValueError, match=r"expected joins among .*, found .'median'"):
        make(publishes=("norm",), joins={"norm": "median"})
    assert make(publishes=("norm",)).row_rules is None
