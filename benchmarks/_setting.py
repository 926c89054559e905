"""A model with a batch on a device, and the computations that are measured with them."""

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

# A threshold of 2 rejects nothing. Random data agree only by chance, and a filter does not combine
# rejected rows. With a usual threshold a contender would be faster if it rejects more.
THRESHOLD = 2.0


@dataclass(frozen=True)
class Setting:
    """A model in training mode, as a module and as a pure loss, with N samples."""

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
        """Run one forward and backward pass for all N samples."""
        inputs, targets = self.batch
        with self.autocast():
            loss = criterion(self.model(inputs), targets)
        loss.backward()
        # Free the gradients at the end, so that they are not counted as memory of the next
        # contender.
        self.model.zero_grad(set_to_none=True)

    def rows(self, microbatches: int, plan: Plan, **options: Any) -> Callable[[], gf.GradStack]:
        """Return a function that computes the gradients of M microbatches."""
        grads_of = gf.microbatch_grads(self.loss, microbatches, plan=plan, **options)

        def compute() -> gf.GradStack:
            with self.autocast():
                return grads_of(self.params, self.batch, buffers=self.buffers)

        return compute

    def filtered(self, microbatches: int, plan: Plan, **options: Any) -> Contender:
        """Return a function that computes rows, Gram, agreement filter and weighted sum."""
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
        """Return a whole step, from the same parameters each time, or in place with ``donate``."""
        rows, params = self.rows(microbatches, plan, **options), self.params
        state = update.init(params)
        if not donate:
            return lambda: update(params, state, rows())
        own = {name: p.clone() for name, p in params.items()}
        return lambda: update(own, state, rows(), donate=True)

    def published(self, microbatches: int) -> Contender:
        """Return a whole step of the published package, used as in its documentation.

        The data are already on the device, so the copies of a training run are not measured.
        """
        from gradient_agreement_filtering import step_GAF

        model = copy.deepcopy(self.model)
        # The lr is 0, so the parameters do not change.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
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
