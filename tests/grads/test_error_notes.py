"""Notes on errors inside of a pass over all rows: they name the plan that runs rows one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfilter as gf
from _models import OldStyle


def rows(loss, plan, m=2):
    return gf.microbatch_grads(loss, m, plan=plan)({"w": torch.ones(3)}, torch.ones(4, 3))


@pytest.mark.parametrize("plan", ["fused", "vmap"])
def test_an_error_of_torch_names_the_plan_that_works(plan):
    loss = lambda params, x: OldStyle.apply(params["w"] * x).sum()
    with pytest.raises(RuntimeError) as caught:
        rows(loss, plan)
    note = caught.value.__notes__[-1]
    assert f'plan="{plan}"' in note and 'plan="loop"' in note
    assert len(caught.value.__notes__) == 1
    assert rows(loss, "loop").stacked()["w"].shape == (2, 3)


@pytest.mark.parametrize("plan", ["fused", "vmap"])
def test_the_notes_of_refusals_in_the_backward_pass(plan):
    table = nn.Embedding(5, 3, sparse=True)
    params, _ = gf.extract(table)
    loss = gf.model_loss(table, lambda output, y: output.square().mean())
    batch = (torch.arange(4), torch.zeros(4))
    with pytest.raises(RuntimeError) as caught:
        gf.microbatch_grads(loss, 2, plan=plan)(params, batch).gram()
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert 'plan="loop"' in text or "sparse" in text


@pytest.mark.parametrize("plan", ["fused", "vmap", "auto", "loop"])
def test_our_own_errors_have_said_it(plan):
    with pytest.raises(ValueError, match="Expected a scalar loss") as caught:
        rows(lambda params, x: params["w"] * x, plan)
    assert not any("Raised under" in note for note in getattr(caught.value, "__notes__", ()))


def test_storage_is_asked_for_in_plain_words():
    import copy

    def loss(params, x):
        return (copy.deepcopy(params["w"].detach()) * params["w"] * x).sum()

    with pytest.warns(UserWarning, match="Fell back") as caught:
        rows(loss, "auto").stacked()
    assert "BatchedTensorImpl" not in str(caught[0].message)


def test_a_stack_says_why_the_loop_was_taken(capsys):
    import copy

    def loss(params, x):
        return (copy.deepcopy(params["w"].detach()) * params["w"] * x).sum()

    with pytest.warns(UserWarning, match="Fell back") as caught:
        stack = rows(loss, "auto")
    why = str(caught[0].message).removeprefix('Fell back to plan "loop": ').split(". Pass plan")[0]
    for asked in (stack, stack.first(1), stack.at({"w": torch.ones(3)})):
        assert f'fell back to plan "loop": {why}' in asked.explain()
    assert 'plan "loop"' in stack.explain() and "all rows are held" in stack.explain()
    assert capsys.readouterr().out == ""
    chosen = rows(lambda params, x: (params["w"] * x).sum(), "loop")
    assert 'plan "loop"' in chosen.explain() and "fell back" not in chosen.explain()


def test_a_stack_says_why_the_loop_was_taken_in_the_backward_pass():
    """The rows are refused at the first question, when the stack is already there."""
    asked = []

    def refuse_once(grad):
        asked.append(grad)
        if len(asked) == 1:
            raise RuntimeError("one row at a time")

    def loss(params, x):
        y = params["w"] * x
        y.register_hook(refuse_once)
        return y.square().sum()

    stack = rows(loss, "auto")
    assert "fell back" not in stack.explain()
    with pytest.warns(UserWarning, match="Fell back") as caught:
        stack.gram()
    why = str(caught[0].message).removeprefix('Fell back to plan "loop": ').split(". Pass plan")[0]
    assert f'fell back to plan "loop": {why}' in stack.explain()


MEMORY = {
    "a copy": lambda tensor: copy.deepcopy(tensor.detach()).sum(),
    "its storage": lambda tensor: len(tensor.detach().untyped_storage()),
    "its address": lambda tensor: tensor.detach().data_ptr() > 0,
    "an array": lambda tensor: tensor.detach().numpy().sum(),
}


@pytest.mark.parametrize("plan", ["fused", "vmap"])
@pytest.mark.parametrize("what", MEMORY)
def test_what_asks_for_memory_is_named_in_our_words(what, plan):
    loss = lambda params, x: (float(MEMORY[what](params["w"])) * params["w"] * x).sum()
    with pytest.raises(RuntimeError) as caught:
        rows(loss, plan)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert 'plan="loop"' in text
    assert "memory of a tensor" in str(caught.value)
    assert "TensorWrapper" not in text and "BatchedTensorImpl" not in text
    assert rows(loss, "loop").stacked()["w"].shape == (2, 3)


def test_rows_under_vmap_carry_no_graph():
    """A module that nobody differentiates has trainable parameters of its own."""
    held = nn.Linear(3, 3)
    stack = rows(lambda params, x: held(params["w"] * x).square().mean(), "vmap")
    assert not stack.losses.requires_grad
    assert not stack.stacked()["w"].requires_grad
    assert not stack.gram().requires_grad


class Checkpoints(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(3, 2), reentrant

    def forward(self, x):
        return checkpoint(torch.tanh, self.linear(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize(
    "reentrant, plan, fix",
    [
        (False, "vmap", r'Use plan="auto", "fused" or "loop"\.'),
        (True, "vmap", r"use_reentrant=False"),
        (True, "fused", r"use_reentrant=False"),
    ],
)
def test_checkpoints_are_refused_in_our_words(reentrant, plan, fix):
    model = Checkpoints(reentrant)
    loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
    batch = torch.randn(8, 3), torch.randint(2, (8,))
    with pytest.raises(RuntimeError, match=rf"activation checkpointing .*{fix}"):
        gf.microbatch_grads(loss, 4, plan=plan)(gf.extract(model)[0], batch).gram()
