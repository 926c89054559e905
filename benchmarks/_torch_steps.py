"""Training steps in plain torch, for comparison. The lr is 0, so parameters do not change."""

import copy

import torch

from benchmarks._models import criterion
from benchmarks._setting import Setting
from benchmarks._timing import Contender


def plain_step(setting: Setting) -> Contender:
    """Return a step with forward, backward, and SGD with momentum."""
    model = copy.deepcopy(setting.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    inputs, targets = setting.batch

    def step() -> None:
        criterion(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sam_step(setting: Setting, rho: float) -> Contender:
    """Return a step of SAM: perturb along the gradient, second gradient, restore, SGD."""
    model = copy.deepcopy(setting.model)
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.9)
    inputs, targets = setting.batch

    def step() -> None:
        criterion(model(inputs), targets).backward()
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            moves = [p.grad * (rho / (norm + 1e-12)) for p in params]
            torch._foreach_add_(params, moves)
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        with torch.no_grad():
            torch._foreach_sub_(params, moves)
        optimizer.step()
        optimizer.zero_grad()

    return step
