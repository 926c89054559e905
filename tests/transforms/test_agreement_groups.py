"""`agree_filter` with groups of leaves and with excluded ones, against the rule of each group."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_agreement import RULES, sequential
from torch import nn

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import BAD, assert_close, assert_same, flat, normal_tree, random_matrix, run, unflat
from gradfilter.transforms import _agreement

seeds = st.integers(0, 2**20)
LEAVES = [["fc.weight"], ["fc.bias"], ["scale"], ["conv.weight"]]
LAYERS = [["fc.weight", "fc.bias"], ["scale"], ["conv.weight"]]  # by the order of the parameters
GROUPS = {"leaf": LEAVES, "layer": LAYERS, None: [["fc.weight", "fc.bias", "scale", "conv.weight"]]}
EXCLUDED = {"scale", "fc.bias"}


def by_groups(matrix, threshold, groups, options, min_accepted=2):
    """The rule of every group on its columns; rows with NaN anywhere are out of all groups."""
    finite = matrix.isfinite().all(1)
    matrix = torch.where(finite[:, None], matrix, torch.nan)
    rows, grads, accepted, cosines, margin = unflat(matrix), {}, [], [], 1.0
    for names in groups:
        own = {name: rows[name] for name in names}
        merged, _, ok, cosine, near = sequential(flat(own, batch_dims=1), threshold, *options)
        agreed = ok.sum() >= min_accepted
        start = 0
        for name in names:
            size = rows[name][0].numel()
            part = merged[start : start + size].view(rows[name].shape[1:])
            grads[name], start = part if agreed else torch.zeros_like(part), start + size
        accepted.append(ok)
        cosines.append(cosine)
        margin = min(margin, near)
    mean = torch.where(finite[:, None], matrix, 0.0).sum(0) / finite.sum().clamp(min=1)
    for name, leaf in unflat(mean).items():
        grads.setdefault(name, leaf)
    return grads, torch.stack(accepted), torch.stack(cosines), margin


@pytest.mark.parametrize("excluded", [set(), EXCLUDED])
@pytest.mark.parametrize("per", ["leaf", "layer", None])
@given(seed=seeds, options=st.sampled_from(RULES))
def test_every_group_follows_the_rule_by_itself(per, excluded, seed, options):
    matrix = random_matrix(seed, 2 + seed % 5, ("plain",) * 5 + ("zero", *BAD))
    threshold = (0.5, 0.9, 1.0, 1.5, 2.0)[seed % 5]
    groups = [[n for n in names if n not in excluded] for names in GROUPS[per]]
    groups = [names for names in groups if names]
    expected, accepted, cosine, margin = by_groups(matrix, threshold, groups, options)
    if margin < 1e-9:
        return
    link = gf.agree_filter(
        threshold,
        against=options[0],
        average=options[1],
        per=per,
        exclude=(lambda name: name in excluded) if excluded else None,
    )
    grads, out = run(link, unflat(matrix))
    agreed = accepted.sum(1) >= 2
    assert out["keep"] == agreed.any()
    grads = {name: grads[name] for name in expected}
    if per is None and not excluded:
        assert "weights" in out  # whole rows, as ever
        return
    assert_close(grads, expected, rtol=1e-7, atol=1e-9)
    assert "weights" not in out
    whole = per is None
    assert torch.equal(out["accepted"], accepted[0] if whole else accepted)
    assert_close(out["cosine"], cosine[0] if whole else cosine, rtol=1e-6, atol=1e-7)
    assert "agreed" not in out if whole else torch.equal(out["agreed"], agreed)


@given(seed=seeds, options=st.sampled_from(RULES))
def test_groups_by_operations_of_one_are_groups_one_by_one(seed, options):
    rows = unflat(random_matrix(seed, 5, ("plain", "plain", "zero", "nan")))
    link = gf.agree_filter(0.9, against=options[0], average=options[1], per="leaf")
    expected = run(link, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_agreement, "readable", lambda tensor: False)
        assert_close(run(link, rows), expected, rtol=1e-7, atol=1e-9)


def test_a_row_that_is_not_finite_in_one_leaf_is_rejected_in_all():
    matrix = random_matrix(1, 4)
    rows = unflat(matrix)
    rows["fc.bias"][2, 1] = torch.inf
    for exclude in (None, lambda name: name == "fc.bias"):
        grads, out = run(gf.agree_filter(2.0, per="leaf", exclude=exclude), rows)
        assert not out["accepted"][:, 2].any() and out["cosine"][:, 2].isnan().all()
        assert_close(flat(grads), matrix[[0, 1, 3]].mean(0))


AGAINST = {"w": torch.tensor([[1.0], [-1.0]]), "b": torch.tensor([[1.0], [2.0]])}


def test_a_group_without_agreement_has_gradient_zero_and_momentum_moves_it():
    update = gf.chain(gf.agree_filter(0.9, per="leaf"), gf.sgd(1.0, momentum=0.5))
    params = {"w": torch.zeros(1), "b": torch.zeros(1)}
    both = {"w": torch.tensor([[1.0], [1.0]]), "b": torch.tensor([[1.0], [1.0]])}
    params, state, _ = update(params, update.init(params), both)
    moved, state, info = update(params, state, AGAINST)
    assert info["keep"] and info["agree_filter/agreed"].tolist() == [False, True]
    assert moved["w"].item() == -1.5  # by the momentum of the first step alone
    assert moved["b"].item() == -1 - (0.5 + 1.5)
    # With a chain of its own, a group that disagrees stays where it is.
    rule = lambda: gf.chain(gf.agree_filter(0.9), gf.sgd(1.0, momentum=0.5))
    apart = gf.partition({"w": rule(), "b": rule()}, lambda name: name)
    params, state, _ = apart(params, apart.init(params), both)
    assert apart(params, state, AGAINST)[0]["w"] == params["w"]


def test_a_step_without_any_agreement_is_skipped():
    update = gf.chain(
        gf.agree_filter(0.9, per="leaf", exclude=lambda name: name == "b"), gf.sgd(1.0)
    )
    params = {"w": torch.zeros(1), "b": torch.zeros(1)}
    moved, _, info = update(params, update.init(params), AGAINST)
    assert not info["keep"]
    assert_same(moved, params)  # also what is excluded


def published(grads, threshold):
    """The rule of gaf-microbatch-pytorch on one parameter tensor (M, ...), from its formula.

    Rows within the threshold of each other are neighbours, and a row is its own. The first row
    with the most neighbours stays with these, at their mean; with no two neighbours, 0.
    """
    units = F.normalize(grads.flatten(1), dim=1)
    near = 1 - units @ units.T < threshold
    counts = near.sum(1).tolist()
    centre = counts.index(max(counts))
    if max(counts) == 1:
        return torch.zeros_like(grads[0]), centre
    return grads[near[centre]].mean(0), centre


def test_groups_per_leaf_are_those_of_the_published_package_where_the_first_row_is_the_centre():
    link = gf.agree_filter(0.6, against="first", per="leaf", exclude=lambda name: name == "scale")
    seen = {"same": 0, "none": 0, "other centre": 0}
    for seed in range(60):
        rows = unflat(random_matrix(seed, 5))
        grads, out = run(link, rows)
        for place, name in enumerate(["fc.weight", "fc.bias", "conv.weight"]):
            expected, centre = published(rows[name], 0.6)
            if centre == 0:
                assert_close(grads[name], expected)
                seen["same" if out["agreed"][place] else "none"] += 1
            else:  # they choose the row with the most neighbours, the rule of the paper the first
                seen["other centre"] += 1
        assert_close(grads["scale"], rows["scale"].mean(0))  # excluded in both
    assert min(seen.values()) >= 3


def small_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, 3))
    return model.double(), (torch.randn(24, 6).double(), torch.randint(3, (24,)))


@pytest.mark.parametrize("budget", [None, 0])
def test_rows_of_any_plan_give_what_ordinary_gradients_give(budget):
    model, (x, y) = small_network()
    rows = []
    for xs, ys in zip(x.chunk(6), y.chunk(6), strict=True):
        model.zero_grad()
        F.cross_entropy(model(xs), ys).backward()
        rows.append({n: p.grad.clone() for n, p in model.named_parameters()})
    params, _ = gf.extract(model)
    dense = gf.DenseStack({n: torch.stack([row[n] for row in rows]) for n in rows[0]})
    scale = torch.tensor([1.0, 0, 2, 1, -1, 1])
    loss = gf.model_loss(model, F.cross_entropy)
    link = gf.agree_filter(0.95, per="layer", exclude=lambda name: name == "0.bias")
    for plan in ("fused", "vmap", "loop"):
        options = {} if budget is None or plan != "fused" else {"memory_budget": budget}
        computed = gf.microbatch_grads(loss, 6, plan=plan, **options)(params, (x, y))
        for cut in (lambda s: s, lambda s: s.scaled(scale), lambda s: s.first(4)):
            found, expected = run(link, cut(computed), params), run(link, cut(dense), params)
            assert_close(found, expected, rtol=1e-7, atol=1e-10)
            assert expected[1]["agreed"].sum() > 0


def test_the_grams_of_leaves_are_one_pass_and_so_is_their_combination():
    model, batch = small_network()
    passes = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            h = self.inner(x)
            h.register_hook(lambda grad: passes.append(1))
            return h

    watched = Watched()
    params, _ = gf.extract(watched)
    loss = gf.model_loss(watched, F.cross_entropy)
    for budget, expected in ((None, 1), (0, 2)):
        passes.clear()
        options = {} if budget is None else {"memory_budget": budget}
        rows = gf.microbatch_grads(loss, 6, plan="fused", **options)(params, batch)
        run(gf.agree_filter(1.0, per="leaf"), rows, params)
        assert len(passes) == expected


def test_half_precision_combines_as_whole_rows_do():
    model = nn.Linear(6, 4).bfloat16()
    params, _ = gf.extract(model)
    batch = torch.randn(12, 6).bfloat16(), torch.randint(4, (12,))
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 4, plan="fused")(params, batch)
    found = run(gf.agree_filter(2.0, per="leaf"), rows, params)[0]
    expected = run(gf.mean_rows(), rows, params)[0]
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-3)


def test_a_scheduled_threshold_per_leaf():
    link = gf.scheduled(gf.agree_filter, threshold=gs.linear(1.5, 4, min_value=0.5), per="leaf")
    params = normal_tree(0)
    state = link.init(params)
    for k in range(5):
        rows = unflat(random_matrix(k, 5))
        grads, state, out = link.update(rows, state, params)
        by_hand = gf.agree_filter(out["threshold"].item(), per="leaf")
        assert_close(grads, run(by_hand, rows)[0])


def test_compiled_groups_are_the_groups():
    model, batch = small_network()
    update = gf.chain(gf.agree_filter(0.95, per="layer"), gf.sgd(0.1, momentum=0.9))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=6)
    compiled = gf.compile(step, backend="graph")
    states = [step.init(model, seed=0)] * 2
    for _ in range(3):
        states[0], info = step(states[0], batch)
        states[1], found = compiled(states[1], batch)
        assert_close(states[1]["params"], states[0]["params"], rtol=1e-8)
        assert_close(dict(found), dict(info), rtol=1e-8)


def test_options_of_groups_are_checked():
    with pytest.raises(ValueError, match=r'per "leaf", "layer" or None, found per=.module.*partit'):
        gf.agree_filter(per="module")
    with pytest.raises(TypeError, match=r"exclude as a function of a leaf's name, found list"):
        gf.agree_filter(exclude=["fc.bias"])
    with pytest.raises(ValueError, match=r"a leaf that is not excluded, found none among.*mean"):
        gf.agree_filter(exclude=lambda name: True).init(normal_tree(0))
    with pytest.raises(ValueError, match=r"M = 1, which has nothing to agree"):
        run(gf.agree_filter(per="leaf"), unflat(random_matrix(0, 1)))
    with pytest.raises(ValueError, match=r"'sam_perturb'.*what 'agree_filter' gives"):
        gf.chain(gf.agree_filter(per="leaf"), gf.sam_perturb(0.1))
