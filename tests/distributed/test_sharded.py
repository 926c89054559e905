"""Parameters sharded over ranks by FSDP2: the training equals that of whole parameters."""

import inspect

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarks._wire import Wire
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gradfilter as gf
from _torch_optim import TORCH_CLASSES
from gradfilter.distributed import ShardedStack, sharded_rows

M, B, STEPS = 3, 4, 5
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


class Net(torch.nn.Module):
    """Odd sizes, so that shards differ and one is empty; a transposed convolution; BatchNorm."""

    def __init__(self):
        super().__init__()
        # A bias before a BatchNorm has gradient 0, and Adam would enlarge its rounding errors.
        self.up = torch.nn.ConvTranspose1d(2, 5, 3, bias=False)
        self.norm = torch.nn.BatchNorm1d(5)
        self.hidden = torch.nn.Linear(5, 7)
        self.unused = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(7, 3)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        h = self.norm(self.up(x)).relu().mean(2)
        return self.scale * self.head(self.hidden(h).tanh())


def network():
    torch.manual_seed(5)
    return Net()


def sharded(layout):
    """FSDP2 over all ranks, or over pairs of ranks that are replicated (HSDP)."""
    size = dist.get_world_size()
    mesh = (
        init_device_mesh("cpu", (size,))
        if layout == "fsdp"
        else init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))
    )
    model = network()
    for layer in (model.up, model.hidden, model.head):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches(step):
    """The batch of every rank in one step."""
    g = torch.Generator().manual_seed(step)
    return [
        (torch.randn(M * B, 2, 4, generator=g), torch.randint(3, (M * B,), generator=g))
        for _ in range(dist.get_world_size())
    ]


def reference(step, params):
    """Row m is the mean over ranks of the gradients of their microbatches m. (M, *shape)."""
    model = network()
    rows_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan="loop")
    stacks = [rows_of(params, batch) for batch in batches(step)]
    rows = {
        name: torch.stack([stack.stacked()[name] for stack in stacks]).mean(0) for name in params
    }
    return gf.DenseStack(rows, losses=torch.stack([stack.losses for stack in stacks]).mean(0))


def whole(tree):
    return {
        n: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for n, leaf in tree.items()
    }


def close(found, expected):
    torch.testing.assert_close(found, expected, **TIGHT)


def own_rows(model, step):
    loss = lambda batch: F.cross_entropy(model(batch[0]), batch[1])
    return sharded_rows(model, loss, batches(step)[dist.get_rank()], M)


def questions(layout):
    model = sharded(layout)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    rows = own_rows(model, 0)
    assert all((p.grad.full_tensor() == 7).all() for p in model.parameters())  # put back
    expected = reference(0, gf.extract(network())[0])
    assert len(rows) == M and rows.shapes == expected.shapes
    close(rows.losses, expected.losses)
    assert not whole(rows.stacked())["unused.weight"].any()
    weights = torch.tensor([0.5, 0.0, 2.0])
    scale = torch.tensor([0.0, -2.0, 3.0])
    names = ["up.weight", "head.bias"]
    for view in (
        lambda s: s,
        lambda s: s.scaled(scale),
        lambda s: s.columns(names).first(2),
        lambda s: s.scaled(scale).first(2),
    ):
        a, b = view(rows), view(expected)
        assert torch.equal(a.live, b.live)
        close(a.gram(), b.gram())
        close(a.sq_norms(), b.sq_norms())
        v = a.combine(weights[: len(a)])
        close(whole(v), b.combine(weights[: len(a)]))
        squares = a.sum_squares(weights[: len(a)])
        close(whole(squares), b.sum_squares(weights[: len(a)]))
        close(a.dot(v), b.dot(whole(v)))
        close(whole(a.stacked()), b.stacked())
    p = dict(model.named_parameters())["hidden.weight"]
    return v["up.weight"].placements == p.placements


def test_every_question_has_the_answer_of_whole_rows(two):
    assert two.run(questions, "fsdp") == [True] * 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_every_question_on_four_ranks(four, layout):
    assert four.run(questions, layout) == [True] * 4


LR = gf.schedules.cosine(0.1, 20, warmup_steps=2)
CHAINS = {
    "agree, sgd": lambda: gf.chain(gf.agree_filter(1.0), gf.sgd(LR, momentum=0.9)),
    "consensus, global norm, adamw": lambda: gf.chain(
        gf.consensus_filter(), gf.clip_by_global_norm(0.1), gf.adamw(0.01)
    ),
    "clipped rows, adam": lambda: gf.chain(
        gf.finite_filter(), gf.clip_per_row(0.5), gf.mean_rows(), gf.adam(0.01, amsgrad=True)
    ),
    "agc, rmsprop": lambda: gf.chain(
        gf.mean_rows(),
        gf.agc_clip(0.02, unit_dims=lambda name: 1 if name == "up.weight" else None),
        gf.rmsprop(0.01, momentum=0.9),
    ),
    "agc, some": lambda: gf.chain(
        gf.mean_rows(), gf.agc_clip(0.05, exclude=lambda name: "head" in name), gf.sgd(0.1)
    ),
    "msam, cautious, adamw": lambda: gf.chain(
        gf.mean_rows(), gf.msam(gf.cautious(gf.adamw(0.01)), 0.3)
    ),
    "schedule-free, lion": lambda: gf.partition(
        {
            "head": gf.chain(gf.mean_rows(), gf.schedule_free(gf.sgd(LR))),
            "body": gf.chain(gf.mean_rows(), gf.cautious(gf.lion(0.01, weight_decay=0.1))),
        },
        lambda name: "head" if "head" in name else "body",
    ),
    "agree per layer": lambda: gf.chain(
        gf.agree_filter(1.0, per="layer", exclude=lambda name: "head" in name), gf.sgd(0.1)
    ),
    "trimmed": lambda: gf.chain(gf.trimmed_mean(1), gf.sgd(0.1)),
    "geometric": lambda: gf.chain(gf.geometric_median(), gf.sgd(0.1)),
    "centered": lambda: gf.chain(gf.centered_clip(0.3, steps=2), gf.sgd(0.1)),
    "guarded tree": lambda: gf.chain(gf.mean_rows(), gf.finite_filter(), gf.sgd(0.1)),
    "groups": lambda: gf.partition(
        {
            "head": gf.chain(gf.agree_filter(1.2), gf.sgd(0.1)),
            "body": gf.chain(gf.sign_agreement(0.5), gf.adamw(0.01), gf.ema_params(0.9)),
        },
        lambda name: "head" if "head" in name else "body",
    ),
}


def training(layout, name, donate):
    model, update = sharded(layout), CHAINS[name]()
    params = {n: p.detach() for n, p in model.named_parameters()}
    single = gf.extract(network())[0]
    states = [update.init(params), update.init(single)]
    kept = 0
    for step in range(STEPS):
        rows = own_rows(model, step)
        params, states[0], info = update(params, states[0], rows, donate=donate)
        if not donate:
            gf.insert(model, params, {})
        single, states[1], expected = update(single, states[1], reference(step, single))
        close(whole(params), single)
        close(whole({n: p.detach() for n, p in model.named_parameters()}), single)
        assert info.keys() == expected.keys()
        for key, value in expected.items():
            found = info[key]
            close(found.to(value.dtype), value)
        kept += bool(info["keep"])
    close(whole(gf.state_dict(states[0])), gf.state_dict(states[1]))
    return kept


@pytest.mark.parametrize("name", CHAINS)
def test_training_is_that_of_one_process_on_the_mean_rows(two, name):
    kept = two.run(training, "fsdp", name, name not in ("groups", "schedule-free, lion"))
    assert kept[0] == kept[1] > 0


@pytest.mark.slow
def test_training_with_shards_that_are_replicated(four):
    four.run(training, "hsdp", "agc, rmsprop", False)
    four.run(training, "hsdp", "agree, sgd", True)


def surrogate():
    """gsam_decompose, sam_perturb and their like ask for norms and products of trees."""
    model = sharded("fsdp")
    params = {n: p.detach() for n, p in model.named_parameters()}
    g, h = (own_rows(model, step).combine(torch.full((M,), 1 / M)) for step in (0, 1))
    single = gf.extract(network())[0]
    link = gf.gsam_decompose(0.4)
    found = link.update(h, {}, params, clean_grads=g)[0]
    close(whole(found), link.update(whole(h), {}, single, clean_grads=whole(g))[0])
    link = gf.sam_perturb(0.3)
    found = link.update(g, {}, params, grad_fn=lambda near: near)[0]
    close(whole(found), link.update(whole(g), {}, single, grad_fn=lambda near: near)[0])
    for link in (gf.friendly_sam(0.3, adaptive="asam"), gf.look_sam(0.3, 2)):
        states = [link.init(params), link.init(single)]
        for grads in (g, h):
            found, states[0], _ = link.update(grads, states[0], params, grad_fn=lambda p: p)
            given = whole(grads)
            expected, states[1], _ = link.update(given, states[1], single, grad_fn=lambda p: p)
            close(whole(found), expected)
        close(whole(gf.state_dict(states[0])), gf.state_dict(states[1]))


def test_norms_and_products_of_sharded_trees(two):
    two.run(surrogate)


def gone_bad():
    """A NaN in the shard of one rank is seen by all of them."""
    mesh = init_device_mesh("cpu", (2,))
    rows = torch.ones(3, 4)
    rows[1, 0] = torch.nan
    stack = ShardedStack({"w": distribute_tensor(rows, mesh, [Shard(1)])})
    params = {"w": distribute_tensor(torch.zeros(4), mesh, [Shard(0)])}
    for make in (gf.agree_filter, gf.consensus_filter):
        grads, _, out = make().update(stack, {}, params)
        assert out["accepted"].tolist() == [True, False, True] and out["keep"]
        close(grads["w"].full_tensor(), torch.ones(4))
    _, _, out = gf.finite_filter().update({"w": stack.stacked()["w"][1]}, {}, params)
    assert not out["keep"] and type(out["keep"]) is torch.Tensor


def test_a_rank_with_nan_in_its_shard(two):
    two.run(gone_bad)


def skipped():
    """A skipped step changes no bit of parameters, moments and their placement."""
    model = sharded("fsdp")
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    update = gf.chain(gf.agree_filter(0.0), gf.adamw(0.1))
    state = update.init(params)
    new, new_state, info = update(params, state, own_rows(model, 0))
    assert not info["keep"]
    for a, b in zip(new.values(), params.values(), strict=True):
        assert torch.equal(a.to_local(), b.to_local()) and a.placements == b.placements
    for a, b in zip(gf.state_dict(new_state).values(), gf.state_dict(state).values(), strict=True):
        a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (a, b))
        assert torch.equal(a, b)


def test_a_skipped_step_changes_nothing(two):
    two.run(skipped)


def wire():
    rows = own_rows(sharded("fsdp"), 0)
    with Wire(2) as of_gram:
        rows.gram()
    with Wire(2) as of_combination:
        rows.combine(torch.ones(M))
    return of_gram.sent, of_combination.calls


def test_a_gram_sends_its_numbers_and_a_combination_nothing(two):
    for sent, calls in two.run(wire):
        assert sent == M * M * 8  # a ring all-reduce between two ranks
        assert calls == []


def refusals():
    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"axis M whole on every rank, found 'w'.*RankStack"):
        ShardedStack({"w": rows})
    unfinished = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"found placements .*Partial.*redistribute"):
        ShardedStack({"w": unfinished})
    model = sharded("fsdp")
    with pytest.raises(ValueError, match=r"12 .*5 microbatches divide|5 microbatches divide"):
        sharded_rows(model, lambda batch: batch, torch.ones(12), 5)
    with pytest.raises(ValueError, match=r"found plain \['bias', 'weight'\].*fully_shard"):
        sharded_rows(torch.nn.Linear(2, 2), lambda batch: batch, torch.ones(4), 2)
    with pytest.raises(TypeError, match=r"plan 'loop' and 'scale' sharded over .*sharded_rows"):
        params = {n: p.detach() for n, p in model.named_parameters()}
        rows_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), M, plan="loop")
        rows_of(params, batches(0)[0])
    with pytest.raises(ValueError, match="cannot answer `at`"):
        link = gf.chain(gf.mean_rows(), gf.sam_perturb(0.1), gf.sgd(0.1))
        params = {n: p.detach() for n, p in model.named_parameters()}
        link(params, link.init(params), own_rows(model, 0))
    mixed = ShardedStack(
        {
            "sharded": distribute_tensor(torch.ones(2, 6), mesh, [Shard(1)]),
            "replicated": distribute_tensor(torch.ones(2, 3), mesh, [Replicate()]),
            "plain": torch.ones(2, 4),
        }
    )
    assert torch.equal(mixed.gram(), torch.full((2, 2), 13.0))


def test_what_cannot_be_is_refused_and_what_is_mixed_is_counted_once(two):
    two.run(refusals)


def with_torch_optim():
    """The recipe for an optimizer of torch, and who refuses sharded parameters by name."""
    model = sharded("fsdp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    filters = gf.chain(gf.agree_filter(1.0), gf.clip_by_global_norm(0.5))
    params = {n: p.detach() for n, p in model.named_parameters()}
    state = filters.init(params)
    whole_model = network()
    single = torch.optim.AdamW(whole_model.parameters(), lr=0.01)
    own = {n: p.detach() for n, p in whole_model.named_parameters()}
    for step in range(3):
        for net, rule, rows, at in (
            (model, optimizer, own_rows(model, step), params),
            (whole_model, single, reference(step, own), own),
        ):
            grads, state, out = filters.update(rows, state, at)
            for name, p in net.named_parameters():
                p.grad = grads[name]
            if out["keep"]:
                rule.step()
        close(whole(params), own)


def test_the_recipe_for_torch_optim(two):
    two.run(with_torch_optim)


# --- Classes of torch.optim by from_torch ---


UNFIT = {"LBFGS", "SparseAdam"}  # from_torch has no use for them with whole parameters either
FLAGS = (
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"weight_decay": 0.05, "maximize": True},
    {"momentum": 0.9},
    {"amsgrad": True},
)
UNSUPPORTED = {  # torch has no rule for one of their operations on DTensors
    *(("Adagrad", "fused"), ("SGD", "fused")),
    *(("Rprop", ""), ("Rprop", "foreach")),
}


DAILY = [*((n, {}) for n in ("NAdam", "Adafactor", "Muon", "Rprop")), ("SGD", {"fused": True})]


def key_of(flags):
    return " ".join(n if value else f"no {n}" for n, value in flags.items())


TORCH_CASES = [
    (name, flags)
    for name, kind in TORCH_CLASSES.items()
    if name not in UNFIT
    for flags in FLAGS
    if set(flags) <= set(inspect.signature(kind).parameters)
]


def refusal_of(name, flags):
    """The message by which a class is refused, or None."""
    if name == "Muon":
        return r"whole matrices for Muon, found '.*' as a DTensor.*AdamW"
    if name == "Adafactor" or (name, key_of(flags)) == ("Adagrad", "no foreach"):
        return rf"whole parameters for {name}, which reads numbers .*found '.*' as a DTensor"
    if (name, key_of(flags)) in UNSUPPORTED:
        return rf"that {name} takes with these arguments, found '.*' as a DTensor.*foreach=False"
    return None


def leaves():
    """Odd sizes: one shard is empty."""
    g = torch.Generator().manual_seed(7)
    return {n: torch.randn(s, generator=g) for n, s in {"a": (5, 3), "b": (1, 4)}.items()}


def cut(tree):
    mesh = init_device_mesh("cpu", (2,))
    spread = lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)
    return {n: spread(t) for n, t in tree.items()}


def torch_class(name, flags):
    """A chain on sharded parameters, and the class itself on whole ones, step by step."""
    model, kind = sharded("fsdp"), TORCH_CLASSES[name]
    rule = gf.from_torch(kind, lr=0.01, **flags)
    params = {n: p.detach() for n, p in model.named_parameters()}
    refusal = refusal_of(name, flags)
    if refusal is not None:
        with pytest.raises((ValueError, RuntimeError), match=f"(?s)^from_torch: .*{refusal}"):
            rule.init(params)
        return False
    filters = gf.chain(gf.agree_filter(1.0), rule)
    state = filters.init(params)
    single = {n: torch.nn.Parameter(p) for n, p in gf.extract(network())[0].items()}
    optimizer, mean = kind(single.values(), lr=0.01, **flags), gf.agree_filter(1.0)
    for step in range(STEPS):
        params, state, info = filters(params, state, own_rows(model, step))
        gf.insert(model, params, {})
        rows = reference(step, {n: p.detach() for n, p in single.items()})
        grads, _, out = mean.update(rows, {}, single)
        assert info["keep"] == out["keep"]
        for n, p in single.items():
            p.grad = grads[n]
        if out["keep"]:
            optimizer.step()
        close(whole(params), {n: p.detach() for n, p in single.items()})
    assert all(params[n].placements == p.placements for n, p in model.named_parameters())
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), TORCH_CASES, ids=lambda v: str(v))
def test_a_class_of_torch_trains_shards_as_it_trains_whole_parameters(two, name, flags):
    assert two.run(torch_class, name, flags) == [refusal_of(name, flags) is None] * 2


def test_some_classes_of_torch_train_shards_or_say_why_not(two):
    for name, flags in DAILY:
        two.run(torch_class, name, flags)


def continued():
    """The state moves to an optimizer of torch on the same shards, which continues alike."""
    own = [cut({n: t + k for n, t in leaves().items()}) for k in range(4)]
    rule = gf.from_torch(torch.optim.AdamW, lr=0.01)
    params, state = own[0], rule.init(own[0])
    for grads in own[1:3]:
        params, state, _ = rule(params, state, grads)
    single = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = torch.optim.AdamW(single.values(), lr=0.01)
    optimizer.load_state_dict(gf.export_torch_state(state, optimizer.state_dict(), single))
    back = gf.import_torch_state(rule.init(params), optimizer.state_dict(), list(single))
    close(whole(gf.state_dict(back)), whole(gf.state_dict(state)))
    for n, p in single.items():
        p.grad = own[3][n]
    optimizer.step()
    params, _, _ = rule(params, state, own[3])
    close(whole(params), whole({n: p.detach() for n, p in single.items()}))


def test_the_state_on_shards_moves_to_an_optimizer_of_torch_and_back(two):
    two.run(continued)
