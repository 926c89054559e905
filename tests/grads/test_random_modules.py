"""Random modules, losses and chains against the plain loop: equal results, or a clear refusal.

GRADFILTER_RANDOM_CASES=10000 sets the number of random cases, GRADFILTER_RANDOM_SEED=7 their seed.
"""

import dataclasses
import os
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from _random_cases import BATCHES, DTYPES, LOSSES, SMOOTH_LOSSES, Case, draw
from _random_check import ON_ROWS, REDUCING, TRANSFORMS, chains, run, shrink
from _random_habits import HABITS
from _random_layers import LAYERS

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.jit, which random modules use

COUNT = int(os.environ.get("GRADFILTER_RANDOM_CASES", 60))
SEED = int(os.environ.get("GRADFILTER_RANDOM_SEED", 0))
CHUNKS = 20

EVERY = (
    *("gram", "scaled.combine", "at.stacked", "at_rows.stacked", "dot"),
    *("along.stacked", "scaled.columns.along.combine", "columns.first.sq_norms", "stacked"),
)


FEW = ("gram", "at.combine", "stacked")


def check(case):
    """Fail with the smallest case found that fails in the same way."""
    outcome = run(case)
    if outcome.failed:
        small = shrink(case, outcome.kind)
        again = run(small)
        pytest.fail(f"{again.kind}: {again.text}\n{small.describe()}\n(drawn as {case!r})")
    return outcome


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name):
    for plan, questions in {"auto": EVERY, "loop": FEW, "vmap": FEW}.items():
        check(Case(seed=3, layers=(name,), loss="mse_loss", plan=plan, questions=questions))
    _check_chains(Case(seed=3, layers=(name,), loss="mse_loss"))


SLOW = ("scripted LSTM",)  # torch.jit takes half a minute to optimise it


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in HABITS]
)
def test_a_habit(name):
    case = Case(seed=3, layers=("linear",), habits=(name,), loss="mse_loss", questions=EVERY)
    outcomes = [check(case.without(plan=plan)) for plan in ("auto", "fused")]
    outcomes += [check(case.without(plan=plan, questions=FEW)) for plan in ("loop", "vmap")]
    assert all(outcome.kind != "void" for outcome in outcomes), "the plain loop fails"
    _check_chains(case)


def _check_chains(case):
    check(case.without(chain=("mean_rows", "sam")))
    check(case.without(chain=("mean_rows",), host="Filtered"))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("plan", ["auto", "fused", "loop", "vmap"])
def test_a_batch(batch, plan):
    check(Case(seed=4, layers=("linear",), batch=batch, plan=plan, questions=EVERY))
    check(Case(seed=4, layers=("linear",), batch=batch, plan=plan, samples=1))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss(loss):
    for plan in ("auto", "fused", "loop", "vmap"):
        check(Case(seed=5, layers=("linear",), loss=loss, plan=plan, questions=EVERY))


@pytest.mark.parametrize("name", [name for name, entry in LAYERS.items() if entry.smooth])
def test_a_layer_in_low_precision(name):
    for dtype in ("float32", "bfloat16", "float16"):
        check(Case(seed=6, layers=(name,), dtype=dtype, questions=FEW))


@pytest.mark.parametrize("loss", SMOOTH_LOSSES)
def test_a_loss_in_low_precision(loss):
    for dtype in ("float32", "bfloat16", "float16"):
        check(Case(seed=6, layers=("linear",), loss=loss, dtype=dtype, questions=FEW))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_cases(chunk):
    """A share of the random cases."""
    for seed in range(SEED * 10**6 + chunk, SEED * 10**6 + COUNT, CHUNKS):
        check(draw(seed, chains()))


@pytest.mark.slow
def test_the_cases_try_something():
    """Few cases are void or refused, and every part is drawn."""
    drawn = [draw(seed, chains()) for seed in range(3000)]
    used = Counter(name for case in drawn for name in (*case.layers, *case.habits, *case.chain))
    missing = {*LAYERS, *HABITS, *TRANSFORMS} - set(used)
    assert not missing, missing
    assert {case.batch for case in drawn} == set(BATCHES)
    assert {case.dtype for case in drawn} == set(DTYPES)
    kinds = Counter(run(case).kind for case in drawn[:60])
    assert kinds["equal"] >= 36, kinds
    assert kinds["void"] <= 6, kinds


def test_a_case_is_the_same_at_every_call():
    assert draw(12, chains()) == draw(12, chains())
    case = Case(seed=3, layers=("attention", "batch norm"), habits=("stash, detached",))
    for one, other in zip(*(case.build()[0].state_dict().values() for _ in range(2)), strict=True):
        assert torch.equal(one, other)
    assert eval(repr(case)) == case  # what a failure prints can be pasted


def test_chains_have_one_reducer_and_at_most_one_perturbation():
    for names in chains():
        assert sum(name in REDUCING for name in names) == 1
        assert sum(name in ("sam", "asam", "sam per row") for name in names) <= 1
        assert all(name in ON_ROWS for name in names[: [n in REDUCING for n in names].index(True)])


# Faults that the comparison has to notice.

LINEAR = Case(seed=3, layers=("linear", "layer norm"), questions=("stacked", "gram"))


def broken(monkeypatch, place, name, change):
    true = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *a, **k: change(true(*a, **k)))


@pytest.mark.parametrize("question", ["gram", "sq_norms", "combine", "dot", "stacked"])
@pytest.mark.parametrize("plan", ["fused", "loop"])
def test_a_wrong_answer_is_noticed(question, plan, monkeypatch):
    from gradfilter.grads._stack import DenseStack
    from gradfilter.grads.fused._fused_stack import FusedStack

    def nudged(answer):
        if isinstance(answer, dict):
            return {name: leaf * (1 + 1e-6) for name, leaf in answer.items()}
        return answer * (1 + 1e-6)

    for kind in (FusedStack, DenseStack):
        broken(monkeypatch, kind, question, nudged)
    case = LINEAR.without(plan=plan, questions=(question,))
    assert run(case).kind == "wrong"


def test_one_wrong_leaf_in_low_precision_is_noticed(monkeypatch):
    from gradfilter.grads.fused._fused_stack import FusedStack

    half = lambda tree: {n: leaf * (0.5 if "weight" in n else 1) for n, leaf in tree.items()}
    broken(monkeypatch, FusedStack, "stacked", half)
    for dtype in ("float32", "bfloat16", "float16"):
        assert run(LINEAR.without(dtype=dtype)).kind == "wrong", dtype


def test_what_is_left_on_a_module_is_noticed(monkeypatch):
    """A pass that changes the module, or a question that draws from a global generator."""
    from gradfilter.grads.fused._fused_stack import FusedStack

    broken(monkeypatch, FusedStack, "gram", lambda answer: answer + 0 * torch.rand(()))
    assert run(LINEAR.without(questions=("gram",))).kind == "changed"


def test_an_error_from_below_is_unclear(monkeypatch):
    from gradfilter.grads.fused._fused_stack import FusedStack

    def fail(self):  # with torch's own error for the memory of a row
        return torch.vmap(lambda row: row + row.untyped_storage().nbytes())(torch.ones(2))

    monkeypatch.setattr(FusedStack, "gram", fail)
    assert run(LINEAR.without(questions=("gram",))).kind == "unclear"


def test_a_refusal_of_an_ordinary_module_is_no_answer(monkeypatch):
    from gradfilter.grads.fused import _forward as _fused

    def refuse(*args):
        error = ValueError("Expected nothing at all.")
        error.add_note('Use plan="loop".')
        raise error

    monkeypatch.setattr(_fused, "_refuse_backward_hooks", refuse)
    assert run(LINEAR.without(plan="fused")).kind == "not refusable"
    assert run(LINEAR.without(plan="auto")).kind == "unclear"  # a fallback without need


def test_a_failure_shrinks_to_its_cause(monkeypatch):
    true = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *a, **k: true(x, *a, **k) * (1 + _inside(x)))
    case = Case(
        seed=3,
        layers=("linear", "layer norm", "gate"),
        habits=("forward hook",),
        batch="keywords",
        rows=5,
        questions=("gram", "dot"),
    )
    assert run(case).kind == "wrong"
    small = shrink(case, "wrong")
    assert dataclasses.replace(small, questions=()) == Case(
        seed=3, layers=("layer norm",), loss="mse_loss", rows=2, questions=()
    )
    assert "layer norm" in small.describe() or "LayerNorm" in small.describe()


def _inside(x):
    return 0.5 * torch._C._functorch.is_batchedtensor(x)
