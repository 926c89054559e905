"""Sharpness-aware training by hand: `loss.backward()` on a plain module, in float64."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _naive import generator

MICROBATCHES = 3


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count, size=9):
    """Return batches with much in common, so that an average of gradients says something."""
    draw = generator(11)
    teacher = torch.randn(6, 3, dtype=torch.float64, generator=draw)
    found = []
    for _ in range(count):
        x = torch.randn(size, 6, dtype=torch.float64, generator=draw)
        noise = torch.randn(size, 3, dtype=torch.float64, generator=draw)
        found.append((x, (x @ teacher + noise).argmax(1)))
    return found


class ByHand:
    """A plain module with a torch optimizer, and its gradients as flat vectors."""

    def __init__(self, model, optimizer):
        self.model = copy.deepcopy(model)
        self.optimizer = optimizer(self.model.parameters())

    @property
    def weights(self):
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def gradient(self, batch, move=None):
        """Return the gradient at w + move, and leave the module at w."""
        params, before = list(self.model.parameters()), self.weights
        if move is not None:
            nn.utils.vector_to_parameters(before + move, params)
        self.optimizer.zero_grad()
        x, y = batch
        F.cross_entropy(self.model(x), y).backward()
        nn.utils.vector_to_parameters(before, params)
        return torch.cat([p.grad.flatten() for p in params])

    def step(self, gradient):
        start = 0
        for p in self.model.parameters():
            p.grad = gradient[start : start + p.numel()].view_as(p).clone()
            start += p.numel()
        self.optimizer.step()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def train_step_of(model, sharp, **options):
    """Return the step of the library with the same update rule as `sgd`."""
    update = gf.chain(gf.mean_rows(), sharp, gf.sgd(0.1, momentum=0.9))
    loss = gf.model_loss(model, F.cross_entropy)
    return gf.train_step(loss, update, microbatches=MICROBATCHES, **options)
