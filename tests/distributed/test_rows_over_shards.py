"""Rows of each rank's own samples over sharded parameters are those of one process."""

import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import gradfilter as gf
from _world import PATIENCE, World
from gradfilter._lost_ranks import LostRanksError
from gradfilter.distributed import across_ranks
from gradfilter.interop import Filtered

M, B, STEPS = 3, 2, 4
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Net(torch.nn.Module):
    """Odd sizes, a table, a convolution, norms, attention, a tied and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.place = torch.nn.Parameter(0.1 * torch.randn(5, 6))
        self.conv = torch.nn.Conv1d(6, 6, 3, padding=1)
        self.block = torch.nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True)
        self.norm = torch.nn.LayerNorm(6)
        self.matrix = torch.nn.Parameter(0.3 * torch.randn(6, 6))
        self.unused = torch.nn.Linear(2, 2)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        h = self.table(x) + self.place
        h = h + self.conv(h.mT).mT
        h = self.norm(self.block(h))
        h = torch.tanh(h @ self.matrix) + h @ self.matrix.T
        return self.scale * F.linear(h, self.table.weight).mean(1)


def network():
    torch.manual_seed(5)
    return Net()


def sharded(layout="fsdp"):
    size = dist.get_world_size()
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
    else:
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))
    model = network()
    for layer in (model.conv, model.block, model.norm):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch_of(step):
    """The batch of all ranks in one step."""
    g = torch.Generator().manual_seed(step)
    n = M * B * dist.get_world_size()
    return torch.randint(11, (n, 5), generator=g), torch.randint(11, (n,), generator=g)


def own(batch):
    each, rank = M * B, dist.get_rank()
    return tuple(t[rank * each : (rank + 1) * each] for t in batch)


def reference(params, batch, rows):
    """Rows by an ordinary backward pass of the plain module for each microbatch."""
    model, found, losses = network(), [], []
    gf.insert(model, params, {})
    for x, y in zip(batch[0].chunk(rows), batch[1].chunk(rows), strict=True):
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.detach())
        zero = torch.zeros_like
        found.append(
            {n: zero(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        )
    grads = {name: torch.stack([row[name] for row in found]) for name in found[0]}
    return gf.DenseStack(grads, losses=torch.stack(losses))


def whole(tree):
    return {
        n: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for n, leaf in tree.items()
    }


def close(found, expected):
    torch.testing.assert_close(found, expected, **TIGHT)


def local_rows(model, batch, rows=M, **options):
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss = gf.model_loss(model, F.cross_entropy)
    return gf.microbatch_grads(loss, rows, **options)(params, own(batch))


def rows_of_all(local):
    chain = across_ranks()
    params = local.origin.params
    return chain.update(local, chain.init(params), params)[0]


def questions(layout, rows, budget):
    model, batch = sharded(layout), batch_of(0)
    total = rows * dist.get_world_size()
    make = lambda: rows_of_all(local_rows(model, batch, rows, memory_budget=budget))
    expected = reference(gf.extract(network())[0], batch, total)
    stack = make()
    assert len(stack) == total and stack.shapes == expected.shapes
    close(stack.losses, expected.losses)
    weights = torch.linspace(-1, 2, total)
    scale = torch.linspace(2, 0, total)
    close(whole(make().combine(weights)), expected.combine(weights))
    for view in (
        lambda s: s,
        lambda s: s.scaled(scale),
        lambda s: s.columns(["table.weight", "norm.bias", "unused.bias"]).first(total - 1),
    ):
        a, b = view(make()), view(expected)
        w = weights[: len(a)]
        close(a.sq_norms(), b.sq_norms())
        v = a.combine(w)
        close(whole(v), b.combine(w))
        assert all(isinstance(leaf, DTensor) for leaf in v.values())
        close(a.dot(v), b.dot(whole(v)))
        close(a.gram(), b.gram())
        close(whole(a.combine(w)), b.combine(w))
        close(whole(a.sum_squares(w)), b.sum_squares(w))
        close(whole(a.stacked()), b.stacked())
        close(
            whole(a.reduce_columns(lambda t: t.median(0).values)),
            b.reduce_columns(lambda t: t.median(0).values),
        )
    params = dict(model.named_parameters())
    return all(v[n].placements == params[n].placements for n in v)


@pytest.mark.parametrize("rows", [1, M])
def test_every_question_has_the_answer_of_one_process(two, rows):
    assert two.run(questions, "fsdp", rows, None) == [True] * 2


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 20_000])
def test_every_question_with_a_small_budget(two, budget):
    assert two.run(questions, "fsdp", M, budget) == [True] * 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_every_question_on_four_ranks(four, layout):
    assert four.run(questions, layout, M, None) == [True] * 4


# --- Training ---


CHAINS = {
    "agreement": lambda: [gf.agree_filter(1.0), gf.sgd(0.1, momentum=0.9)],
    "consensus": lambda: [gf.consensus_filter(), gf.adamw(0.01)],
    "clipped rows": lambda: [
        gf.finite_filter(),
        gf.clip_per_row(0.5),
        gf.mean_rows(),
        gf.clip_by_global_norm(1.0),
        gf.adamw(0.01),
    ],
    "mean": lambda: [gf.mean_rows(), gf.sgd(0.1)],
    "sam": lambda: [gf.mean_rows(), gf.sam_perturb(0.05), gf.sgd(0.1)],
    "sam of filtered rows": lambda: [gf.agree_filter(1.2), gf.sam_perturb(0.05), gf.sgd(0.1)],
    "1-sam": lambda: [gf.sam_perturb(0.05, per_microbatch=True), gf.mean_rows(), gf.sgd(0.1)],
    "gsam": lambda: [
        gf.mean_rows(),
        gf.sam_perturb(0.05),
        gf.gsam_decompose(0.2),
        gf.sgd(0.1),
    ],
    "median": lambda: [gf.coordinate_median(), gf.sgd(0.1)],
    "per example": lambda: [gf.per_example_adam(0.01)],
    "spikes": lambda: [gf.mean_rows(), gf.spike_clip(warmup=2), gf.sgd(0.1)],
    "by leaf": lambda: [gf.agree_filter(1.0, per="leaf"), gf.sgd(0.1)],
    "agc": lambda: [gf.mean_rows(), gf.agc_clip(0.02), gf.sgd(0.1)],
}


BEFORE = {
    "agreement of clipped rows": lambda: [gf.clip_per_row(0.3)],
    "median of clipped rows": lambda: [gf.finite_filter(), gf.clip_per_row(0.3)],
}
"""What runs on the rows of each rank, before `across_ranks`."""

CHAINS |= {
    "agreement of clipped rows": lambda: [gf.agree_filter(1.0), gf.sgd(0.5)],
    "median of clipped rows": lambda: [gf.coordinate_median(), gf.sgd(0.5)],
}


MORE = {
    "watch": lambda: [gf.watch(), gf.agree_filter(1.0), gf.sgd(0.5)],
    "by layer": lambda: [gf.agree_filter(1.0, per="layer"), gf.sgd(0.5)],
    "geometric median": lambda: [gf.geometric_median(), gf.sgd(0.5)],
    "centered clip": lambda: [gf.centered_clip(0.3), gf.sgd(0.5)],
    "trimmed": lambda: [gf.trimmed_mean(1), gf.sgd(0.5)],
    "signs": lambda: [gf.sign_agreement(0.5), gf.sgd(0.5)],
    "quantile": lambda: [gf.clip_per_row(gf.quantile(0.5)), gf.mean_rows(), gf.sgd(0.5)],
    "clip of leaves": lambda: [gf.clip_per_row(0.1, per_leaf=True), gf.mean_rows(), gf.sgd(0.5)],
    "reference": lambda: [gf.reference_filter("average"), gf.sgd(0.5)],
    "friendly": lambda: [gf.mean_rows(), gf.friendly_sam(0.05), gf.sgd(0.5)],
    "look": lambda: [gf.mean_rows(), gf.look_sam(0.05, 2), gf.sgd(0.5)],
    "adaptive": lambda: [gf.mean_rows(), gf.sam_perturb(0.05, adaptive="asam"), gf.sgd(0.5)],
    "normalized": lambda: [gf.normalize_rows(), gf.mean_rows(), gf.sgd(0.5)],
    "losses": lambda: [gf.trim_losses(0.2), gf.mean_rows(), gf.sgd(0.5)],
    "outliers": lambda: [gf.outlier_filter(1.2), gf.mean_rows(), gf.sgd(0.5)],
    "skip": lambda: [gf.mean_rows(), gf.spike_skip(), gf.sgd(0.5)],
    "budget": lambda: [gf.budget_clip(), gf.mean_rows(), gf.sgd(0.5)],
    # Not with `cautious`, which counts signs: attention's gradient for its key bias is rounding.
    "msam": lambda: [gf.mean_rows(), gf.msam(gf.adamw(0.01), 0.3)],
}
CHAINS |= MORE


def training(name, layout="fsdp", rows=M):
    model = sharded(layout)
    loss = gf.model_loss(model, F.cross_entropy)
    before = BEFORE.get(name, list)
    chain = gf.chain(*before(), across_ranks(), *CHAINS[name]())
    step = gf.train_step(loss, chain, microbatches=rows)
    state = step.init(model)
    plain = network()
    ranks = dist.get_world_size()
    naive = gf.train_step(
        gf.model_loss(plain, F.cross_entropy),
        gf.chain(*before(), *CHAINS[name]()),
        microbatches=rows * ranks,
        plan="loop",
    )
    expected = naive.init(plain)
    kept = 0
    for at in range(STEPS):
        state, info = step(state, own(batch_of(at)))
        expected, wanted = naive(expected, batch_of(at))
        close(whole(state["params"]), expected["params"])
        own_rows = ("clip_per_row", "finite_filter") if before is not list else ()
        for key in wanted.keys() - {"loss", *(k for k in wanted if k.startswith(own_rows))}:
            close(info[key].to(wanted[key].dtype), wanted[key])
        kept += bool(info.get("keep", True))
    return kept


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in CHAINS]
)
def test_training_is_that_of_one_process(two, name):
    kept = two.run(training, name)
    assert kept[0] == kept[1] > 0


def test_single_rows_move_along_themselves(two):
    two.run(training, "1-sam", "fsdp", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agreement", "consensus", "clipped rows", "sam"])
def test_training_on_four_ranks(four, name):
    assert len(set(four.run(training, name, "hsdp"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agreement", "consensus", "clipped rows", "sam"])
def test_training_on_three_ranks(three, name):
    assert len(set(three.run(training, name))) == 1


# --- An optimizer of torch, by `Filtered` ---


def with_filtered(rows):
    model, plain, size = sharded(), network(), dist.get_world_size()
    make = lambda module, chain, m: Filtered(
        module,
        F.cross_entropy,
        chain,
        torch.optim.AdamW(module.parameters(), lr=0.01),
        m,
    )
    found = make(model, gf.chain(across_ranks(), gf.consensus_filter()), rows)
    naive = make(plain, gf.consensus_filter(), rows * size)
    for at in range(STEPS):
        model(own(batch_of(9))[0])  # leaves the root's parameters gathered, as an evaluation does
        mine = found.step(*own(batch_of(at)))
        wanted = naive.step(*batch_of(at))
        assert mine.info.keys() == wanted.info.keys()
        params = dict(model.named_parameters())
        found_now = whole({name: p.detach() for name, p in found._params().items()})
        close(found_now, {name: p.detach() for name, p in plain.named_parameters()})
    # Its own forward and backward passes work as before.
    F.cross_entropy(model(own(batch_of(9))[0]), own(batch_of(9))[1]).backward()
    return all(isinstance(p, DTensor) for p in params.values())


def test_filtered_drives_an_optimizer_of_torch(two):
    assert two.run(with_filtered, M) == [True] * 2


def accumulated(links, clip):
    """Steps of one to three batches, next to ordinary backward passes."""
    model, plain, size = sharded(), network(), dist.get_world_size()
    found = Filtered(
        model,
        F.cross_entropy,
        gf.chain(across_ranks(), *links, gf.mean_rows()),
        torch.optim.AdamW(model.parameters(), lr=0.01),
        M,
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for at in range(STEPS):
        batches = [batch_of(10 * at + part) for part in range(1 + at % 3)]
        params = {n: p.detach().clone() for n, p in plain.named_parameters()}
        stacks = [reference(params, batch, M * size) for batch in batches]
        for batch in batches[:-1]:
            model(own(batch)[0])  # leaves the root's parameters gathered, as an evaluation does
            found.accumulate(*own(batch))
        result = found.step(*own(batches[-1]))
        rows = [stack.stacked() for stack in stacks]
        norms = torch.cat([stack.sq_norms() for stack in stacks]).sqrt()
        factors = (clip / norms).clamp(max=1)
        assert factors.min() < 1 if clip < 1e3 else factors.min() == 1
        for name, p in plain.named_parameters():
            leaf = torch.cat([own_rows[name] for own_rows in rows])
            p.grad = torch.einsum("m,m...->...", factors, leaf) / len(leaf)
        optimizer.step()
        here = torch.cat(
            [stack.losses.unflatten(0, (size, M))[dist.get_rank()] for stack in stacks]
        )
        close(result.loss, here.mean())
        close(whole(found._params()), {n: p.detach() for n, p in plain.named_parameters()})
    with pytest.raises(ValueError, match=r"expected no keep= with accumulate\(\)"):
        found.accumulate(*own(batch_of(0)), keep=True)
    found.accumulate(*own(batch_of(0)))
    with pytest.raises(ValueError, match=r"expected no keep= with accumulate\(\)"):
        found.step(*own(batch_of(0)), keep=True)


@pytest.mark.parametrize("clip", [0.3, 1e9])
def test_batches_accumulate_where_rows_need_not_be_held(two, clip):
    links = [gf.finite_filter(), gf.clip_per_row(clip)] if clip < 1 else []
    two.run(accumulated, links, clip)


# --- Activation checkpoints ---


class Checkpointed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 6)
        self.second = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh())
        self.head = torch.nn.Linear(7, 3)

    def forward(self, x):
        h = checkpoint(self.first, x, use_reentrant=False).tanh()
        return self.head(checkpoint(self.second, h, use_reentrant=False))


def checkpoints():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    model, plain = Checkpointed(), Checkpointed()
    plain.load_state_dict(model.state_dict())
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    g = torch.Generator().manual_seed(3)
    n = M * B * dist.get_world_size()
    batch = torch.randn(n, 5, generator=g), torch.randint(3, (n,), generator=g)
    steps = [
        gf.train_step(
            gf.model_loss(net, F.cross_entropy),
            gf.chain(*first, gf.clip_per_row(0.3), gf.mean_rows(), gf.sgd(0.1)),
            microbatches=m,
        )
        for net, first, m in (
            (model, [across_ranks()], M),
            (plain, [], M * dist.get_world_size()),
        )
    ]
    states = [steps[0].init(model), steps[1].init(plain)]
    for _ in range(3):
        states[0], _ = steps[0](states[0], own(batch))
        states[1], _ = steps[1](states[1], batch)
        close(whole(states[0]["params"]), states[1]["params"])


def test_checkpointed_functions_gather_again(two):
    two.run(checkpoints)


# --- Tensor parallelism ---


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(5, 8)
        self.down = torch.nn.Linear(8, 5)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x + self.down(self.up(x).relu()))


def tensor_parallel(dp, tp, with_fsdp):
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    model, plain = Mlp(), Mlp()
    plain.load_state_dict(model.state_dict())
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if with_fsdp:
        fully_shard(model.up, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    g = torch.Generator().manual_seed(3)
    batch = torch.randn(M * B * dp, 5, generator=g), torch.randint(3, (M * B * dp,), generator=g)
    at = mesh.get_local_rank("dp")
    mine = tuple(t[at * M * B : (at + 1) * M * B] for t in batch)
    front = across_ranks(mesh.get_group("dp"))
    chain = [gf.consensus_filter(), gf.clip_by_global_norm(0.5), gf.adamw(0.01)]
    found = gf.train_step(
        gf.model_loss(model, F.cross_entropy), gf.chain(front, *chain), microbatches=M
    )
    naive = gf.train_step(
        gf.model_loss(plain, F.cross_entropy), gf.chain(*chain), microbatches=M * dp, plan="loop"
    )
    state, expected = found.init(model), naive.init(plain)
    for _ in range(3):
        state, _ = found(state, mine)
        expected, _ = naive(expected, batch)
        close(whole(state["params"]), expected["params"])


def test_tensor_parallel_layers_alone(two):
    two.run(tensor_parallel, 1, 2, False)


@pytest.mark.slow
@pytest.mark.parametrize("with_fsdp", [False, True])
def test_tensor_parallel_layers_with_data_parallelism(four, with_fsdp):
    four.run(tensor_parallel, 2, 2, with_fsdp)


# --- Refusals ---


class Branching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def refusals():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(torch.nn.Linear(2, 2), mesh=mesh)
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss = gf.model_loss(model, F.cross_entropy)
    batch = torch.randn(4, 2), torch.arange(4) % 2
    rows = gf.microbatch_grads(loss, 2)(params, batch)
    with pytest.raises(ValueError, match=r"Expected across_ranks\(\) before a sum of rows"):
        rows.combine(torch.ones(2))
    with pytest.raises(TypeError, match=r"Expected plan .fused. .* found plan 'vmap'"):
        gf.microbatch_grads(loss, 2, plan="vmap")(params, batch)
    with pytest.raises(ValueError, match="rows in several parts"):
        gf.microbatch_grads(loss, 3, uneven=True)(params, batch)
    with pytest.raises(ValueError, match="found groups="):
        gf.microbatch_grads(loss, 2)(params, batch, groups=torch.tensor([0, 1, 1, 0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Filtered: expected across_ranks\(\) first in the chain"):
        Filtered(model, F.cross_entropy, gf.mean_rows(), optimizer, 2)
    adaptive = gf.sam_perturb(0.1, adaptive="asam", per_microbatch=True)
    moved = gf.chain(across_ranks(), adaptive, gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(loss, moved, microbatches=2)
    with pytest.raises(ValueError, match=r"Expected parameters that all rows share.*adaptive="):
        step(step.init(model), batch)
    chain = gf.chain(across_ranks(), gf.mean_rows())
    with pytest.raises(ValueError, match="expected compile=False"):
        Filtered(model, F.cross_entropy, chain, optimizer, 2, compile=True)
    filtered = Filtered(model, F.cross_entropy, chain, optimizer, 2)
    for first in ([across_ranks(), gf.agree_filter(1.0)], [gf.clip_per_row(1.0), across_ranks()]):
        held = gf.chain(*first, *([] if "agree" in first[1].name else [gf.mean_rows()]))
        with pytest.raises(ValueError, match=r"found accumulate\(\) with parameters that are sha"):
            Filtered(model, F.cross_entropy, held, optimizer, 2).accumulate(*batch)
    with pytest.raises(ValueError, match="Expected whole parameters with reference_batch="):
        filtered.step(*batch, reference_batch=batch)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mixed = fully_shard(torch.nn.Linear(2, 2), mesh=mesh, mp_policy=half)
    with pytest.raises(ValueError, match=r"without a MixedPrecisionPolicy.*torch.autocast"):
        of = gf.microbatch_grads(gf.model_loss(mixed, F.cross_entropy), 2)
        of({n: p.detach() for n, p in mixed.named_parameters()}, batch)
    branching = fully_shard(Branching(), mesh=mesh)
    with pytest.raises(RuntimeError, match="Ranks with sharded parameters cannot run several"):
        of = gf.microbatch_grads(gf.model_loss(branching, F.cross_entropy), 2)
        ones = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].expand(4, 2)
        of({n: p.detach() for n, p in branching.named_parameters()}, (ones, batch[1]))
    step = gf.train_step(
        loss, gf.chain(across_ranks(), gf.mean_rows(), gf.sgd(0.1)), microbatches=2
    )
    with pytest.raises(TypeError, match=r"Expected whole parameters in a step of gradfilter.comp"):
        gf.compile(step, backend="graph")(step.init(model), batch)


def test_what_cannot_be_is_refused(two):
    two.run(refusals)


def differing():
    """Ranks whose models differ find out before the first sum."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(torch.nn.Linear(2, 2), mesh=mesh)
    params = {n: p.detach() for n, p in model.named_parameters()}
    rows = 2 + dist.get_rank()
    batch = torch.randn(2 * rows, 2), torch.arange(2 * rows) % 2
    local = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), rows)(params, batch)
    across_ranks().update(local, {}, params)


def test_ranks_that_differ_are_refused(two):
    for error in two.errors(differing):
        assert "expected as many rows on every rank, found 2 on rank 0 and 3 on rank 1" in error


def ignored_rows():
    """A row without labels on one rank takes no part, and asks nothing of that rank alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    model, plain = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    plain.load_state_dict(model.state_dict())
    fully_shard(model, mesh=mesh)
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(8, 3, generator=g), torch.randint(3, (8,), generator=g)
    y[:2] = -100  # the first row of the first rank
    at = dist.get_rank()
    params = {n: p.detach() for n, p in model.named_parameters()}
    of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 2)
    found = rows_of_all(of(params, (x[4 * at : 4 * at + 4], y[4 * at : 4 * at + 4])))
    assert found.live.tolist() == [False, True, True, True]
    rows = gf.microbatch_grads(gf.model_loss(plain, F.cross_entropy), 4)(
        {n: p.detach() for n, p in plain.named_parameters()}, (x, y)
    )
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0])
    close(whole(found.combine(weights)), rows.combine(weights))
    close(found.gram(), rows.gram())


def test_a_row_without_labels_on_one_rank(two):
    two.run(ignored_rows)


# --- A rank that is gone while the others gather ---


set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def lost(victim, harm):
    """What is said when one rank goes in the forward pass of the second step."""
    model, going = sharded(), []

    def leave(*_):
        if going and dist.get_rank() == victim:
            if harm == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # until the test is over

    model.norm.register_forward_pre_hook(leave)
    chain = gf.chain(across_ranks(), gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), chain, microbatches=M)
    state = step.init(model)
    state, _ = step(state, own(batch_of(0)))
    dist.barrier()
    set_timeout(timedelta(seconds=1))
    going.append(True)
    before = {n: p.to_local().clone() for n, p in state["params"].items()}
    with pytest.raises(LostRanksError) as found:
        step(state, own(batch_of(1)))
    close({n: p.to_local() for n, p in state["params"].items()}, before)
    return str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["killed", "stalls"])
def test_a_rank_that_is_gone_while_the_others_gather_is_named(harm):
    world = World(3, timeout=10 * PATIENCE)
    try:
        world.start(lost, 1, harm)
        for rank in (0, 2):
            fine, said = world.outcome(rank)
            assert fine, said
            assert f"Rank {rank} of 3 lost the others while gathering what is sharded" in said
            assert "No word within 3 s from rank 1. Nothing was updated" in said
    finally:
        world.close()
