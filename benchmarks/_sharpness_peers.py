"""SAM and GSAM as optimizers around SGD, of another library and of ours, used as documented.

Each function takes a model, a batch and the learning rate of SGD, and returns a function that makes
one step. All compute the same: SAM with ρ, and GSAM with ρ and α.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks._models import Batch, criterion
from benchmarks._timing import Contender

RHO, ALPHA = 0.05, 0.4
MOMENTUM = 0.9
Build = Callable[[nn.Module, Batch, float], Contender]


def theirs_sam(model: nn.Module, batch: Batch, lr: float) -> Contender:
    from pytorch_optimizer import SAM

    inputs, targets = batch
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=lr, momentum=MOMENTUM)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        return loss

    def step() -> None:
        closure()
        optimizer.step(closure)
        optimizer.zero_grad()

    return step


def theirs_gsam(model: nn.Module, batch: Batch, lr: float) -> Contender:
    from pytorch_optimizer import GSAM

    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    return _with_closure(
        GSAM(model.parameters(), base, model, rho_scheduler=_constant(RHO), alpha=ALPHA), batch
    )


def ours_sam(model: nn.Module, batch: Batch, lr: float) -> Contender:
    from gradfilter.interop import SAM

    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    return _with_closure(SAM(model.parameters(), base, RHO, model=model), batch)


def ours_gsam(model: nn.Module, batch: Batch, lr: float) -> Contender:
    from gradfilter.interop import GSAM

    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    return _with_closure(
        GSAM(model.parameters(), base, model, gsam_alpha=ALPHA, rho_scheduler=_constant(RHO)), batch
    )


def _with_closure(optimizer: torch.optim.Optimizer, batch: Batch) -> Contender:
    def step() -> None:
        optimizer.set_closure(criterion, *batch)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _constant(rho: float) -> SimpleNamespace:
    """Return a schedule with the method that both libraries use."""
    return SimpleNamespace(step=lambda: rho)


OPTIMIZERS: dict[str, dict[str, Build]] = {
    "SAM": {"gradfilter.interop: SAM": ours_sam, "pytorch_optimizer: SAM": theirs_sam},
    "GSAM": {"gradfilter.interop: GSAM": ours_gsam, "pytorch_optimizer: GSAM": theirs_gsam},
}
