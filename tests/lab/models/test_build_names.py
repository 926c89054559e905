"""Names of models, and the one-line errors about models that cannot be built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _lab_models import images, made
from gradfilter.lab._usage import UsageError
from gradfilter.lab.models._build import FAMILIES, find_family

LEAST = {
    **{"resnet18_1": 1, "wrn_10_1": 1, "mlp_3": 1, "tv_resnet18": 1, "vit_4": 4, "cnn5_1": 4},
    **{"cnn3_1": 4, "lenet": 16, "cnn_1": 32, "vgg8": 32},
}
"""Pixels of the smallest side."""


@pytest.mark.parametrize("name", LEAST)
def test_smallest_images(name):
    least = LEAST[name]
    logits = made(name, (2, least, least + 4), 7).eval()(images((2, least, least + 4), 2))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    for height, width in [(least - 1, least), (least, least - 1)]:
        with pytest.raises(UsageError, match=f"found .*{height}.*{width}"):
            made(name, (2, height, width))


@given(
    st.sampled_from([name for name in LEAST if name != "tv_resnet18"]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
)
@settings(max_examples=30, deadline=None)
def test_images_fit_or_are_refused(name, channels, height, width):
    fits = min(height, width) >= LEAST[name]
    if name == "vit_4":
        fits = height % 4 == 0 and width % 4 == 0
    shape = (channels, height, width)
    options = {"width": 1} if name == "vgg8" else {}
    if not fits:
        with pytest.raises(UsageError, match=f"found {height} x {width}"):
            made(name, shape, **options)
        return
    x = images(shape, 2)
    before = x.clone()
    assert made(name, shape, 7, **options).eval()(x).shape == (2, 7)
    assert torch.equal(x, before)


@given(st.integers(1, 9999), st.integers(1, 9999))
@settings(max_examples=30)
def test_sizes_are_read_from_names(a, b):
    for name, label, sizes in [
        (f"resnet18_{a}", "resnet18_K", [18, a]),
        (f"cnn_{a}", "cnn_K", [a]),
        (f"cnn3_{a}", "cnn3_K", [a]),
        (f"cnn5_{a}", "cnn5_K", [a]),
        (f"vit_{a}", "vit_D", [a]),
        (f"mlp_{a}", "mlp_H", [a]),
        (f"wrn_{a}_{b}", "wrn_D_W", [a, b]),
    ]:
        assert find_family(name) == (FAMILIES[label], sizes)


def test_examples_of_the_families_are_their_own():
    for label, family in FAMILIES.items():
        for example in family.examples:
            assert find_family(example)[0] is FAMILIES[label]
        assert family.examples


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        *(("resnet_18", "resnet18"), ("resnt18_5", "resnet18_64"), ("VGG16", "vgg16")),
        *(("wrn-28-10", "wrn_28_10"), ("mlp64", "mlp_64"), ("LeNet", "lenet"), ("cnn_0", "cnn_64")),
        *(
            ("resnet18_08", "resnet18_64"),
            ("cnn_10\n", "cnn_64"),
            ("cnn3", "cnn3_16"),
            ("xyz", None),
            ("", None),
        ),
    ],
)
def test_unknown_names_get_the_list_and_a_hint(name, hint):
    with pytest.raises(UsageError) as caught:
        made(name)
    message = str(caught.value)
    assert all(label in message for label in FAMILIES)
    assert repr(name) in message
    assert "\n" not in message
    assert message.endswith(f"Did you mean {hint}?") if hint else "Did you mean" not in message


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mlp_8", {"init": "xavier"}, "--weight-init: expected one of pytorch, fixup"),
        ("mlp_8", {"additions": ["batchnorm"]}, "expected dropout-P for mlp_8, found 'batchnorm'"),
        ("tv_resnet18", {"additions": ["batchnorm"]}, "expected none for tv_resnet18"),
        ("resnet18_1", {"additions": ["dropout-0.1"]}, "expected batchnorm for resnet18_1"),
        ("resnet18_1", {"additions": ["batchnorm-2"]}, "found 'batchnorm-2'"),
        ("resnet18_1", {"additions": ["batchnorm"] * 2}, "expected batchnorm once"),
        *(
            ("mlp_8", {"additions": [f"dropout{p}"]}, "expected dropout-P with 0 < P < 1")
            for p in ("", "-", "-0", "-1", "--0.1", "-nan", "-x")
        ),
        ("mlp_8", {"width": 3}, "model keyword: expected depth, found width"),
        ("lenet", {"depth": 3}, "model keyword: expected none, found depth"),
        ("mlp_8", {"depth": 0}, "depth: expected a whole number from 1 to 1000, found 0"),
        ("vit_8", {"patch": 1.5}, "patch: expected a whole number"),
        ("vit_8", {"depth": True}, "depth: expected a whole number"),
        ("mlp_8", {"classes": 1}, "classes: expected >= 2, found 1"),
        ("mlp_8", {"shape": (8, 8)}, r"shape: expected \(channels, height, width\)"),
        ("mlp_8", {"shape": (0, 8, 8)}, r"shape: expected \(channels"),
        ("wrn_17_2", {}, "expected a depth of 6n [+] 4 in wrn_D_W, found 17"),
        ("wrn_13_2", {}, "expected a depth of 6n [+] 4 in wrn_D_W, found 13"),
        ("wrn_4_2", {}, "expected a depth of 6n [+] 4 in wrn_D_W, found 4"),
        ("resnet18_9999", {}, r"expected at most 2e\+09 parameters, found 2.7e\+11"),
    ],
)
def test_refusals(name, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        made(name, **options)
    assert "\n" not in str(caught.value)
