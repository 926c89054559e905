"""The info of a step: its entries, and its numbers for a log."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradfilter as gf


def test_scalars_stay_and_rows_become_their_mean():
    info = {
        "loss": torch.tensor(0.25, requires_grad=True),
        "keep": torch.tensor(False),
        "rule/accepted": torch.tensor([True, True, True, False]),
        "rule/count": torch.tensor([1, 2, 6, 7]),
        "rule/half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "rule/matrix": torch.arange(6.0).reshape(2, 3),
        "rule/number": 3,
    }
    found = gf.scalars(info)
    assert found == {
        **{"loss": 0.25, "keep": 0.0, "rule/accepted": 0.75, "rule/count": 4.0},
        **{"rule/half": 1.5, "rule/matrix": 2.5, "rule/number": 3.0},
    }
    assert all(type(value) is float for value in found.values())


def test_a_row_that_is_not_finite_does_not_hide_the_others_but_a_nan_of_the_loss_shows():
    nan = math.nan
    found = gf.scalars(
        {
            "loss": torch.tensor(nan),
            "agree_filter/cosine": torch.tensor([0.5, nan, 1.0]),
            "agree_filter/none": torch.tensor([nan, nan]),
            "aux": {"penalty": torch.tensor([0.5, nan, 1.0])},
        }
    )
    assert found.pop("agree_filter/cosine") == 0.75
    assert found.keys() == {"loss", "agree_filter/none", "aux/penalty"}
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(
    ("aux", "expected"),
    [
        (torch.tensor([1.0, 3.0]), {"aux": 2.0}),
        ((torch.tensor([1.0]), torch.tensor([4.0])), {"aux/0": 1.0, "aux/1": 4.0}),
        ({"a": {"b": torch.ones(2)}, "c": [torch.zeros(2)]}, {"aux/a.b": 1.0, "aux/c.0": 0.0}),
        ({}, {}),
    ],
)
def test_the_leaves_of_aux_are_named_by_their_place(aux, expected):
    assert gf.scalars({"aux": aux}) == expected


def test_what_is_not_a_real_number_is_omitted():
    info = {"a": "text", "b": None, "c": torch.tensor(1j), "d": torch.tensor(2.0), "e": [1.0]}
    assert gf.scalars(info) == {"d": 2.0}


def test_wide_entries_keep_their_digits():
    value = 1 + 2.0**-40
    assert gf.scalars({"x": torch.tensor([value, value], dtype=torch.float64)}) == {"x": value}


@pytest.mark.parametrize("wrong", [(1, 2), torch.ones(()), None])
def test_another_object_is_refused_with_the_way_out(wrong):
    with pytest.raises(TypeError, match=r"a dict, found \w+\. Unpack the result first: state, inf"):
        gf.scalars(wrong)


def test_the_info_of_a_step_is_a_plain_dict_with_aux():
    def criterion(logits, labels):
        return cross_entropy(logits, labels), {"rate": (logits.argmax(-1) == labels).float().mean()}

    model = nn.Linear(3, 2)
    update = gf.chain(gf.agree_filter(2.0), gf.sgd(0.1))
    step = gf.train_step(
        gf.model_loss(model, criterion, has_aux=True), update, microbatches=4, plan="loop"
    )
    state, info = step(step.init(model), (torch.randn(8, 3), torch.arange(8) % 2))
    assert type(info) is dict and type(state) is dict and gf.Info is dict
    assert set(state) == set(gf.TrainState.__annotations__)
    found = gf.scalars(info)
    assert found["loss"] == info["loss"].item()
    assert found["aux/rate"] == info["aux"]["rate"].mean().item()
    assert found.keys() == (info.keys() - {"aux"}) | {"aux/rate"}
