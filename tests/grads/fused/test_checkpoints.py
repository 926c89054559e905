"""Activation checkpoints in a pass over all rows: answers and memory of a plain pass."""

import contextlib
import copy
import functools
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint as torchs
from torch.utils.checkpoint import checkpoint_sequential

import gradfilter as gf
from _allocations import Peak
from _random_layers import OldSwish

pytestmark = pytest.mark.usefixtures("float64")

checkpoint = functools.partial(torchs.checkpoint, use_reentrant=False)
N = 12


class Experts(nn.Module):
    """Units that only some samples use, which vmap refuses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        some = (x[:, 0] > 0).nonzero()[:, 0]
        return torch.zeros_like(x).index_add(0, some, self.layer(x[some]))


class OldFunction(nn.Module):
    def forward(self, x):
        return OldSwish.apply(x)


class Exponential(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class Net(nn.Module):
    """Layers for a forward pass that a test gives."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.a, self.out, self.scale = nn.Linear(5, 6), nn.Linear(6, 3), nn.Parameter(torch.rand(6))
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.norm, self.average = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None)
        self.ln, self.experts, self.old = nn.LayerNorm(6), Experts(), OldFunction()
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.run(self, x)


FORMS = {}


def form(function):
    FORMS[function.__name__] = function


@form
def one(net, x):
    return net.out(checkpoint(net.block, net.a(x)))


@form
def several_of_one_module(net, x):
    h = checkpoint(net.block, checkpoint(net.block, net.a(x)).sin())
    return net.out(h) + checkpoint(net.block, x @ net.a.weight.T) @ net.out.weight.T


@form
def sequential(net, x):
    return net.out(checkpoint_sequential(net.block, 2, net.a(x), use_reentrant=False))


@form
def nested(net, x):
    inner = lambda h: checkpoint(net.block, h.cos()).sin() * h
    middle = lambda h: net.out(checkpoint(inner, h.cos()).exp() * h)
    return checkpoint(middle, checkpoint(net.a, x))


@form
def only_another_checkpoint(net, x):
    return net.out(checkpoint(lambda h: checkpoint(net.block, h), net.a(x)))


@form
def trees(net, x):
    def run(given, *, scale):
        h = net.block(given["h"][0] * scale)
        return {"h": (h, h.sin(), given["h"][1]), "more": [scale]}

    found = checkpoint(run, {"h": (net.a(x), 7)}, scale=net.a(x).cos())
    return net.out(found["h"][0] * found["more"][0] + found["h"][1] * found["h"][2])


@form
def closures(net, x):
    h = net.a(x)
    return net.out(checkpoint(lambda: net.block(h).cos()) * net.scale)


@form
def outputs_without_gradients(net, x):
    run = lambda h: (net.block(h).cos(), (h > 0).double(), h.detach().sin())
    found = checkpoint(run, net.a(x))
    return net.out(found[0] * found[1] + found[2]) + checkpoint(torch.sin, x).sum()


@form
def without_gradients(net, x):
    with torch.no_grad():
        h = checkpoint(net.block, net.a(x))
    return net.out(net.a(x) + h)


@form
def shared_by_all_rows(net, x):
    return net.out(checkpoint(lambda: net.scale.exp()) * net.a(x))


@form
def questions(net, x):
    def run(h):
        if (h.abs() >= 0).all():
            h = h.sin()
        return net.block(h)

    h = checkpoint(run, net.a(x))
    return net.out(h) + 0 * torch.rand(())  # after a draw, a question to the host is refused


@form
def questions_with_several_answers(net, x):
    return net.out(checkpoint(lambda h: net.block(h.sin() if h[0, 0] > 0 else h), net.a(x)))


@form
def tensors_in_attributes(net, x):
    net.seen = net.a(x).cos()

    def run(h):
        net.last = net.block(h)
        return net.last * net.seen.sin()

    return net.out(checkpoint(run, net.a(x)))


@form
def batch_norm(net, x):
    return net.out(checkpoint(lambda h: net.norm(net.block(h)).sin(), net.a(x)))


@form
def batch_norm_first_and_cumulative(net, x):
    return net.out(checkpoint(net.average, checkpoint(net.norm, net.a(x))))


@form
def layers(net, x):
    def run(h):
        h = torch.stack([net.ln(h), h.sin(), h], 1)
        return net.attention(*[net.gru(h)[0]] * 3)[0][:, -1]

    return net.out(checkpoint(run, net.a(x)))


@form
def row_by_row(net, x):
    h = checkpoint(lambda h: net.experts(net.block(h)).sin(), net.a(x))
    return net.out(checkpoint(net.old, h))


@form
def functions_of_the_user(net, x):
    return net.out(checkpoint(lambda h: Exponential.apply(net.block(h)).sin(), net.a(x)))


@form
def vmap_inside(net, x):
    return net.out(checkpoint(lambda h: net.block(torch.func.vmap(torch.sin)(h)), net.a(x)))


@form
def settings(net, x):
    h = checkpoint(lambda h: net.block(h).sin(), net.a(x), determinism_check="none")
    contexts = lambda: (contextlib.nullcontext(), contextlib.nullcontext())
    h = checkpoint(lambda h: net.block(h).sin(), h, context_fn=contexts)
    kept = [torch.ops.aten.addmm.default, torch.ops.aten.sin.default]
    contexts = functools.partial(torchs.create_selective_checkpoint_contexts, kept)
    h = checkpoint(lambda h: net.block(h).sin(), h, context_fn=contexts)
    with torchs.set_checkpoint_early_stop(False):
        h = checkpoint(lambda h: net.block(h).sin(), h)
    return net.out(checkpoint(net.block, h, preserve_rng_state=False))


def batch_of(n=N):
    return torch.randn(n, 5), torch.arange(n) % 3


def rows_of(model, batch, m, plan="fused", **settings):
    loss = gf.model_loss(model, F.cross_entropy)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    return gf.microbatch_grads(loss, m, plan=plan, **settings)(params, batch)


def plain_grads(model, params, x, y):
    """One ordinary backward pass of a copy of the module, with the checkpoints of torch."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(params, strict=False)
    F.cross_entropy(twin(x), y).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in twin.named_parameters()
    }


def plain_rows(model, batch, m, at=None):
    parts = zip(at or [{}] * m, *(t.chunk(m) for t in batch), strict=True)
    rows = [plain_grads(model, *part) for part in parts]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def check_answers(rows, want, tolerance=1e-10):
    """Compare the answers to all questions with those of the rows of plain backward passes."""
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=1e-12)
    weights = torch.linspace(-1, 2, len(rows))
    total = {name: torch.einsum("m,m...->...", weights, leaf) for name, leaf in want.items()}
    flat = torch.cat([leaf.flatten(1) for leaf in want.values()], 1)
    close(rows.combine(weights), total)
    close(rows.gram(), flat @ flat.T)
    close(rows.sq_norms(), flat.square().sum(1))
    close(rows.dot(total), flat @ torch.cat([leaf.flatten() for leaf in total.values()]))
    close(rows.stacked(), want)


def forms_and_rows():
    """All forms with rows of many, several and single samples, which BatchNorm refuses."""
    for name in FORMS:
        yield from ((name, m) for m in (1, 3, N) if m < N or "batch_norm" not in name)


@pytest.mark.parametrize(("name", "m"), [*forms_and_rows()])
def test_the_answers_are_those_of_plain_backward_passes(name, m):
    model, batch = Net(FORMS[name]), batch_of()
    want = plain_rows(model, batch, m)
    rows = rows_of(model, batch, m)
    attributes = set(vars(model))
    check_answers(rows, want)
    check_answers(rows_of(model, batch, m, memory_budget=0.25), want)
    assert set(vars(model)) == attributes
    assert not any(torch._C._functorch.is_batchedtensor(t) for t in vars(model).values()
                   if isinstance(t, torch.Tensor))  # fmt: skip


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("name", ["nested", "several_of_one_module", "layers", "batch_norm"])
def test_other_parameters(name, m):
    model, batch = Net(FORMS[name]), batch_of()
    want, rows = plain_rows(model, batch, m), rows_of(model, batch, m)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {name: p + 0.1 for name, p in params.items()}
    check_answers(rows.at(moved), plain_rows(model, batch, m, [moved] * m))
    steps = torch.linspace(-0.3, 0.2, m)
    own = [{name: p + steps[i] * want[name][i] for name, p in params.items()} for i in range(m)]
    check_answers(rows.along(steps), plain_rows(model, batch, m, own), 1e-9)
    check_answers(rows, want)


@pytest.mark.parametrize("m", [1, 3])
def test_buffers_are_written_once_as_without_checkpoints(m):
    def run(net, x, call):
        return net.out(call(net.norm, call(net.average, net.a(x)).sin()))

    model, batch = Net(lambda net, x: run(net, x, checkpoint)), batch_of()
    rows = rows_of(model, batch, m)
    rows.gram()
    plain = Net(lambda net, x: run(net, x, lambda function, h: function(h)))
    plain.load_state_dict(model.state_dict())
    for x in batch[0].chunk(m):
        plain(x)
    torch.testing.assert_close(rows.buffers, dict(plain.named_buffers()), rtol=1e-12, atol=0)


def test_the_mode_and_the_attributes_of_the_pass_hold_when_a_function_runs_again():
    model, batch = Net(FORMS["batch_norm"]), batch_of()
    want, rows = plain_rows(model, batch, 3), rows_of(model, batch, 3)
    model.eval()
    check_answers(rows, want)
    assert not any(module.training for module in model.modules())
    model = Net(FORMS["tensors_in_attributes"])
    want, rows = plain_rows(model, batch, 3), rows_of(model, batch, 3)
    model.seen = left = torch.zeros(())
    check_answers(rows, want)
    assert model.seen is left


# --- Random numbers ---


@pytest.mark.parametrize("budget", [0, 0.25])
@pytest.mark.parametrize("nest", [False, True])
def test_a_function_draws_the_same_numbers_when_it_runs_again(nest, budget):
    def noisy(net, x):
        inner = lambda h: net.block(h * torch.rand_like(h)).sin() * torch.rand(h.shape)
        run = (lambda h: checkpoint(inner, h.cos()) * torch.rand_like(h)) if nest else inner
        return net.out(checkpoint(run, net.a(x)))

    def fixed(net, x):
        numbers, h = net.numbers, net.a(x)
        h = net.block((h.cos() if nest else h) * numbers[0]).sin() * numbers[1]
        return net.out(h * numbers[2] if nest else h)

    model, batch, m = Net(noisy), batch_of(), 3
    torch.manual_seed(3)
    rows = rows_of(model, batch, m, memory_budget=budget)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    numbers = torch.rand(2 + nest, m, N // m, 6)
    model.run, want = fixed, []
    for i, part in enumerate(zip(*(t.chunk(m) for t in batch), strict=True)):
        model.numbers = numbers[:, i]
        want.append(plain_grads(model, {}, *part))
    del model.numbers
    model.run = noisy
    torch.set_rng_state(state)
    check_answers(rows, {name: torch.stack([row[name] for row in want]) for name in want[0]})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("m", [1, 3])
def test_dropout_is_that_of_the_same_pass_without_checkpoints(m):
    def run(net, x, call):
        def attend(h):
            h = torch.stack([h, h.sin()], 1)
            h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.3)
            return F.dropout(net.attention(h, h, h)[0], 0.2)[:, 0]

        return net.out(F.dropout(call(attend, F.dropout(net.a(x)))))

    model, batch = Net(lambda net, x: run(net, x, checkpoint)), batch_of()
    model.attention.dropout = 0.4
    plain = copy.deepcopy(model)
    plain.run = lambda net, x: run(net, x, lambda function, h: function(h))
    answers = []
    for net in (model, plain):
        torch.manual_seed(5)
        answers.append((rows_of(net, batch, m).stacked(), torch.get_rng_state()))
    torch.testing.assert_close(*answers, rtol=1e-10, atol=1e-13)


def test_numbers_that_are_not_drawn_again_are_refused_by_name():
    def forgets(net, x):
        run = lambda h: net.block(F.dropout(h))
        return net.out(checkpoint(run, net.a(x), preserve_rng_state=False))

    def own(net, x):
        run = lambda h: net.block(h * torch.rand(h.shape, generator=net.generator))
        return net.out(checkpoint(run, net.a(x)))

    batch = batch_of()
    torch.rand(1)
    for run in (forgets, own):
        model = Net(run)
        model.generator = torch.Generator()
        torch.rand(1, generator=model.generator)
        with pytest.raises(RuntimeError, match="draws other random numbers when it runs again"):
            rows_of(model, batch, 3).gram()
        with (
            pytest.warns(UserWarning, match="other random numbers")
            if run is own
            else (
                pytest.raises(
                    RuntimeError, match=r'other random numbers(.|\n)*Pass plan="loop" from'
                )
            )
        ):
            rows_of(model, batch, 3, "auto").gram()
        rows_of(model, batch, 3, "loop").gram()  # as torch does


# --- Autocast ---


def test_a_function_runs_again_under_the_autocast_of_its_first_run():
    def run(net, x, call):
        h = call(lambda h: net.ln(net.block(h)), net.a(x))
        with torch.autocast("cpu", enabled=False):
            h = call(lambda h: net.block(h).sin(), h.float())
        return net.out(call(lambda h: net.block(h).softmax(-1), h))

    model, (x, y) = Net(lambda net, x: run(net, x, checkpoint)).float(), batch_of()
    plain = copy.deepcopy(model)
    plain.run = lambda net, x: run(net, x, lambda function, h: function(h))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, want = (rows_of(net, (x.float(), y), 3, memory_budget=0) for net in (model, plain))
    torch.testing.assert_close(found.stacked(), want.stacked(), rtol=0, atol=0)
    torch.testing.assert_close(found.gram(), want.gram(), rtol=0, atol=0)


# --- Fallbacks and refusals ---


def test_what_falls_back_says_why():
    def hooked(net, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return net.block(net.a(x)).sin()

    class Inside(OldFunction):
        def forward(self, x):
            return checkpoint(super().forward, x)

    def inside(net, x):
        return net.out(net.old(net.a(x)))

    reasons = {
        "hooks on saved tensors": lambda net, x: net.out(hooked(net, x)),
        "hooks on saved tensors inside": lambda net, x: net.out(checkpoint(hooked, net, x)),
        "inside a module that runs row by row": inside,
        "use_reentrant=False": lambda net, x: net.out(
            torchs.checkpoint(net.block, net.a(x), use_reentrant=True)
        ),
    }
    for reason, run in reasons.items():
        model, batch = Net(run), batch_of()
        if run is inside:
            model.old = Inside()
        with pytest.warns(UserWarning, match=f'Fell back to plan "loop".*{reason}'):
            rows = rows_of(model, batch, 3, "auto")
        assert reason in rows.explain()
        check_answers(rows, plain_rows(model, batch, 3))


def test_arguments_that_are_written_are_refused_as_torch_does():
    late = lambda net, h: (checkpoint(lambda h: net.block(h.sin()), h), h.mul_(2))[0]
    early = lambda net, h: checkpoint(lambda h: net.block(h.mul_(2)), h)
    for written in (late, early):
        model, batch = Net(lambda net, x, w=written: net.out(w(net, net.a(x) * 1))), batch_of()
        with pytest.raises(RuntimeError, match="written in place after the function had begun"):
            rows_of(model, batch, 3).gram()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            plain_rows(model, batch, 3)


def test_a_layer_that_is_used_twice_with_statistics_takes_the_loop():
    run = lambda net, x: net.out(net.norm(checkpoint(net.norm, net.a(x))))
    model, batch = Net(run), batch_of()
    with pytest.warns(UserWarning, match="inside of a checkpoint and once more"):
        rows = rows_of(model, batch, 3, "auto")
    check_answers(rows, plain_rows(model, batch, 3))
    torch.testing.assert_close(rows.buffers, rows_of(model, batch, 3, "loop").buffers)


def test_a_refused_pass_leaves_no_hooks():
    def refused(net, x):
        raise ValueError("no")

    model, batch = Net(lambda net, x: checkpoint(checkpoint, refused, net, x)), batch_of()
    for plan in ("fused", "auto"):
        with pytest.raises((ValueError, RuntimeError)) as held:
            rows_of(model, batch, 3, plan)
        assert held.value is not None
        if plan == "fused" or torch.__version__ >= "2.12":  # the loop is torch's own
            assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    # torch 2.11 keeps the hooks of the loop while the error is held.
    del held
    gc.collect()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


# --- Memory ---


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.project = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x):
        heads = self.qkv(self.first(x)).unflatten(-1, (3, 2, 12)).movedim(-3, 0)
        q, k, v = heads.transpose(-2, -3)
        mixed = F.dropout((q @ k.mT).softmax(-1), 0.1) @ v
        x = x + self.project(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.second(x))))


def normalised():
    return nn.Sequential(*(layer for _ in range(3) for layer in (nn.BatchNorm1d(32), nn.Tanh())))


class Tower(nn.Module):
    def __init__(self, block, checkpointed):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.out, self.checkpointed = nn.Linear(24, 3), checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x) if self.checkpointed else block(x)
        return self.out(x.mean(1))


def saved_bytes(run, make, batch):
    """The peak without checkpoints minus that with them."""
    peaks = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = make(checkpointed)
        with Peak() as memory:
            run(model, batch)
        peaks.append(memory.peak)
    return peaks[0] - peaks[1]


def lean_ways(criterion):
    """Questions and a whole step, each of which takes a model and a batch."""
    ones = torch.ones(8)
    questions = {
        "combine": lambda rows: rows.combine(ones),
        "gram and combine": lambda rows: (rows.gram(), rows.combine(ones)),
        "norms": lambda rows: rows.sq_norms(),
    }
    for name, ask in questions.items():

        def run(model, batch, ask=ask):
            loss = gf.model_loss(model, criterion)
            params = {name: p.detach() for name, p in model.named_parameters()}
            ask(gf.microbatch_grads(loss, 8, plan="fused")(params, batch))

        yield name, run

    def step(model, batch):
        loss = gf.model_loss(model, criterion)
        chain = gf.chain(gf.agree_filter(1.5), gf.sgd(0.1))
        train = gf.train_step(loss, chain, microbatches=8, plan="fused")
        train(train.init(model), batch)

    yield "a filtered step", step


@pytest.mark.slow
@pytest.mark.parametrize("block", [Block, normalised])
def test_checkpoints_save_what_they_save_in_a_plain_pass(block):
    def plain(model, batch):
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    make = functools.partial(Tower, block)
    batch = torch.randn(16, 32, 24), torch.arange(16) % 3
    want = saved_bytes(plain, make, batch)
    for name, run in lean_ways(F.cross_entropy):
        assert saved_bytes(run, make, batch) > 0.85 * want, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpoints_of_hugging_face_save_what_they_save_in_a_plain_pass():
    hf = pytest.importorskip("transformers")

    def make(checkpointed):
        config = hf.GPT2Config(vocab_size=19, n_embd=24, n_layer=4, n_head=2, n_positions=32)
        config.bos_token_id = config.eos_token_id = 1
        model = hf.GPT2LMHeadModel(config).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        return model

    def plain(model, batch):
        model(**batch).loss.backward()

    words = torch.randint(3, 19, (16, 32))
    batch = {"input_ids": words, "labels": words}
    want = saved_bytes(plain, make, batch)
    for name, run in lean_ways(None):
        assert saved_bytes(run, make, batch) > 0.85 * want, name


def test_a_budget_of_the_users_own_holds_factors_in_spite_of_checkpoints():
    model, batch = Net(FORMS["layers"]), batch_of()
    asked, lean = rows_of(model, batch, 3, memory_budget=0.25), rows_of(model, batch, 3)
    assert "kB" in asked.explain() and "MB kept between questions" in asked.explain()
    assert "nothing kept: a backward pass per question" in lean.explain()
    assert "activation checkpoints" in lean.explain()
    assert "activation checkpoints" not in asked.explain()
    model.run = lambda net, x: net.out(net.a(x))
    assert "MB kept between questions" in rows_of(model, batch, 3).explain()


def test_a_released_stack_leaves_nothing_to_the_garbage_collector():
    model, batch = Net(FORMS["nested"]), batch_of()
    gc.disable()
    try:
        with Peak() as memory:
            rows = rows_of(model, batch, 3)
            rows.gram()
            rows.release()
            del rows
            assert memory.peak > memory.now == 0
    finally:
        gc.enable()


# --- Models of others ---


def transformer(hf, kind):
    small = {"vocab_size": 19, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(**small, n_embd=8, n_layer=2, n_head=2))
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.BertForSequenceClassification(
        hf.BertConfig(**small, **sizes, intermediate_size=12, max_position_embeddings=8)
    )


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}]
)
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_hugging_face(kind, settings):
    model = transformer(pytest.importorskip("transformers"), kind).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    words = torch.randint(3, 19, (6, 7))
    labels = words.clone() if kind == "gpt2" else torch.arange(6) % 2
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}
    model.gradient_checkpointing_enable(**settings)
    model.train()
    runs = []
    layer = (model.transformer.h if kind == "gpt2" else model.bert.encoder.layer)[0]
    handle = layer.register_forward_pre_hook(lambda *_: runs.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = gf.model_loss(model)
        rows = gf.microbatch_grads(loss, 3, plan="fused")(gf.extract(model)[0], batch)
        before = len(runs)
        rows.gram()
    assert len(runs) == before + 1  # the layer runs again
    handle.remove()
    want = []
    for m in range(3):
        model.zero_grad()
        model(**{name: t.chunk(3)[m] for name, t in batch.items()}).loss.backward()
        want.append({name: p.grad for name, p in model.named_parameters()})
    check_answers(rows, {name: torch.stack([row[name] for row in want]) for name in rows.shapes})


def test_timm():
    timm = pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **size, num_classes=3).double()
    model.set_grad_checkpointing()
    batch = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    check_answers(rows_of(model, batch, 3), plain_rows(model, batch, 3))
