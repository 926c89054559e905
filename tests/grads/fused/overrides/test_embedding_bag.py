"""Bags of embeddings, in every mode: equal to ordinary backward passes, and without tables."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _compiled import check_compiled
from _plain import module_rows, off, side_by_side

UNITS, WIDTH, LENGTH, PAD = 9, 3, 6, 4


class Bags(nn.Module):
    """Bags of the tokens (B, LENGTH) of a row, of one length or by offsets."""

    def __init__(self, offsets=None, units=UNITS, weighted=False, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(units, WIDTH, **options)
        self.scale = nn.Linear(LENGTH, LENGTH) if weighted else None
        self.offsets = offsets
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        weights = None
        if self.scale is not None:
            weights = self.scale(tokens.to(self.out.weight.dtype) / UNITS).sigmoid()
        if self.offsets is None:
            return self.out(self.bag(tokens, per_sample_weights=weights)).tanh()
        flat = None if weights is None else weights.flatten()
        starts = torch.tensor(self.offsets)
        return self.out(self.bag(tokens.flatten(), starts, flat)).tanh()


def spread(y, target):
    places = torch.arange(y.numel(), dtype=y.dtype).view(y.shape)
    return (y * torch.cos(places) * (1 + target.sum())).mean()


def tokens(m, b, dtype=torch.float64):
    torch.manual_seed(m)
    ids = torch.randint(UNITS, (m * b, LENGTH))
    ids[:, 1] = ids[:, 0]  # a unit twice in a bag
    ids[0] = PAD  # nothing but padding
    return ids, torch.rand(m * b, dtype=dtype)


def stack(model, batch, m, plan="fused", **options):
    loss = gf.model_loss(model, spread)
    if m == len(batch[0]):
        return gf.per_sample_grads(loss, plan=plan, **options)(gf.extract(model)[0], batch)
    return gf.microbatch_grads(loss, m, plan=plan, **options)(gf.extract(model)[0], batch)


OPTIONS = {
    **{mode: {"mode": mode} for mode in ("sum", "mean", "max")},
    **{f"{mode}, padded": {"mode": mode, "padding_idx": PAD} for mode in ("sum", "mean", "max")},
    "sum, by frequency": {"mode": "sum", "scale_grad_by_freq": True},
    "mean, by frequency, padded": {
        "mode": "mean",
        "scale_grad_by_freq": True,
        "padding_idx": PAD - UNITS,
    },
    "sum, weighted": {"mode": "sum", "weighted": True},
    "sum, weighted, padded, by frequency": {
        "mode": "sum",
        "weighted": True,
        "padding_idx": PAD,
        "scale_grad_by_freq": True,
    },
}
ENDS = {"include_last_offset": True}


class LookedUp(nn.EmbeddingBag):
    """The same bags of a plain embedding: the bag of torch 2.11 takes other units' frequencies."""

    def forward(self, tokens, offsets=None, per_sample_weights=None):
        flat, weights = tokens.flatten(), per_sample_weights
        starts = offsets if offsets is not None else torch.arange(0, len(flat), LENGTH)
        ends = [*starts.tolist()[1:], len(flat)]
        bags = list(zip(starts.tolist(), ends, strict=True))
        found = F.embedding(flat, self.weight, self.padding_idx, scale_grad_by_freq=True)
        if weights is not None:
            found = found * weights.flatten()[:, None]
        kept = torch.ones(len(flat), dtype=torch.bool)
        if self.padding_idx is not None:
            kept = flat != self.padding_idx % self.num_embeddings
        sums = [found[low:high][kept[low:high]].sum(0) for low, high in bags]
        counts = [kept[low:high].sum().clamp(min=1) for low, high in bags]
        if self.mode == "mean":
            sums = [total / count for total, count in zip(sums, counts, strict=True)]
        return torch.stack(sums[:-1] if self.include_last_offset else sums)


def reference(model):
    """The model itself, or with bags that divide by the right frequencies under every torch."""
    if model.bag.scale_grad_by_freq:
        model = copy.deepcopy(model)
        model.bag.__class__ = LookedUp
    return model


@pytest.mark.parametrize("offsets", [None, (0, 2, 2, 5), "last"], ids=["rows", "offsets", "last"])
@pytest.mark.parametrize(("m", "b"), [(3, 2), (4, 1)])
@pytest.mark.parametrize("name", OPTIONS)
def test_bags_have_the_rows_of_ordinary_passes(name, m, b, offsets):
    options = OPTIONS[name]
    if offsets == "last":
        offsets, options = (0, 3, 5, b * LENGTH), {**options, **ENDS}
    torch.manual_seed(0)
    model, batch = Bags(offsets, **options).double(), tokens(m, b)
    losses, want = module_rows(reference(model), spread, batch, m)
    matrix = side_by_side(want, want)
    weights = torch.linspace(-0.7, 1.3, m, dtype=torch.float64)
    for budget in (0.25, 0):
        rows = stack(model, batch, m, memory_budget=budget)
        assert rows.overrides["embedding_bag"] == 1
        torch.testing.assert_close(rows.losses, losses)
        torch.testing.assert_close(rows.gram(), matrix @ matrix.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rows.sq_norms(), (matrix**2).sum(1), rtol=1e-10, atol=1e-12)
        total = rows.combine(weights)
        assert off(torch.cat([total[n].flatten() for n in want]), weights @ matrix) < 1e-10
        assert off(side_by_side(rows.stacked(), want), matrix) < 1e-10


def test_equal_entries_of_a_bag_give_the_gradient_to_one_unit():
    model, batch = Bags(mode="max").double(), tokens(3, 2)
    with torch.no_grad():
        model.bag.weight.copy_(model.bag.weight[:1].expand(UNITS, -1))
    _, want = module_rows(model, spread, batch, 3)
    assert off(side_by_side(stack(model, batch, 3).stacked(), want), side_by_side(want, want)) < (
        1e-12
    )


def test_lengths_of_bags_may_differ_between_rows():
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(UNITS, WIDTH, dtype=torch.float64))
    ids, _ = tokens(4, 1)
    starts = torch.tensor([[0, 1], [0, 3], [0, 6], [0, 0]])

    def loss(params, batch):
        row, offsets = batch
        found = F.embedding_bag(row[0], params["w"], offsets[0], mode="mean")
        return (found * torch.arange(6.0, dtype=found.dtype).cos().view(2, 3)).sum()

    rows = gf.per_sample_grads(loss, plan="fused")({"w": table.detach()}, (ids, starts))
    for m, grad in enumerate(rows.stacked()["w"]):
        value = loss({"w": table}, (ids[m : m + 1], starts[m : m + 1]))
        (want,) = torch.autograd.grad(value, [table])
        torch.testing.assert_close(grad, want)


def test_questions_make_no_tables():
    """A row of the table takes 1.2 MB; the largest tensor of a pass is far smaller than M rows."""
    units, m = 50_000, 16
    model, (ids, y) = Bags(units=units, mode="mean").double(), tokens(m, 1)
    model.bag.weight.data.mul_(0.1)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            parts = found if isinstance(found, (tuple, list)) else (found,)
            sizes.extend(t.untyped_storage().nbytes() for t in parts if isinstance(t, torch.Tensor))
            return found

    with Sizes():
        rows = stack(model, (ids, y), m)
        rows.gram(), rows.sq_norms(), rows.combine(torch.ones(m))
    assert max(sizes) < 1.01 * units * WIDTH * 8  # the table, and one combination


@pytest.mark.parametrize("offsets", [(1, 2), (0, 99)])
def test_offsets_that_torch_refuses_are_refused(offsets):
    model, batch = Bags(offsets, mode="sum").double(), tokens(3, 2)
    with pytest.raises(RuntimeError, match="offsets"):
        stack(model, batch, 3)
    with pytest.raises(RuntimeError, match="offsets"):
        model(batch[0][:2])


def test_every_row_has_its_own_table():
    model, batch = Bags(mode="mean", padding_idx=PAD).double(), tokens(3, 2)
    own = {n: torch.stack([p + 0.1 * k for k in range(3)]) for n, p in gf.extract(model)[0].items()}
    found = stack(model, batch, 3).at_rows(own).stacked()
    for m in range(3):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(own[n][m])
        _, want = module_rows(model, spread, tuple(t.chunk(3)[m] for t in batch), 1)
        got = torch.cat([found[n][m].flatten() for n in want])
        assert off(got, side_by_side(want, want)[0]) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "mode"), [*itertools.product((torch.float16, torch.bfloat16), ("sum", "mean", "max"))]
)
def test_half_precision_is_as_good_as_a_plain_pass(dtype, mode):
    torch.manual_seed(0)
    model, batch = Bags((0, 2, 7), mode=mode).to(dtype), tokens(3, 2, dtype)
    _, plain = module_rows(model, spread, batch, 3)
    found = stack(model, batch, 3).stacked()
    exact = side_by_side(
        *[module_rows(model.double(), spread, (batch[0], batch[1].double()), 3)[1]] * 2
    )
    got, eager = (side_by_side({n: g.double() for n, g in r.items()}, r) for r in (found, plain))
    floor = 8 * torch.finfo(dtype).eps * exact.norm()
    assert (got - exact).norm() <= 4 * (eager - exact).norm() + floor


def test_torchs_own_function_runs_row_by_row():
    torch.manual_seed(0)
    table = torch.randn(UNITS, WIDTH, dtype=torch.float64)
    ids, scale = tokens(3, 2)

    def loss(params, batch):
        row, y = batch
        found = torch.embedding_bag(params["w"], row.flatten(), torch.tensor([0, 4]), mode=1)[0]
        return spread(found, y)

    rows = gf.microbatch_grads(loss, 3, plan="fused")({"w": table}, (ids, scale))
    assert "row by row inside the pass: embedding_bag" in rows.explain()
    for m, grad in enumerate(rows.stacked()["w"]):
        own = table.clone().requires_grad_()
        value = loss({"w": own}, (ids.chunk(3)[m], scale.chunk(3)[m]))
        torch.testing.assert_close(grad, torch.autograd.grad(value, [own])[0])


def test_a_compiled_step_equals_the_step():
    model, batch = Bags((0, 2, 7), mode="mean").double(), tokens(3, 2)
    check_compiled(model, spread, batch, 3)
