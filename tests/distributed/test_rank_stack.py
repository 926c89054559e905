"""Rows on several ranks: the answers and the training of one stack with all rows.

Every rank also computes the answer of one process, from rows that a seed determines.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from benchmarks._wire import Wire

import gradfilter as gf
from _cases import EXTRA, VARIANTS, build, make_params, make_rows, make_stack
from _world import mine
from gradfilter import _tree
from gradfilter.distributed import RankStack, across_ranks
from gradfilter.distributed import _ranks as _exchange

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
ODD = {"a": (3, 5), "b": (7,), "c": (), "d": (2, 3, 3), "e": (1,)}  # 42 numbers


def rows_of(seed, rows, dtype=torch.float64, shapes=ODD):
    g = torch.Generator().manual_seed(seed)

    def leaf(shape):
        common = torch.randn(shape, generator=g, dtype=torch.float64)
        return common + 2 * torch.randn((rows, *shape), generator=g, dtype=torch.float64)

    return {name: leaf(shape).to(dtype) for name, shape in shapes.items()}


def same_on_all_ranks(tree):
    """Bit for bit, NaN included."""
    for leaf in _tree.leaves(tree):
        own = torch.empty(leaf.numel(), dtype=leaf.dtype).copy_(leaf.flatten()).view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        assert all(torch.equal(part, own) for part in parts)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or TIGHT), equal_nan=True)


# What follows runs on every rank.


def questions(m, bucket):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_exchange, "BUCKET", bucket)
        return answered(m)


def answered(m):
    n = m * dist.get_world_size()
    full = rows_of(1, n)
    losses = torch.arange(n) + 0.5
    whole = gf.DenseStack(full, losses=losses)
    spread = RankStack(gf.DenseStack(mine(full), losses=mine(losses)))
    assert len(spread) == n and spread.shapes == whole.shapes
    close(spread.losses, losses)
    scale = torch.linspace(-1, 1, n)
    scale[n // 2] = 0.0
    weights = torch.linspace(0.5, 2, n)
    weights[-1] = 0.0
    tree = {name: torch.full(shape, 0.5) for name, shape in ODD.items()}

    def cut(stack, view):
        stack = stack.scaled(scale) if "scaled" in view else stack
        stack = stack.columns(["b", "d"]) if "columns" in view else stack
        return stack.first(n - 1) if "first" in view and n > 1 else stack

    for order in ("gram", "combine"):  # before and after the rows are exchanged
        for view in ("", "scaled", "columns", "first", "scaled columns first"):
            a, b = cut(spread, view), cut(whole, view)
            assert len(a) == len(b) and a.shapes == b.shapes and torch.equal(a.live, b.live)
            v, w = {name: tree[name] for name in a.shapes}, weights[: len(b)]
            answers = [
                lambda s: s.sq_norms(),
                lambda s, w=w: s.combine(w),
                lambda s, v=v: s.dot(v),
                lambda s: s.gram(),
                lambda s: s.sq_norms(),
                lambda s, w=w: s.combine(w),
                lambda s, w=w: s.sum_squares(w),
                lambda s: s.stacked(),
                lambda s: s.reduce_columns(lambda columns: columns.amax(0) - columns[-1]),
            ]
            for answer in answers if order == "combine" else answers[3:]:
                found = answer(a)
                close(found, answer(b))
                same_on_all_ranks(found)
    spread.release()
    close(spread.combine(weights), whole.combine(weights))
    close(spread.gram(), whole.gram())
    return n


@pytest.mark.parametrize("m", [1, 2, 3])
def test_every_question_has_the_answer_of_one_stack(world, m):
    # 42 numbers in one bucket, in several, and every leaf larger than a bucket.
    for bucket in (2**22, 16, 1):
        assert set(world.run(questions, m, bucket)) == {m * len(world.pipes)}


def every_case(m):
    params = make_params(torch.float64)
    size = dist.get_world_size()
    full = make_rows(params, rows=m * size)
    for variant in VARIANTS:
        link = build(variant)
        single, spread = link, gf.chain(across_ranks(), link)
        states = [single.init(params), spread.init(params)]
        values = [dict(params), dict(params)]
        for _ in range(2):
            whole = make_stack(values[0], full)
            values[0], states[0], expected = single(values[0], states[0], whole, **EXTRA)
            local = make_stack(values[1], mine(full))
            values[1], states[1], found = spread(values[1], states[1], local, **EXTRA)
            same_on_all_ranks(values[1])
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                same_on_all_ranks(found[key])
                close(found[key], value)
            close(values[1], values[0])
            close(list(gf.state_dict(states[1]).values()), list(gf.state_dict(states[0]).values()))
    return len(VARIANTS)


@pytest.mark.parametrize("m", [1, 3])
def test_every_link_after_across_ranks_is_what_it_is_on_one_stack(world, m):
    assert set(world.run(every_case, m)) == {len(VARIANTS)}


RULES = {
    "running": lambda: gf.agree_filter(0.9),
    "halving": lambda: gf.agree_filter(0.9, average="halving"),
    "first": lambda: gf.agree_filter(0.9, against="first"),
    "consensus": lambda: gf.consensus_filter(),
    "consensus, hard": lambda: gf.consensus_filter(0.8, soft=False),
    "aggregate": lambda: gf.aggregate(lambda gram: gram.diagonal().softmax(0)),
    "sign agreement": lambda: gf.sign_agreement(0.5),
    "per leaf": lambda: gf.agree_filter(0.9, per="leaf"),
    "trimmed": lambda: gf.trimmed_mean(1),
    "median": lambda: gf.coordinate_median(),
    "geometric": lambda: gf.geometric_median(),
    "centered": lambda: gf.centered_clip(1.0, steps=2),
    "removed first": lambda: gf.chain(gf.finite_filter(), gf.mean_rows()),
    "guarded": lambda: gf.chain(gf.finite_filter(), gf.agree_filter(0.9)),
}


def rules(m, seeds):
    """Also with a rank whose rows are NaN, one with an Inf, and a zero row."""
    n, kept = m * dist.get_world_size(), 0
    for seed in range(seeds):
        full = rows_of(seed, n)
        if seed % 3:
            full["a"][m : 2 * m, 0, 0] = torch.nan  # all rows of rank 1
            full["d"][n - 1] = torch.inf if seed % 3 == 1 else 0.0
        params = {name: torch.zeros(shape) for name, shape in ODD.items()}
        for make in RULES.values():
            link = make()
            if len(link.parts) < 2 and link.name in ("sign_agreement", "aggregate") and seed % 3:
                continue  # they look at every row there is
            expected = link.update(gf.DenseStack(full), link.init(params), params)
            found = link.update(RankStack(mine(full)), link.init(params), params)
            same_on_all_ranks([found[0], found[2]])
            close(found[0], expected[0])
            assert found[2].keys() == expected[2].keys()
            for key in found[2]:
                close(found[2][key], expected[2][key])
            kept += bool(found[2].get("keep", False))
    return kept


@pytest.mark.parametrize("m", [1, 2, 5])
def test_every_rule_decides_alike_on_all_ranks_and_as_one_process_does(world, m):
    kept = world.run(rules, m, 12)
    assert len(set(kept)) == 1 and kept[0] > 12


def followed(by):
    """Every rank has clean samples of its own: all follow the mean of their gradients."""
    size = dist.get_world_size()
    full = rows_of(1, 3 * size)
    references = [rows_of(10 + rank, 1) for rank in range(size)]
    own = {name: leaf[0] for name, leaf in references[dist.get_rank()].items()}
    mean = {name: torch.stack([r[name][0] for r in references]).mean(0) for name in ODD}
    params = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in ODD.items()}
    rule = gf.reference_filter(by=by)
    found = rule.update(RankStack(mine(full)), {}, params, reference=own)
    expected = rule.update(gf.DenseStack(full), {}, params, reference=mean)
    same_on_all_ranks([found[0], found[2]])
    close(found[0], expected[0])
    close(found[2]["weights"], expected[2]["weights"])


@pytest.mark.parametrize("by", ["product", "cosine"])
def test_all_ranks_follow_the_mean_of_their_references(world, by):
    world.run(followed, by)


def followed_in_parts():
    """Behind `across_ranks` the rows of all parts are held, and the weights are those of all."""
    size = dist.get_world_size()
    loss = gf.model_loss(network(), torch.nn.functional.cross_entropy)
    given, found = data(4 * size, 7), []
    for spread, at_once in ((False, None), (False, 2), (True, 1)):
        links = [across_ranks()] * spread
        update = gf.chain(*links, gf.reference_filter(by="cosine"), gf.sgd(0.3))
        rows = 4 if spread else 4 * size
        step = gf.train_step(loss, update, microbatches=rows, rows_at_once=at_once)
        state = step.init(network())
        for k in range(3):
            batch = data(8 * size, k)
            own = (mine(batch), mine(given)) if spread else (batch, given)
            state, info = step(state, own[0], reference_batch=own[1])
        found.append((state["params"], info))
    same_on_all_ranks(found[2][0])
    for params, info in found[1:]:
        close(params, found[0][0], rtol=1e-5, atol=1e-6)
        key = "reference_filter/accepted"
        assert info[key].tolist() == found[0][1][key].tolist()


def test_rows_in_parts_follow_a_reference_on_all_ranks(world):
    world.run(followed_in_parts)


def half_precision():
    n = 3 * dist.get_world_size()
    full = rows_of(1, n, torch.bfloat16)
    weights = torch.linspace(-1, 2, n)
    spread = RankStack(mine(full))
    close(spread.gram(), gf.DenseStack(full).gram(), rtol=1e-6, atol=1e-6)  # float32 products
    found = spread.combine(weights)
    same_on_all_ranks(found)
    for name, leaf in found.items():
        assert leaf.dtype == torch.bfloat16
        exact = (weights.reshape(-1, *[1] * leaf.ndim) * full[name].double()).sum(0)
        close(leaf.double(), exact, rtol=1.01 * 2**-8, atol=1e-6)  # half of eps = 2**-7


def test_half_precision_rows_are_summed_in_float32_and_rounded_once(world):
    world.run(half_precision)


def data(n, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)


def network():
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))


def trained(m, chains, steps=5):
    """Twice the same training: on the rows of all ranks, and in one process."""
    size, loss = dist.get_world_size(), gf.model_loss(network(), torch.nn.functional.cross_entropy)
    found = []
    for spread in (False, True):
        update = chains(spread)
        params, _ = gf.extract(network())
        state = update.init(params)
        grads_of = gf.microbatch_grads(loss, m if spread else m * size)
        for k in range(steps):
            batch = data(4 * m * size, k)
            if spread:
                batch = mine(batch)
            params, state, info = update(params, state, grads_of(params, batch))
        found.append((params, info))
    return found


CHAINS = {
    "agree": lambda *links: gf.chain(*links, gf.agree_filter(0.95), gf.sgd(0.1, momentum=0.9)),
    "consensus": lambda *links: gf.chain(*links, gf.consensus_filter(), gf.adamw(0.01)),
    "sam": lambda *links: gf.chain(
        *links, gf.agree_filter(1.5), gf.sam_perturb(0.1), gf.gsam_decompose(0.4), gf.sgd(0.1)
    ),
    "sam of rows": lambda *links: gf.chain(
        *links, gf.sam_perturb(0.1), gf.agree_filter(1.5), gf.gsam_decompose(0.4), gf.sgd(0.1)
    ),
    "per microbatch": lambda *links: gf.chain(
        *links, gf.sam_perturb(0.1, per_microbatch=True), gf.mean_rows(), gf.sgd(0.1)
    ),
}


def training(m, name):
    chains = CHAINS[name]
    single, spread = trained(m, lambda spread: chains(*[across_ranks()] * spread))
    close(spread[0], single[0])
    same_on_all_ranks(spread)
    assert spread[1].keys() == single[1].keys()
    close(list(spread[1].values()), list(single[1].values()))


@pytest.mark.parametrize("name", CHAINS)
def test_training_is_that_of_one_process_with_all_microbatches(world, name):
    world.run(training, 1, name)
    world.run(training, 2, name)


def sharpness_per_rank(m, alpha):
    """sam_perturb before across_ranks, against the definition of m-sharpness."""
    rho, lr, size = 0.2, 0.1, dist.get_world_size()
    model = network()
    loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
    params, _ = gf.extract(model)
    batch = data(4 * m * size)

    def gradient(at, part):
        value = lambda p: torch.nn.functional.cross_entropy(
            torch.func.functional_call(model, p, (part[0],)), part[1]
        )
        return torch.func.grad(value)(at)

    clean, near = [], []
    for rank in range(size):
        part = _tree.tree_map(lambda t, r=rank: t.unflatten(0, (size, -1))[r], batch)
        g = gradient(params, part)
        norm = sum(leaf.square().sum() for leaf in g.values()).sqrt()
        clean.append(g)
        near.append(gradient({n: p + rho * g[n] / norm for n, p in params.items()}, part))
    g, h = ({n: sum(t[n] for t in trees) / size for n in params} for trees in (clean, near))
    a, b = (sum((t[n] * h[n]).sum() for n in params) for t in (g, h))
    expected = {n: p - lr * ((1 + alpha * a / b) * h[n] - alpha * g[n]) for n, p in params.items()}

    surrogate = [gf.gsam_decompose(alpha)] if alpha else []
    update = gf.chain(gf.sam_perturb(rho), across_ranks(), gf.mean_rows(), *surrogate, gf.sgd(lr))
    rows = gf.microbatch_grads(loss, m)(params, mine(batch))
    with Wire(size) as wire:
        found, _, _ = update(params, update.init(params), rows)
    close(found, expected)
    same_on_all_ranks(found)
    return wire.calls.count("allreduce_")


@pytest.mark.parametrize("m", [1, 2])
def test_m_sharpness_perturbs_on_every_rank_and_reduces_once(world, m):
    assert set(world.run(sharpness_per_rank, m, 0.0)) == {1}  # h
    assert set(world.run(sharpness_per_rank, m, 0.4)) == {2}  # h and g


def shared_gradients():
    """Autograd gives both parameters one and the same gradient, expanded from a single number."""
    size = dist.get_world_size()
    shape = (_exchange.BUCKET + 3,)
    params = {"a": torch.zeros(shape), "b": torch.zeros(shape)}
    loss = lambda p, batch: (p["a"] + p["b"]).sum() * batch.mean()
    update = gf.chain(across_ranks(), gf.mean_rows(), gf.sgd(1.0))
    for m in (1, 2):
        batch = torch.arange(2.0 * m * size)
        rows = gf.microbatch_grads(loss, m)(params, mine(batch))
        found, _, _ = update(params, update.init(params), rows)
        for name in params:
            close(found[name], torch.full(shape, -batch.mean()))


def test_gradients_that_autograd_shares_are_added_up_once(world):
    world.run(shared_gradients)


def sized_rows(kind):
    """Weighted, grouped and uneven rows on every rank are those of one process with all samples."""
    torch.manual_seed(3)
    size, n, m = dist.get_world_size(), 6, 3
    each = functools.partial(torch.nn.functional.cross_entropy, reduction="none")
    loss, samples = gf.model_loss(network(), each), 7 if kind == "uneven" else n
    batch = torch.randn(size * samples, 6), torch.arange(size * samples) % 3
    weights = torch.arange(size * samples) % 5 + 1.0
    weights[:2] = 0  # the first row of the first rank is empty
    index = torch.randint(2, (size * samples,)) + 1  # so is the first group of every rank
    params, _ = gf.extract(loss.model)
    given = {
        "weights": {"sample_weights": weights},
        "groups": {"groups": index, "sample_weights": weights},
        "uneven": {"sample_weights": weights},
    }[kind]
    local = gf.microbatch_grads(loss, m, uneven=True)
    parts = [t.chunk(size) for t in batch]
    options = [
        dict(zip(given, own, strict=True))
        for own in zip(*(t.chunk(size) for t in given.values()), strict=True)
    ]
    pairs = zip(zip(*parts, strict=True), options, strict=True)
    rows = [local(params, part, **own) for part, own in pairs]
    whole = gf.DenseStack(
        {name: torch.cat([part.stacked()[name] for part in rows]) for name in params},
        losses=torch.cat([part.losses for part in rows]),
    )
    for rule in (gf.mean_rows, lambda: gf.agree_filter(1.0), lambda: gf.consensus_filter(1.0)):
        spread, alone = gf.chain(across_ranks(), rule()), gf.chain(rule())
        grads, _, out = spread.update(rows[dist.get_rank()], spread.init(params), params)
        expected, _, other = alone.update(whole, alone.init(params), params)
        close(grads, expected)
        close(out["weights"], other["weights"])
        same_on_all_ranks(grads)
    return whole.live.tolist().count(False)


@pytest.mark.parametrize("kind", ["weights", "groups", "uneven"])
def test_rows_of_other_sizes(world, kind):
    empty = {"weights": 1, "groups": len(world.pipes), "uneven": 0}[kind]
    assert set(world.run(sized_rows, kind)) == {empty}
