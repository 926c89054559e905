"""`train_step`, `select` and state dictionaries."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import ConvBN, Dropped, images, vectors
from gradfilter import _tree


def new_step(model, **kwargs):
    update = gf.chain(gf.agree_filter(1.1), gf.agc_clip(0.1), gf.sgd(0.1, momentum=0.9))
    kwargs = {"microbatches": 4, **kwargs}
    return gf.train_step(gf.model_loss(model, F.cross_entropy), update, **kwargs)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(_tree.leaves(a), _tree.leaves(b), strict=True))


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
def test_one_object_is_the_loop_written_out(plan):
    model = ConvBN()
    step = new_step(model, plan=plan)
    state = step.init(model)
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 4, plan=plan)
    memory = step.update.init(params)
    for _ in range(3):
        batch = images()
        state, info = step(state, batch)
        rows = grads_of(params, batch, buffers=buffers)
        params, memory, expected = step.update(params, memory, rows)
        buffers = rows.buffers
        assert equal(state["params"], params) and equal(state["buffers"], buffers)
        assert torch.equal(info["loss"], rows.losses.mean())
        assert {k: v for k, v in info.items() if k != "loss"}.keys() == expected.keys()


def test_the_same_state_gives_the_same_step_whatever_the_generators_do():
    model, batch = Dropped(), vectors()
    step = new_step(model)
    state = step.init(model)
    before = torch.get_rng_state()
    first, _ = step(state, batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, _ = step(state, batch)
    assert equal(first, again)
    second, _ = step(first, batch)
    assert not torch.equal(first["random"]["cpu"], second["random"]["cpu"])


def test_a_seed_fixes_the_random_state():
    model = Dropped()
    step = new_step(model)
    before = torch.get_rng_state()
    a, b, c = step.init(model, seed=1), step.init(model, seed=1), step.init(model, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a["random"]["cpu"], b["random"]["cpu"])
    assert not torch.equal(a["random"]["cpu"], c["random"]["cpu"])


def noisy(scale=0.1):
    def update(grads, state, params, /, **extra):
        return {n: g + scale * torch.randn_like(g) for n, g in grads.items()}, state, {}

    return gf.transform("noisy", "tree -> tree", update)


def sharp_noise():
    return gf.chain(gf.mean_rows(), noisy(), gf.sam_perturb(0.05), gf.sgd(0.1))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("donate", [False, True])
def test_a_transform_draws_other_numbers_in_every_step(dropout, donate):
    """As in a plain loop, the numbers of a step follow those of the step before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 2)).double()
    plain = copy.deepcopy(model)
    loss = gf.model_loss(model, F.cross_entropy)
    update = gf.chain(gf.mean_rows(), noisy(), gf.sgd(0.1))
    step = gf.train_step(loss, update, microbatches=2, plan="loop")
    state = step.init(model, seed=5)
    batches = [(torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])) for _ in range(3)]
    for batch in batches:
        state, _ = step(state, batch, donate=donate)
    torch.manual_seed(5)
    for x, y in batches:
        plain.zero_grad()
        for rows in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(plain(rows[0]), rows[1]) / 2).backward()
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.1 * (p.grad + 0.1 * torch.randn_like(p))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(state["params"][name], p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
def test_noise_of_a_transform_resumes_and_leaves_the_second_pass_alone(plan):
    model, batch = Dropped(), vectors()
    loss = gf.model_loss(model, F.cross_entropy)
    step = gf.train_step(loss, sharp_noise(), microbatches=4, plan=plan)
    state = step.init(model, seed=3)
    first, _ = step(state, batch)
    torch.manual_seed(99)
    assert equal(first, step(state, batch)[0])
    second, _ = step(first, batch)
    torch.rand(3)
    resumed, _ = step(gf.load_state_dict(step.init(model), gf.state_dict(first)), batch)
    assert equal(second, resumed)


def test_a_skipped_step_gates_parameters_but_not_buffers():
    model = ConvBN()
    step = new_step(model)
    state = step.init(model)
    after, info = step(state, images(), keep=False)
    assert not info["keep"]
    assert equal(after["params"], state["params"])
    assert equal(after["transforms"], state["transforms"])
    assert after["buffers"]["bn.num_batches_tracked"] == 8
    gated = gf.select(info["keep"], after["buffers"], state["buffers"])
    assert equal(gated, state["buffers"])


def test_a_run_continues_from_a_file_bit_for_bit(tmp_path):
    model = Dropped()
    step = new_step(model)
    batches = [vectors() for _ in range(6)]
    state = step.init(model, seed=0)
    for k, batch in enumerate(batches):
        if k == 3:
            torch.save(gf.state_dict(state), tmp_path / "run.pt")
        state, _ = step(state, batch)
    flat = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = gf.load_state_dict(step.init(copy.deepcopy(model), seed=5), flat)
    for batch in batches[3:]:
        resumed, _ = step(resumed, batch)
    assert equal(resumed, state)


def test_per_sample_and_plain_losses():
    loss = lambda params, batch: ((params["w"] * batch).sum(1) ** 2).mean()
    step = gf.train_step(loss, gf.chain(gf.consensus_filter(), gf.sgd(0.1)))
    state, info = step(step.init({"w": torch.ones(3)}), torch.randn(10, 3))
    assert info["consensus_filter/accepted"].shape == (10,)
    assert state["buffers"] == {}


def test_training_lowers_the_loss():
    torch.manual_seed(1)
    model, x = Dropped(0.0), torch.randn(64, 6)
    batch = x, x[:, :3].argmax(1)
    step = new_step(model)
    state = step.init(model)
    losses = []
    for _ in range(60):
        state, info = step(state, batch)
        losses.append(info["loss"])
    assert losses[-1] < 0.5 * losses[0]
    gf.insert(model, state["params"], state["buffers"])
    torch.testing.assert_close(
        F.cross_entropy(model(batch[0]), batch[1]), losses[-1], rtol=0.2, atol=0
    )


def test_donation_keeps_the_storage_of_parameters():
    model, batch = Dropped(), vectors()
    step = new_step(model)
    state = step.init(model)
    expected, _ = step(state, batch)
    expected = _tree.tree_map(torch.clone, expected)
    donated, _ = step(state, batch, donate=True)
    assert equal(donated, expected)
    assert all(donated["params"][n] is state["params"][n] for n in state["params"])


def test_only_complete_chains_from_rows():
    loss = lambda params, batch: params["w"].sum()
    for update in (gf.sgd(0.1), gf.chain(gf.agree_filter())):
        with pytest.raises(TypeError, match="train_step: expected a chain from rows to an update"):
            gf.train_step(loss, update)


NO_STATES = {
    "the model": (lambda state, model, step: model, TypeError, "found Dropped"),
    "the batch": (lambda state, model, step: vectors(), TypeError, "found tuple"),
    "not unpacked": (lambda state, model, step: step(state, vectors()), TypeError, "found tuple"),
    "none": (lambda state, model, step: None, TypeError, "found NoneType"),
    "the chain's": (
        lambda state, model, step: state["transforms"],
        ValueError,
        r"missing \['params', 'buffers', 'transforms', 'random'\], extra \['agree_filter', ",
    ),
    "with more in it": (
        lambda state, model, step: {**state, "epoch": torch.tensor(3)},
        ValueError,
        r"missing \[\], extra \['epoch'\]",
    ),
}


@pytest.mark.parametrize("wrong, error, found", NO_STATES.values(), ids=NO_STATES)
def test_a_state_that_is_none(wrong, error, found):
    model = Dropped()
    step = new_step(model)
    state = step.init(model)
    begin = r"Begin with state = step.init\(model\), then write state, info = step\("
    with pytest.raises(error, match=f"^train_step: expected the state .*{found}.*{begin}"):
        step(wrong(state, model, step), vectors())


def test_init_of_something_else_than_a_model():
    model = Dropped()
    step = new_step(model)
    for wrong, found in ((model.parameters(), "generator"), (gf.extract(model), "tuple")):
        with pytest.raises(TypeError, match=f"^train_step: expected a module.*found {found}"):
            step.init(wrong)


def test_a_file_that_was_not_read():
    template = gf.sgd(0.1).init({"w": torch.ones(1)})
    with pytest.raises(TypeError, match=r"found str. Read it first: torch.load\(path, weights"):
        gf.load_state_dict(template, "run.pt")


def test_select_keeps_every_bit():
    old = {"a": torch.tensor([-0.0, torch.nan, 1.0]), "n": torch.tensor(3)}
    new = {"a": torch.tensor([0.0, 2.0, torch.nan]), "n": torch.tensor(4)}
    kept = gf.select(torch.tensor(False), new, old)
    assert torch.equal(kept["a"].view(torch.int32), old["a"].view(torch.int32))
    taken = gf.select(torch.tensor(True), new, old)
    assert torch.equal(taken["a"].view(torch.int32), new["a"].view(torch.int32))
    assert kept["n"] == 3 and gf.select(True, new, old)["n"] == 4


def test_state_dict_has_dotted_names_and_load_checks_them():
    params = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
    update = gf.chain(gf.agc_clip(), gf.sgd(0.1, momentum=0.9), gf.ema_params())
    state = update.init(params)
    flat = gf.state_dict(state)
    assert set(flat) == {
        "sgd.momentum.fc.weight",
        "sgd.momentum.fc.bias",
        "sgd.count",
        "ema_params.ema_average.fc.weight",
        "ema_params.ema_average.fc.bias",
    }
    loaded = gf.load_state_dict(state, flat)
    assert loaded["sgd"]["momentum"]["fc.bias"] is not flat["sgd.momentum.fc.bias"]
    fewer = {k: v for k, v in flat.items() if k != "sgd.count"}
    with pytest.raises(ValueError, match=r"missing \['sgd.count'\], extra \['stray'\]"):
        gf.load_state_dict(state, {**fewer, "stray": torch.ones(1)})
    with pytest.raises(
        ValueError, match=r"'sgd.count' of shape \(\) and torch.int64, found \(1,\)"
    ):
        gf.load_state_dict(state, {**flat, "sgd.count": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'sgd\.count' to be a tensor, found int"):
        gf.load_state_dict(state, {**flat, "sgd.count": 3})


def test_a_checkpoint_of_another_kind_of_device_says_what_to_do_about_random_numbers():
    state = {"w": torch.ones(2), "random": {"cpu": torch.ones(3), "cuda": torch.ones(1)}}
    flat = gf.state_dict(state)
    of_a_cpu = {name: value for name, value in flat.items() if name != "random.cuda"}
    with pytest.raises(ValueError, match=r"missing \['random.cuda'\].*take those entries"):
        gf.load_state_dict(state, of_a_cpu)
    with pytest.raises(ValueError, match=r"share the dotted name 'a.b'"):
        gf.state_dict({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})


@pytest.mark.parametrize("plan", ["auto", "fused", "loop", "vmap"])
def test_aux_of_the_criterion_is_in_the_info(plan):
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 2

    def criterion(output, y):
        right = output.argmax(1) == y
        return F.cross_entropy(output, y), {"accuracy": right.double().mean(), "right": right}

    loss = gf.model_loss(model, criterion, has_aux=True)
    step = gf.train_step(loss, gf.chain(gf.mean_rows(), gf.sgd(0.1)), microbatches=4, plan=plan)
    state = step.init(model)
    new, info = step(state, (x, y))
    right = (model(x).argmax(1) == y).view(4, 2)
    assert info["aux"]["right"].tolist() == right.tolist()
    assert info["aux"]["accuracy"].tolist() == right.double().mean(1).tolist()
    without = gf.train_step(
        gf.model_loss(model, F.cross_entropy), step.update, microbatches=4, plan=plan
    )
    other, plain = without(state, (x, y))
    assert "aux" not in plain
    torch.testing.assert_close(new["params"], other["params"])


@pytest.mark.parametrize("plan", ["auto", "fused", "loop", "vmap"])
def test_aux_of_a_plain_loss_is_in_the_info(plan):
    def loss(params, batch):
        values = batch @ params["w"]
        return values.mean(), values.max()

    update = gf.chain(gf.agree_filter(2.0), gf.sgd(0.1))
    step = gf.train_step(loss, update, has_aux=True, microbatches=2, plan=plan)
    _, info = step(step.init({"w": torch.ones(2)}), torch.arange(8.0).view(4, 2))
    assert info["aux"].tolist() == [5.0, 13.0]
    with pytest.raises(ValueError, match=r"has_aux on model_loss\(model, criterion, has_aux=True"):
        gf.train_step(gf.model_loss(nn.Linear(2, 2), F.mse_loss), update, has_aux=True)


def test_a_donated_step_with_an_empty_row_is_a_whole_step():
    """Nothing may be asked of the rows once their parameters are overwritten."""

    def mean_of_finite(rows, state, params, /, **extra):
        return {name: g.nan_to_num(0).mean(0) for name, g in rows.stacked().items()}, state, {}

    results = []
    for donate in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        reducer = gf.transform("own", "rows -> tree", mean_of_finite)
        loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
        step = gf.train_step(loss, gf.chain(reducer, gf.sgd(0.1, momentum=0.9)), microbatches=4)
        batch = torch.randn(8, 3), torch.tensor([-100, -100, 0, 1, 1, 1, 0, 0])
        state, info = step(step.init(model), batch, donate=donate)
        results.append({**state["params"], "loss": info["loss"]})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected)
