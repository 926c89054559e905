"""Per-sample rows of padded text through the models of transformers, under plan "fused"."""

import copy
import warnings

import pytest
import torch

import gradfilter as gf
from _transformers_models import LENGTHS, MODELS, build, criterion, padded
from gradfilter.grads.fused._row_questions import SHORTCUTS

hf = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # Said by torch once in a process, of whichever model comes first.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]

EVERY_DAY = {
    *("bert", "deberta-v2", "modernbert", "gpt2", "llama", "bloom", "mamba2", "t5", "bart"),
    *("mixtral", "gpt_oss", "phimoe", "ibert", "switch_transformers"),
}
# Rotary frequencies and the like are float32 whatever the dtype, and one kernel's sums for all rows
# differ in it from the kernel's for one.
IN_FLOAT32 = {
    **{"deepseek_v2": 1e-6, "deepseek_v3": 1e-6, "mamba": 1e-6, "mamba2": 1e-6},
    **dict.fromkeys(("switch_transformers", "nllb-moe"), 1e-5),
}
ROUTED_IN_FLOAT32 = {"switch_transformers", "nllb-moe"}  # the routers make their weights so
# Which modules of these run row by row.
PARTS = {
    "bloom": "BloomGelu",
    "gpt_oss": "GptOssExperts",
    "ibert": "QuantAct",
    "mixtral": "MixtralExperts",
    "olmoe": "OlmoeExperts",
    "switch_transformers": "SwitchTransformersTop1Router",
}
KINDS = [pytest.param(kind, marks=[] if kind in EVERY_DAY else pytest.mark.slow) for kind in MODELS]


def plain_rows(model, batch, loss):
    """An ordinary backward pass per text, over the plain module."""
    model = copy.deepcopy(model)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows, losses = {name: [] for name in params}, []
    for i in range(len(LENGTHS)):
        text = {name: leaf[i : i + 1] for name, leaf in batch.items()}
        model.zero_grad()
        value = loss(model(**text), text)
        value.backward()
        losses.append(value.detach())
        for name, p in params.items():
            grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            rows[name].append(grad.double())  # routers may make theirs float32
    after = {name: b.detach() for name, b in model.named_buffers()}
    return {name: torch.stack(leaf) for name, leaf in rows.items()}, torch.stack(losses), after


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_are_those_of_plain_backward_passes(kind):
    model, batch, loss = build(kind), padded(kind), criterion(kind)
    if kind in ROUTED_IN_FLOAT32:
        model.float()
    want, losses, after = plain_rows(model, batch, loss)
    params, buffers = gf.extract(model)
    grads_of = gf.per_sample_grads(gf.model_loss(model, loss))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Fell back")
        rows = grads_of(params, batch, buffers=buffers)
    rtol = IN_FLOAT32.get(kind, 1e-9)
    torch.testing.assert_close(rows.losses, losses, rtol=rtol, atol=rtol)
    torch.testing.assert_close(rows.buffers, after)
    flat = torch.cat([leaf.flatten(1) for leaf in want.values()], 1)
    scale = flat.norm(dim=1).max()
    gram = rows.gram()
    torch.testing.assert_close(gram, flat @ flat.T, rtol=rtol, atol=float(rtol * scale**2))
    weights = torch.linspace(-0.7, 1.3, len(LENGTHS))
    combined = {name: torch.tensordot(weights, leaf, 1) for name, leaf in want.items()}
    floor = float(rtol * scale)
    found, stacked = (
        {name: leaf.double() for name, leaf in tree.items()}
        for tree in (rows.combine(weights), rows.stacked())
    )
    for name, leaf in want.items():
        torch.testing.assert_close(found[name], combined[name], rtol=rtol, atol=floor)
        torch.testing.assert_close(stacked[name], leaf, rtol=rtol, atol=floor)


@pytest.mark.parametrize("plan", ["auto", "loop"])
def test_a_router_may_make_its_weight_float32(plan):
    """As those of Switch do in a model of another dtype, by ``.data`` of the parameter."""
    kind = "switch_transformers"
    model, batch, loss = build(kind), padded(kind), criterion(kind)
    want, _, _ = plain_rows(model, batch, loss)
    params, buffers = gf.extract(model)
    rows = gf.per_sample_grads(gf.model_loss(model, loss), plan=plan)(
        params, batch, buffers=buffers
    )
    scale = max(float(leaf.norm()) for leaf in want.values())
    for name, leaf in rows.stacked().items():
        assert leaf.dtype == params[name].dtype == torch.float64
        torch.testing.assert_close(leaf, want[name], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", [kind for kind in PARTS if kind in EVERY_DAY])
def test_what_cannot_run_at_once_is_a_small_part(kind):
    model, batch = build(kind), padded(kind)
    if kind in ROUTED_IN_FLOAT32:
        model.float()
    params, buffers = gf.extract(model)
    grads_of = gf.per_sample_grads(gf.model_loss(model, criterion(kind)), plan="fused")
    said = grads_of(params, batch, buffers=buffers).explain()
    assert PARTS[kind] in said.splitlines()[-1]


def test_masks_of_padded_text_take_no_groups():
    """The question whether a mask may be omitted gets the answer no for all rows."""
    for kind in ("bert", "llama", "mamba2"):
        model, batch = build(kind), padded(kind)
        params, buffers = gf.extract(model)
        loss = gf.model_loss(model, criterion(kind))
        assert not gf.per_sample_grads(loss, plan="fused")(params, batch, buffers=buffers).groups


def test_shortcuts_of_the_installed_transformers_ask_for_full_masks():
    """A full mask is left out and any other is not: no is a right answer for a full one, too."""
    from transformers import masking_utils

    names = {name for module, name in SHORTCUTS if module == masking_utils.__name__}
    assert names == {name for _, name in SHORTCUTS}
    full = torch.ones(1, 4, dtype=torch.bool)
    part = full & (torch.arange(4) < 3)
    causal = lambda mask: masking_utils._ignore_causal_mask_sdpa(mask, 4, 4, 0, 0)
    both = lambda mask: masking_utils._ignore_bidirectional_mask_sdpa(mask, 4)
    assert causal(full) and not causal(part)
    assert both(full) and not both(part)
    given = torch.zeros(1, 4, 8)
    config = hf.Mamba2Config(hidden_size=8, num_heads=4, head_dim=4, expand=2)
    made = masking_utils.create_recurrent_attention_mask
    recurrent = lambda mask: made(config=config, inputs_embeds=given, attention_mask=mask)
    assert recurrent(full) is None
    torch.testing.assert_close(recurrent(part), part)
