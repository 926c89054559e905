"""All kinds of rows on two ranks: rows and earlier answers are never written to."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import gradfilter as gf
from _world import mine
from gradfilter import _tree
from gradfilter.distributed import RankStack, _ranks, across_ranks
from gradfilter.distributed import _ranks as _exchange
from gradfilter.grads._joined_stacks import join

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or TIGHT))


KINDS = {
    "a": ((3, 4), torch.float32),
    "b": ((5,), torch.float64),
    "c": ((7, 2), torch.bfloat16),
    "d": ((), torch.float32),
    "none": ((0, 3), torch.float32),
    "e": ((2,), torch.float32),
}


def in_turn(m):
    """Answers in any order; they change no row, and no answer changes an earlier one."""
    g = torch.Generator().manual_seed(1)
    full = {
        name: torch.randn(2 * m, *shape, generator=g).to(dtype)
        for name, (shape, dtype) in KINDS.items()
    }
    rows, weights = mine(full), torch.linspace(0.5, 1, 2 * m)
    before = {name: leaf.clone() for name, leaf in rows.items()}
    spread, whole = RankStack(rows), gf.DenseStack(full)
    for _ in range(2):
        kept, copies = [], []
        for stack, expected in (
            (spread, whole),
            (spread.scaled(weights), whole.scaled(weights)),
            (spread.columns(["c", "d"]), whole.columns(["c", "d"])),
        ):
            for ask in ("combine", "gram", "combine", "combine", "sq_norms"):
                arguments = [weights] if ask == "combine" else []
                found = getattr(stack, ask)(*arguments)
                close(found, getattr(expected, ask)(*arguments), rtol=1e-2, atol=1e-2)
                kept.append(found)
                copies.append(_tree.tree_map(torch.clone, found))
        spread.release()
        spread.gram()
        close(kept, copies, rtol=0, atol=0)
        for leaf in _tree.leaves(kept):
            leaf.fill_(9.0)  # they are the caller's
    assert all(torch.equal(rows[name], before[name]) for name in rows)


@pytest.mark.parametrize("m", [1, 2])
def test_no_row_and_no_earlier_answer_is_written_to(two, m):
    two.run(in_turn, m)


def fewer_numbers_than_ranks():
    one = RankStack({"a": torch.ones(1, 1)})
    assert one.gram().tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert one.combine(torch.ones(2))["a"].tolist() == [2.0]
    none = RankStack({"a": torch.ones(2, 0)})
    assert not none.gram().any() and none.combine(torch.ones(4))["a"].shape == (0,)


def test_fewer_numbers_than_ranks(two):
    two.run(fewer_numbers_than_ranks)


def strided(m, bucket):
    """Permuted and expanded leaves; sums of the local rows that are not contiguous."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_exchange, "BUCKET", bucket)
        full = {
            "a": torch.randn(4, 6, 2 * m, generator=torch.Generator().manual_seed(0)).permute(
                2, 1, 0
            ),
            "b": torch.arange(2.0 * m)[:, None].expand(2 * m, 5),
            "c": torch.arange(20.0)[::2].expand(2 * m, 10),
        }
        spread, weights = RankStack(mine(full)), torch.linspace(0, 1, 2 * m)
        for _ in range(2):
            close(spread.combine(weights), gf.DenseStack(full).combine(weights))
            spread.gram()
        every_other = {"a": torch.arange(20.0)[::2], "b": torch.ones(4)[::2]}
        found = _exchange.added_up(every_other, _ranks.Ranks.of(None))
        assert torch.equal(found["a"], 2 * torch.arange(20.0)[::2])


@pytest.mark.parametrize("bucket", [2**22, 3])
def test_rows_that_are_not_contiguous(two, bucket):
    two.run(strided, 1, bucket)
    two.run(strided, 2, bucket)


def followed(count):
    """Rows, losses and weights that autograd follows, outside no_grad."""
    warnings.simplefilter("error")
    leaf = torch.randn(count, _ranks.LONG + 1, requires_grad=True)
    for rows in (leaf, leaf * 2):
        spread = RankStack(gf.DenseStack({"a": rows}, losses=leaf.sum(1)))
        weights = torch.ones(2 * count, requires_grad=True)
        results = [spread.losses, spread.combine(weights), spread.gram(), spread.combine(weights)]
        results += [spread.dot({"a": torch.ones(len(leaf[0]))}), spread.sq_norms()]
        results += [spread.stacked()]
        assert not any(result.requires_grad for result in _tree.leaves(results))


def test_rows_that_autograd_follows(two):
    for count in (1, 2, 40):
        two.run(followed, count)


def many_rows(m):
    """More rows than one message brings the losses of, and as many as it does."""
    full, losses = torch.randn(2 * m, 5), torch.arange(2.0 * m)
    whole = gf.DenseStack({"a": full}, losses=losses.float())
    spread = RankStack(gf.DenseStack({"a": mine(full)}, losses=mine(losses.float())))
    assert torch.equal(spread.losses, whole.losses) and spread.live.all()
    params = {"a": torch.zeros(5)}
    found, expected = (gf.consensus_filter().update(s, {}, params) for s in (spread, whole))
    close(found[0], expected[0])
    close(found[2], expected[2])


@pytest.mark.parametrize("m", [32, 33])
def test_many_rows_per_rank(two, m):
    two.run(many_rows, m)


def elsewhere(m):
    """`at`, `at_rows` and `along` of what `first`, `columns` and `scaled` left."""
    net = torch.nn.Linear(4, 3)
    loss = gf.model_loss(net, F.cross_entropy)
    params, _ = gf.extract(net)
    batch = torch.randn(8 * m, 4), torch.arange(8 * m) % 3
    whole = gf.microbatch_grads(loss, 2 * m)(params, batch)
    spread = RankStack(gf.microbatch_grads(loss, m)(params, mine(batch)))
    scale = torch.linspace(0, 1, 2 * m)
    for view in (
        lambda s: s.first(2 * m - 1),
        lambda s: s.scaled(scale).columns(["bias"]).first(2 * m - 1),
        lambda s: s.first(1).scaled(scale[-1:]),
    ):
        a, b = view(spread), view(whole)
        far = {n: torch.linspace(0, 1, params[n].numel()).view_as(params[n]) for n in a.shapes}
        near = {n: params[n] + far[n] for n in far}
        apart = {n: torch.stack([p + k * far[n] for k in range(len(a))]) for n, p in near.items()}
        steps = torch.linspace(-0.5, 0.7, len(a))
        joined = (
            join(*(s.columns([n]).scaled(steps + 1) for n in s.shapes)).along(steps) for s in (a, b)
        )
        pairs = [(a.at(near), b.at(near)), (a.at_rows(apart), b.at_rows(apart))]
        for x, y in (*pairs, (a.along(steps), b.along(steps)), tuple(joined)):
            assert x.shapes == y.shapes and torch.equal(x.live, y.live)
            close(x.losses, y.losses)
            close(x.gram(), y.gram())
            close(x.combine(torch.ones(len(x))), y.combine(torch.ones(len(y))))


@pytest.mark.parametrize("m", [1, 2])
def test_the_same_rows_at_other_parameters(two, m):
    two.run(elsewhere, m)


def host_group():
    """A backend without CPUs gets an additional gloo group, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        patch.setattr(dist, "get_backend", lambda group: "nccl")
        assert RankStack({"a": torch.ones(1, 2)}).gram().sum() == 8
        group = dist.group.WORLD
        made = _ranks._host_group(group)
        assert made is not group and made is _ranks._host_group(group)
    assert _ranks._host_group(group) is group
    _ranks._make_host_group.cache_clear()
    dist.destroy_process_group(made)


def test_ranks_whose_backend_knows_no_cpu_compare_notes_beside_it(two):
    two.run(host_group)


def two_groups():
    """Stacks of two groups of the same ranks, asked in turn, and of one made after another."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    own = 1.0 + dist.get_rank()
    a, b = (
        RankStack({"a": torch.full((1, 5), k * own)}, g)
        for k, g in zip((1, 10), groups, strict=True)
    )
    assert a.gram()[0, 1] == 10 and b.gram()[0, 1] == 1000
    assert b.combine(torch.ones(2))["a"][0] == 30 and a.combine(torch.ones(2))["a"][0] == 3
    dist.destroy_process_group(groups[0])
    again = RankStack({"a": torch.full((1, 5), own)}, dist.new_group([0, 1]))
    assert again.gram()[1, 1] == 20


def test_groups_asked_in_turn(two):
    two.run(two_groups)


def test_sharded_tensors_are_imported_when_needed():
    code = "import gradfilter.distributed, sys; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def compiled():
    """A compiled update across ranks gives what the update gives, also in its second step."""
    g = torch.Generator().manual_seed(dist.get_rank())
    params = {"w": torch.zeros(4, 3), "b": torch.ones(4)}
    update = gf.chain(
        across_ranks(), gf.agree_filter(1.0), gf.agc_clip(0.1), gf.sgd(0.1, momentum=0.9)
    )
    state = update.init(params)
    step = torch.compile(update, backend="aot_eager")
    for _ in range(2):
        rows = {n: 1 + torch.randn(3, *p.shape, generator=g) for n, p in params.items()}
        expected = update(params, state, rows)
        params, state, info = step(params, state, rows)
        torch.testing.assert_close((params, state, info), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_update_is_the_update(two):
    two.run(compiled)
