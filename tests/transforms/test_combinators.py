"""masked, partition, freeze, gate, ema_params and named, against chains without them."""

import pytest
import torch

import gradfilter as gf
from _cases import is_head, label, make_params, make_rows, make_stack, sgd

PARAMS = make_params(torch.float64)
ROWS = make_rows(PARAMS)
TREE = {name: g[0] for name, g in ROWS.items()}
HEAD = [name for name in PARAMS if is_head(name)]
BODY = [name for name in PARAMS if not is_head(name)]


def restrict(tree, names):
    return {name: tree[name] for name in names}


def call(update, grads, params=PARAMS, **extra):
    return update(params, update.init(params), grads, **extra)


def assert_params(got, expected):
    assert set(got) == set(expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


# --- masked


@pytest.mark.parametrize("make", [lambda: gf.clip_by_global_norm(0.5), lambda: gf.agc_clip(0.01)])
def test_masked_links_see_only_their_leaves(make):
    new = call(gf.chain(gf.masked(make(), is_head), gf.sgd(1.0)), TREE)[0]
    seen = call(gf.chain(make(), gf.sgd(1.0)), restrict(TREE, HEAD), restrict(PARAMS, HEAD))[0]
    rest = {n: PARAMS[n] - TREE[n] for n in BODY}
    assert_params(new, {**seen, **rest})


def test_masked_rows_are_joined_again():
    update = gf.chain(gf.masked(gf.clip_per_row(0.5), is_head), gf.mean_rows(), gf.sgd(1.0))
    head = torch.cat([ROWS[n].reshape(5, -1) for n in HEAD], 1)
    factor = (0.5 / head.norm(dim=1)).clamp(max=1)
    expected = {
        n: PARAMS[n]
        - (ROWS[n] * factor.reshape(-1, *[1] * PARAMS[n].ndim) if n in HEAD else ROWS[n]).mean(0)
        for n in PARAMS
    }
    assert_params(call(update, ROWS)[0], expected)


def test_masked_reducer_leaves_the_mean_elsewhere():
    update = gf.chain(gf.masked(gf.agree_filter(0.5), is_head), gf.sgd(1.0))
    inner = gf.chain(gf.agree_filter(0.5, min_accepted=1), gf.sgd(1.0))
    seen = call(inner, restrict(ROWS, HEAD), restrict(PARAMS, HEAD))
    new, _, info = call(update, ROWS)
    assert info["keep"] and not info["agree_filter/accepted"].all()
    assert_params(new, {**seen[0], **{n: PARAMS[n] - ROWS[n].mean(0) for n in BODY}})


def test_masked_sam_perturbs_and_decomposes_only_its_leaves():
    stack = make_stack(PARAMS, ROWS)
    update = gf.chain(
        gf.mean_rows(), gf.masked(gf.sam_perturb(0.3), is_head), gf.gsam_decompose(0.4), gf.sgd(1.0)
    )
    g = {n: r.mean(0) for n, r in ROWS.items()}
    norm = sum((g[n] ** 2).sum() for n in HEAD).sqrt()
    h = {n: g[n] + 0.5 * 0.3 * g[n] / norm if n in HEAD else g[n] for n in PARAMS}
    a = sum((g[n] * h[n]).sum() for n in PARAMS)
    b = sum((h[n] ** 2).sum() for n in PARAMS)
    d = {n: (1 + 0.4 * a / b) * h[n] - 0.4 * g[n] for n in PARAMS}
    assert_params(call(update, stack)[0], {n: PARAMS[n] - d[n] for n in PARAMS})


def test_masked_predicate_that_chooses_nothing():
    with pytest.raises(ValueError, match=r"choose a leaf for 'agc_clip', found none among"):
        gf.chain(gf.masked(gf.agc_clip(), lambda n: False), sgd()).init(PARAMS)


# --- partition


def test_partition_is_two_independent_chains():
    chains = {
        "head": gf.chain(gf.consensus_filter(), gf.adamw(0.1)),
        "body": gf.chain(gf.agree_filter(1.2), gf.agc_clip(0.01), gf.sgd(0.2, momentum=0.9)),
    }
    update = gf.partition(chains, label)
    params, state = PARAMS, update.init(PARAMS)
    apart = {key: (restrict(PARAMS, own)) for key, own in (("head", HEAD), ("body", BODY))}
    states = {key: chains[key].init(apart[key]) for key in chains}
    for seed in range(3):
        rows = make_rows(PARAMS, seed=seed)
        params, state, info = update(params, state, rows)
        for key, own in (("head", HEAD), ("body", BODY)):
            apart[key], states[key], alone = chains[key](
                apart[key], states[key], restrict(rows, own)
            )
            for name, value in alone.items():
                assert torch.equal(info[f"partition/{key}/{name}"], value)
        assert_params(params, {**apart["head"], **apart["body"]})


def test_partition_skips_branch_by_branch():
    update = gf.partition(
        {
            "head": gf.chain(gf.agree_filter(0.0), gf.sgd(0.1, momentum=0.9)),
            "body": gf.chain(gf.mean_rows(), sgd()),
        },
        label,
    )
    planted = {n: p.clone() for n, p in PARAMS.items()}
    planted["head.weight"][0, 0] = -0.0
    new, state, info = call(update, ROWS, planted)
    assert not info["partition/head/keep"] and info["partition/body/keep"] and info["keep"]
    for n in HEAD:
        assert torch.equal(new[n], planted[n])
    assert torch.signbit(new["head.weight"][0, 0])
    assert state["head"]["sgd"]["count"] == 0 and state["body"]["sgd"]["count"] == 1
    assert all((new[n] != planted[n]).any() for n in BODY)
    both = gf.partition({k: gf.chain(gf.agree_filter(0.0), sgd()) for k in ("head", "body")}, label)
    assert not call(both, ROWS)[2]["keep"]


def test_partition_per_leaf_filters_per_tensor():
    update = gf.partition(
        {n: gf.chain(gf.agree_filter(0.9, min_accepted=1), gf.sgd(1.0)) for n in PARAMS},
        lambda name: name,
    )
    new = call(update, ROWS)[0]
    for n in PARAMS:
        alone = gf.chain(gf.agree_filter(0.9, min_accepted=1), gf.sgd(1.0))
        assert_params({n: new[n]}, call(alone, {n: ROWS[n]}, {n: PARAMS[n]})[0])


def test_partition_inside_a_chain_with_sam_in_a_branch():
    update = gf.chain(
        gf.clip_per_row(2.0),
        gf.partition(
            {
                "head": gf.chain(gf.mean_rows(), gf.sam_perturb(0.3), gf.sgd(1.0)),
                "body": gf.chain(gf.mean_rows(), gf.sgd(1.0)),
            },
            label,
        ),
    )
    new = call(update, make_stack(PARAMS, ROWS))[0]
    j = torch.cat([g.reshape(5, -1) for g in ROWS.values()], 1)
    c = (2.0 / j.norm(dim=1)).clamp(max=1)
    weigh = lambda g: torch.einsum("m,m...->...", c / 5, g)
    g = {n: weigh(ROWS[n]) for n in PARAMS}
    norm = sum((g[n] ** 2).sum() for n in HEAD).sqrt()
    expected = {n: PARAMS[n] - g[n] for n in BODY}
    for n in HEAD:
        expected[n] = PARAMS[n] - weigh(ROWS[n] + 0.5 * 0.3 * g[n] / norm)
    assert_params(new, expected)


def test_partition_errors():
    with pytest.raises(TypeError, match=r"all branches to take rows or all a tree.*mean_rows"):
        gf.partition({"head": sgd(), "body": gf.chain(gf.agree_filter(), sgd())}, label)
    with pytest.raises(TypeError, match=r"branch 'head' of kind 'tree -> tree'"):
        gf.partition({"head": gf.agc_clip(), "body": sgd()}, label)
    with pytest.raises(ValueError, match=r"found 'body' for leaf 'body.weight'"):
        gf.partition({"head": sgd()}, label).init(PARAMS)
    with pytest.raises(ValueError, match=r"found none in \['tail'\]"):
        gf.partition({"head": sgd(), "body": sgd(), "tail": sgd()}, label).init(PARAMS)
    with pytest.raises(ValueError, match="at least one branch"):
        gf.partition({}, label)


# --- freeze


def test_freeze_changes_no_bit():
    planted = {n: torch.full_like(p, -0.0) for n, p in PARAMS.items()}
    for update in (gf.chain(gf.mean_rows(), gf.freeze()), gf.freeze()):
        new = call(update, gf.DenseStack(ROWS), planted)[0]
        assert all(torch.signbit(p).all() for p in new.values())
    new = call(gf.chain(sgd(), gf.freeze(is_head)), TREE, planted)[0]
    assert all(torch.signbit(new[n]).all() for n in HEAD)
    assert all((new[n] != 0).any() for n in BODY)


def test_freeze_with_names_has_to_follow_a_rule():
    with pytest.raises(TypeError, match="takes an update, found a tree"):
        gf.chain(gf.mean_rows(), gf.freeze(is_head))


# --- gate


@pytest.mark.parametrize("on", [True, False])
def test_gate_takes_the_link_or_leaves_it(on):
    late = torch.tensor(on)
    clip = gf.chain(gf.gate(gf.agc_clip(0.01), "late"), gf.sgd(1.0))
    without = gf.chain(gf.agc_clip(0.01) if on else gf.agc_clip(None), gf.sgd(1.0))
    assert_params(call(clip, TREE, late=late)[0], call(without, TREE)[0])
    filtered = gf.chain(gf.gate(gf.agree_filter(0.9), "late"), gf.sgd(1.0))
    plain = gf.chain(gf.agree_filter(0.9) if on else gf.mean_rows(), gf.sgd(1.0))
    assert_params(call(filtered, ROWS, late=late)[0], call(plain, ROWS)[0])
    per_row = gf.chain(gf.gate(gf.clip_per_row(0.5), "late"), gf.consensus_filter(), gf.sgd(1.0))
    links = [gf.clip_per_row(0.5)] * on + [gf.consensus_filter(), gf.sgd(1.0)]
    assert_params(call(per_row, ROWS, late=late)[0], call(gf.chain(*links), ROWS)[0])


def test_a_gate_that_is_off_keeps_the_step_and_its_own_state():
    update = gf.chain(gf.gate(gf.agree_filter(0.0), "late"), gf.gate(sgd(), "late"))
    new, state, info = call(update, ROWS, late=torch.tensor(False))
    assert info["keep"] and state["sgd"]["count"] == 0
    assert all(torch.equal(new[n], PARAMS[n]) for n in PARAMS)
    on = call(gf.chain(gf.gate(gf.agree_filter(0.0), "late"), sgd()), ROWS, late=torch.tensor(True))
    assert not on[2]["keep"]


def test_a_gate_around_a_whole_chain():
    update = gf.gate(gf.chain(gf.agree_filter(1.2), sgd()), "late")
    new, state, info = call(update, ROWS, late=torch.tensor(False))
    assert info["keep"] and state["sgd"]["count"] == 0
    assert all(torch.equal(new[n], PARAMS[n]) for n in PARAMS)
    on = call(update, ROWS, late=torch.tensor(True))[0]
    assert_params(on, call(gf.chain(gf.agree_filter(1.2), sgd()), ROWS)[0])


def test_a_gated_reducer_hands_the_right_weights_to_sam():
    stack = make_stack(PARAMS, ROWS)
    gated = gf.chain(gf.gate(gf.agree_filter(0.9), "late"), gf.sam_perturb(0.3), gf.sgd(1.0))
    plain = gf.chain(gf.mean_rows(), gf.sam_perturb(0.3), gf.sgd(1.0))
    assert_params(call(gated, stack, late=torch.tensor(False))[0], call(plain, stack)[0])


def test_a_closed_gate_around_sam_makes_gsam_plain():
    stack = make_stack(PARAMS, ROWS)
    links = gf.gate(gf.sam_perturb(0.3), "late"), gf.gsam_decompose(0.4), gf.sgd(1.0)
    new = call(gf.chain(gf.mean_rows(), *links), stack, late=torch.tensor(False))[0]
    assert_params(new, {n: PARAMS[n] - ROWS[n].mean(0) for n in PARAMS})
    before = gf.chain(links[0], gf.mean_rows(), links[1], links[2])
    assert_params(call(before, stack, late=torch.tensor(False))[0], new)


# --- ema_params


def test_ema_follows_the_applied_parameters():
    update = gf.chain(gf.finite_filter(), gf.sgd(0.1, momentum=0.9), gf.ema_params(0.8))
    params, state = PARAMS, update.init(PARAMS)
    average = {n: p.clone() for n, p in PARAMS.items()}
    for k in range(6):
        grads = {n: g[k % 5] * (torch.nan if k == 3 else 1.0) for n, g in ROWS.items()}
        params, state, _ = update(params, state, grads)
        if k != 3:  # the skipped step is not averaged
            average = {n: 0.8 * average[n] + 0.2 * params[n] for n in params}
        assert_params(gf.ema_of(state), average)


def test_ema_of_finds_averages_in_branches_and_train_states():
    update = gf.partition(
        {k: gf.chain(gf.mean_rows(), sgd(), gf.ema_params()) for k in ("head", "body")}, label
    )
    assert set(gf.ema_of({"transforms": update.init(PARAMS)})) == set(PARAMS)
    for state in (sgd().init(PARAMS), {}):
        with pytest.raises(ValueError, match="found 0"):
            gf.ema_of(state)
    twice = gf.chain(sgd(), gf.ema_params(0.9), gf.ema_params(0.99))
    with pytest.raises(ValueError, match="found 2"):
        gf.ema_of(twice.init(PARAMS))
