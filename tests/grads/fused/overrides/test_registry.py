"""Every operation override: how often it is used, and the result without it.

Without its override an operation runs under vmap, which for most operations only takes longer.
Three overrides are necessary. `embedding`: vmap masks `padding_idx` in the first row alone, without
an error. `rnn`, and `batch_norm` with running statistics: vmap cannot run them.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _zoo import ZOO
from _zoo_case import PLAN, Case, Net, inputs
from _zoo_check import Oracle, probe_for
from gradfilter.grads.fused.overrides._row_by_row import COMPOSED, NAMES

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.skipif(PLAN != "fused", reason="only the fused plan has rules"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def plain_name(function):
    """Return the name f of aten.f.overload."""
    return function.__name__.split(".")[0]


# The functions a rule stands for, by their names.
FUNCTIONS = {
    "linear": {"linear"},
    "conv": {f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)},
    "embedding": {"embedding"},
    "embedding_bag": {"embedding_bag"},
    "layer_norm": {"layer_norm"},
    "group_norm": {"group_norm"},
    "instance_norm": {"instance_norm"},
    "rms_norm": {"rms_norm"},
    "batch_norm": {"batch_norm"},
    "attention": {"scaled_dot_product_attention"},
    "multi_head_attention": {"multi_head_attention_forward"},
    "weight_norm": {"_weight_norm"},
    "cross_entropy": {"cross_entropy"},
    "nll_loss": {"nll_loss"},
    "rnn": {"lstm", "gru", "rnn_tanh", "rnn_relu"},
    "cell": {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"},
    "product": {
        *("matmul", "__matmul__", "__rmatmul__", "linalg_matmul", "mm", "bmm", "addmm"),
        *("baddbmm", "einsum"),
    },
    **{
        loss: {loss}
        for loss in (
            *("kl_div", "soft_margin_loss", "margin_ranking_loss", "multi_margin_loss"),
            *("multilabel_margin_loss", "triplet_margin_loss", "ctc_loss", "gaussian_nll_loss"),
        )
    },
    "row by row": {*NAMES, *(plain_name(function) for function in COMPOSED)},
    "format": {"contiguous", "to", "clone"},  # without a name of their own
    # What vmap itself runs wrongly: test_spellings.py.
    "fault": {
        "roll",
        "select_scatter",
        "index_fill",
        "as_strided",
        "as_strided_",
        "as_strided_copy",
    },
}

# Rule, case, how often one forward pass takes it.
COUNTS = [
    ("linear", "linear-3d", 2),
    ("linear", "tied-head", 2),
    ("conv", "conv1d", 2),
    ("conv", "lenet", 2),
    ("conv", "transposed3d", 2),
    ("conv", "conv-used-twice", 2),
    ("embedding", "embedding", 1),
    ("embedding", "embedding-used-twice", 2),
    ("layer_norm", "layer-norm-0", 1),
    ("group_norm", "group-norm-5", 1),
    ("instance_norm", "instance-norm-9", 1),
    ("rms_norm", "rms-norm-13", 1),
    ("batch_norm", "batch-norm-maps", 1),
    ("batch_norm", "batch-norm-twice", 2),
    ("attention", "attention-causal", 1),
    ("multi_head_attention", "multi-head-self", 1),
    ("weight_norm", "weight-norm", 2),
    ("embedding_bag", "embedding-bag-max", 1),
    ("cross_entropy", "labels-left-out", 1),
    ("cross_entropy", "summed", 1),
    ("nll_loss", "loss-nll", 1),
    ("rnn", "lstm-used-twice", 2),
    ("rnn", "gru", 1),
    ("product", "addmm", 2),
    ("product", "einsum", 2),
]

# Cases that a rule must be there for.
NEEDED = [
    ("embedding", "embedding-padding"),
    ("embedding", "tied-head-padding"),
    ("embedding", "embedding-used-twice"),
    ("batch_norm", "batch-norm-maps"),
    ("rnn", "lstm"),
    ("rnn", "gru"),
    ("rnn", "rnn-tanh"),
]


def table():
    """The rules by the function they stand for."""
    from gradfilter.grads.fused.overrides._registry import OVERRIDES

    return OVERRIDES


@pytest.fixture
def without(monkeypatch):
    """Takes one rule out of the table."""

    def remove(rule):
        rules = table()
        found = [function for function in rules if plain_name(function) in FUNCTIONS[rule]]
        assert found, f"no rule {rule}"
        for function in found:
            monkeypatch.delitem(rules, function)

    return remove


def assert_as_the_loop(case, m=3, b=3):
    """Everything asked of one stack; how often each rule was taken."""
    model, batch = case.model(), case.samples(m, b)
    loop = case.rows(model, batch, m, b, "loop")
    oracle = Oracle(loop, probe_for(gf.extract(model)[0], m), case.rtol)
    rows = case.rows(model, batch, m, b, PLAN)
    oracle.check_pass(rows, case.name)
    for question in ("gram", "combine", "dot", "sq_norms", "stacked"):
        oracle.check(rows, question, case.name)
    return rows.overrides


def test_every_rule_is_known_here():
    functions = {plain_name(function) for function in table()}
    assert functions <= set().union(*FUNCTIONS.values())


@pytest.mark.parametrize(("rule", "name", "count"), COUNTS)
def test_a_pass_takes_the_rule_as_often_as_the_layer_is_called(rule, name, count):
    case = ZOO[name]
    model = case.model()
    rows = case.rows(model, case.samples(3, 3), 3, 3, PLAN)
    assert rows.overrides[rule] == count


@pytest.mark.parametrize(("rule", "name"), sorted({c[:2] for c in COUNTS} - {*NEEDED}))
def test_without_a_rule_the_result_is_right_or_refused(without, rule, name):
    without(rule)
    try:
        taken = assert_as_the_loop(ZOO[name])
    except RuntimeError as refusal:
        assert str(refusal)
        assert rule in {needed for needed, _ in NEEDED}
    else:
        assert not taken.get(rule, 0)


@pytest.mark.parametrize(("rule", "name"), NEEDED)
def test_these_are_wrong_or_refused_without_their_rule(without, rule, name):
    assert assert_as_the_loop(ZOO[name])[rule] > 0
    without(rule)
    with pytest.raises((RuntimeError, AssertionError)):
        assert_as_the_loop(ZOO[name])


def test_without_any_rule_linear_layers_and_attention_are_right(monkeypatch):
    for function in list(table()):
        monkeypatch.delitem(table(), function)
    for name in ("linear-3d", "lenet", "used-twice", "layer-norm-0", "attention-by-hand"):
        taken = assert_as_the_loop(ZOO[name])
        assert not any(taken.values())


def test_batch_norm_of_weights_is_not_taken_for_a_layer():
    """Weight standardisation: what is normalised is a weight, the same in every row."""
    case = ZOO["weight-standardised"]
    rows = case.rows(case.model(), case.samples(3, 3), 3, 3, PLAN)
    rows.gram()
    assert not rows.overrides.get("batch_norm", 0)


def test_a_transform_inside_the_loss_keeps_out_of_the_rules():
    """A vmap of the loss's own: what runs inside it belongs to that level."""
    run = lambda net, x: torch.func.vmap(lambda row: F.linear(row, net.a.weight))(x) + net.a(x)
    case = Case("nested", lambda: Net(run, a=nn.Linear(6, 4)), inputs(6))
    assert assert_as_the_loop(case)["linear"] >= 1
