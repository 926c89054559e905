"""The laws of `gradfilter.testing`, over every public transform."""

import inspect

import pytest
import torch

import gradfilter as gf
from _cases import CASES, EXTRA, SHAPES, VARIANTS, M, build, make_params, make_rows
from gradfilter import _tree
from gradfilter.testing._check_laws import LAWS
from gradfilter.testing._laws import Problem, no_host_sync

PROBLEM = Problem(SHAPES, M, EXTRA)
ON_A_GPU = "same_on_a_gpu"
FREEZES = ("freeze", 1)
every_transform = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}")


def test_every_public_transform_is_a_case():
    public = {
        name
        for name, thing in ((name, getattr(gf, name)) for name in gf.__all__)
        if inspect.isfunction(thing)
        and not name.startswith("_")
        and name != "link"  # an alias of transform
        and inspect.signature(thing).return_annotation == "Transform"
    }
    assert public >= {"chain", "agree_filter", "sgd"}
    assert public == set(CASES)


@every_transform
def test_every_case_goes_from_rows_to_an_update(variant):
    assert "rows -> update" in build(variant).kinds


def laws():
    """Return the pairs of a law and a variant; a second compilation of a transform is slow."""
    return [
        pytest.param(law, variant, marks=[pytest.mark.slow] * heavy, id=f"{law}-{name}-{i}")
        for law in LAWS
        if law != ON_A_GPU
        for variant in VARIANTS
        for name, i in [variant]
        for heavy in [law == "compiles_whole_and_once" and i > 0]
    ]


@pytest.mark.parametrize(("law", "variant"), laws())
def test_law(law, variant):
    if (law, variant) == ("changes_something", FREEZES):
        with pytest.raises(AssertionError, match="no parameter has moved"):
            LAWS[law](build(variant), PROBLEM)
    else:
        LAWS[law](build(variant), PROBLEM)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_transform
def test_on_a_gpu_as_on_the_cpu_and_without_waiting(variant):
    LAWS[ON_A_GPU](build(variant), PROBLEM)


def test_the_host_sync_detector_detects():
    with no_host_sync(), pytest.raises(AssertionError, match="wait"):
        torch.ones(()).item()
    with no_host_sync(), pytest.raises(AssertionError, match="wait"):
        bool(torch.ones(()) > 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inductor_agrees_with_eager():
    torch._dynamo.reset()
    update, params = build(("chain", 0)), make_params()
    state = update.init(params)
    compiled = torch.compile(update, fullgraph=True)
    for seed in range(3):
        rows = make_rows(params, seed=seed)
        grad_fn = lambda p, rows=rows: rows
        expected = update(params, state, rows, grad_fn=grad_fn)
        params, state, _ = compiled(params, state, rows, grad_fn=grad_fn)
        for got, want in zip(
            _tree.leaves((params, state)), _tree.leaves(expected[:2]), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
