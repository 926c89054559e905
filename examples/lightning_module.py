"""Train a LightningModule with filtered gradients.

    python examples/lightning_module.py

`FilteredModule` is a `LightningModule` with a chain: set `transforms` and `microbatches`, and write
`microbatch_loss` in place of `training_step`. The optimizer, the scheduler, gradient clipping,
logging and checkpoints are Lightning's; the metrics of the chain are logged with them. Replace
`Digits` by your data module and the layers of `Classifier` by yours. Needs Lightning and
scikit-learn (`pip install "gradfilter[interop,lab]"`).
"""

import argparse
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import gradfilter as gf
from gradfilter.interop import FilteredModule

Batch = tuple[Tensor, Tensor]


class Digits(L.LightningDataModule):
    """Scikit-learn's digits, with batches that the number of microbatches divides."""

    def __init__(self, batch_size: int) -> None:
        """Remember the size of a batch."""
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Split the samples."""
        found = load_digits()
        x = torch.tensor(found.data, dtype=torch.float32) / 16
        data = TensorDataset(x, torch.tensor(found.target))
        self.train, self.val = random_split(data, [0.7, 0.3], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return DataLoader(self.val, 512)


class Classifier(FilteredModule):
    """A small network; `microbatch_loss` is evaluated for all microbatches at once."""

    def __init__(self, lr: float, threshold: float, microbatches: int) -> None:
        """Build the layers and the chain."""
        super().__init__()
        self.save_hyperparameters()
        self.transforms = gf.agree_filter(threshold)
        self.microbatches = microbatches
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images. (B, 10)."""
        return self.layers(x)

    def microbatch_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of one microbatch."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss and the accuracy."""
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), sync_dist=True)
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return an optimizer and a schedule over all steps."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Printer(Callback):
    """Print a line per epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the metrics of the last step and of the validation."""
        found = trainer.callback_metrics
        if trainer.is_global_zero:
            print(
                f"epoch {trainer.current_epoch + 1}: loss {found['train_loss']:.4f}, val accuracy "
                f"{found['val_accuracy']:.4f}, accepted {found['agree_filter/accepted']:.4f}"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the module, and keep the best checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--threshold", type=float, default=0.97, help="largest accepted 1 - cosine")
    parser.add_argument("--out", default="runs/lightning", help="folder for the checkpoints")
    args = parser.parse_args(argv)
    L.seed_everything(0)
    best = ModelCheckpoint(args.out, "best", monitor="val_accuracy", mode="max", save_last=True)
    trainer = L.Trainer(max_epochs=args.epochs, callbacks=[best, Printer()], logger=False)
    trainer.fit(Classifier(args.lr, args.threshold, 4), Digits(80))


if __name__ == "__main__":
    main()
