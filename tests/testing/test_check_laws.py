"""`check_laws`: a transform that breaks a law fails, and the error names the law."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import gradfilter as gf
from gradfilter.testing import check_laws
from gradfilter.testing._check_laws import LAWS, completed

COMPILE = "compiles_whole_and_once"


def on_tree(update, **given):
    return gf.link("mine", "tree -> tree", update, **given)


def writes_into_its_state(grads, state, params, **extra):
    state["sum"] += 1
    return grads, state, {}


def noise(grads, state, params, **extra):
    return {name: g + torch.randn_like(g) for name, g in grads.items()}, state, {}


def nothing(grads, state, params, **extra):
    return {name: torch.full_like(g, -0.0) for name, g in grads.items()}, state, {}


def knows_all_keywords(grads, state, params, *, keep=None, rows=None, weights=None, grad_fn=None):
    return grads, state, {}


def grows(grads, state, params, **extra):
    return grads, {"seen": torch.cat([state["seen"], torch.zeros(1)])}, {}


def rounds(grads, state, params, **extra):
    """Near 256 the numbers of bfloat16 are 2 apart."""
    return {name: (g + 256) - 256 for name, g in grads.items()}, state, {}


def waits(grads, state, params, **extra):
    largest = max(g.abs().max().item() for g in grads.values())
    return {name: g / largest for name, g in grads.items()}, state, {}


def by_the_shortest(rows, state, params, /, **extra):
    """A removed row has norm 0."""
    norms = rows.sq_norms().sqrt()
    return rows.scaled(norms / norms.min()), state, {}


def by_the_mean(rows, state, params, /, **extra):
    norms = torch.where(rows.live, rows.sq_norms().sqrt(), 0.0)
    mean = norms.sum() / rows.live.sum().clamp(min=1)
    return rows.scaled(1 / (1 + mean).expand(len(rows))), state, {"mean": mean}


def unannounced(grads, state, params, **extra):
    return grads, state, {"size": torch.ones(())}


def calls(grads, state, params, **extra):
    calls.count = getattr(calls, "count", 0) + 1  # a new graph whenever it is another number
    return {name: g * calls.count for name, g in grads.items()}, state, {}


def repeats(grads, state, params, **extra):
    """A state whose elements share memory, into which nothing can be written."""
    return grads, repeated(params), {}


def repeated(params):
    return {name: torch.ones_like(p.sum()).expand(p.shape) for name, p in params.items()}


def around(chain, function):
    """A chain with another update, which a chain around it does not know."""
    changed = replace(chain, compute=lambda *args: function(chain.compute, *args))
    return changed.with_parts(chain.parts)


def around_both(chain, function):
    """A chain with another update, also where its update rule applies itself."""
    return around(chain, function).with_apply(
        lambda *args, donate: function(partial(chain.apply, donate=donate), *args)
    )


def twice(compute, *args):
    updates, state, out = compute(*args)
    return {name: 2 * u for name, u in updates.items()}, state, out


def forgives(compute, rows, state, params, context):
    if isinstance(rows, dict):
        rows = {name: rows.get(name, torch.zeros(5, *p.shape)) for name, p in params.items()}
    return compute(rows, state, params, context)


PLAIN = gf.chain(gf.mean_rows(), gf.sgd(0.1))
BROKEN = {
    "mutates_nothing": on_tree(writes_into_its_state, init=lambda params: {"sum": torch.zeros(())}),
    "is_reproducible": on_tree(noise),
    "changes_something": gf.chain(gf.mean_rows(), gf.sgd(0.1), gf.freeze()),
    "ignores_unknown_keywords": on_tree(knows_all_keywords),
    "skips_where_rows_are_rejected": on_tree(
        writes_into_its_state, init=lambda params: {"sum": torch.full((), 7.0)}
    ),
    "skips_bit_by_bit": on_tree(
        writes_into_its_state, init=lambda params: {"sum": torch.full((), 7.0)}
    ),
    "leaves_rejected_rows_out": gf.link("mine", "rows -> rows", by_the_shortest),
    "keeps_dtypes_and_shapes": on_tree(grows, init=lambda params: {"seen": torch.zeros(1)}),
    "half_precision_follows_single": on_tree(rounds),
    "never_waits": on_tree(waits),
    "state_round_trips": on_tree(grows, init=lambda params: {"seen": torch.zeros(1)}),
    "publishes_what_it_says": on_tree(unannounced),
    "nesting_does_not_matter": around(PLAIN, twice),
    "names_leaves_that_do_not_match": around_both(PLAIN, forgives),
    "donates_storage": on_tree(repeats, init=repeated),
    "works_on_parts_of_the_rows": gf.link(
        "mine", "rows -> rows", by_the_mean, publishes=("mean",), joins={"mean": "same"}
    ),
    COMPILE: on_tree(calls),
}


@pytest.mark.parametrize("law", BROKEN)
def test_a_broken_law_is_named(law):
    others = [name for name in LAWS if name not in (law, "never_waits")]
    with pytest.raises(AssertionError, match=rf"breaks 1 of [12] laws\.\n  {law}: "):
        check_laws(BROKEN[law], skip=others)


def test_every_law_that_needs_no_gpu_is_broken_by_something():
    assert BROKEN.keys() | {"same_on_a_gpu"} == LAWS.keys()


@pytest.mark.parametrize(
    "law", ["nesting_does_not_matter", "names_leaves_that_do_not_match", "donates_storage"]
)
def test_a_law_that_no_other_stands_for(law):
    with pytest.raises(AssertionError, match=rf"breaks 1 of 1[67] laws\.\n  {law}: "):
        check_laws(BROKEN[law], skip=[COMPILE])


@pytest.mark.parametrize(
    "wait",
    [
        lambda g: 1 if (g > 0).any() else 2,
        lambda g: g[g > 0].mean(),
        lambda g: g.reshape(-1).tolist()[0],
        lambda g: float(g.numpy().max()),
        lambda g: g.cpu().mean(),
        lambda g: 1 if torch.allclose(g, 2 * g) else 2,
        lambda g: torch.linalg.eigvalsh(g @ g.mT).mean(),
        lambda g: torch.linalg.cholesky(g.mT @ g).mean(),
        lambda g: len(g.unique_consecutive()),
    ],
)
def test_what_makes_the_host_wait(wait):
    def update(grads, state, params, **extra):
        return {name: wait(g) * g for name, g in grads.items()}, state, {}

    others = [name for name in LAWS if name != "never_waits"]
    with pytest.raises(AssertionError, match="makes the host wait"):
        check_laws(on_tree(update), shapes={"w": (4, 3)}, skip=others)


def test_what_does_not_make_the_host_wait():
    def update(grads, state, params, **extra):
        order = {name: g[torch.arange(len(g)).flip(0)] for name, g in grads.items()}
        for g in order.values():
            g[g > 1] = 1.0  # written by torch.where
        return order, state, {}

    others = [name for name in LAWS if name != "never_waits"]
    assert check_laws(on_tree(update), shapes={"w": (4, 3)}, skip=others) == ("never_waits",)


def test_random_numbers_and_defaults_are_as_they_were():
    torch.set_default_dtype(torch.float64)
    try:
        before = torch.get_rng_state()
        check_laws(gf.adamw(gf.schedules.cosine(0.1, 10)))
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_all_broken_laws_are_named_together():
    with pytest.raises(AssertionError) as found:
        check_laws(on_tree(noise), skip=[COMPILE])
    assert "  is_reproducible: " in str(found.value)
    assert "  donates_storage: " in str(found.value)
    assert found.value.__cause__ is not None


def test_a_state_of_numbers_is_refused_in_words():
    def compute(grads, state, params, context):
        return {name: -0.1 * g for name, g in grads.items()}, {"count": 1}, {}

    bare = replace(gf.sgd(0.1), name="bare", init=lambda params: {"count": 0}, compute=compute)
    with pytest.raises(AssertionError, match=r"found '.*count' of type int"):
        check_laws(bare, skip=[name for name in LAWS if name != "is_reproducible"])


def test_one_cause_of_everything_is_told_once():
    def update(grads, state, params, *, temperature, **extra):
        return {name: g * temperature for name, g in grads.items()}, state, {}

    with pytest.raises(AssertionError, match=r"laws\.\n  all:\n.*'temperature'$"):
        check_laws(on_tree(update), skip=[COMPILE])


def test_a_complex_state_is_compared():
    def update(grads, state, params, **extra):
        return grads, {"z": 1j * state["z"]}, {}

    init = lambda params: {"z": torch.ones(2, dtype=torch.complex128)}
    check_laws(on_tree(update, init=init), skip=[COMPILE])


def test_a_link_is_completed_for_every_place_it_can_take():
    names = lambda link: [[part.name for part in chain.parts] for chain in completed(link)]
    assert names(gf.budget_clip()) == [
        ["budget_clip", "mean_rows", "sgd"],
        ["clip_per_row", "budget_clip", "mean_rows", "sgd"],
    ]
    assert names(gf.agree_filter()) == [
        ["agree_filter", "sgd"],
        ["clip_per_row", "agree_filter", "sgd"],
    ]
    assert names(gf.agc_clip()) == [["mean_rows", "agc_clip", "sgd"], ["agc_clip", "sgd"]]
    assert names(gf.adam()) == [["mean_rows", "adam"], ["adam"]]
    assert names(gf.ema_params(0.9)) == [["mean_rows", "sgd", "ema_params"], ["sgd", "ema_params"]]
    assert names(gf.chain(gf.agc_clip(), gf.adam())) == [
        ["mean_rows", "agc_clip", "adam"],
        ["agc_clip", "adam"],
    ]
    assert names(gf.chain(gf.mean_rows(), gf.adam())) == [["mean_rows", "adam"]]
    assert len(completed(gf.finite_filter())) == 4


def test_names_of_the_laws_that_hold_come_back():
    held = check_laws(gf.clip_per_row(0.5))
    asked = [name for name in LAWS if name != "same_on_a_gpu" or torch.cuda.is_available()]
    assert list(held) == asked
    assert check_laws(gf.mean_rows(), skip=held[1:]) == held[:1]


def test_shapes_rows_and_keywords_are_the_callers():
    seen = []

    def update(rows, state, params, /, colour=None, **extra):
        seen.append((len(rows), {name: tuple(p.shape) for name, p in params.items()}, colour))
        return rows, state, {}

    look = gf.link("look", "rows -> rows", update)
    check_laws(look, shapes={"w": (2, 2)}, rows=7, extra={"colour": "red"}, skip=[COMPILE])
    assert seen[0] == (7, {"w": (2, 2)}, "red")
    assert all(line == seen[0] for line in seen)


def test_the_documentation_names_every_law():
    assert all(f"``{name}``" in check_laws.__doc__ for name in LAWS)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="Call the factory"):
        check_laws(gf.agree_filter)
    with pytest.raises(ValueError, match=r"found \['never_waited'\]"):
        check_laws(gf.mean_rows(), skip=["never_waited"])
    with pytest.raises(ValueError, match="Put sam_perturb"):
        check_laws(gf.gsam_decompose(0.4))


def test_pytest_is_not_needed():
    code = "import sys, gradfilter.testing; print('pytest' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
