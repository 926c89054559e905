"""Chains: refusals when they are built and when they are called, and their composition."""

from dataclasses import replace

import pytest
import torch

import gradfilter as gf
from _cases import make_params, make_rows, make_stack, sgd

PARAMS = make_params()
ROWS = make_rows(PARAMS)


def call(update, grads=ROWS, params=PARAMS, **extra):
    return update(params, update.init(params), grads, **extra)


# --- when the chain is built


@pytest.mark.parametrize(
    "links, error, message",
    [
        (
            lambda: [gf.mean_rows(), gf.gsam_decompose(0.4), sgd()],
            ValueError,
            r"transform 2, 'gsam_decompose', needs 'clean_grads'.*Put sam_perturb\(rho\) before it",
        ),
        (
            lambda: [gf.clip_per_row(1.0), sgd()],
            TypeError,
            r"transform 2, 'sgd', takes one gradient tree, but rows reach it from 'clip_per_row'"
            r".*Insert a reducer before it: mean_rows\(\)",
        ),
        (
            lambda: [gf.agc_clip(), gf.ema_params(0.9)],
            TypeError,
            r"transform 2, 'ema_params', takes an update, found a tree. Put it after sgd",
        ),
        (lambda: [gf.agree_filter, sgd()], TypeError, r"found function. Call the factory"),
        (
            lambda: [[gf.mean_rows(), sgd()]],
            TypeError,
            r"found list. Unpack it: chain\(\*transforms\)",
        ),
        (
            lambda: [gf.mean_rows(), torch.optim.SGD([torch.ones(1)])],
            TypeError,
            r"found SGD. Use sgd\(lr\) and so on, from_torch\(SGD, lr=...\), or interop.Filt",
        ),
        (lambda: [gf.mean_rows(), torch.optim.Adam], TypeError, r"found Adam. Use sgd\(lr\)"),
        (lambda: [gf.mean_rows(), None], TypeError, r"found NoneType. Factories such as"),
        (lambda: [], ValueError, r"at least one transform"),
        (
            lambda: [gf.agc_clip(), gf.agc_clip(), gf.named("agc_clip_2", gf.agc_clip()), sgd()],
            ValueError,
            r"two transforms are called 'agc_clip_2'",
        ),
    ],
)
def test_refused_when_built(links, error, message):
    with pytest.raises(error, match=message):
        gf.chain(*links())


def rows_rule():
    """An update rule that takes rows alone."""
    return gf.named("heads", gf.chain(gf.mean_rows(), sgd()))


def per_row_sam():
    return gf.sam_perturb(0.1, per_microbatch=True)


MISPLACED = {
    "a second reducer": (
        lambda: [gf.agree_filter(0.97), gf.mean_rows(), sgd()],
        r"'agree_filter' has already reduced .*Remove 'mean_rows': a chain has one reducer",
        lambda filtered, mean, rule: [filtered, rule],
    ),
    "a second reducer, with a link between": (
        lambda: [gf.agree_filter(), gf.agc_clip(), gf.consensus_filter(), sgd()],
        r"'agree_filter' has already reduced .*Remove 'consensus_filter'",
        lambda filtered, clip, second, rule: [filtered, clip, rule],
    ),
    "a filter behind the mean": (
        lambda: [gf.mean_rows(), gf.agc_clip(), gf.agree_filter(), sgd()],
        r"Put 'agree_filter' in the place of 'mean_rows': a chain has one reducer",
        lambda mean, clip, filtered, rule: [filtered, clip, rule],
    ),
    "the same link twice": (
        lambda: [gf.mean_rows()] * 2 + [sgd()],
        r"Remove 'mean_rows'",
        lambda mean, again, rule: [mean, rule],
    ),
    "a reducer behind a clip": (
        lambda: [gf.agc_clip(0.01), gf.mean_rows(), sgd()],
        r"'agc_clip' works on one gradient. Move 'mean_rows' before 'agc_clip'",
        lambda clip, mean, rule: [mean, clip, rule],
    ),
    "a reducer behind two clips": (
        lambda: [gf.finite_filter(), gf.clip_by_global_norm(1.0), gf.agc_clip(), gf.mean_rows()],
        r"'clip_by_global_norm' works on one .*Move 'mean_rows' before 'clip_by_global_norm'",
        lambda finite, whole, units, mean: [finite, mean, whole, units],
    ),
    "rows behind the reducer": (
        lambda: [gf.mean_rows(), gf.agc_clip(), gf.clip_per_row(1.0), sgd()],
        r"'mean_rows' has already reduced the rows. Move 'clip_per_row' before 'mean_rows'",
        lambda mean, clip, each, rule: [each, mean, clip, rule],
    ),
    "m-sharpness behind the reducer": (
        lambda: [gf.mean_rows(), per_row_sam(), sgd()],
        r"transform 2, 'sam_perturb', takes rows, .*Move 'sam_perturb' before 'mean_rows'",
        lambda mean, sam, rule: [sam, mean, rule],
    ),
    "rows behind a clip, the reducer last": (
        lambda: [gf.agc_clip(), gf.clip_per_row(1.0), gf.mean_rows(), sgd()],
        r"Put 'clip_per_row', and 'mean_rows' behind it, before 'agc_clip'",
        lambda clip, each, mean, rule: [each, mean, clip, rule],
    ),
    "rows behind a clip, no reducer": (
        lambda: [gf.agc_clip(), gf.clip_per_row(1.0), sgd()],
        r"Put 'clip_per_row', and a reducer \(mean_rows\(\), .*\) behind it, before 'agc_clip'",
        lambda clip, each, rule: [each, gf.mean_rows(), clip, rule],
    ),
    "a clip before the reducer": (
        lambda: [gf.clip_per_row(1.0), gf.agc_clip(), gf.mean_rows(), sgd()],
        r"rows reach it from 'clip_per_row'. Put 'mean_rows' before it",
        lambda each, clip, mean, rule: [each, mean, clip, rule],
    ),
    "a second rule": (
        lambda: [gf.mean_rows(), sgd(), gf.adam(0.1)],
        r"transform 3, 'adam', is a second update rule after 'sgd'. Keep one of the two",
        lambda mean, first, second: [mean, second],
    ),
    "a second rule behind an average": (
        lambda: [sgd(), gf.ema_params(), gf.adam(0.1)],
        r"transform 3, 'adam', is a second update rule after 'sgd'",
        lambda first, average, second: [first, average],
    ),
    "a clip behind the rule": (
        lambda: [sgd(), gf.agc_clip()],
        r"transform 2, 'agc_clip', stands after the update rule 'sgd'.*Move it before 'sgd'",
        lambda rule, clip: [clip, rule],
    ),
    "a clip behind the average": (
        lambda: [gf.mean_rows(), sgd(), gf.ema_params(), gf.agc_clip()],
        r"stands after the update rule 'sgd'.*Move it before 'sgd'",
        lambda mean, rule, average, clip: [mean, clip, rule, average],
    ),
    "a filter behind the rule": (
        lambda: [gf.mean_rows(), sgd(), gf.agree_filter()],
        r"Put 'agree_filter' in the place of 'mean_rows'",
        lambda mean, rule, filtered: [filtered, rule],
    ),
    "rows behind the rule": (
        lambda: [sgd(), gf.clip_per_row(1.0)],
        r"Put 'clip_per_row', and a reducer .* behind it, before 'sgd'",
        lambda rule, each: [each, gf.mean_rows(), rule],
    ),
    "an average before the rule": (
        lambda: [gf.ema_params(), sgd()],
        r"transform 1, 'ema_params', takes an update, found none before it. Put it after sgd",
        lambda average, rule: [rule, average],
    ),
    "an average before rows": (
        lambda: [gf.clip_per_row(1.0), gf.ema_params(), gf.mean_rows(), sgd()],
        r"transform 2, 'ema_params', takes an update, found rows. Put it after sgd",
        lambda each, average, mean, rule: [each, mean, rule, average],
    ),
    "a rule of rows behind a reducer": (
        lambda: [gf.mean_rows(), rows_rule()],
        r"Remove 'mean_rows': 'heads' has reducers of its own",
        lambda mean, rule: [rule],
    ),
    "a rule of rows behind a clip": (
        lambda: [gf.agc_clip(), rows_rule()],
        r"'agc_clip' works on one gradient. Put what stands before it inside 'heads'",
        lambda clip, rule: [gf.named("heads", gf.chain(gf.mean_rows(), clip, sgd()))],
    ),
    "a clip behind a rule of rows": (
        lambda: [rows_rule(), gf.agc_clip()],
        r"Put it inside 'heads', or leave it out",
        lambda rule, clip: [rule],
    ),
}


@pytest.mark.parametrize("links, message, followed", MISPLACED.values(), ids=MISPLACED)
def test_what_a_refusal_advises_works(links, message, followed):
    with pytest.raises(TypeError, match=message):
        gf.chain(*links())
    gf.chain(*followed(*links()))


def test_masked_update_rules_are_refused():
    for update in (sgd(), gf.chain(gf.mean_rows(), sgd())):
        with pytest.raises(TypeError, match=r"update rule.*Use partition"):
            gf.masked(update, lambda name: True)


@pytest.mark.parametrize("name", ["", "a/b", "a.b"])
def test_names_that_would_not_join(name):
    with pytest.raises(ValueError, match=r"without '/' and '\.'"):
        gf.named(name, gf.agc_clip())


# --- when it is called


def test_rows_for_a_chain_that_takes_a_tree():
    update = gf.chain(gf.agc_clip(), sgd())
    with pytest.raises(TypeError, match=r"agc_clip -> sgd: rows reach .* GradStack of 5 rows"):
        call(update, gf.DenseStack(ROWS))
    with pytest.raises(ValueError, match=r"shape \(4, 3\), found \(5, 4, 3\).*mean_rows"):
        call(update, ROWS)


def test_something_that_is_no_gradient():
    with pytest.raises(TypeError, match="found list"):
        call(sgd(), [torch.ones(1)])


def test_a_polymorphic_start_is_still_guarded():
    with pytest.raises(TypeError, match=r"finite_filter -> sgd: rows reach.*mean_rows"):
        call(gf.chain(gf.finite_filter(), sgd()), gf.DenseStack(ROWS))


def test_one_row_has_nothing_to_agree_with():
    rows = {name: g[:1] for name, g in ROWS.items()}
    with pytest.raises(ValueError, match=r"agree_filter: .*M = 1, which has nothing to agree"):
        call(gf.chain(gf.agree_filter(), sgd()), rows)


def test_sam_without_a_way_to_the_second_gradient():
    with pytest.raises(ValueError, match=r"sam_perturb: .*cannot answer `at`.*grad_fn"):
        call(gf.chain(gf.sam_perturb(0.1), gf.mean_rows(), sgd()))
    with pytest.raises(ValueError, match=r"sam_perturb: .*cannot answer `at`.*grad_fn"):
        call(gf.chain(gf.mean_rows(), gf.sam_perturb(0.1), sgd()))
    tree = {name: g.mean(0) for name, g in ROWS.items()}
    with pytest.raises(ValueError, match=r"sam_perturb: .*behind a reducer.*grad_fn"):
        call(gf.chain(gf.sam_perturb(0.1), sgd()), tree)


def test_m_sharpness_needs_rows_that_can_be_computed_again():
    update = gf.chain(gf.sam_perturb(0.1, per_microbatch=True), gf.mean_rows(), sgd())
    with pytest.raises(ValueError, match=r"sam_perturb: .*cannot answer `along`") as caught:
        call(update, grad_fn=lambda params: ROWS)
    assert "grad_fn" not in str(caught.value)


WITHOUT_WEIGHTS = {
    "masked agree_filter": (
        "agree_filter",
        lambda: gf.masked(gf.agree_filter(1.5), lambda n: "head" in n),
    ),
    "trimmed_mean": ("trimmed_mean", lambda: gf.trimmed_mean(1)),
    "at times": ("mean_rows", lambda: gf.every(2, gf.mean_rows(), gf.coordinate_median())),
    "gated": ("coordinate_median", lambda: gf.gate(gf.coordinate_median(), "late")),
    "a chain": ("robust", lambda: gf.named("robust", gf.chain(gf.trimmed_mean(1)))),
}


@pytest.mark.parametrize("case", WITHOUT_WEIGHTS)
def test_what_combines_again_is_refused_behind_a_reducer_without_weights(case):
    name, make = WITHOUT_WEIGHTS[case]
    again = [
        gf.sam_perturb(0.1),
        gf.masked(gf.sam_perturb(0.1), lambda n: "head" in n),
        gf.every(2, gf.sam_perturb(0.1)),
        gf.friendly_sam(0.1),
        gf.look_sam(0.1),
        gf.scheduled(gf.sam_perturb, rho=gf.schedules.linear(0.1, 5)),
        gf.named("sharp", gf.chain(gf.agc_clip(0.1), gf.sam_perturb(0.1))),
    ]
    for part in again:
        with pytest.raises(ValueError, match=rf"no single weight .* what '{name}' gives") as caught:
            gf.chain(make(), part, sgd())
        if part.name == "sam_perturb":
            assert f"Put 'sam_perturb' before '{name}'" in str(caught.value)
    update = gf.chain(gf.sam_perturb(0.1), make(), sgd())
    call(update, make_stack(PARAMS, ROWS), late=torch.tensor(True))
    with pytest.raises(ValueError, match=rf"'gsam_decompose'.*in the place of '{name}': mean_rows"):
        gf.chain(gf.sam_perturb(0.1), make(), gf.gsam_decompose(0.4), sgd())


def test_weights_of_every_part_of_a_reducer_at_times_are_weights():
    reducer = gf.every(2, gf.mean_rows(), gf.agree_filter(1.5))
    call(gf.chain(reducer, gf.sam_perturb(0.1), sgd()), make_stack(PARAMS, ROWS))


def test_a_partition_of_trees_that_perturbs_is_refused_without_weights():
    branches = {"a": gf.chain(gf.sam_perturb(0.1), sgd()), "b": sgd()}
    groups = gf.partition(branches, lambda n: "a" if "head" in n else "b")
    gf.chain(gf.mean_rows(), groups)
    with pytest.raises(ValueError, match=r"'partition'.*what 'trimmed_mean' gives"):
        gf.chain(gf.trimmed_mean(1), groups)


def test_a_clean_tree_needs_no_weights():
    def remember(grads, state, params, /, **extra):
        return grads, state, {"clean_grads": grads}

    clean = gf.transform("clean", "tree -> tree", remember, publishes=["clean_grads"])
    call(gf.chain(gf.trimmed_mean(1), clean, gf.gsam_decompose(0.4), sgd()), ROWS)


def test_only_updates_are_callable():
    with pytest.raises(
        TypeError, match=r"ends in an update rule, found one of kind 'rows -> tree'"
    ):
        call(gf.chain(gf.finite_filter(), gf.mean_rows()))


def test_changed_leaves_are_named_by_the_rule_that_remembers_them():
    update = gf.chain(gf.mean_rows(), sgd())
    state = update.init(PARAMS)
    fewer = {n: p for n, p in PARAMS.items() if n != "head.bias"}
    rows = {n: g for n, g in ROWS.items() if n != "head.bias"}
    with pytest.raises(ValueError, match=r"state 'momentum'.*extra \['head.bias'\]"):
        update(fewer, state, rows)


@pytest.mark.parametrize(
    "state, error, message",
    [
        (None, TypeError, "found NoneType. Begin with"),
        ((PARAMS, {}, {}), TypeError, "found tuple. Begin with .* params, state, info = update"),
        ({}, ValueError, r"missing \['agree_filter', 'sgd'\], extra \[\]"),
        ({"mean_rows": {}, "sgd": {}}, ValueError, r"\['agree_filter'\], extra \['mean_rows'\]"),
        ({str(i): {} for i in range(9)}, ValueError, r"'5'\] and 3 more. Begin with"),
    ],
)
def test_a_state_that_is_none_or_anothers(state, error, message):
    update = gf.chain(gf.agree_filter(1.2), sgd())
    with pytest.raises(error, match=f"^chain agree_filter -> sgd: expected the state.*{message}"):
        update(PARAMS, state, ROWS)


@pytest.mark.parametrize(
    "wrong, found",
    [
        (lambda model: model, "Linear"),
        (lambda model: model.parameters(), "generator"),
        (lambda model: gf.extract(model), "tuple"),
        (lambda model: None, "NoneType"),
    ],
)
def test_init_of_something_else_than_parameters(wrong, found):
    update = gf.chain(gf.mean_rows(), sgd())
    advice = r"params, buffers = extract\(model\)"
    with pytest.raises(
        TypeError, match=f"^chain mean_rows -> sgd: expected .* found {found}.*{advice}"
    ):
        update.init(wrong(torch.nn.Linear(2, 2)))


# --- what it composes to


def test_a_link_that_would_collide_with_a_keyword_of_chains_is_refused_when_made():
    def collides(rows, state, params, **extra):
        return rows, state, {}

    def fine(rows, state, params, /, **extra):
        return rows, state, {}

    with pytest.raises(TypeError, match=r"own: .*'rows'.*Put `, /` behind params"):
        gf.link("own", "rows -> rows", collides)
    gf.link("own", "rows -> rows", fine)


def test_methods_and_callable_objects_are_checked_for_such_names_like_functions():
    class Own:
        def update(self, rows, state, params, **extra):
            return rows, state, {}

        def __call__(self, grads, state, weights, **extra):
            return grads, state, {}

    with pytest.raises(TypeError, match="'rows'"):
        gf.transform("own", "rows -> rows", Own().update)
    with pytest.raises(TypeError, match="'weights'"):
        gf.transform("own", "rows -> rows", Own())


def test_another_function_in_a_transform_is_the_one_that_runs():
    """An update rule that applies itself must not outlive the function that it stands for."""

    def still(grads, state, params, context):
        return (
            {name: torch.zeros_like(p) for name, p in params.items()},
            state,
            {"lr": torch.ones(())},
        )

    params = {"w": torch.ones(2)}
    for update in (gf.sgd(1.0), gf.chain(gf.sgd(1.0)), gf.named("x", gf.sgd(1.0))):
        changed = replace(update, compute=still)
        assert changed(params, update.init(params), params)[0]["w"].tolist() == [1.0, 1.0]


def test_kinds_of_chains():
    assert gf.chain(gf.agree_filter(), sgd()).kind == "rows -> update"
    assert gf.chain(gf.agc_clip(), sgd()).kind == "tree -> update"
    assert gf.chain(gf.sam_perturb(0.1), sgd()).kind == "tree -> update"
    assert gf.chain(gf.sam_perturb(0.1), gf.mean_rows(), sgd()).kind == "rows -> update"
    assert gf.chain(gf.finite_filter()).kind == "rows -> rows or tree -> tree"


def test_names_are_numbered_and_given():
    update = gf.chain(
        gf.mean_rows(), gf.agc_clip(0.1), gf.chain(gf.agc_clip(0.2), sgd()), gf.ema_params()
    )
    assert list(update.init(PARAMS)) == ["mean_rows", "agc_clip", "agc_clip_2", "sgd", "ema_params"]
    _, _, info = call(update)
    assert {"agc_clip/clipped_fraction", "agc_clip_2/clipped_fraction", "sgd/lr"} <= set(info)
    named = gf.chain(gf.named("head", gf.chain(gf.mean_rows(), gf.agc_clip())), sgd())
    assert "head/agc_clip/clipped_fraction" in call(named)[2]


def test_a_dict_goes_in_wherever_a_stack_does():
    update = gf.chain(gf.agree_filter(1.2), sgd())
    by_dict, by_stack = call(update), call(update, gf.DenseStack(ROWS))
    assert all(torch.equal(by_dict[0][n], by_stack[0][n]) for n in PARAMS)


def test_vmapped_gradients_go_straight_in():
    grad = torch.func.grad(lambda p, x: (p["w"] * x).sum())
    rows = torch.func.vmap(grad, (None, 0))({"w": torch.ones(2)}, torch.tensor([[1.0, 2], [3, 4]]))
    new = call(gf.chain(gf.mean_rows(), gf.sgd(1.0)), rows, {"w": torch.ones(2)})[0]
    assert torch.equal(new["w"], torch.tensor([-1.0, -2.0]))


def test_two_agc_clips_in_one_chain_are_the_tighter_one_by_one():
    params = make_params(torch.float64)
    grads = {n: 3 * torch.randn_like(p) for n, p in params.items()}

    def clip(g, p, clipping):
        over = list(range(1, g.ndim)) if g.ndim > 1 else list(range(g.ndim))
        norm = lambda t: (t * t).sum(over, keepdim=True).sqrt() if over else t.abs()
        limit = clipping * norm(p).clamp(min=1e-3)
        return g * (limit / norm(g)).clamp(max=1)

    update = gf.chain(gf.agc_clip(0.5), gf.agc_clip(0.1), gf.sgd(1.0))
    new, _, info = call(update, grads, params)
    for n, p in params.items():
        torch.testing.assert_close(p - new[n], clip(clip(grads[n], p, 0.5), p, 0.1))
    assert info["agc_clip/clipped_fraction"] > 0 and info["agc_clip_2/clipped_fraction"] > 0


def test_the_latest_rows_are_visible():
    seen = {}

    def look(grads, state, params, /, **extra):
        seen["norms"] = extra["rows"].sq_norms()
        return grads, state, {}

    spy = gf.link("spy", "tree -> tree", look)
    call(gf.chain(gf.clip_per_row(0.5), gf.mean_rows(), gf.named("inner", gf.chain(spy)), sgd()))
    torch.testing.assert_close(seen["norms"], torch.full((5,), 0.25, dtype=torch.float64))


def test_keep_is_the_and_of_everybody():
    def vote(name, keep):
        def update(grads, state, params, /, **extra):
            return grads, state, {"keep": torch.tensor(keep)}

        return gf.link(name, "tree -> tree", update, publishes=("keep",))

    tree = {name: g[0] for name, g in ROWS.items()}
    for first, second, caller in torch.cartesian_prod(*[torch.tensor([0, 1])] * 3).bool().tolist():
        update = gf.chain(vote("a", first), vote("b", second), sgd())
        new, _, info = call(update, tree, keep=torch.tensor(caller))
        assert bool(info["keep"]) == (first and second and caller)
        assert torch.equal(new["head.weight"], PARAMS["head.weight"]) != bool(info["keep"])


def test_a_caller_may_give_a_plain_bool():
    update = gf.chain(gf.mean_rows(), sgd())
    assert torch.equal(call(update, keep=False)[0]["head.weight"], PARAMS["head.weight"])
    assert not torch.equal(call(update, keep=True)[0]["head.weight"], PARAMS["head.weight"])


def test_clip_per_row_before_consensus():
    """Consensus looks at directions only; what it accepts is combined as it was clipped."""
    params = make_params(torch.float64)
    rows = make_rows(params)
    update = gf.chain(gf.clip_per_row(0.7), gf.consensus_filter(1.0, soft=False), gf.sgd(1.0))
    new, _, info = call(update, rows, params)
    j = torch.cat([g.reshape(5, -1) for g in rows.values()], 1)
    clipped = j * (0.7 / j.norm(dim=1)).clamp(max=1)[:, None]
    unit = j / j.norm(dim=1, keepdim=True)
    agree = torch.stack([unit[i] @ (unit.sum(0) - unit[i]) for i in range(5)]) >= 0
    assert torch.equal(info["consensus_filter/accepted"], agree) and agree.sum() >= 2
    got = torch.cat([(params[n] - new[n]).reshape(-1) for n in params])
    torch.testing.assert_close(got, clipped[agree].mean(0))


def test_a_gate_reads_a_metric_of_an_earlier_link():
    update = gf.chain(
        gf.finite_filter(), gf.mean_rows(), gf.gate(gf.agc_clip(1e-6), "finite_filter/any"), sgd()
    )
    with pytest.raises(ValueError, match=r"gate: 'agc_clip' runs when 'finite_filter/any'"):
        call(update)
    tree_chain = gf.chain(gf.finite_filter(), gf.gate(gf.agc_clip(1e-6), "keep"), gf.sgd(1.0))
    tree = {name: g[0] for name, g in ROWS.items()}
    new = call(tree_chain, tree)[0]
    assert (new["body.conv"] - PARAMS["body.conv"]).abs().max() < 1e-4


def test_a_skipped_step_still_reports_its_metrics():
    rows = {"w": torch.tensor([[1.0], [-1.0], [1.0]])}
    params = {"w": torch.zeros(1)}
    update = gf.chain(gf.agree_filter(0.5, min_accepted=3), gf.sgd(0.1))
    new, _, info = call(update, rows, params)
    assert not info["keep"] and torch.equal(new["w"], params["w"])
    assert info["agree_filter/accepted"].tolist() == [True, False, True]


def test_a_chain_with_another_function_is_no_longer_its_parts():
    params, rows = {"w": torch.ones(2)}, {"w": torch.ones(3, 2)}
    slow, fast = (gf.chain(gf.mean_rows(), gf.sgd(lr)) for lr in (0.1, 0.5))
    changed = replace(slow, name="changed", compute=fast.compute)
    assert changed.parts == () and changed.apply is None and slow.parts
    for update in (changed, gf.chain(changed)):
        assert update(params, update.init(params), rows)[0]["w"].tolist() == [0.5, 0.5]
    assert gf.hyperparameters(changed) == {}


@pytest.mark.parametrize("given", [None, True, False])
def test_keep_may_be_a_plain_bool_and_none_is_not_given(given):
    def update(grads, state, params, /, **extra):
        return grads, state, {"keep": True}

    own = gf.chain(gf.transform("own", "tree -> tree", update), gf.sgd(1.0))
    params = {"w": torch.ones(2)}
    new, _, info = own(params, own.init(params), params, keep=given)
    skipped = given is False
    assert info["keep"].item() is not skipped
    assert new["w"].tolist() == ([1.0, 1.0] if skipped else [0.0, 0.0])


def test_a_branch_of_a_skipped_step_says_so():
    gated = gf.gate(gf.chain(gf.finite_filter(), gf.sgd(1.0)), "late")
    update = gf.partition({"a": gated}, lambda name: "a")
    params, no = {"w": torch.ones(2)}, torch.tensor(False)
    info = update(params, update.init(params), params, keep=no, late=no)[2]
    assert not info["keep"] and not info["partition/a/keep"]
