"""One model with one batch on one device, and the computations on them that are timed."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import gradfilter as gf
from benchmarks._models import Batch, Task, criterion
from benchmarks._timing import Contender
from gradfilter._types import Params, Tree
from gradfilter.grads._loss import ModelLoss
from gradfilter.grads._microbatch import Plan

# Nothing is rejected from 2 on. Random data agree by chance only, and what a filter rejects it need
# not combine: with a usual threshold a contender would be the faster the more it throws away.
THRESHOLD = 2.0


@dataclass(frozen=True)
class Setting:
    """A model in training mode, as a module and as a pure loss, and N samples."""

    model: nn.Module
    batch: Batch
    loss: ModelLoss
    params: Params
    buffers: Tree
    device: torch.device
    bf16: bool

    @classmethod
    def of(cls, task: Task, samples: int, device: torch.device, *, bf16: bool = False) -> "Setting":
        torch.manual_seed(0)
        model = task.model().to(device).train()
        inputs, targets = (t.to(device) for t in task.batch(samples))
        loss = gf.model_loss(model, criterion)
        return cls(model, (inputs, targets), loss, *gf.extract(model), device, bf16)

    @property
    def size(self) -> int:
        """The number of parameters, P."""
        return sum(p.numel() for p in self.params.values())

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def plain(self) -> None:
        """One forward and backward pass over all N samples at once."""
        inputs, targets = self.batch
        with self.autocast():
            loss = criterion(self.model(inputs), targets)
        loss.backward()
        # Freed at the end, not the start, so that no contender holds the gradients of others.
        self.model.zero_grad(set_to_none=True)

    def rows(self, microbatches: int, plan: Plan, **options: Any) -> Callable[[], gf.GradStack]:
        """The gradients of M microbatches."""
        grads_of = gf.microbatch_grads(self.loss, microbatches, plan=plan, **options)

        def compute() -> gf.GradStack:
            with self.autocast():
                return grads_of(self.params, self.batch, buffers=self.buffers)

        return compute

    def filtered(self, microbatches: int, plan: Plan, **options: Any) -> Contender:
        """Rows, their Gram, the agreement filter on it, and the combination of all rows."""
        rows, filter_ = self.rows(microbatches, plan, **options), gf.agree_filter(THRESHOLD)
        state = filter_.init(self.params)
        return lambda: filter_.update(rows(), state, self.params)

    def step(
        self,
        microbatches: int,
        plan: Plan,
        update: gf.Transform,
        *,
        donate: bool = False,
        **options: Any,
    ) -> Contender:
        """A whole step, always from the same parameters, or in place as torch's optimizers are."""
        rows, params = self.rows(microbatches, plan, **options), self.params
        state = update.init(params)
        if not donate:
            return lambda: update(params, state, rows())
        own = {name: p.clone() for name, p in params.items()}
        return lambda: update(own, state, rows(), donate=True)

    def published(self, microbatches: int) -> Contender:
        """A whole step of the filter's authors' own package, as its documentation has it.

        The data lie on the device already, which spares it the copies of a training run.
        """
        from gradient_agreement_filtering import step_GAF

        model = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # stays where it is
        data = TensorDataset(*self.batch)
        parts = torch.arange(len(data)).chunk(microbatches)
        subsets = [Subset(data, part.tolist()) for part in parts]

        def step() -> dict[str, float]:
            with self.autocast():
                result = step_GAF(
                    model,
                    optimizer,
                    criterion,
                    subsets,
                    wandb=False,
                    verbose=False,
                    cos_distance_thresh=THRESHOLD,
                    device=self.device,
                )
            optimizer.zero_grad()
            return result

        return step
