"""The hyperparameters of a chain as a flat dict."""

import json

import pytest
import torch

import gradfilter as gf


def is_head(name):
    return name.startswith("head")


def test_every_argument_has_a_name_that_info_and_state_use():
    update = gf.chain(gf.agc_clip(0.01), gf.agc_clip(0.02), gf.sgd(0.1))
    found = gf.hyperparameters(update)
    assert found["agc_clip/clipping"] == 0.01 and found["agc_clip_2/clipping"] == 0.02
    assert found["sgd/lr"] == 0.1 and found["sgd/nesterov"] is False  # a default
    params = {"w": torch.ones(2)}
    assert {name.split("/")[0] for name in found} == set(update.init(params))


def test_parts_inside_arguments_have_longer_names():
    head = gf.chain(gf.clip_by_global_norm(1.0), gf.adam(0.01, betas=(0.8, 0.95)))
    update = gf.partition({"head": head, "rest": gf.freeze()}, lambda name: "head")
    found = gf.hyperparameters(gf.chain(update))
    assert found["partition/branches/head/clip_by_global_norm/max_norm"] == 1.0
    assert found["partition/branches/head/adam/betas/0"] == 0.8
    assert found["partition/branches/head/adam/betas/1"] == 0.95
    assert found["partition/branches/rest/names"] is None
    masked = gf.hyperparameters(gf.chain(gf.masked(gf.agc_clip(0.5), is_head), gf.sgd(0.1)))
    assert masked["agc_clip/transform/clipping"] == 0.5 and masked["agc_clip/names"] == "is_head"


def test_what_is_no_number_is_a_text_and_no_tensor_is_read():
    lr = gf.schedules.cosine(0.1, 100)
    update = gf.chain(gf.scheduled(gf.agc_clip, clipping=lr), gf.sgd(torch.ones((), device="meta")))
    found = gf.hyperparameters(update)
    assert found["agc_clip/clipping"] == repr(lr) == "cosine(max_value=0.1, total_steps=100)"
    assert found["agc_clip/factory"] == "agc_clip" and found["sgd/lr"] == "tensor of shape ()"
    assert json.loads(json.dumps(found)) == found


def test_a_transform_alone_has_its_name_in_front():
    assert gf.hyperparameters(gf.clip_per_row(2.0)) == {
        "clip_per_row/max_norm": 2.0,
        "clip_per_row/per_leaf": False,
    }


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="expected a transform or a chain, found function"):
        gf.hyperparameters(gf.agc_clip)
