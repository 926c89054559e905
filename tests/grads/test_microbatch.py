"""Rows against M ordinary backward passes, under every plan."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _models import ConvBN, Counting, Dropped, Tied, WithLoss, images, token_loss, tokens, vectors

pytestmark = pytest.mark.usefixtures("float64")
every_plan = pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])


def naive(model, criterion, batches, state=None):
    """Gradients, losses and buffers of ordinary backward passes over a copy of the module."""
    model = copy.deepcopy(model)
    rows, losses = [], []
    for args, kwargs, targets in batches:
        model.zero_grad()
        output = model(*args, **kwargs)
        loss = output.loss if criterion is None else criterion(output, targets)
        loss.backward()
        rows.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in model.named_parameters()
                if p.requires_grad
            }
        )
        losses.append(loss.detach())
    stacked = {n: torch.stack([row[n] for row in rows]) for n in rows[0]}
    return stacked, torch.stack(losses), dict(model.named_buffers())


def assert_rows_equal(stack, expected):
    rows, losses, buffers = expected
    torch.testing.assert_close(stack.stacked(), rows, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stack.losses, losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stack.buffers, buffers, rtol=1e-10, atol=1e-12)


def chunks(batch, m):
    x, y = (t.chunk(m) for t in batch)
    return [((a,), {}, b) for a, b in zip(x, y, strict=True)]


@every_plan
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("m", [1, 3, 6])
def test_batch_norm_equals_forward_passes_in_order(plan, training, m):
    model, batch = ConvBN().train(training), images()
    loss = gf.model_loss(model, F.cross_entropy)
    params, buffers = gf.extract(model)
    before = copy.deepcopy(model.state_dict())
    rows = gf.microbatch_grads(loss, m, plan=plan)(params, batch, buffers=buffers)
    assert_rows_equal(rows, naive(model, F.cross_entropy, chunks(batch, m)))
    assert rows.buffers["bn.num_batches_tracked"] == (2 * m if training else 0)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@every_plan
def test_buffers_handed_on_over_several_batches(plan):
    model = ConvBN()
    loss = gf.model_loss(model, F.cross_entropy)
    params, buffers = gf.extract(model)
    batches = [images() for _ in range(3)]
    for batch in batches:
        buffers = gf.microbatch_grads(loss, 4, plan=plan)(params, batch, buffers=buffers).buffers
    passes = [p for batch in batches for p in chunks(batch, 4)]
    expected = naive(model, F.cross_entropy, passes)[2]
    torch.testing.assert_close(buffers, expected, rtol=1e-12, atol=1e-12)


def test_float32_running_statistics_of_the_loop_are_bit_equal():
    torch.set_default_dtype(torch.float32)
    model, batch = ConvBN(), images()
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 4, plan="loop")(params, batch, buffers=buffers)
    expected = naive(model, F.cross_entropy, chunks(batch, 4))[2]
    assert all(torch.equal(rows.buffers[n], expected[n]) for n in expected)


@every_plan
def test_tied_frozen_and_unused_parameters(plan):
    model, batch = Tied(), tokens()
    params, _ = gf.extract(model)
    assert set(params) == {"embed.weight", "mix.weight", "unused"}
    rows = gf.microbatch_grads(gf.model_loss(model, token_loss), 3, plan=plan)(params, batch)
    assert_rows_equal(rows, naive(model, token_loss, chunks(batch, 3)))
    assert rows.stacked()["unused"].abs().sum() == 0
    assert rows.stacked()["embed.weight"].abs().sum() > 0


@every_plan
def test_frozen_parameters_keep_their_present_value(plan):
    model, batch = Tied(), tokens()
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, token_loss), 3, plan=plan)
    before = grads_of(params, batch).losses
    with torch.no_grad():
        model.mix.bias.add_(1.0)
    assert (grads_of(params, batch).losses != before).all()


@every_plan
def test_keyword_and_tuple_inputs(plan):
    model, (ids, y) = Tied(), tokens()
    shift = torch.randn(len(ids))
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, token_loss), 3, plan=plan)
    expected = naive(
        model,
        token_loss,
        [
            ((a, 2.0), {"shift": s}, b)
            for a, s, b in zip(ids.chunk(3), shift.chunk(3), y.chunk(3), strict=True)
        ],
    )
    by_keyword = ({"ids": ids, "scale": 2.0, "shift": shift}, y)
    by_place = ((ids, 2.0, shift), y)
    for batch in (by_keyword, by_place):
        assert_rows_equal(grads_of(params, batch), expected)


class Tokenized(dict):
    """Like a tokenizer's output: a mapping that is not a plain dict."""


@every_plan
@pytest.mark.parametrize("mapping", [dict, Tokenized])
def test_dict_batches_of_a_model_with_its_own_loss(plan, mapping):
    model, (ids, labels) = WithLoss(), tokens()
    mask = torch.rand(ids.shape)
    batch = mapping(input_ids=ids, attention_mask=mask, labels=labels, return_dict=True)
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model), 4, plan=plan)(params, batch)
    parts = zip(ids.chunk(4), mask.chunk(4), labels.chunk(4), strict=True)
    expected = [((), {"input_ids": i, "attention_mask": m, "labels": y}, None) for i, m, y in parts]
    assert_rows_equal(rows, naive(model, None, expected))


@every_plan
def test_dict_batch_with_a_criterion_sees_output_and_batch(plan):
    model, (ids, labels) = WithLoss(), tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones(ids.shape), "labels": labels}
    criterion = lambda output, batch: 2 * token_loss(output.logits, batch["labels"])
    params, _ = gf.extract(model)
    twice = gf.microbatch_grads(gf.model_loss(model, criterion), 4, plan=plan)(params, batch)
    once = gf.microbatch_grads(gf.model_loss(model), 4, plan=plan)(params, batch)
    torch.testing.assert_close(twice.losses, 2 * once.losses)


@every_plan
def test_per_sample_is_one_row_per_sample(plan):
    model, batch = Dropped(0.0), vectors(5)
    params, _ = gf.extract(model)
    rows = gf.per_sample_grads(gf.model_loss(model, F.cross_entropy), plan=plan)(params, batch)
    assert len(rows) == 5
    assert_rows_equal(rows, naive(model, F.cross_entropy, chunks(batch, 5)))


@given(
    m=st.integers(1, 5),
    b=st.integers(1, 4),
    width=st.integers(1, 9),
    chunk=st.none() | st.integers(1, 6),
)
def test_vmap_equals_loop(m, b, width, chunk):
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
    params, _ = gf.extract(model)
    loss, batch = gf.model_loss(model, F.cross_entropy), vectors(m * b)
    loop = gf.microbatch_grads(loss, m, plan="loop")(params, batch)
    vmap = gf.microbatch_grads(loss, m, plan="vmap", chunk_size=chunk)(params, batch)
    torch.testing.assert_close(vmap.stacked(), loop.stacked(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(vmap.losses, loop.losses, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks_do_not_change_running_statistics(chunk_size):
    model, batch = ConvBN(), images()
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 6, plan="vmap", chunk_size=chunk_size)(
        params, batch, buffers=buffers
    )
    assert_rows_equal(rows, naive(model, F.cross_entropy, chunks(batch, 6)))


@every_plan
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_dropout_differs_per_row_and_at_repeats_it(plan, chunk_size):
    model = Dropped()
    x, y = vectors(1)
    batch = x.expand(6, -1), y.expand(6)  # six times the same sample
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(
        gf.model_loss(model, F.cross_entropy), 6, plan=plan, chunk_size=chunk_size
    )
    rows = grads_of(params, batch)
    assert len(set(rows.losses.tolist())) == 6
    assert torch.equal(rows.at(params).losses, rows.losses)
    assert (grads_of(params, batch).losses != rows.losses).any()
    assert torch.equal(rows.at(params).losses, rows.losses)  # for ever


@every_plan
def test_at_leaves_the_global_generator_alone(plan):
    model, batch = Dropped(), vectors()
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan=plan)(params, batch)
    before = torch.get_rng_state()
    rows.at(params)
    assert torch.equal(torch.get_rng_state(), before)


@every_plan
def test_at_uses_the_incoming_buffers(plan):
    model, batch = ConvBN(), images()
    params, buffers = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan=plan)(
        params, batch, buffers=buffers
    )
    again = rows.at(params)
    assert all(torch.equal(again.buffers[n], rows.buffers[n]) for n in buffers)


@every_plan
def test_at_computes_under_the_autocast_of_the_first_pass(plan):
    torch.set_default_dtype(torch.float32)
    model, batch = Dropped(), vectors()
    params, _ = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan=plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = grads_of(params, batch)
    torch.testing.assert_close(rows.at(params).losses, rows.losses, rtol=0, atol=0)


@every_plan
def test_at_starts_from_where_the_stack_is(plan):
    model, batch = Dropped(), vectors()
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan=plan)(params, batch)
    moved = {n: p + 1 for n, p in params.items()}
    head = {"b.weight": params["b.weight"]}
    assert torch.equal(rows.at(moved).at(head).losses, rows.at({**moved, **head}).losses)


@every_plan
def test_at_rows_gives_every_row_its_own_parameters(plan):
    model, batch = Dropped(), vectors()
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan=plan)(params, batch)
    own = {n: p + torch.randn(3, *p.shape) for n, p in params.items()}
    got = rows.at_rows(own).stacked()
    for m in range(3):
        expected = rows.at({n: p[m] for n, p in own.items()}).stacked()
        for n in params:
            torch.testing.assert_close(got[n][m], expected[n][m], rtol=1e-10, atol=1e-12)


@every_plan
def test_plain_losses_and_aux(plan):
    def loss(params, batch):
        value = (params["w"] * batch["x"]).sum(1).mean()
        return value, {"double": 2 * value, "rows": batch["x"].sum(0)}

    x = torch.randn(6, 2)
    rows = gf.microbatch_grads(loss, 3, has_aux=True, plan=plan)({"w": torch.ones(2)}, {"x": x})
    torch.testing.assert_close(rows.aux["double"], 2 * rows.losses)
    torch.testing.assert_close(rows.aux["rows"], x.reshape(3, 2, 2).sum(1))
    assert not rows.aux["double"].requires_grad


@every_plan
def test_aux_of_a_model(plan):
    model, batch = Dropped(0.0), vectors()
    criterion = lambda out, y: (F.cross_entropy(out, y), out.argmax(1))
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, criterion, has_aux=True)
    rows = gf.microbatch_grads(loss, 3, plan=plan)(params, batch)
    assert torch.equal(rows.aux.flatten(), model(batch[0]).argmax(1))


def test_extract_copies_and_insert_writes_back():
    model = ConvBN()
    params, buffers = gf.extract(model)
    params["head.weight"].zero_()
    assert model.head.weight.abs().sum() > 0
    head = model.head.weight
    buffers["bn.running_mean"].fill_(3.0)
    gf.insert(model, params, buffers)
    assert model.head.weight is head and head.abs().sum() == 0
    assert (model.bn.running_mean == 3.0).all()


def test_insert_refuses_whole_before_writing_anything():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    for bad, message in (
        ({"bais": torch.zeros(2)}, "unknown name 'bais'"),
        ({"bias": torch.zeros(3)}, r"shape \(2,\), found \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            gf.insert(model, {"weight": torch.zeros(2, 2), **bad})
        assert torch.equal(model.weight, before)


@pytest.mark.parametrize("assign", [True, False])
def test_buffers_that_are_not_batch_norms(assign):
    model, batch = Counting(assign), vectors()
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, 3, plan="loop")(params, batch, buffers=buffers)
    assert rows.buffers["calls"] == 3 and model.calls == 0
    for plan in ("vmap", "fused"):
        with pytest.raises(RuntimeError, match=r"buffer 'calls'.*plan=\"loop\""):
            gf.microbatch_grads(loss, 3, plan=plan)(params, batch, buffers=buffers)
    with pytest.warns(UserWarning, match="Fell back to plan \"loop\".*'calls'"):
        rows = gf.per_sample_grads(loss)(params, batch, buffers=buffers)
    assert rows.buffers["calls"] == 12


def test_auto_falls_back_with_a_warning_on_the_same_random_numbers():
    def loss(params, x):
        if torch.rand(()) > 2 or x.sum().item() > 0:  # another number for every row
            x = -x
        return (params["w"] * x * torch.rand(2)).sum()

    params, x = {"w": torch.ones(2)}, torch.randn(9, 2)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match='Fell back to plan "loop": __bool__') as caught:
        auto = gf.per_sample_grads(loss)(params, x)
    assert len(caught) == 1
    torch.manual_seed(3)
    loop = gf.per_sample_grads(loss, plan="loop")(params, x)
    assert torch.equal(auto.losses, loop.losses)
    assert torch.equal(auto.at(params).losses, loop.losses)


def test_auto_raises_the_users_own_error():
    def loss(params, x):
        return (params["w"] @ torch.ones(5)).sum() + x.sum()

    with pytest.raises(RuntimeError, match=r"size mismatch|inconsistent tensor size"):
        gf.per_sample_grads(loss)({"w": torch.ones(2)}, torch.randn(9, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_plan
def test_on_a_gpu_as_on_the_cpu(plan):
    model, batch = ConvBN(), images()
    expected = naive(model, F.cross_entropy, chunks(batch, 4))
    model.cuda()
    params, buffers = gf.extract(model)
    cuda_batch = tuple(t.cuda() for t in batch)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 4, plan=plan)(
        params, cuda_batch, buffers=buffers
    )
    on_cpu = gf.DenseStack(
        {n: g.cpu() for n, g in rows.stacked().items()},
        losses=rows.losses.cpu(),
        buffers={n: b.cpu() for n, b in rows.buffers.items()},
    )
    assert_rows_equal(on_cpu, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_plan
def test_dropout_on_a_gpu_is_reproduced_by_at(plan):
    model = Dropped().cuda()
    batch = tuple(t.cuda() for t in vectors())
    params, _ = gf.extract(model)
    rows = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan=plan)(params, batch)
    assert torch.equal(rows.at(params).losses, rows.losses)


def notes(model, criterion, batch, m=3, plan="auto"):
    """Return the notes below the error of a loss that raises."""
    params, _ = gf.extract(model)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        gf.microbatch_grads(gf.model_loss(model, criterion), m, plan=plan)(params, batch)
    return caught.type, getattr(caught.value, "__notes__", [])


LABELS = torch.arange(6) % 2
FLAT = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
CONV = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten())
NORM = nn.Sequential(nn.LayerNorm(2), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused", "auto"])
@pytest.mark.parametrize("network", [FLAT, CONV, NORM])
@pytest.mark.parametrize(
    "home, other, fix",
    [
        (torch.float32, torch.float64, "x.float(), or model.double() before extract"),
        (torch.float64, torch.float32, "x.double(), or model.float() before extract"),
        (torch.float32, torch.int64, "x.float()"),
        (torch.float32, torch.uint8, "x.float()"),
    ],
)
def test_dtypes_that_differ_are_noted(plan, network, home, other, fix):
    model, x = copy.deepcopy(network).to(home), torch.ones(6, 1, 2, 2).to(other)
    kind, found = notes(model, F.cross_entropy, (x, LABELS), plan=plan)
    assert kind is RuntimeError
    assert found == [f"The batch holds {other}, the parameters {home}: {fix}."]


WIDE = torch.ones(6, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "model, batch",
    [
        (nn.Linear(3, 2), (WIDE, LABELS)),
        (nn.Linear(4, 2), (WIDE, LABELS.float())),
        (nn.Embedding(4, 2), (WIDE[:, 0].float(), LABELS)),
        (nn.Embedding(4, 2), (LABELS, LABELS.short())),
    ],
)
def test_errors_about_something_else_have_no_note(model, batch):
    model = copy.deepcopy(model).double()
    assert notes(model, F.cross_entropy, batch, plan="loop") == (RuntimeError, [])


def test_a_loss_that_raises_for_its_own_reasons_has_no_note():
    def criterion(output, y):
        raise RuntimeError("no luck")

    batch = torch.ones(6, 3, dtype=torch.float32), torch.ones(6, 2, dtype=torch.float64)
    assert notes(nn.Linear(3, 2).float(), criterion, batch) == (RuntimeError, [])


def test_dtypes_that_torch_takes_together_are_taken():
    params, _ = gf.extract(nn.Linear(3, 2, dtype=torch.float32))
    loss = gf.model_loss(nn.Linear(3, 2, dtype=torch.float32), F.mse_loss)
    batch = torch.ones(6, 3, dtype=torch.float32), torch.ones(6, 2, dtype=torch.float64)
    assert gf.microbatch_grads(loss, 3)(params, batch).losses.dtype == torch.float64


def test_a_fallback_says_what_it_said_without_a_note():
    def criterion(output, y):
        if torch._C._functorch.maybe_current_level():
            raise RuntimeError("expected one dtype")
        return (output - y).square().mean()

    model = nn.Linear(3, 2, dtype=torch.float32)
    batch = torch.ones(6, 3, dtype=torch.float32), torch.ones(6, 2, dtype=torch.float64)
    params, _ = gf.extract(model)
    with pytest.warns(UserWarning) as caught:
        gf.microbatch_grads(gf.model_loss(model, criterion), 3)(params, batch)
    assert [str(w.message) for w in caught] == [
        'Fell back to plan "loop": expected one dtype. Pass plan="loop" to choose it outright.'
    ]


@pytest.mark.filterwarnings("ignore:var_mean")  # torch's, before it raises
@pytest.mark.parametrize("plan", ["loop", "vmap", "fused", "auto"])
def test_batch_norm_of_one_sample_is_noted(plan):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    kind, found = notes(model, F.cross_entropy, (torch.ones(6, 3), LABELS), 6, plan)
    assert kind is ValueError
    assert found == [
        "Rows of one sample: BatchNorm has nothing to average. Use fewer microbatches (M < N), "
        "GroupNorm or model.eval()."
    ]


def test_keyword_arguments_of_a_dict_batch_are_noted():
    note = (
        "A dict batch is given to the model as keyword arguments; for "
        '{"x", "y"} pass (batch["x"], batch["y"]).'
    )
    batch = {"x": torch.ones(6, 3), "y": LABELS}
    assert notes(nn.Linear(3, 2), F.cross_entropy, batch) == (TypeError, [note])

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(3, 2)

        def forward(self, x, y):
            return self.part(x, scale=2)

    assert notes(Inside(), F.cross_entropy, batch) == (TypeError, [])


def test_the_class_of_a_criterion_is_refused():
    message = r"found the class CrossEntropyLoss\. Call it: CrossEntropyLoss\(\)\."
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="^Expected a criterion, " + message):
        gf.model_loss(model, nn.CrossEntropyLoss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="^Filtered: expected a criterion, " + message):
        gf.interop.Filtered(model, nn.CrossEntropyLoss, gf.mean_rows(), optimizer, 2)


def test_insert_refuses_what_is_no_module_or_no_dict():
    model = nn.Linear(3, 2)
    params, buffers = gf.extract(model)
    with pytest.raises(
        TypeError, match=r"insert\(model, params, buffers\).*insert\(dict, Linear\)"
    ):
        gf.insert(params, model)
    with pytest.raises(TypeError, match=r"found insert\(Linear, tuple\)"):
        gf.insert(model, (params, buffers))
