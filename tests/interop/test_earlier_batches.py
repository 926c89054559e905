"""`accumulate` of a compiled host: the uncompiled training to the bit, or a clear refusal."""

import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _allocations import Peak
from _formulas import formulas
from _models import Normed
from gradfilter.interop import Filtered

pytestmark = pytest.mark.usefixtures("float64")


def vectors(n):
    return torch.randn(n, 6) * torch.arange(1, n + 1)[:, None], torch.randint(0, 3, (n,))


def noise():
    def update(grads, state, params, /, **extra):
        return {k: g + 0.01 * torch.randn_like(g) for k, g in grads.items()}, state, {}

    return gf.transform("noise", "tree -> tree", update)


def with_aux(output, y):
    return F.cross_entropy(output, y), {"right": (output.argmax(1) == y).double().mean()}


HELD = lambda: gf.agree_filter(1.0)
STREAMED = lambda: gf.chain(gf.finite_filter(), gf.clip_per_row(0.5), gf.mean_rows(), noise())
SAM_OF_ROWS = lambda: gf.chain(
    gf.sam_perturb(0.05, per_microbatch=True), gf.clip_per_row(0.5), gf.agree_filter(1.2)
)
SAM_OF_SUM = lambda: gf.chain(
    gf.gate(gf.clip_per_row(0.5), "on"),
    gf.mean_rows(),
    gf.every(2, gf.sam_perturb(0.05)),
)


def filtered(model, chain, m=2, criterion=F.cross_entropy, **options):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return Filtered(model, criterion, chain(), optimizer, m, **options)


def train(compile, chain, sizes, extra=None, scaler=False, **options):
    """Train three steps; return the host, and all that was returned or changed."""
    torch.manual_seed(3)
    model = Normed()
    if scaler:
        options["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    host = filtered(model, chain, compile=compile, **options)
    extra, found = extra or {}, []
    for _ in range(3):
        with contextlib.nullcontext() if compile else formulas():
            found += [host.accumulate(*vectors(n), **extra) for n in sizes[:-1]]
            result = host.step(*vectors(sizes[-1]), **extra)
        found += [result.loss, result.info, result.aux, copy.deepcopy(model.state_dict())]
    return host, (found, host.state_dict(), torch.get_rng_state())


CASES = {
    "held, some steps skipped": (HELD, {}),
    "streamed": (STREAMED, {"sizes": (4, 8, 8)}),
    "held, second pass": (SAM_OF_ROWS, {"scaler": True, "criterion": with_aux, "has_aux": True}),
    "streamed, second pass": (SAM_OF_SUM, {"scaler": True, "extra": {"on": torch.tensor(True)}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_host_accumulates_to_the_bit(case):
    chain, options = CASES[case]
    options = {"sizes": (8, 8), **options}
    host, found = train("graph", chain, **options)
    _, expected = train(False, chain, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    branches = 2 if chain is SAM_OF_SUM else 1  # every second step has another graph
    assert len(host._graphs.entries) == branches
    assert len(host._batch_graphs.entries) == branches * len(set(options["sizes"][:-1]))
    if case == "held, some steps skipped":
        kept = [bool(item["keep"]) for item in found[0] if isinstance(item, dict) if "keep" in item]
        assert len(set(kept)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["streamed", "held, second pass"])  # minutes of compiling
def test_inductor_accumulates_as_without_compiling(case):
    chain, options = CASES[case]
    options = {"sizes": (8, 8), **options}
    with torch._inductor.config.patch(fallback_random=True):  # the same draws as eager ones
        _, found = train("inductor", chain, **options)
    _, expected = train(False, chain, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("chain", ["streamed", "held"])
def test_sam_with_dropout_follows_ordinary_backward_passes(chain):
    """The second pass over each batch sees the masks of its first pass."""
    rho, lr = 0.5, 0.1
    chains = {
        "streamed": lambda: gf.chain(gf.mean_rows(), gf.sam_perturb(rho)),
        "held": lambda: gf.chain(gf.sam_perturb(rho), gf.mean_rows()),
    }
    torch.manual_seed(0)
    model, plain = Normed(), Normed()
    plain.load_state_dict(model.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    host = Filtered(
        model, F.cross_entropy, chains[chain](), torch.optim.SGD(parameters, lr), 2,
        plan="loop", compile="graph",
    )  # fmt: skip
    trained = [p for p in plain.parameters() if p.requires_grad]

    def gradient(batches, numbers):
        """Sum the gradients of the rows; return it with the random state after each batch."""
        total = [torch.zeros_like(p) for p in trained]
        after = []
        for (x, y), start in zip(batches, numbers, strict=True):
            if start is not None:
                torch.set_rng_state(start)
            before = torch.get_rng_state()
            for rows in (slice(0, 4), slice(4, 8)):
                grads = torch.autograd.grad(F.cross_entropy(plain(x[rows]), y[rows]), trained)
                for own, grad in zip(total, grads, strict=True):
                    own += grad / 4
            after.append(before)
        return total, after

    for seed in range(2):
        torch.manual_seed(seed)
        batches = [vectors(8) for _ in range(2)]
        torch.manual_seed(100 + seed)
        for batch in batches[:-1]:
            host.accumulate(*batch)
        result = host.step(*batches[-1])
        torch.manual_seed(100 + seed)
        grads, numbers = gradient(batches, [None] * 2)
        buffers = copy.deepcopy(dict(plain.named_buffers()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(trained, grads, strict=True):
                p += rho * g / norm
        second, _ = gradient(batches, numbers)
        with torch.no_grad():
            for p, g, s in zip(trained, grads, second, strict=True):
                p += -rho * g / norm - lr * s
            for name, buffer in plain.named_buffers():
                buffer.copy_(buffers[name])
        assert result.info["sam_perturb/surrogate_gap"] > 0
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_another_number_of_batches_and_a_checkpoint_in_between():
    torch.manual_seed(0)
    model, other = Normed(), Normed()
    other.load_state_dict(model.state_dict())
    a, b = filtered(model, HELD, compile="graph"), filtered(other, HELD)
    for k in (1, 0, 1):
        batches = [vectors(8) for _ in range(k + 1)]
        for host in (a, b):
            torch.manual_seed(k)
            for batch in batches[:-1]:
                host.accumulate(*batch)
            if k:
                with pytest.raises(RuntimeError, match="in a checkpoint, found 1 batch"):
                    host.state_dict()
            with formulas():
                host.step(*batches[-1])
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    assert len(a._graphs.entries) == 2
    state = a.state_dict()
    a.accumulate(*vectors(8))
    a.load_state_dict(state)
    assert len(a._earlier) == 0


@pytest.mark.filterwarnings("ignore:gradfilter.compile. trace number")
def test_what_another_pass_cannot_compute_again_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    host = filtered(model, lambda: gf.chain(gf.mean_rows(), gf.sam_perturb(0.1)), compile="graph")
    before = copy.deepcopy(model.state_dict())

    def refuses(change, undo, match):
        x, y = vectors(8)
        host.accumulate(x, y)
        change(x)
        with pytest.raises(RuntimeError, match=match):
            host.step(*vectors(8))
        undo()
        host._discard_accumulated()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), name

    refuses(lambda x: x.add_(1), lambda: None, "another pass over them, found the batch written")
    with torch.no_grad():
        refuses(
            lambda x: model[0].weight.mul_(2),
            lambda: model[0].weight.copy_(before["0.weight"]),
            "found the tensor that the loss reads written in place since",
        )
    refuses(lambda x: model.eval(), lambda: model.train(), "another mode or Python state")


def test_one_pass_needs_the_batch_only_once():
    """A loader may write the next batch into the memory of the last one."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    other = copy.deepcopy(model)
    a, b = filtered(model, HELD, compile="graph"), filtered(other, HELD, m=4)
    x, y = vectors(16)
    first, targets = x[:8].clone(), y[:8].clone()
    a.accumulate(first, targets)
    first.zero_()
    targets.zero_()
    a.step(x[8:], y[8:])
    b.step(x, y)
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-12, atol=1e-12)


def test_keywords_and_leaves_are_those_of_the_step():
    gated = lambda: gf.chain(gf.gate(gf.clip_per_row(0.1), "on"), gf.mean_rows())
    model, on = nn.Linear(6, 3), torch.tensor(True)
    host = filtered(model, gated, compile="graph")
    host.accumulate(*vectors(4), on=on)
    with pytest.raises(ValueError, match="keyword 'on' with one value"):
        host.accumulate(*vectors(4), on=torch.tensor(False))
    with pytest.raises(ValueError, match="keyword 'on' with one value"):
        host.step(*vectors(4), on=torch.tensor(False))
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"found \['bias'\] in some only"):
        host.accumulate(*vectors(4), on=on)
    model.bias.requires_grad_(True)
    assert host.step(*vectors(4), on=on).info["clip_per_row/norm"].shape == (4,)


def test_streamed_batches_hold_one_gradient():
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 100))
    size = sum(p.nbytes for p in model.parameters())
    chain = lambda: gf.chain(gf.clip_per_row(0.5), gf.mean_rows())
    host = filtered(model, chain, m=4, compile="graph")
    batches = [(torch.randn(4, 100), torch.arange(4)) for _ in range(6)]
    for _ in range(2):  # the second time everything is traced
        with Peak() as memory:
            for batch in batches[1:]:
                host.accumulate(*batch)
            gc.collect()
            held = memory.now
        host.step(*batches[0])
    assert held < 1.1 * size
