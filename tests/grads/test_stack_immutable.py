"""Tensors that a stack returned may be written to: its next answers are the same."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _cases import make_params, make_rows, make_stack
from gradfilter.distributed import RankStack, ShardedStack
from gradfilter.grads._joined_stacks import choose, join

M = 5
PLANS = ("fused", "loop", "vmap")


class Net(nn.Module):
    """A convolution, norms, a bare parameter and one that is used twice: every way to keep rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3)
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = self.norm(self.conv(x)).tanh().mean((2, 3)) * self.scale
        return self.head(self.mix(self.mix(h).tanh()))


def of_a_model(plan, rows=M, **options):
    torch.manual_seed(1)
    model, x, y = Net().double(), torch.randn(2 * M, 1, 6, 6).double(), torch.arange(2 * M) % 4
    size = 2 * rows
    grads_of = gf.microbatch_grads(
        gf.model_loss(model, F.cross_entropy), rows, plan=plan, **options
    )
    return grads_of(gf.extract(model)[0], (x[:size], y[:size]))


def dense():
    params = make_params(torch.float64)
    return make_stack(params, make_rows(params))


FACTORS = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def in_world(make):
    def run():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return make()

    return run


def sharded():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    rows = make_rows(make_params(torch.float64))
    leaves = {n: distribute_tensor(g, mesh, [Shard(1)]) for n, g in rows.items() if g.ndim > 1}
    return ShardedStack(leaves, losses=torch.arange(5.0))


KINDS = {
    **{plan: lambda plan=plan: of_a_model(plan) for plan in PLANS},
    "fused, nothing kept": lambda: of_a_model("fused", memory_budget=0),
    "fused, one row": lambda: of_a_model("fused", rows=1),
    "fused, released": lambda: released(of_a_model("fused")),
    "dense": dense,
    "dense, scaled": lambda: dense().scaled(FACTORS),
    "dense, first": lambda: dense().first(3),
    "dense, columns": lambda: dense().columns(["body.weight"]),
    "fused, scaled": lambda: of_a_model("fused").scaled(FACTORS),
    "fused, first": lambda: of_a_model("fused").first(3),
    "joined": lambda: join(dense().columns(["head.bias"]), dense().columns(["body.conv"])),
    "selected": lambda: choose(torch.tensor(True), dense().scaled(FACTORS), dense()),
    "ranks": in_world(lambda: RankStack(dense())),
    "ranks, one row": in_world(lambda: RankStack(of_a_model("fused", rows=1))),
    "sharded": in_world(sharded),
}


@pytest.fixture(autouse=True)
def no_process_group_is_left_open():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def released(stack):
    stack.release()
    return stack


def probe(stack):
    torch.manual_seed(2)
    tree = {name: torch.randn(shape).double() for name, shape in stack.shapes.items()}
    if isinstance(stack, ShardedStack):
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = next(iter(stack.rows.values())).device_mesh
        tree = {name: distribute_tensor(leaf, mesh, [Shard(0)]) for name, leaf in tree.items()}
    return tree


QUESTIONS = {
    "gram": lambda stack: stack.gram(),
    "sq_norms": lambda stack: stack.sq_norms(),
    "dot": lambda stack: stack.dot(probe(stack)),
    "combine": lambda stack: stack.combine(torch.linspace(-1, 2, len(stack)).double()),
    "losses": lambda stack: stack.losses,
    "live": lambda stack: stack.live,
}


def leaves(answer):
    return list(answer.values()) if isinstance(answer, dict) else [answer]


def plain(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copied(answer):
    return [plain(leaf).clone() for leaf in leaves(answer)]


def spoil(answer):
    for leaf in leaves(answer):
        leaf.fill_(7) if leaf.dtype != torch.bool else leaf.logical_not_()


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_may_be_written_to(kind, question):
    stack = KINDS[kind]()
    order = [question, *(other for other in QUESTIONS if other != question)]
    before = {}
    for name in order * 2:
        answer = QUESTIONS[name](stack)
        now = copied(answer)
        for a, b in zip(before.setdefault(name, now), now, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        spoil(answer)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("fused")])
def test_rows_of_the_fused_plan_may_be_written_to(kind):
    stack = KINDS[kind]()
    rows, gram = copied(stack.stacked()), stack.gram()
    before = {name: copied(ask(stack)) for name, ask in QUESTIONS.items()}
    spoil(stack.stacked())
    torch.testing.assert_close(copied(stack.stacked()), rows, rtol=1e-10, atol=1e-12)
    spoil(stack.stacked())
    for name, ask in QUESTIONS.items():
        torch.testing.assert_close(copied(ask(stack)), before[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stack.gram(), gram)


@pytest.mark.parametrize("kind", ["loop", "vmap", "dense", "joined", "dense, first", "sharded"])
@pytest.mark.parametrize("question", ["gram", "sq_norms", "dot", "combine", "stacked", "scaled"])
def test_rows_that_are_held_and_were_written_to_are_refused(kind, question):
    stack = KINDS[kind]()
    spoil(stack.stacked())
    asked = {
        **QUESTIONS,
        "stacked": lambda stack: stack.stacked(),
        "scaled": lambda stack: stack.scaled(torch.ones(len(stack))),
    }
    with pytest.raises(RuntimeError, match=r"written in place since\. Write to a copy"):
        asked[question](stack)


@pytest.mark.parametrize("kind", ["dense", "dense, scaled", "ranks"])
def test_scaled_rows_of_a_stack_may_be_written_to(kind):
    stack = KINDS[kind]().scaled(torch.full((M,), 2.0))
    rows = copied(stack.stacked())
    spoil(stack.stacked())
    torch.testing.assert_close(copied(stack.stacked()), rows, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["dense", "fused", "joined", "ranks"])
def test_factors_and_choices_may_be_written_to(kind):
    factors = FACTORS.clone()
    stack = KINDS[kind]().scaled(factors)
    norms, live = stack.sq_norms(), stack.live
    factors.fill_(7)
    if kind != "joined":
        stack.scale.fill_(7)
    torch.testing.assert_close(stack.sq_norms(), norms, rtol=0, atol=0)
    assert torch.equal(stack.live, live)
    when = torch.tensor(True)
    chosen = choose(when, dense().scaled(FACTORS), dense())
    when.fill_(False)
    assert not chosen.live.all()


def test_rows_made_in_inference_mode_are_taken():
    with torch.inference_mode():
        rows = {"w": torch.ones(2, 3)}
    assert gf.DenseStack(rows).gram().tolist() == [[3, 3], [3, 3]]
