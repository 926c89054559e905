"""Half precision, layer by layer: dtypes and errors are those of a plain backward pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _plain import off, plain_rows, side_by_side
from _zoo_case import PLAN

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
M = 3
HALF = [torch.bfloat16, torch.float16]


class Step(nn.Module):
    """A cell, run twice."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(6, 6)

    def forward(self, x):
        state = self.cell(x[:, 0])
        state = self.cell(x[:, 1], state)
        return state[0] if isinstance(state, tuple) else state


class First(nn.Module):
    """The first thing that a module returns."""

    def __init__(self, core, times=1):
        super().__init__()
        self.core, self.times = core, times

    def forward(self, x):
        return self.core(*[x] * self.times)[0]


class Lookup(nn.Module):
    """Ids made of the inputs, so that every layer takes the same batch."""

    def __init__(self, embed):
        super().__init__()
        self.embed = embed

    def forward(self, x):
        return self.embed((x.flatten(1)[:, :4].float() > 0).long())


class Product(nn.Module):
    """A product with a parameter, by the name of a torch function."""

    def __init__(self, run, *shapes):
        super().__init__()
        self.run = run
        self.p = nn.ParameterList(nn.Parameter(torch.randn(s) * 0.5) for s in shapes)

    def forward(self, x):
        return self.run(x, *self.p)


MAPS, ROWS, STEPS = (4, 6, 5, 5), (4, 6), (4, 3, 6)
LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), ROWS),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 2), MAPS),
    "Conv2d of one image": (lambda: Product(lambda x, w: F.conv2d(x[0], w), (4, 6, 2, 2)), MAPS),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 2), MAPS),
    "LayerNorm": (lambda: nn.LayerNorm(6), STEPS),
    "LayerNorm without weights": (lambda: nn.LayerNorm(6, elementwise_affine=False), STEPS),
    "RMSNorm": (lambda: nn.RMSNorm(6), STEPS),
    "RMSNorm without weights": (lambda: nn.RMSNorm(6, elementwise_affine=False), STEPS),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), MAPS),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), MAPS),
    "InstanceNorm2d, tracked": (lambda: nn.InstanceNorm2d(6, track_running_stats=True), MAPS),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), MAPS),
    "BatchNorm2d without weights": (lambda: nn.BatchNorm2d(6, affine=False), MAPS),
    "BatchNorm2d, untracked": (
        lambda: nn.BatchNorm2d(6, affine=False, track_running_stats=False),
        MAPS,
    ),
    "BatchNorm2d in evaluation": (lambda: nn.BatchNorm2d(6).eval(), MAPS),
    "BatchNorm2d in evaluation without weights": (
        lambda: nn.BatchNorm2d(6, affine=False).eval(),
        MAPS,
    ),
    "Embedding": (lambda: Lookup(nn.Embedding(2, 6, padding_idx=0)), ROWS),
    "EmbeddingBag": (lambda: Lookup(nn.EmbeddingBag(2, 6)), ROWS),
    "LSTM": (lambda: First(nn.LSTM(6, 6)), STEPS),
    "GRU": (lambda: First(nn.GRU(6, 6)), STEPS),
    "LSTMCell": (lambda: Step(nn.LSTMCell), STEPS),
    "GRUCell": (lambda: Step(nn.GRUCell), STEPS),
    "RNNCell": (lambda: Step(nn.RNNCell), STEPS),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(6, 2), 3), STEPS),
    "MultiheadAttention of one sequence": (
        lambda: First(nn.MultiheadAttention(6, 2), 3),
        (4, 6),
    ),
    "attention": (
        lambda: Product(lambda x, w: F.scaled_dot_product_attention(x @ w, x, x), (6, 6)),
        STEPS,
    ),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), ROWS),
    "PReLU": (lambda: nn.PReLU(), ROWS),
    "addmm": (lambda: Product(lambda x, b, w: torch.addmm(b, x, w), (4,), (6, 4)), ROWS),
    "baddbmm": (
        lambda: Product(lambda x, b, w: torch.baddbmm(b, x, w), (4, 3, 5), (4, 6, 5)),
        STEPS,
    ),
    "addbmm": (
        lambda: Product(lambda x, b, w: b.addbmm(x, w), (3, 5), (4, 6, 5)),
        STEPS,
    ),
    "mv": (lambda: Product(lambda x, w: x.to(w.dtype).mv(w), (6,)), ROWS),
    "dot": (lambda: Product(lambda x, w: x.flatten().to(w.dtype).dot(w), (24,)), ROWS),
    "tensordot": (lambda: Product(lambda x, w: torch.tensordot(x.to(w.dtype), w, 2), ROWS), ROWS),
    "tensordot of some": (
        lambda: Product(lambda x, w: torch.tensordot(x.to(w.dtype), w, 1), (6, 4)),
        ROWS,
    ),
    "inner": (lambda: Product(lambda x, w: torch.inner(x[0].to(w.dtype), w), (6,)), ROWS),
    "select_scatter": (
        lambda: Product(lambda x, w: x.select_scatter((x[0] * w).to(x.dtype), 0, 1), (6,)),
        ROWS,
    ),
    "attention with a mask of numbers": (
        lambda: Product(
            lambda x, w, v, m: F.multi_head_attention_forward(
                *[x.transpose(0, 1)] * 3,
                6,
                2,
                w,
                None,
                None,
                None,
                False,
                0.0,
                v,
                None,
                attn_mask=m,
            )[1],
            (18, 6),
            (6, 6),
            (3, 3),
        ),
        STEPS,
    ),
    "pooled volumes": (
        lambda: Product(
            lambda x, w: F.interpolate((x * w)[:, None, :, :4, :4], 2, mode="area"), (5,)
        ),
        MAPS,
    ),
    "vecdot": (lambda: Product(lambda x, w: torch.linalg.vecdot(x, w), (4, 6)), ROWS),
}
LOSSES = {
    "cross_entropy": lambda h: F.cross_entropy(h, torch.tensor([0, 1, 2, 3])),
    "nll_loss": lambda h: F.nll_loss(h, torch.tensor([0, 1, 2, 3])),
    "binary_cross_entropy_with_logits": lambda h: F.binary_cross_entropy_with_logits(
        h, h.detach().sigmoid()
    ),
    "hinge_embedding_loss": lambda h: F.hinge_embedding_loss(h, torch.ones_like(h)),
    "mse_loss": lambda h: F.mse_loss(h, torch.ones_like(h)),
    "l1_loss": lambda h: F.l1_loss(h, torch.ones_like(h)),
    "torch's poisson_nll_loss": lambda h: torch.poisson_nll_loss(
        h, torch.ones_like(h), True, False, 1e-8, 1
    ),
    "cosine_embedding_loss": lambda h: F.cosine_embedding_loss(h, h.flip(0), torch.ones(4)),
    "trace": lambda h: h[:, :4].trace(),
    "cdist": lambda h: torch.cdist(h, h.flip(0)).sum(),
}


SEEN = []  # not in the module, where a list that grows counts as a state


class Watched(nn.Module):
    """A layer between two others, its result's dtype written down."""

    def __init__(self, layer, shape):
        super().__init__()
        self.before, self.layer = nn.Linear(shape[-1], shape[-1]), layer

    def forward(self, x):
        h = self.before(x)
        y = self.layer(h)
        SEEN.append((str(h.dtype), str(y.dtype)))
        return y.float() if y.dtype in HALF else y


def spread(y):
    """A loss in which no two entries count the same."""
    return (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).mean()


def watched(name, small=1.0):
    torch.manual_seed(1)
    build, shape = LAYERS[name]
    model = Watched(build(), shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.before.weight.mul_(small)
        model.before.bias.mul_(small)
    return model, torch.randn(M, *shape)


def plain(model, batch, criterion, autocast=None):
    """Losses and rows of ordinary passes, all in float64."""
    losses, rows = [], []
    for x in batch:
        own = copy.deepcopy(model)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            value = criterion(own(x))
        params = [*own.parameters()]
        found = torch.autograd.grad(value, params, allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)
        ]
        losses.append(value.detach().double())
        rows.append(torch.cat([g.double().flatten() for g in grads]))
    return torch.stack(losses), torch.stack(rows)


def planned(model, batch, criterion, plan, autocast=None):
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, lambda out, _: criterion(out))
    flat = batch.flatten(0, 1), torch.zeros(len(batch) * batch.shape[1])
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        found = gf.microbatch_grads(loss, M, plan=plan)(params, flat, buffers=buffers)
    rows = side_by_side({n: g.double() for n, g in found.stacked().items()}, params)
    return found.losses.double(), rows


def vmap_refuses(name):
    """Recurrent layers in half precision, and running statistics of InstanceNorm."""
    return any(kind in name for kind in ("LSTM", "GRU", "RNN", "tracked"))


def assert_as_good(got, eager, exact, dtype):
    """Errors of the order of a plain pass's: four times, or a few roundings where it was lucky."""
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        floor = 8 * torch.finfo(dtype).eps * truth.norm()
        assert (mine - truth).norm() <= 4 * (theirs - truth).norm() + floor


@pytest.mark.parametrize("plan", [PLAN, "vmap"])
@pytest.mark.parametrize("small", [1.0, 1e-2], ids=["usual", "small"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_half_precision_are_as_good_as_a_plain_pass(name, dtype, small, plan):
    model, batch = watched(name, small)
    model, batch = model.to(dtype), batch.to(dtype)
    exact = plain(copy.deepcopy(model).double(), batch.double(), spread)
    eager = plain(model, batch, spread)
    try:
        got = planned(model, batch, spread, plan)
    except RuntimeError:
        assert plan == "vmap" and vmap_refuses(name)
        return
    assert_as_good(got, eager, exact, dtype)


@pytest.mark.parametrize("plan", [PLAN, "vmap"])
@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast_every_activation_has_the_dtype_of_a_plain_pass(name, plan):
    SEEN.clear()
    model, batch = watched(name)
    dtype = torch.bfloat16
    eager = plain(model, batch, spread, dtype)
    want = set(SEEN)
    SEEN.clear()
    try:
        got = planned(model, batch, spread, plan, dtype)
    except RuntimeError:
        assert plan == "vmap" and vmap_refuses(name)
        return
    assert set(SEEN) == want
    exact = plain(copy.deepcopy(model).double(), batch.double(), spread)
    assert_as_good(got, eager, exact, dtype)


@pytest.mark.parametrize("plan", [PLAN, "vmap"])
@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_every_loss_has_the_dtype_of_a_plain_pass(name, plan):
    torch.manual_seed(1)
    layer, batch, seen = nn.Linear(6, 4), torch.randn(M, 4, 6), []

    def criterion(h):
        value = LOSSES[name](h)
        seen.append((str(h.dtype), str(value.dtype)))
        return value.float()

    eager = plain(layer, batch, criterion, torch.bfloat16)
    want = set(seen)
    seen.clear()
    got = planned(layer, batch, criterion, plan, torch.bfloat16)
    assert set(seen) == want
    exact = plain(copy.deepcopy(layer).double(), batch.double(), lambda h: LOSSES[name](h))
    assert_as_good(got, eager, exact, torch.bfloat16)


def test_rows_at_weights_of_their_own_have_the_dtype_of_a_plain_pass_under_autocast():
    for name in ("Linear", "Conv2d", "LayerNorm", "GroupNorm", "BatchNorm2d", "LSTMCell"):
        SEEN.clear()
        model, batch = watched(name)
        plain(model, batch, spread, torch.bfloat16)
        want = set(SEEN)
        params, buffers = gf.extract(model)
        loss = gf.model_loss(model, lambda out, _: spread(out))
        flat = batch.flatten(0, 1), torch.zeros(12)
        with torch.autocast("cpu", torch.bfloat16):
            rows = gf.microbatch_grads(loss, M, plan=PLAN)(params, flat, buffers=buffers)
        SEEN.clear()
        rows.at_rows({n: p.expand(M, *p.shape).clone() for n, p in params.items()})
        assert set(SEEN) == want, name


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="of newer torch")
def test_a_product_and_a_loss_in_one_function_take_the_loop_under_autocast():
    loss = lambda p, b: F.linear_cross_entropy(b[0], p["w"], b[1])
    params, batch = {"w": torch.randn(4, 6)}, (torch.randn(12, 6), torch.arange(12) % 4)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="linear_cross_entropy under autocast"):
            found = gf.microbatch_grads(loss, M)(params, batch)
        want = plain_rows(loss, params, batch, M)
    assert off(side_by_side(found.stacked(), params), want) < 1e-6


def test_the_default_eps_of_rms_norm_is_that_of_float32():
    x = torch.linspace(-1, 1, 24).view(4, 6) * 1e-3
    for dtype in HALF:
        loss = lambda p, b: F.rms_norm(b[0], (6,), p["w"]).float().square().mean()
        params, batch = {"w": torch.ones(6, dtype=dtype)}, (x.to(dtype),)
        found = gf.microbatch_grads(loss, 2, plan=PLAN)(params, batch)
        want = plain_rows(loss, params, batch, 2).float()
        got = side_by_side(found.stacked(), params).float()
        assert (got - want).norm() <= 8 * torch.finfo(dtype).eps * want.norm()
