"""`agree_filter(average="halving")` against the authors' package, step by step."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import gradfilter as gf
from _naive import assert_close, random_matrix, run, unflat

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("gradient_agreement_filtering", reason="the published package is not installed")
from gradient_agreement_filtering import _filter_gradients_cosine_sim, step_GAF
from sklearn.datasets import load_digits

INF = float("inf")
M, B, STEPS, LR = 4, 6, 30, 0.05


def published_rule(rows, threshold):
    """The package's filter function, chained over the rows: merged leaves, accepted, distances."""
    merged, *others = [
        [leaf[m] for leaf in rows.values()] for m in range(len(next(iter(rows.values()))))
    ]
    accepted, distances = [True], [0.0]
    for row in others:
        new, distance = _filter_gradients_cosine_sim(merged, row, threshold)
        merged = merged if new is None else new
        accepted.append(new is not None)
        distances.append(distance)
    return (
        dict(zip(rows, merged, strict=True)),
        accepted,
        torch.tensor(distances, dtype=torch.float64),
    )


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 0.97, 1.0, 1.3, 1.9, 2.0, INF])
def test_halving_is_the_published_filter_function(threshold):
    for seed in range(40):
        rows = unflat(random_matrix(seed, 2 + seed % 7, ("plain", "plain", "zero", "tiny")))
        merged, accepted, distances = published_rule(rows, threshold)
        grads, out = run(gf.agree_filter(threshold, average="halving"), rows)
        assert out["accepted"].tolist() == accepted
        assert_close(1 - out["cosine"], distances, atol=1e-9)
        assert_close(grads, merged)


def digits_cnn():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    ).double()


def noisy_digits():
    """Digits with a third of the labels wrong, so that microbatches do disagree."""
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(images).reshape(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(labels)
    g = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(labels), generator=g) < 1 / 3
    labels = torch.where(wrong, torch.randint(10, labels.shape, generator=g), labels)
    return images.double(), labels, torch.randperm(len(labels), generator=g)


@cache
def published_training(threshold):
    """Their step, 30 times: the model, and how many microbatches joined the first in each step."""
    images, labels, order = noisy_digits()
    data, model = TensorDataset(images, labels), digits_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    agreed = []
    for batch in order[: STEPS * M * B].reshape(STEPS, M, B):
        result = step_GAF(
            model,
            optimizer,
            nn.CrossEntropyLoss(),
            [Subset(data, microbatch.tolist()) for microbatch in batch],
            wandb=False,
            verbose=False,
            cos_distance_thresh=threshold,
        )
        agreed.append(result["agreed_count"])
    return model, agreed


@pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])
@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_thirty_training_steps_are_those_of_the_published_step(threshold, plan):
    theirs, agreed = published_training(threshold)
    assert set(agreed) == {0, 1, 2, 3}  # steps skipped, merged in part, merged whole

    images, labels, order = noisy_digits()
    model = digits_cnn().train()  # as step_GAF does in every step
    loss = gf.model_loss(model, nn.functional.cross_entropy)
    grads_of = gf.microbatch_grads(loss, M, plan=plan)
    update = gf.chain(gf.agree_filter(threshold, average="halving"), gf.sgd(LR, momentum=0.9))
    params, buffers = gf.extract(model)
    state = update.init(params)
    for joined, batch in zip(agreed, order[: STEPS * M * B].reshape(STEPS, -1), strict=True):
        rows = grads_of(params, (images[batch], labels[batch]), buffers=buffers)
        params, state, info = update(params, state, rows)
        buffers = rows.buffers
        distances = 1 - info["agree_filter/cosine"][1:]
        assert (distances - threshold).abs().min() > 1e-9  # no tie for rounding to decide
        assert info["agree_filter/accepted"].sum() == 1 + joined
        assert info["keep"] == (joined > 0)
    assert_close(params, dict(theirs.named_parameters()), rtol=1e-6, atol=1e-12)
    assert_close(buffers, dict(theirs.named_buffers()), rtol=1e-6, atol=1e-12)
