"""`step_gaf` and `train_gaf` against the published package, and corrections of its errors."""

import copy
import inspect
import math
import sys
import types

import pytest
import torch
from gradient_agreement_filtering import step_GAF as published
from gradient_agreement_filtering import train_GAF as published_training
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import gradfilter as gf
from gradfilter.interop._gaf import step_GAF, step_gaf, train_GAF, train_gaf

pytestmark = pytest.mark.usefixtures("float64")
CRITERION = nn.CrossEntropyLoss()


def net(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *extra, nn.Tanh(), nn.Linear(8, 3))


def data(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g))


def parts(m, b, seed=1):
    everything = data(m * b, seed)
    return [Subset(everything, range(i * b, (i + 1) * b)) for i in range(m)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


@pytest.mark.parametrize("threshold", [0.8, 1.0, 1.2])
def test_a_run_is_the_published_one(threshold):
    ours, theirs = net(), net()
    our_sgd, their_sgd = sgd(ours), sgd(theirs)
    agreed = set()
    for step in range(25):
        microbatches = parts(4, 5, seed=step)
        got = step_gaf(ours, our_sgd, CRITERION, microbatches, cos_distance_thresh=threshold)
        want = published(
            theirs,
            their_sgd,
            CRITERION,
            microbatches,
            wandb=False,
            verbose=False,
            cos_distance_thresh=threshold,
        )
        want["train_loss"] /= 20  # theirs is a sum over samples
        for key in ("train_loss", "cosine_distance", "agreed_count", "train_accuracy"):
            assert got[key] == pytest.approx(want[key], rel=1e-9), (step, key)
        agreed.add(got["agreed_count"])
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)
    assert len(agreed) > 1


def test_the_papers_average_is_a_mean():
    model, batch = net(), parts(3, 5)
    params, _ = gf.extract(model)
    loss = gf.model_loss(model, CRITERION)
    joined = tuple(torch.cat(t) for t in zip(*(b[:] for b in batch), strict=True))
    mean = gf.microbatch_grads(loss, 3)(params, joined).combine(torch.full((3,), 1 / 3))
    step_gaf(model, sgd(model), CRITERION, batch, cos_distance_thresh=2, average="mean")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, mean[name])


def test_tensors_datasets_and_sizes_that_differ():
    found = []
    for batch in (parts(3, 4), [tuple(part[:]) for part in parts(3, 4)]):
        model = net()
        found.append((step_gaf(model, sgd(model), CRITERION, batch), model.state_dict()))
    torch.testing.assert_close(found[0], found[1])

    everything = data(12)
    uneven = [Subset(everything, range(*ends)) for ends in ((0, 3), (3, 8), (8, 12))]
    ours, theirs = net(nn.BatchNorm1d(8)), net(nn.BatchNorm1d(8))
    got = step_gaf(ours, sgd(ours), CRITERION, uneven, cos_distance_thresh=1.5)
    quiet = {"wandb": False, "verbose": False}
    want = published(theirs, sgd(theirs), CRITERION, uneven, cos_distance_thresh=1.5, **quiet)
    assert got["train_loss"] == pytest.approx(want["train_loss"] / 12)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-9, atol=1e-11)
    assert got["agreed_count"] >= 1


def test_frozen_parameters_and_batch_norm():
    model, reference = net(nn.BatchNorm1d(8)), net(nn.BatchNorm1d(8))
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    batch = parts(3, 5)
    step_gaf(model.eval(), sgd(model), CRITERION, batch, cos_distance_thresh=2)
    assert model.training and model[0].weight.grad is None
    assert all(torch.equal(model[0].state_dict()[k], v) for k, v in frozen.items())
    for part in batch:
        reference(part[:][0])
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


def test_a_skip_leaves_parameters_and_optimizer_alone():
    model = net()
    optimizer = sgd(model)
    step_gaf(model, optimizer, CRITERION, parts(2, 5), cos_distance_thresh=2)
    before, momentum = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    result = step_gaf(model, optimizer, CRITERION, parts(3, 5, seed=9), cos_distance_thresh=0.0)
    assert result["agreed_count"] == 0
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    torch.testing.assert_close(optimizer.state_dict(), momentum, rtol=0, atol=0)


def test_targets_that_are_no_classes_have_no_accuracy():
    model = net()
    batch = [(torch.randn(5, 6), torch.randn(5, 3)) for _ in range(2)]
    result = step_gaf(model, sgd(model), nn.MSELoss(), batch, cos_distance_thresh=2)
    assert math.isnan(result["train_accuracy"]) and result["agreed_count"] == 1


def test_one_microbatch_is_refused_before_anything_happens():
    model = net().eval()
    with pytest.raises(ValueError, match="at least two microbatches, found 1"):
        step_gaf(model, sgd(model), CRITERION, parts(1, 5))
    assert not model.training


def test_results_are_logged_and_printed_where_asked(monkeypatch, capsys):
    model, logged = net(), []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(log=logged.append))
    result = step_gaf(model, sgd(model), CRITERION, parts(2, 5), wandb=True, verbose=True)
    assert logged == [result] and str(result) in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "wandb", None)
    for spelling in ("wandb", "use_wandb"):
        with pytest.raises(ModuleNotFoundError, match="Install wandb"):
            step_gaf(model, sgd(model), CRITERION, parts(2, 5), **{spelling: True})


def test_training_learns_and_reports_every_epoch():
    torch.manual_seed(0)
    x = torch.randn(240, 6)
    both = (
        TensorDataset(x[:160], x[:160, :3].argmax(1)),
        TensorDataset(x[160:], x[160:, :3].argmax(1)),
    )
    model = net()
    args = types.SimpleNamespace(epochs=12, batch_size=8, num_batches_to_force_agreement=2)
    epochs = train_gaf(model, args, *both, sgd(model), CRITERION, cos_distance_thresh=1.0)
    assert [e["epoch"] for e in epochs] == list(range(1, 13))
    assert set(epochs[0]) == {"epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert epochs[-1]["val_accuracy"] > 0.8 > epochs[0]["train_accuracy"]
    model.eval()
    with torch.no_grad():
        right = (model(both[1][:][0]).argmax(1) == both[1][:][1]).double().mean()
    assert epochs[-1]["val_accuracy"] == pytest.approx(right.item())


def test_an_epoch_meets_every_sample_once():
    seen = []

    def criterion(outputs, targets):
        return CRITERION(outputs, targets % 3)

    class Watched(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    x = torch.randn(26, 6)
    train = Watched(x, torch.arange(26))
    args = {"epochs": 2, "batch_size": 4, "num_batches_to_force_agreement": 3}
    model = net()
    for _ in range(2):
        torch.manual_seed(5)
        train_gaf(model, args, train, data(6), sgd(model), criterion)
    first, second = seen[:24], seen[24:48]
    assert len(set(first)) == len(set(second)) == 24
    assert first != second and first != sorted(first)
    assert seen == 2 * (first + second)


ARGS = {"epochs": 2, "batch_size": 4, "num_batches_to_force_agreement": 2}


class Triples(TensorDataset):
    """Samples with an index, which nobody asked for."""

    def __getitem__(self, index):
        return *super().__getitem__(index), index


def test_training_data_in_any_form_give_one_run():
    train, val = data(20), data(6, seed=3)
    forms = [
        (train, val),
        (Subset(train, range(20)), Subset(val, range(6))),
        (train.tensors, list(val.tensors)),
        (list(train), list(val)),
        (Triples(*train.tensors), Triples(*val.tensors)),
    ]
    runs = []
    for form in forms:
        model = net()
        torch.manual_seed(5)
        runs.append((train_gaf(model, ARGS, *form, sgd(model), CRITERION), model.state_dict()))
    assert len(runs[0][0]) == 2
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


def test_training_needs_as_many_samples_as_one_step():
    model = net()
    args = types.SimpleNamespace(epochs="1", batch_size="4", num_batches_to_force_agreement="2")
    assert len(train_gaf(model, args, data(8), data(4), sgd(model), CRITERION)) == 1
    with pytest.raises(ValueError, match="agreement = 8 training samples, found 7"):
        train_gaf(model, args, data(7), data(4), sgd(model), CRITERION)


def test_a_loader_is_refused_before_anything_happens():
    loader, model = DataLoader(data(20), batch_size=4), net().eval()
    for pair in ((loader, data(4)), (data(20), loader)):
        with pytest.raises(TypeError, match=r"found DataLoader\. Give its \.dataset"):
            train_gaf(model, ARGS, *pair, sgd(model), CRITERION)
    assert not model.training


def test_validation_is_in_evaluation_mode_and_training_goes_on():
    model, modes = net(nn.BatchNorm1d(8), nn.Dropout(0.5)), []

    def criterion(outputs, targets):
        modes.append(model.training)
        return CRITERION(outputs, targets)

    train_gaf(model.eval(), ARGS | {"epochs": 1}, data(16), data(8, seed=3), sgd(model), criterion)
    assert model.training and all(m.training for m in model.modules())
    assert modes[-2:] == [False, False] and all(modes[:-2]) and len(modes) > 2
    assert model[1].num_batches_tracked == 4


def test_the_threshold_of_training_is_that_of_its_steps():
    for threshold, moves in ((0.0, False), (2.0, True)):
        model = net()
        before = copy.deepcopy(model.state_dict())
        args = (ARGS, data(16), data(4), sgd(model), CRITERION)
        train_gaf(model, *args, cos_distance_thresh=threshold)
        assert torch.equal(model[0].weight, before["0.weight"]) != moves
    means, halves = net(), net()
    for model, average in ((means, "mean"), (halves, "halving")):
        torch.manual_seed(5)
        args = (ARGS | {"num_batches_to_force_agreement": 4}, data(16), data(4))
        train_gaf(model, *args, sgd(model), CRITERION, cos_distance_thresh=2, average=average)
    assert not torch.allclose(means[0].weight, halves[0].weight)


def test_validation_losses_are_means_over_samples():
    model, val = net(), data(7, seed=3)
    result = train_gaf(model, ARGS | {"epochs": 1}, data(16), val, sgd(model), CRITERION)[0]
    expected = CRITERION(model(val.tensors[0]), val.tensors[1])
    assert result["val_loss"] == pytest.approx(expected.item())


def test_epochs_are_logged_and_printed_where_asked(monkeypatch, capsys):
    model, logged = net(), []
    run = (model, ARGS, data(16), data(4), sgd(model), CRITERION)
    monkeypatch.setitem(sys.modules, "wandb", None)
    train_gaf(*run)
    assert not capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(log=logged.append))
    epochs = train_gaf(*run, use_wandb=True, verbose=True)
    assert [entry for entry in logged if "epoch" in entry] == epochs
    assert len(logged) == 2 + 2 * 2 and str(epochs[1]) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"epochs": 1, "batch_size": 9, "num_batches_to_force_agreement": 2}, ValueError, "18"),
        ({"epochs": 1, "batch_size": 4}, AttributeError, "num_batches_to_force_agreement"),
        (ARGS | {"batch_size": 0}, ValueError, r"args\.batch_size >= 1, found 0"),
        (ARGS | {"num_batches_to_force_agreement": 1}, ValueError, "agreement >= 2, found 1"),
        (ARGS | {"epochs": -1}, ValueError, "epochs >= 0, found -1"),
    ],
)
def test_arguments_that_cannot_be_trained_with(args, error, message):
    model = net()
    with pytest.raises(error, match=message):
        train_gaf(model, args, data(16), data(4), sgd(model), CRITERION)


def test_nothing_to_validate_with_is_refused():
    model = net()
    for nothing in (data(0), data(0).tensors, []):
        with pytest.raises(ValueError, match="expected validation samples, found none"):
            train_gaf(model, ARGS, data(16), nothing, sgd(model), CRITERION)


@pytest.mark.parametrize("fused", [False, True])
def test_channels_last(fused):
    def run(layout, **flags):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
        model = nn.Sequential(*layers).to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, **flags)
        for _ in range(3):
            x = torch.randn(12, 3, 6, 6).to(memory_format=layout)
            batch = list(zip(x.split(4), (torch.arange(12) % 3).split(4), strict=True))
            step_gaf(model, optimizer, CRITERION, batch, cos_distance_thresh=2)
        return model[0].weight

    found = run(torch.channels_last, fused=fused)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.grad.stride() == found.stride()
    torch.testing.assert_close(found, run(torch.contiguous_format), rtol=1e-9, atol=1e-11)


def test_half_precision_counts_every_hit():
    model = net().bfloat16()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([9.0, 0, 0]))
    batch = [(torch.randn(301, 6).bfloat16(), torch.zeros(301, dtype=torch.int64))] * 2
    assert step_gaf(model, sgd(model), CRITERION, batch)["train_accuracy"] == 1


def test_a_dataset_may_be_a_list_of_samples():
    found = []
    for batch in (parts(3, 4), [list(part) for part in parts(3, 4)]):
        model = net()
        found.append((step_gaf(model, sgd(model), CRITERION, batch), model.state_dict()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_row_that_is_not_finite_is_rejected():
    model = net()
    (x, y), *rest = [part[:] for part in parts(3, 5)]
    batch = [(x * torch.nan, y), *rest]
    result = step_gaf(model, sgd(model), CRITERION, batch, cos_distance_thresh=2)
    assert result["agreed_count"] == 1 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_is_run_row_by_row():
    torch._dynamo.reset()
    model, other = net(), net()
    user, calls = torch.compile(model, backend="aot_eager"), []

    def criterion(outputs, targets):
        calls.append(1)
        return CRITERION(outputs, targets)

    for module in (user, other):
        step_gaf(module, sgd(module), criterion, parts(2, 5), cos_distance_thresh=2)
        assert len(calls) == (2 if module is user else 3)  # the other one all rows at once
    torch.testing.assert_close(model.state_dict(), other.state_dict())


def test_what_cannot_step_is_refused_before_anything_happens():
    model = net().eval()
    with pytest.raises(TypeError, match=r"step_gaf: .* found LBFGS, whose step needs a closure"):
        step_gaf(model, torch.optim.LBFGS(model.parameters()), CRITERION, parts(2, 5))
    with pytest.raises(TypeError, match=r"step_gaf: expected a torch\.nn\.Module, found function"):
        step_gaf(lambda x: x, sgd(model), CRITERION, parts(2, 5))
    assert not model.training


def test_the_published_signatures_with_quiet_defaults():
    for ours, theirs in ((step_gaf, published), (train_gaf, published_training)):
        found, known = (inspect.signature(f).parameters for f in (ours, theirs))
        assert set(found) - {"average", "use_wandb"} == set(known)
        positional = [name for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == list(known)[: len(positional)]
        quiet = {n: p.default for n, p in found.items() if p.default is not inspect.Parameter.empty}
        assert quiet == {
            "cos_distance_thresh": 1.0,
            "average": "halving",
            "verbose": False,
            "wandb": False,
            "use_wandb": False,  # the repository's spelling, where the package has wandb
            "device": None,
        }


def test_the_published_spellings():
    assert step_GAF is step_gaf and train_GAF is train_gaf
