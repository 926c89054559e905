"""`capture`: the step as a CUDA graph, tested without a GPU by stand-ins for its parts."""

import pytest
import torch
import torch.nn.functional as F

import gradfilter as gf
from _models import ConvBN, Dropped, images, vectors
from gradfilter import _tree
from gradfilter.grads._call_context import Rewinds, random_state, random_state_restored
from gradfilter.transforms._capture import (
    Captured,
    capture,
    copied_where_shared,
    copy_inputs,
    static_inputs,
)

cpu = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Mlp(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


class Pointed:
    """A generator that can be pointed at states as CUDA's can, on the CPU's default one.

    Pointing at a state while another is current swaps their contents in and out.
    """

    def __init__(self, box=None):
        self.box = box

    def clone_state(self):
        return Pointed([torch.default_generator.get_state()])

    def graphsafe_get_state(self):
        return Pointed(self.current())

    def graphsafe_set_state(self, other):
        self.current()[0] = torch.default_generator.get_state()
        self.box = other.box
        torch.default_generator.set_state(self.box[0])

    def current(self):
        if self.box is None:
            self.box = [torch.default_generator.get_state()]
        return self.box

    def set_state(self, state):
        self.box[0] = state.clone()

    def get_state(self):
        return self.box[0]


class Again:
    """A graph whose replay calls a function."""

    def __init__(self, replay):
        self.replay = replay


def links(*more):
    return gf.chain(gf.agree_filter(1.1), *more, gf.agc_clip(0.1), gf.sgd(0.1, momentum=0.9))


def step_of(model, update=None, **kwargs):
    kwargs = {"microbatches": 4, **kwargs}
    return gf.train_step(gf.model_loss(model, F.cross_entropy), update or links(), **kwargs)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(_tree.leaves(a), _tree.leaves(b), strict=True))


def test_a_chain_with_branches_is_refused():
    step = gf.train_step(
        lambda p, x: (p["w"] * x).mean(),
        gf.chain(gf.mean_rows(), gf.every(2, gf.agc_clip(0.1)), gf.sgd(0.1)),
        microbatches=2,
    )
    with pytest.raises(ValueError, match=r"a chain without every\(\), late\(\) and look_sam"):
        gf.capture(step, step.init({"w": torch.ones(2)}), torch.ones(2, 2))


def test_a_state_on_the_cpu_is_refused():
    model = Mlp()
    step = step_of(model)
    with pytest.raises(ValueError, match=r"on a CUDA device, found cpu.*call step\(state, batch\)"):
        capture(step, step.init(model), vectors())


def test_another_step_is_refused():
    with pytest.raises(TypeError, match="made by train_step, found function"):
        capture(lambda state, batch: state, {}, vectors())


def test_inputs_are_copied_into_the_tensors_of_the_capture():
    first, second = ({"x": torch.randn(4, 2), "scale": 2.0, "none": None} for _ in range(2))
    static = static_inputs({"batch": first, "keep": torch.tensor(True)}, cpu)
    tensor = static["batch"]["x"]
    assert torch.equal(tensor, first["x"]) and tensor is not first["x"]
    copy_inputs(static, {"batch": second, "keep": torch.tensor(False)})
    assert static["batch"]["x"] is tensor and torch.equal(tensor, second["x"])
    assert not static["keep"]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(3, 2), "scale": 2.0},
        {"x": torch.ones(4, 2, dtype=torch.float64), "scale": 2.0},
        {"x": torch.ones(4, 2), "scale": 3.0},
        {"x": torch.ones(4, 2), "scale": torch.ones(4)},
        {"x": torch.ones(4, 2)},
        {"x": torch.ones(4, 2), "scale": 2.0, "more": torch.ones(4)},
        torch.ones(4, 2),
    ],
    ids=["shape", "dtype", "value", "type", "missing", "more", "structure"],
)
def test_a_batch_unlike_the_captured_one_is_refused_and_nothing_copied(other):
    static = static_inputs({"batch": {"x": torch.zeros(4, 2), "scale": 2.0}}, cpu)
    with pytest.raises(ValueError, match=r"as captured.*[Cc]apture the step once more"):
        copy_inputs(static, {"batch": other})
    assert not static["batch"]["x"].any()


def test_a_batch_elsewhere_is_refused_at_the_capture():
    with pytest.raises(ValueError, match=r"'batch\.1' on meta, found it on cpu"):
        static_inputs(
            {"batch": (torch.ones(2, device="meta"), torch.ones(2))}, torch.device("meta")
        )


def test_a_state_that_refers_to_the_old_one_is_written_whole():
    old = {"a": torch.tensor([1.0]), "before": torch.tensor([0.0])}
    a, before = old["a"], old["before"]
    for value in (2.0, 3.0):
        new = {"a": torch.tensor([value]), "before": old["a"].view(1)}
        _tree.donate_into(old, copied_where_shared(new, old))
    assert old["a"] is a and old["before"] is before
    assert (a.item(), before.item()) == (3.0, 2.0)


def test_what_lies_elsewhere_is_not_copied():
    new = torch.ones(3)
    assert copied_where_shared({"x": new}, {"y": torch.ones(3)})["x"] is new


def captured_by_hand(step, state, batch):
    """Build what `capture` builds, with a graph that runs the step again on each replay."""
    generator = Pointed()
    rewinds = Rewinds(generator, state["random"]["cpu"])
    inputs = static_inputs({"batch": batch}, cpu)
    tensors = _tree.tree_map(torch.clone, {k: v for k, v in state.items() if k != "random"})
    info, end = {}, Pointed([None])

    def replay():
        with rewinds.drawing():
            new, out = step({**tensors, "random": {}}, inputs["batch"])
            last = new.pop("random")["cuda"]
            _tree.donate_into(tensors, copied_where_shared(new, tensors))
        info.update(out)
        end.box[0] = last.box[0]

    random = {"cpu": state["random"]["cpu"], "cuda": state["random"]["cpu"]}
    return Captured(Again(replay), inputs, tensors, info, random, rewinds, end)


@pytest.mark.parametrize(
    ("model", "data"),
    [(Mlp, vectors), (ConvBN, images), (Dropped, vectors)],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("sam", [False, True])
def test_replays_advance_as_the_step_does(model, data, sam):
    model = model()
    step = step_of(model, links(gf.sam_perturb(0.05)) if sam else links())
    state = step.init(model, seed=3)
    first = _tree.tree_map(torch.clone, state)
    captured = captured_by_hand(step, state, data())
    found = captured.state
    outside = torch.get_rng_state()
    for _ in range(4):
        batch = data()
        outside = torch.get_rng_state()
        state, info = step(state, batch)
        found, found_info = captured(batch)
        assert torch.equal(torch.get_rng_state(), outside)
        assert equal(*({k: v for k, v in s.items() if k != "random"} for s in (state, found)))
        assert torch.equal(found["random"]["cuda"], state["random"]["cpu"])
        assert equal(info, found_info)
    assert all(
        a is b
        for a, b in zip(
            *map(_tree.leaves, (found["params"], captured.tensors["params"])), strict=True
        )
    )
    assert not equal(first["params"], found["params"])


def test_each_return_takes_a_state_of_its_own_and_runs_share_them():
    start = torch.get_rng_state()
    rewinds = Rewinds(Pointed(), start)
    for _ in range(3):
        rewinds.align(start)
        with rewinds.drawing():
            first = torch.rand(3)
            for _ in range(2):
                with random_state_restored(cpu):
                    rewinds.to_start()
                    assert torch.equal(torch.rand(3), first)
            second = torch.rand(3)
        assert not torch.equal(first, second)
    assert len(rewinds.states) == 3
    assert torch.equal(torch.get_rng_state(), start)
    assert set(random_state(cpu)) == {"cpu"}


def test_a_second_gradient_function_in_a_captured_step_is_refused():
    model, batch = Mlp(), vectors()
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 4)
    params, _ = gf.extract(model)
    with Rewinds(Pointed(), torch.get_rng_state()).drawing():
        grads_of(params, batch)
        with pytest.raises(RuntimeError, match="one gradient function in a captured step"):
            grads_of(params, batch)


def on_cuda(model, data, count=6):
    torch.manual_seed(0)
    return model().cuda(), [tuple(t.cuda() for t in data()) for _ in range(count)]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("sam", [False, True], ids=["plain", "sam"])
@pytest.mark.parametrize(
    ("model", "data"),
    [(Mlp, vectors), (ConvBN, images), (Dropped, vectors)],
    ids=lambda f: f.__name__,
)
def test_a_captured_step_is_the_step(model, data, sam):
    model, batches = on_cuda(model, data)
    step = step_of(model, links(gf.sam_perturb(0.05)) if sam else links())
    state = step.init(model, seed=3)
    before = _tree.tree_map(torch.clone, state)
    generators = torch.get_rng_state(), torch.cuda.get_rng_state()
    captured = capture(step, state, batches[-1])
    assert equal(captured.state, before)  # warming up takes no step
    for batch in batches[:5]:
        found, info = captured(batch)
        state, expected = step(state, batch)
        torch.testing.assert_close(found, state)
        torch.testing.assert_close(info, expected)
    assert equal(generators, (torch.get_rng_state(), torch.cuda.get_rng_state()))


@pytest.mark.gpu
@needs_cuda
def test_dropout_differs_from_step_to_step():
    model, (batch, *_) = on_cuda(Dropped, vectors)
    step = step_of(model, gf.chain(gf.mean_rows(), gf.sgd(0.0)))
    captured = capture(step, step.init(model), batch)
    losses = [captured(batch)[1]["loss"].item() for _ in range(4)]
    assert len(set(losses)) == 4


@pytest.mark.gpu
@needs_cuda
def test_the_second_gradient_of_sam_has_the_masks_of_the_first():
    model, (batch, *_) = on_cuda(Dropped, vectors)
    plain = step_of(model, gf.chain(gf.mean_rows(), gf.sgd(0.1)))
    sam = step_of(model, gf.chain(gf.mean_rows(), gf.sam_perturb(0.0), gf.sgd(0.1)))
    state = plain.init(model)
    a, b = (capture(step, state, batch) for step in (plain, sam))
    for _ in range(3):
        torch.testing.assert_close(b(batch)[0]["params"], a(batch)[0]["params"])


@pytest.mark.gpu
@needs_cuda
def test_keep_is_static_and_a_waiting_loss_is_refused():
    model, (batch, other, *_) = on_cuda(Mlp, vectors)
    step = step_of(model)
    captured = capture(step, step.init(model), batch, keep=torch.tensor(True, device="cuda"))
    before = _tree.tree_map(torch.clone, captured.state["params"])
    captured(other, keep=torch.tensor(False, device="cuda"))
    assert equal(before, captured.state["params"])
    captured(other, keep=torch.tensor(True, device="cuda"))
    assert not equal(before, captured.state["params"])

    def waiting(params, batch):
        loss = F.cross_entropy(batch[0] @ params["w"], batch[1])
        return loss * float(params["w"].sum().item() != 0.5)

    step = gf.train_step(waiting, links(), microbatches=4, plan="loop")
    state = step.init({"w": torch.randn(6, 3, device="cuda")})
    with pytest.raises(RuntimeError, match="cannot be captured"):
        capture(step, state, batch)
