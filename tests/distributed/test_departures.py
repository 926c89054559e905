"""Rows and sums that leave during the backward pass are those that leave after it."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gradfilter as gf
from gradfilter.distributed import RankStack, _ranks

M, B = 3, 2


def picky(grad):
    """Refuse the samples of more than one row, as operations without a rule for rows do."""
    if len(grad) > B:
        raise RuntimeError("picky")


class Net(torch.nn.Module):
    """Layers that complete in another order on the second rank, and one without a gradient."""

    def __init__(self, picky=False):
        super().__init__()
        self.unused = torch.nn.Linear(3, 3)  # the last one to leave
        self.first = torch.nn.Linear(4, 6)
        self.left = torch.nn.Linear(6, 5)
        self.right = torch.nn.Linear(6, 5)
        self.picky = picky

    def forward(self, x):
        h = self.first(x).tanh()
        if self.picky and dist.get_rank() == 1:
            h.register_hook(picky)
        parts = [lambda: self.left(h), lambda: self.right(h).sin()]
        if dist.get_rank() == 1:
            parts.reverse()
        return sum(part() for part in parts)


def stacks(how, rows):
    """The rows of all ranks, and those of one process by ordinary backward passes."""
    torch.manual_seed(3)
    model = Net(picky=how == "refused")
    size, rank = dist.get_world_size(), dist.get_rank()
    x, y = torch.randn(rows * size, B, 4), torch.randint(5, (rows * size, B))
    found = []
    for part, labels in zip(x, y, strict=True):
        model.zero_grad()
        loss = F.cross_entropy(model(part), labels)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        found.append({n: zeros[n] if g is None else g.clone() for n, g in grads.items()})
    expected = gf.DenseStack({n: torch.stack([row[n] for row in found]) for n in found[0]})
    params = gf.extract(model)[0]
    own = tuple(t[rank * rows : (rank + 1) * rows].flatten(0, 1) for t in (x, y))

    def make():
        rows_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), rows)
        stack = RankStack(rows_of(params, own))
        assert not stack._gathered.leaves_early  # of no use on a CPU
        stack._gathered.leaves_early = True
        return stack

    return make, expected


def questions(how, rows, bucket):
    before, _ranks.BUCKET = _ranks.BUCKET, bucket
    try:
        make, expected = stacks(how, rows)
        weights = torch.linspace(-1, 2, len(expected))
        answers = {
            "combine": lambda s: s.combine(weights),
            "some": lambda s: s.columns(["right.weight", "unused.bias"]).combine(weights),
            "scaled": lambda s: s.scaled(weights).first(len(expected) - 1).combine(weights[1:]),
            "gram": lambda s: s.gram(),
            "both": lambda s: (s.gram(), s.combine(weights)),
            "median": lambda s: s.reduce_columns(lambda t: t.median(0).values),
        }
        for ask in answers.values():
            mine, wanted = ask(make()), ask(expected)
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)
            if isinstance(mine, dict):
                assert [*mine] == [*wanted]
    finally:
        _ranks.BUCKET = before
    return True


@pytest.mark.parametrize("bucket", [1, 2**22])
@pytest.mark.parametrize(("how", "rows"), [("order", M), ("order", 1), ("refused", M)])
def test_what_leaves_early_is_what_leaves_late(two, how, rows, bucket):
    assert two.run(questions, how, rows, bucket) == [True] * 2


class Calls(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def order_of(question, collective):
    before, _ranks.BUCKET = _ranks.BUCKET, 1
    try:
        make, expected = stacks("order", M)
        stack = make()
        with Calls() as calls:
            question(stack, torch.ones(len(expected)))
    finally:
        _ranks.BUCKET = before
    at = calls.names.index(collective)
    return "tanh_backward" in calls.names[at:], calls.names.count(collective)


def ask_combine(stack, weights):
    stack.combine(weights)


def ask_gram(stack, weights):
    stack.gram()


@pytest.mark.parametrize(
    ("question", "collective"), [(ask_combine, "allreduce_"), (ask_gram, "alltoall_base_")]
)
def test_the_last_layers_leave_before_the_first_layer_is_computed(two, question, collective):
    assert two.run(order_of, question, collective) == [(True, 8)] * 2  # one call for each leaf
