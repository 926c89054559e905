"""Products with a parameter, in every spelling: equal to ordinary backward passes, as factors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _compiled import check_compiled
from _plain import module_rows, off, side_by_side
from gradfilter.grads.fused import _factors

aten = torch.ops.aten
B, T, D, P = 2, 3, 5, 4
WIDE, TALL, OF = (D, P), (P, D), (P,)


class Product(nn.Module):
    """A function of the input and of parameters, after a layer, so that it has a gradient."""

    def __init__(self, run, shapes, times=1):
        super().__init__()
        self.run, self.times = run, times
        self.before = nn.Linear(D, D)
        self.p = nn.ParameterList(nn.Parameter(0.5 * torch.randn(s)) for s in shapes)

    def forward(self, x):
        return self.run(self.before(x).tanh(), *self.p)


def first(x):
    return x[:, 0]


# By name: the function of (x (B, T, D), parameters), the shapes of the parameters, the mode.
SPELLINGS = {
    "x @ w": (lambda x, w: x @ w, [WIDE]),
    "x @ w of a matrix": (lambda x, w: first(x) @ w, [WIDE]),
    "x @ w.T": (lambda x, w: x @ w.T, [TALL]),
    "x @ w.t()": (lambda x, w: x @ w.t(), [TALL]),
    "x @ w.mT": (lambda x, w: x @ w.mT, [TALL]),
    "w.transpose": (lambda x, w: x.matmul(w.transpose(0, 1)), [TALL]),
    "w.permute": (lambda x, w: x @ w.permute(1, 0), [TALL]),
    "w.permute of three dims": (
        lambda x, w: torch.einsum("btd,edp->btep", x, w.permute(2, 0, 1)),
        [(D, P, 2)],
    ),
    "w @ x": (lambda x, w: w @ x.mT, [TALL]),
    "w.T @ x": (lambda x, w: w.T @ x.mT, [WIDE]),
    "x @ vector": (lambda x, w: x @ w, [(D,)]),
    "vector @ x": (lambda x, w: w @ x.mT, [(D,)]),
    "vector of x": (lambda x, w: x[0, 0] @ w, [WIDE]),
    "torch.matmul": (torch.matmul, [WIDE]),
    "Tensor.matmul": (lambda x, w: x.matmul(w), [WIDE]),
    "__rmatmul__": (lambda x, w: w.__rmatmul__(x), [WIDE]),
    "linalg.matmul": (torch.linalg.matmul, [WIDE]),
    "aten.matmul": (lambda x, w: aten.matmul(x, other=w), [WIDE]),
    "aten.matmul.default": (aten.matmul.default, [WIDE]),
    "torch.mm": (lambda x, w: torch.mm(first(x), mat2=w), [WIDE]),
    "Tensor.mm": (lambda x, w: first(x).mm(w.t()), [TALL]),
    "aten.mm": (lambda x, w: aten.mm.default(first(x), w), [WIDE]),
    "mm of the weight": (lambda x, w: torch.mm(w, first(x).t()), [TALL]),
    "aten with self": (lambda x, w: aten.mm(self=first(x), mat2=w), [WIDE]),
    "torch.addmm": (lambda x, w, b: torch.addmm(b, first(x), w), [WIDE, OF]),
    "Tensor.addmm": (lambda x, w, b: b.addmm(first(x), w), [WIDE, OF]),
    "addmm scaled": (
        lambda x, w, b: torch.addmm(b, first(x), w, beta=0.5, alpha=2.0),
        [WIDE, OF],
    ),
    "addmm without its input": (
        lambda x, w, b: torch.addmm(b, first(x), w, beta=0, alpha=-3) + b,
        [WIDE, OF],
    ),
    "addmm of a matrix": (
        lambda x, w, b: torch.addmm(b, first(x), w, beta=1.5, alpha=0.5),
        [WIDE, (1, P)],
    ),
    "addmm of the rows": (lambda x, w: torch.addmm(first(x), first(x), w, beta=3), [(D, D)]),
    "aten.addmm": (lambda x, w, b: aten.addmm.default(b, first(x), w), [WIDE, OF]),
    "Conv1D of GPT-2": (
        lambda x, w, b: torch.addmm(b, x.view(-1, D), w).view(*x.shape[:-1], P),
        [WIDE, OF],
    ),
    "torch.bmm, expanded": (lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)), [WIDE]),
    "bmm, transposed": (lambda x, w: x.bmm(w.t()[None].expand(len(x), -1, -1)), [TALL]),
    "bmm of the weight": (lambda x, w: torch.bmm(w.expand(len(x), -1, -1), x.mT), [TALL]),
    "bmm, one for each": (lambda x, w: torch.bmm(x.transpose(0, 1), w), [(T, D, P)]),
    "aten.bmm": (lambda x, w: aten.bmm(x, w.expand(len(x), -1, -1)), [WIDE]),
    "baddbmm": (
        lambda x, w, b: torch.baddbmm(b, x, w.expand(len(x), -1, -1), beta=0.5, alpha=2),
        [WIDE, OF],
    ),
    "Tensor.baddbmm": (
        lambda x, w, b: b.baddbmm(x.transpose(0, 1), w),
        [(T, D, P), (T, 1, P)],
    ),
    "matmul, one for each": (lambda x, w: x.transpose(0, 1) @ w, [(T, D, P)]),
    "matmul, broadcast": (lambda x, w: x[:, None] @ w, [(T, D, P)]),
    "matmul of four dims": (lambda x, w: x[None, :, None] @ w, [WIDE]),
    "linear, transposed": (lambda x, w, b: F.linear(x, w.t(), b), [WIDE, OF]),
    "linear without bias": (lambda x, w: F.linear(x, w.T), [WIDE]),
    "einsum": (lambda x, w: torch.einsum("btd,dp->btp", x, w), [WIDE]),
    "einsum, w first": (lambda x, w: torch.einsum("pd,btd->tpb", w, x), [TALL]),
    "einsum with ...": (lambda x, w: torch.einsum("...d, dp -> ...p", x, w), [WIDE]),
    "einsum without ->": (lambda x, w: torch.einsum("btd,dp", x, w), [WIDE]),
    "einsum without ->, sorted": (lambda x, w: torch.einsum("zyd,da", x, w), [WIDE]),
    "einsum without ->, ...": (lambda x, w: torch.einsum("...d,dA", x, w), [WIDE]),
    "einsum of a list": (lambda x, w: torch.einsum("btd,dp->bpt", [x, w]), [WIDE]),
    "einsum, heads": (lambda x, w: torch.einsum("btd,dhp->bthp", x, w), [(D, 2, P)]),
    "einsum, heads first": (lambda x, w: torch.einsum("btd,hpd->bhtp", x, w), [(2, P, D)]),
    "einsum, heads around": (lambda x, w: torch.einsum("btd,hdp->bhtp", x, w), [(2, D, P)]),
    "einsum of two dims": (lambda x, w: torch.einsum("btd,tdp->bp", x, w), [(T, D, P)]),
    "einsum, one for each": (lambda x, w: torch.einsum("btd,ptd->btp", x, w), [(P, T, D)]),
    "einsum of a transposed": (lambda x, w: torch.einsum("btd,dp->btp", x, w.t()), [TALL]),
    "aten.einsum": (lambda x, w: aten.einsum("btd,dp->btp", [x, w]), [WIDE]),
    "used twice": (lambda x, w: (x @ w).tanh() @ w.T + F.linear(x, w @ w.T), [WIDE]),
    "both orders": (lambda x, w: F.linear(x @ w, w), [WIDE]),
    "w.contiguous": (lambda x, w: x @ w.contiguous(), [WIDE]),
    "part of a parameter": (lambda x, w: x @ w[1:], [(D + 1, P)]),
}
OTHERS = {
    "of three operands": lambda x, w: torch.einsum("btd,dp,p->bt", x, w, w[0]),
    "of a computed parameter": lambda x, w: x @ (w * 2),
    "of a reordered copy": lambda x, w: x.flatten(1) @ w.t().flatten().view(T * D, -1),
    "of a diagonal": lambda x, w: torch.einsum("bdd,dp->bp", x[:, :, :T], w[:T]),
    "of a sum": lambda x, w: torch.einsum("btd,dp->bp", x, w),
}
"""Products that run under vmap, as before."""


def spread(y, target):
    """A loss in which no two entries count the same."""
    places = torch.arange(y.numel(), dtype=y.dtype).view(y.shape)
    return (y * torch.cos(places) * (1 + target.sum())).mean() + (y**2).mean() / 3


def case(name, m, b, dtype=torch.float64):
    torch.manual_seed(len(name))
    run, shapes = SPELLINGS[name]
    model = Product(run, shapes).to(dtype)
    return model, (torch.randn(m * b, T, D, dtype=dtype), torch.rand(m * b, dtype=dtype))


def stack(model, batch, m, plan="fused", **options):
    loss = gf.model_loss(model, spread)
    if m == len(batch[0]):
        return gf.per_sample_grads(loss, plan=plan, **options)(gf.extract(model)[0], batch)
    return gf.microbatch_grads(loss, m, plan=plan, **options)(gf.extract(model)[0], batch)


@pytest.mark.parametrize("ghosts", [0.0, 1e9], ids=["materialised", "ghost"])
@pytest.mark.parametrize(("m", "b"), [(3, B), (4, 1)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_product_has_the_rows_of_ordinary_passes(name, m, b, ghosts, monkeypatch):
    monkeypatch.setattr(_factors, "LARGE_SUM", ghosts)
    monkeypatch.setattr(_factors, "TILE", 64)  # so that a leaf takes many tiles
    model, batch = case(name, m, b)
    losses, want = module_rows(model, spread, batch, m)
    names = list(want)
    matrix = side_by_side(want, names)
    for budget in (0.25, 0):
        rows = stack(model, batch, m, memory_budget=budget)
        assert rows.overrides["product"] >= 1
        torch.testing.assert_close(rows.losses, losses)
        torch.testing.assert_close(rows.gram(), matrix @ matrix.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rows.sq_norms(), (matrix**2).sum(1), rtol=1e-10, atol=1e-12)
        weights = torch.linspace(-0.7, 1.3, m, dtype=torch.float64)
        total = rows.combine(weights)
        assert off(torch.cat([total[n].flatten() for n in names]), weights @ matrix) < 1e-10
        tree = {n: torch.randn_like(leaf[0]) for n, leaf in want.items()}
        products = matrix @ torch.cat([tree[n].flatten() for n in names])
        torch.testing.assert_close(rows.dot(tree), products, rtol=1e-9, atol=1e-11)
        assert off(side_by_side(rows.stacked(), names), matrix) < 1e-10


VIEWS = ["x @ w.T", "torch.bmm, expanded", "bmm, transposed", "w.permute", "linear, transposed"]


@pytest.mark.parametrize("name", [*VIEWS, "both orders", "einsum, heads first"])
def test_a_view_of_a_parameter_makes_no_rows(name, monkeypatch):
    monkeypatch.setattr(_factors, "LARGE_SUM", 1e9)
    model, batch = case(name, 3, B)
    layer = next(layer for layer in stack(model, batch, 3).layers if layer.leaf == "p.0")
    assert layer.mode == "ghost"
    assert layer.overrides == ("product", *["linear"] * (name == "both orders"))


def test_a_hook_on_a_view_sees_the_gradient_of_the_view():
    def doubled(x, w):
        view = w.t()
        view.register_hook(lambda grad: 2 * grad)
        return x @ view

    SPELLINGS["hooked"] = (doubled, [TALL])
    try:
        model, batch = case("hooked", 3, B)
    finally:
        del SPELLINGS["hooked"]
    _, want = module_rows(model, spread, batch, 3)
    found = stack(model, batch, 3).stacked()
    assert off(side_by_side(found, want), side_by_side(want, want)) < 1e-12


def test_a_hook_on_a_view_that_was_used_is_refused():
    def late(x, w):
        view = w.t()
        found = x @ view
        view.register_hook(lambda grad: 2 * grad)
        return found

    model = Product(late, [TALL]).double()
    batch = torch.randn(6, T, D).double(), torch.rand(6).double()
    with pytest.raises(RuntimeError, match=r"hook on a view of parameter 'p\.0'"):
        stack(model, batch, 3)
    _, want = module_rows(model, spread, batch, 3)
    with pytest.warns(UserWarning, match="hook on a view"):
        found = stack(model, batch, 3, plan="auto").stacked()
    assert off(side_by_side(found, want), side_by_side(want, want)) < 1e-12


def test_a_frozen_operand_takes_no_override():
    model, batch = case("x @ w", 3, B)
    model.p[0].requires_grad_(False)
    rows = stack(model, batch, 3)
    assert not rows.overrides.get("product")
    _, want = module_rows_of_trained(model, batch)
    assert off(side_by_side(rows.stacked(), want), side_by_side(want, want)) < 1e-12


def module_rows_of_trained(model, batch):
    rows = []
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for x, y in zip(*(t.chunk(3) for t in batch), strict=True):
        trained = [p for p in model.parameters() if p.requires_grad]
        rows.append(torch.autograd.grad(spread(model(x), y), trained))
    return None, dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize("name", ["x @ w", "torch.addmm", "einsum, heads around", "used twice"])
def test_every_row_at_its_own_parameters(name):
    model, batch = case(name, 3, B)
    rows = stack(model, batch, 3)
    params = gf.extract(model)[0]
    own = {n: torch.stack([p + 0.1 * m for m in range(3)]) for n, p in params.items()}
    found = rows.at_rows(own).stacked()
    for m in range(3):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(own[n][m])
        part = tuple(t.chunk(3)[m] for t in batch)
        _, want = module_rows(model, spread, part, 1)
        got = torch.cat([found[n][m].flatten() for n in want])
        assert off(got, side_by_side(want, want)[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["x @ w", "x @ w.T", "addmm scaled", "einsum, heads", "baddbmm"])
def test_half_precision_is_as_good_as_a_plain_pass(name, dtype):
    model, batch = case(name, 3, B, dtype)
    _, plain = module_rows(model, spread, batch, 3)
    _, exact = module_rows(model.double(), spread, tuple(t.double() for t in batch), 3)
    exact = side_by_side(exact, exact)
    model.to(dtype)
    found = stack(model, batch, 3).stacked()
    got, eager = (side_by_side({n: g.double() for n, g in r.items()}, r) for r in (found, plain))
    floor = 8 * torch.finfo(dtype).eps * exact.norm()
    assert (got - exact).norm() <= 4 * (eager - exact).norm() + floor


@pytest.mark.parametrize("name", ["x @ w", "torch.addmm", "Conv1D of GPT-2", "bmm, transposed"])
def test_autocast_gives_the_dtype_of_a_plain_pass(name):
    model, batch = case(name, 3, B, torch.float32)
    seen = []
    run, model.run = model.run, lambda *args: seen.append(run(*args)) or seen[-1]
    with torch.autocast("cpu", torch.bfloat16):
        _, want = module_rows(model, spread, batch, 3)
        plain = seen[0].dtype
        seen.clear()
        found = stack(model, batch, 3).stacked()
    assert plain == torch.bfloat16 and {y.dtype for y in seen} == {plain}
    assert off(side_by_side(found, want), side_by_side(want, want)) < 0.05  # of 8 bits


@pytest.mark.parametrize("name", ["x @ w.T", "Conv1D of GPT-2", "einsum, heads first"])
def test_a_compiled_step_equals_the_step(name):
    model, batch = case(name, 3, B)
    check_compiled(model, spread, batch, 3)


@pytest.mark.parametrize("wrong", [lambda x, w: x @ w, lambda x, w: torch.mm(x, w)])
def test_an_error_of_the_user_is_torchs_own(wrong):
    model = Product(wrong, [(D + 1, P)]).double()
    batch = torch.randn(6, T, D).double(), torch.rand(6).double()
    with pytest.raises(RuntimeError) as ours:
        stack(model, batch, 3, plan="auto")
    with pytest.raises(RuntimeError) as theirs:
        model(batch[0][:2])
    assert str(theirs.value) in str(ours.value)


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_run_under_vmap(name):
    shape = (T * D, P) if name == "of a reordered copy" else WIDE
    model = Product(OTHERS[name], [shape]).double()
    batch = torch.randn(6, T, D).double(), torch.rand(6).double()
    _, want = module_rows(model, spread, batch, 3)
    rows = stack(model, batch, 3)
    assert not rows.overrides.get("product")
    assert off(side_by_side(rows.stacked(), want), side_by_side(want, want)) < 1e-12
