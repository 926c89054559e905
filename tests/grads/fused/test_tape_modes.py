"""Every mode of a leaf, forced on every kind of layer: the answers are equal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _zoo import ZOO
from _zoo_case import PLAN, Case, inputs
from _zoo_check import Oracle, probe_for
from gradfilter.grads.fused import _conv_factor
from gradfilter.grads.fused import _factors as _factor

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.skipif(PLAN != "fused", reason="only the fused plan has modes"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

NAMES = [
    *("linear-2d", "linear-4d", "linear-no-bias", "linear-of-a-constant", "linear-of-a-vector"),
    *("linear-expanded-input", "linear-transposed-input", "linear-in-place-relu", "einsum"),
    *("conv1d-groups", "conv2d", "conv2d-depthwise", "conv2d-dilation", "conv2d-same"),
    *("conv2d-stride-skips-input", "conv2d-circular", "conv3d", "conv-used-twice", "lenet"),
    *("transposed1d", "transposed2d-groups", "transposed3d", "conv-of-a-constant"),
    *("batch-norm-maps", "used-twice", "two-names", "tied-transposed", "weight-split"),
    *("frozen-weights", "frozen-biases", "lora-weight", "lora-adapter", "weight-norm"),
    *("token-and-scale", "table-indexed", "channels-last-model", "attention-by-hand"),
]
ORDERS = [
    ("gram", "combine", "stacked"),
    ("combine", "sq_norms", "dot", "combine without a row"),
    ("dot", "gram", "combine without a row", "agree_filter"),
    ("stacked", "combine", "gram"),
]
SIZES = [(2, 3), (5, 2)]


def oracle_of(case, model, m, b):
    """Return a batch, and the answers of the loop to questions about it."""
    batch = case.samples(m, b)
    loop = case.rows(model, batch, m, b, "loop")
    return batch, Oracle(loop, probe_for(gf.extract(model)[0], m), case.rtol)


def slow(*values, id):
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("ghosts", "budget"),
    [
        pytest.param(0.0, 2_000, id="materialised-little"),
        pytest.param(1e9, 0.25, id="ghost-plenty"),
        slow(0.0, 0, id="materialised-none"),
        slow(0.0, 0.25, id="materialised-plenty"),
        slow(1e9, 0, id="ghost-none"),
        slow(1e9, 2_000, id="ghost-little"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_mode_gives_the_loops_answers(name, ghosts, budget, monkeypatch):
    monkeypatch.setattr(_factor, "LARGE_SUM", ghosts)
    monkeypatch.setattr(_factor, "TILE", 64)  # so that a leaf takes many tiles
    case = ZOO[name]
    model = case.model()
    for m, b in SIZES:
        batch, oracle = oracle_of(case, model, m, b)
        for order in ORDERS:
            where = f"{name}, M = {m}, {' -> '.join(order)}"
            rows = case.rows(model, batch, m, b, PLAN, memory_budget=budget)
            oracle.check_pass(rows, where)
            for question in order:
                oracle.check(rows, question, where)


@pytest.mark.parametrize("layout", ["calls", "windows", "bands"])
@pytest.mark.parametrize("name", [name for name in NAMES if "conv" in name or name == "lenet"])
def test_all_ways_to_the_rows_of_a_convolution_give_the_loops_answers(name, layout, monkeypatch):
    def forced(weight, geometry, samples, positions):
        possible = geometry.is_product and (layout != "bands" or geometry.stride[0] == 1)
        return layout if possible else "calls"

    monkeypatch.setattr(_conv_factor, "fastest", forced)
    monkeypatch.setattr(_factor, "LARGE_SUM", 0.0)
    monkeypatch.setattr(_factor, "LARGEST", 64)  # windows of some rows at a time
    case = ZOO[name]
    model = case.model()
    for m, b in SIZES:
        batch, oracle = oracle_of(case, model, m, b)
        rows = case.rows(model, batch, m, b, PLAN, memory_budget=0.25)
        for question in ("stacked", "gram", "combine", "dot"):
            oracle.check(rows, question, f"{name}, M = {m}")


def modes(model, batch, m, **options):
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    rows = gf.microbatch_grads(loss, m, plan=PLAN, **options)(params, batch, buffers=buffers)
    return {layer.leaf: layer.mode for layer in rows.layers}


def test_rows_much_larger_than_what_they_are_computed_from_are_held_on_request_alone(float64):
    """A layer of ResNet18: 9 times as large with 32 rows of 4 images, 2.3 times with 8 of 16."""
    model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.Flatten())
    batch = torch.randn(128, 128, 4, 4), torch.zeros(128, dtype=torch.int64)
    for m, expected in ((32, "stream"), (16, "store"), (8, "store")):
        assert modes(model, batch, m)["0.weight"] == expected
        assert modes(model, batch, m, memory_budget=0.25)["0.weight"] == "store"
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, F.cross_entropy)
    held, usual = (
        gf.microbatch_grads(loss, 32, plan=PLAN, **options)(params, batch, buffers=buffers)
        for options in ({"memory_budget": 0.25}, {})
    )
    torch.testing.assert_close(usual.gram(), held.gram(), rtol=1e-10, atol=1e-14)
    weights = torch.rand(32)
    torch.testing.assert_close(usual.combine(weights), held.combine(weights), rtol=1e-9, atol=1e-14)


def test_a_wide_layer_on_few_samples_keeps_no_rows():
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 5))
    chosen = modes(model, inputs(512)(16), 8)
    assert chosen["0.weight"] == "ghost"


def test_a_narrow_layer_on_many_positions_holds_its_rows():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    chosen = modes(model, inputs(3, 8, 8)(16), 4)
    assert chosen["0.weight"] == "store"


def test_a_matrix_used_twice_is_one_ghost(monkeypatch):
    monkeypatch.setattr(_factor, "LARGE_SUM", 1e9)
    case = ZOO["used-twice"]
    rows = case.rows(case.model(), case.samples(3, 2), 3, 2, PLAN)
    assert {layer.leaf: layer.mode for layer in rows.layers}["a.weight"] == "ghost"


def test_a_convolution_used_twice_is_never_a_ghost(monkeypatch):
    monkeypatch.setattr(_factor, "LARGE_SUM", 1e9)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2 * 64, 5)

        def forward(self, x):
            return self.out(self.conv(self.conv(x).relu()).flatten(1))

    assert modes(Twice(), inputs(2, 8, 8)(16), 4)["conv.weight"] == "store"


def test_a_small_budget_streams():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten())
    model.append(nn.Linear(64 * 16, 5))
    batch = inputs(3, 8, 8)(16)
    plenty, little = modes(model, batch, 8), modes(model, batch, 8, memory_budget=0)
    assert "stream" not in plenty.values()
    assert little["2.weight"] in ("stream", "ghost")


@pytest.mark.parametrize("bad", [-1, -0.5, 1.5, True])
def test_a_budget_is_bytes_or_a_fraction(bad):
    with pytest.raises(ValueError, match="memory_budget"):
        gf.microbatch_grads(lambda p, b: p["w"].sum(), 2, memory_budget=bad)


@pytest.mark.parametrize("ghosts", [0.0, 1e9], ids=["materialised", "ghost"])
@pytest.mark.parametrize("budget", [0, 0.25], ids=["none", "plenty"])
@pytest.mark.parametrize("name", ["linear-3d", "lenet", "conv2d-groups", "used-twice"])
def test_an_ill_row_stays_out_in_every_mode(name, budget, ghosts, monkeypatch):
    monkeypatch.setattr(_factor, "LARGE_SUM", ghosts)
    case: Case = ZOO[name]
    model, (x, y) = case.model(), case.samples(3, 2)
    weights = torch.tensor([0.7, 0.0, -0.4])
    for ill in (torch.nan, torch.inf):
        x = x.clone()
        x[2].view(-1)[0] = ill
        loop = case.rows(model, (x, y), 3, 2, "loop")
        want = loop.combine(weights)
        for before in ((), ("gram",), ("sq_norms", "gram"), ("stacked",)):
            rows = case.rows(model, (x, y), 3, 2, PLAN, memory_budget=budget)
            for question in before:
                getattr(rows, question)()
            got = rows.combine(weights)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def forward_passes(*questions):
    """Count the calls of the loss for some questions when nothing may be kept between them."""
    runs = []

    def loss(params, x):
        runs.append(1)
        return (x @ params["w"]).tanh().sum()

    params, weights = {"w": torch.ones(4, 2)}, torch.ones(3)
    rows = gf.microbatch_grads(loss, 3, plan=PLAN, memory_budget=0)(params, torch.randn(6, 4))
    ask = {
        "gram": lambda: rows.gram(),
        "sq_norms": lambda: rows.sq_norms(),
        "dot": lambda: rows.dot(params),
        "combine": lambda: rows.combine(weights),
    }
    for question in questions:
        ask[question]()
    return len(runs)


@pytest.mark.parametrize(
    ("questions", "passes"),
    [
        (("combine",), 1),
        (("gram", "combine"), 1),
        (("gram", "dot", "combine"), 1),
        (("sq_norms", "combine", "dot", "combine"), 1),  # consensus_filter without a Gram
        (("gram", "combine", "dot"), 2),  # the combination let go of the graph
        (("combine", "gram"), 2),
    ],
)
def test_the_last_combination_lets_go_of_a_pass_that_keeps_nothing(questions, passes):
    assert forward_passes(*questions) == passes
