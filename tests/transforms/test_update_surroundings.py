"""Updates under autocast, with requires_grad, with unusual bools, and from unusual parts."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _cases import is_head, label, make_params, make_rows, make_stack, sgd
from _models import vectors

PARAMS = make_params()
ROWS = make_rows(PARAMS)


def call(update, grads=ROWS, params=PARAMS, **extra):
    return update(params, update.init(params), grads, **extra)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gf.chain(gf.agree_filter(1.2), sgd()),
        lambda: gf.chain(gf.consensus_filter(), gf.adam()),
        lambda: gf.chain(
            gf.mean_rows(), gf.sam_perturb(0.1), gf.gsam_decompose(0.4), gf.agc_clip(), sgd()
        ),
    ],
)
def test_autocast_does_not_reach_into_an_update(make):
    stack = make_stack(PARAMS, make_rows(PARAMS, rows=7))
    expected = call(make(), stack)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(make(), stack)
    for name in PARAMS:
        assert torch.equal(got[0][name], expected[0][name])
    for name, value in expected[2].items():
        assert torch.equal(got[2][name], value)


def test_wide_rows_consensus_under_autocast():
    rows = {"w": torch.randn(40, 3000)}
    update, params = gf.chain(gf.consensus_filter(), sgd()), {"w": torch.zeros(3000)}
    expected = call(update, rows, params)[2]["consensus_filter/cosine"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(update, rows, params)[2]["consensus_filter/cosine"], expected)


def test_parameters_of_a_module_leave_no_graph_behind():
    model = nn.Linear(6, 3)
    params = dict(model.named_parameters())
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3)
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1, momentum=0.9, weight_decay=0.1))
    new, state, _ = call(update, grads_of(params, vectors()), params)
    assert not any(p.requires_grad for p in new.values())
    assert not any(b.requires_grad for b in state["sgd"]["momentum"].values())


def test_grad_fn_may_use_autograd():
    def grad_fn(params):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        value = sum((p**2).sum() for p in leaves.values())
        return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    tree = {n: g[0] for n, g in ROWS.items()}
    new = call(gf.chain(gf.sam_perturb(0.0), gf.sgd(0.5)), tree, grad_fn=grad_fn)[0]
    assert all(p.abs().max() < 1e-6 for p in new.values())


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_grad_fn_always_gets_all_parameters(wrap):
    seen = []

    def grad_fn(params):
        seen.append(set(params))
        return make_stack(PARAMS, ROWS).at(params).stacked()

    if wrap == "masked":
        update = gf.chain(gf.mean_rows(), gf.masked(gf.sam_perturb(0.3), is_head), gf.sgd(1.0))
    else:
        branches = {
            "head": gf.chain(gf.mean_rows(), gf.sam_perturb(0.3), gf.sgd(1.0)),
            "body": gf.chain(gf.mean_rows(), gf.sgd(1.0)),
        }
        update = gf.partition(branches, label)
    got = call(update, make_stack(PARAMS, ROWS), grad_fn=grad_fn)[0]
    expected = call(update, make_stack(PARAMS, ROWS))[0]
    assert seen == [set(PARAMS)]
    for name in PARAMS:
        torch.testing.assert_close(got[name], expected[name])


def test_a_gate_may_not_stand_around_freeze():
    with pytest.raises(TypeError, match=r"gate: 'freeze' may be an update rule or follow one"):
        gf.gate(gf.freeze(), "late")


@pytest.mark.parametrize("late", [True, False])
def test_a_gate_around_a_chain_with_sam_keeps_gsam_honest(late):
    stack = make_stack(PARAMS, ROWS)
    inner = [
        gf.chain(gf.agree_filter(1.2), gf.sam_perturb(0.3)),
        gf.chain(gf.sam_perturb(0.3), gf.agree_filter(1.2)),
    ]
    for part in inner:
        gated = gf.chain(gf.gate(part, "late"), gf.gsam_decompose(0.4), gf.sgd(1.0))
        new = call(gated, stack, late=torch.tensor(late))[0]
        open_links = [part, gf.gsam_decompose(0.4)] if late else [gf.mean_rows()]
        expected = call(gf.chain(*open_links, gf.sgd(1.0)), stack)[0]
        for name in PARAMS:
            torch.testing.assert_close(new[name], expected[name])


def test_masked_chain_of_reducer_and_sam():
    stack = make_stack(PARAMS, ROWS)
    inner = gf.chain(gf.mean_rows(), gf.sam_perturb(0.3))
    got = call(gf.chain(gf.masked(inner, is_head), gf.gsam_decompose(0.4), sgd()), stack)[0]
    apart = gf.chain(gf.mean_rows(), gf.masked(gf.sam_perturb(0.3), is_head))
    expected = call(gf.chain(apart, gf.gsam_decompose(0.4), sgd()), stack)[0]
    for name in PARAMS:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("keep", [torch.tensor([True]), torch.tensor(1)])
def test_keep_has_to_be_one_bool(keep):
    with pytest.raises(ValueError, match=r"bool tensor of shape \(\)"):
        call(gf.chain(gf.mean_rows(), sgd()), keep=keep)


def test_the_callers_keep_binds_a_bare_link_too():
    tree = {n: g[0] for n, g in ROWS.items()}
    update = gf.partition({"head": sgd(), "body": sgd()}, label)
    new, _, info = call(update, tree, keep=torch.tensor(False))
    assert not info["keep"] and torch.equal(new["head.weight"], PARAMS["head.weight"])


def test_links_of_ones_own_are_checked():
    def drop(grads, state, params, /, **extra):
        return {n: g for n, g in grads.items() if n != "head.bias"}, state, {}

    update = gf.chain(gf.mean_rows(), gf.link("drop", "tree -> tree", drop), sgd())
    with pytest.raises(ValueError, match=r"drop: result: .*missing \['head.bias'\]"):
        call(update)
    with pytest.raises(ValueError, match="found 'tree->tree'"):
        gf.link("x", "tree->tree", drop)
    with pytest.raises(ValueError, match=r"needs among .*found \['foo'\]"):
        gf.link("x", "tree -> tree", drop, needs=("foo",))
    spy = gf.link("spy", "tree -> tree", lambda g, s, p, /, **e: (g, s, {}), needs=("rows",))
    call(gf.chain(gf.mean_rows(), spy, sgd()))
    with pytest.raises(ValueError, match="needs 'rows'"):
        gf.chain(spy, sgd())


@pytest.mark.parametrize(
    "make",
    [
        lambda: gf.masked(gf.agc_clip(), ["w"]),
        lambda: gf.agc_clip(exclude="head"),
        lambda: gf.agc_clip(unit_dims={"w": 1}),
        lambda: gf.freeze(["w"]),
        lambda: gf.partition({"a": sgd()}, {"w": "a"}),
    ],
)
def test_predicates_are_functions(make):
    with pytest.raises(TypeError, match="as a function of a leaf's name"):
        make()


def test_freeze_that_chooses_nothing():
    with pytest.raises(ValueError, match="freeze: expected the predicate to choose a leaf"):
        gf.chain(sgd(), gf.freeze(lambda n: n == "nobody")).init(PARAMS)


def test_no_parameters_at_all():
    with pytest.raises(ValueError, match="at least one parameter, found none"):
        sgd().init({})


def test_half_precision_zero_gradients_stay_finite_under_sam():
    params = {"w": torch.ones(3, dtype=torch.float16)}
    rows = {"w": torch.zeros(2, 3, dtype=torch.float16)}
    update = gf.chain(gf.mean_rows(), gf.sam_perturb(0.05), gf.sgd(0.1))
    new = call(update, rows, params, grad_fn=lambda p: {"w": rows["w"] + 0 * p["w"]})[0]
    assert torch.equal(new["w"], params["w"])


def test_a_half_precision_average_does_not_get_stuck():
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    update = gf.chain(gf.sgd(0.0), gf.ema_params(0.999))
    state = update.init(params)
    one = {"w": torch.ones(1, dtype=torch.bfloat16)}
    for _ in range(2000):
        _, state, _ = update(one, state, params)
    assert gf.ema_of(state)["w"].item() == pytest.approx(1 - 0.999**2000, rel=1e-3)


def test_sign_agreement_hides_no_nan():
    rows, params = {"w": torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])}, {"w": torch.zeros(2)}
    grads = gf.sign_agreement(1.0).update(rows, {}, params)[0]["w"]
    assert grads[0].isnan() and grads[1] == 1


def test_numpy_targets_are_refused():
    model = nn.Linear(6, 3)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.mse_loss), 3)
    batch = torch.randn(6, 6), torch.randn(6, 3).numpy()
    with pytest.raises(TypeError, match=r"found ndarray.*from_numpy"):
        grads_of(gf.extract(model)[0], batch)


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
def test_aux_that_is_no_tensor(plan):
    loss = lambda params, x: ((params["w"] * x).sum(), {"n": 3})
    with pytest.raises(TypeError, match="aux as a tree of tensors, found int"):
        gf.microbatch_grads(loss, 2, has_aux=True, plan=plan)({"w": torch.ones(2)}, torch.eye(2))


def test_a_stack_from_a_loss_goes_through_one_compilation():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = nn.Linear(6, 3)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan="loop")
    update = gf.chain(gf.agree_filter(1.2), gf.sgd(gf.schedules.linear(0.1, 10), momentum=0.9))
    compiled = torch.compile(lambda p, s, g: update(p, s, g), backend=counter, fullgraph=True)
    params, _ = gf.extract(model)
    state = update.init(params)
    for _ in range(3):
        rows = grads_of(params, vectors())
        expected = update(params, state, rows)
        params, state, _ = compiled(params, state, rows)
        for name in params:
            torch.testing.assert_close(params[name], expected[0][name])
    assert counter.frame_count == 1


def test_a_compiled_step_leaves_the_fused_plan_alone_and_is_right():
    """Traced, the engine's backward pass has been seen to give wrong gradients without a word."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    loss = gf.model_loss(model, F.cross_entropy)
    update = gf.chain(gf.agree_filter(1.2), gf.sam_perturb(0.1), gf.sgd(0.1, momentum=0.9))
    params, _ = gf.extract(model)

    def step(plan):
        grads_of = gf.microbatch_grads(loss, 3, plan=plan)
        return lambda p, s, batch: update(p, s, grads_of(p, batch))

    compiled = torch.compile(step("fused"), backend="aot_eager")
    state, batch = update.init(params), vectors()
    for _ in range(2):
        expected, _, _ = step("loop")(params, state, batch)
        params, state, _ = compiled(params, state, batch)
        for name in params:
            torch.testing.assert_close(params[name], expected[name])
