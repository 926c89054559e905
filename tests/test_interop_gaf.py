"""step_gaf and train_gaf: the published package's results, and right where it is not."""

import copy
import math
import sys
import types

import pytest
import torch
from gradient_agreement_filtering import step_GAF as published
from torch import nn
from torch.utils.data import Subset, TensorDataset

import gradfilter as gf
from gradfilter.interop._gaf import step_GAF, step_gaf
from gradfilter.interop._gaf_training import train_GAF, train_gaf

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
    ours, theirs = net(), net()
    got = step_gaf(ours, sgd(ours), CRITERION, uneven, cos_distance_thresh=1.5)
    published(
        theirs, sgd(theirs), CRITERION, uneven, wandb=False, verbose=False, cos_distance_thresh=1.5
    )
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
    with pytest.raises(ModuleNotFoundError, match="Install wandb"):
        step_gaf(model, sgd(model), CRITERION, parts(2, 5), wandb=True)


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
    args = {"epochs": 1, "batch_size": 4, "num_batches_to_force_agreement": 3}
    model = net()
    train_gaf(model, args, train, data(6), sgd(model), criterion)
    assert len(seen) == len(set(seen)) == 24


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ({"epochs": 1, "batch_size": 9, "num_batches_to_force_agreement": 2}, ValueError, "18"),
        ({"epochs": 1, "batch_size": 4}, AttributeError, "num_batches_to_force_agreement"),
    ],
)
def test_arguments_that_cannot_be_trained_with(args, error, message):
    model = net()
    with pytest.raises(error, match=message):
        train_gaf(model, args, data(16), data(4), sgd(model), CRITERION)


def test_the_published_spellings():
    assert step_GAF is step_gaf and train_GAF is train_gaf
