"""Rows that overflow in float16, and the training that rejects them, in float32 by hand."""

import torch
import torch.nn.functional as F
from torch import nn

SCALE = 2.0**14
GROWTH = 2  # clean steps after which the scale doubles


def scaler(**options):
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=GROWTH, **options)


class Perceptron(nn.Module):
    """Its losses are finite, also of hot samples, whose gradients overflow under the scale."""

    def __init__(self):
        super().__init__()
        layers = (nn.Linear(*shape, dtype=torch.float32) for shape in ((6, 5), (5, 3)))
        self.first, self.last = layers

    def forward(self, x, labels, heat):
        logits = self.last(F.relu(self.first(x)))
        each = F.cross_entropy(logits.float(), labels, reduction="none")
        return {"loss": (heat * each).mean(), "logits": logits}


def samples(steps, rows, size, hot):
    """Return the columns of a batch by name, for all steps. (steps, rows, size, ...).

    Args:
        steps: The number of steps.
        rows: The number of rows of a step.
        size: The number of samples of a row.
        hot: The rows (step, row) whose gradients overflow.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(steps, rows, size, 6, generator=generator, dtype=torch.float32)
    labels = torch.randint(3, (steps, rows, size), generator=generator)
    heat = torch.ones(steps, rows, size, dtype=torch.float32)
    for place in hot:
        heat[place] = 1000
    return {"x": x, "labels": labels, "heat": heat}


def train_by_hand(model, data, hot, limit=float("inf")):
    """Train in float32 by the mean gradient of all rows but hot ones; return the norms of steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    norms = []
    steps, rows = data["labels"].shape[:2]
    for step in range(steps):
        cool = [row for row in range(rows) if (step, row) not in hot]
        if not cool:
            continue  # skipped
        optimizer.zero_grad()
        for row in cool:
            row_of = {name: values[step, row] for name, values in data.items()}
            (model(**row_of)["loss"] / len(cool)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
    return norms


def scales_by_hand(steps, hot):
    """Return the scale after every step: half after an overflow, twice after clean steps."""
    scale, clean, found = SCALE, 0, []
    for step in range(steps):
        clean = 0 if any(step == at for at, _ in hot) else clean + 1
        if clean == 0:
            scale /= 2
        elif clean == GROWTH:
            scale, clean = 2 * scale, 0
        found.append(scale)
    return found


class TrainerInHalf:
    """Lets a Trainer, the next base class, run in float16, which accelerate leaves out on a CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler, self.accelerator.native_amp = scaler(), True

    def compute_loss_context_manager(self):
        return torch.autocast("cpu", torch.float16)
