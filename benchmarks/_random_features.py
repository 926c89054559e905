"""Ridgeless regression on random ReLU features: double descent with its peak at p = n."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradfilter import diagnostics
from gradfilter.lab.data._load import load_data


@dataclass(frozen=True)
class Point:
    """The results for one number of features.

    Attributes:
        features: The number of features p.
        train_error: The fraction of training labels, right or wrong, that is not predicted.
        test_error: The fraction of test labels that is not predicted.
        test_mse: The mean squared error on one-hot test labels.
        lipschitz: √(mean σ²) over the test images, σ the operator norm of the input Jacobian.
        closed_form: The same from the formula of the Jacobian.
        weight_norm: The Frobenius norm of the fitted weights.
    """

    features: int
    train_error: float
    test_error: float
    test_mse: float
    lipschitz: float
    closed_form: float
    weight_norm: float


def measure(features: int, samples: int, noise: float, seed: int) -> Point:
    """Fit f(x) = Aᵀ relu(W x)/√p without a ridge, with A of the smallest norm, and measure it.

    Args:
        features: The number of features p.
        samples: The number n of training images.
        noise: The fraction of wrong training labels.
        seed: The seed for the split, the wrong labels and the features W.
    """
    data = load_data(
        "digits",
        data_split_seed=seed,
        train_split=samples,
        label_noise=noise,
        label_seed=seed,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    x, x_test = (s.images.fetch(torch.arange(len(s))).flatten(1) for s in (data.train, data.test))
    y = nn.functional.one_hot(data.train.labels, 10).double()
    y_test = nn.functional.one_hot(data.test.clean, 10).double()
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(features, 64, generator=random, dtype=torch.float64) / 8

    def feature_map(images: Tensor) -> Tensor:
        return (images @ w.T).relu() / features**0.5

    a = torch.linalg.pinv(feature_map(x), rtol=1e-12) @ y  # (p, 10)
    predicted, fitted = feature_map(x_test) @ a, feature_map(x) @ a
    norms = diagnostics.operator_norm(lambda images: feature_map(images) @ a, x_test).values
    # J = Aᵀ diag(1[W x > 0]) W / √p
    on = (x_test @ w.T > 0).double()
    jacobians = torch.einsum("pc,np,pd->ncd", a, on, w) / features**0.5
    exact = torch.linalg.matrix_norm(jacobians, 2)
    return Point(
        features=features,
        train_error=(fitted.argmax(1) != data.train.labels).double().mean().item(),
        test_error=(predicted.argmax(1) != data.test.clean).double().mean().item(),
        test_mse=(predicted - y_test).square().sum(1).mean().item(),
        lipschitz=norms.square().mean().sqrt().item(),
        closed_form=exact.square().mean().sqrt().item(),
        weight_norm=a.norm().item(),
    )
