"""Train ResNet18 on CIFAR-100 with `step_GAF` in a loop of your own.

    python examples/cifar100_step.py --optimizer "SGD+Nesterov+val_plateau" --momentum 0.9 \
        --label_error_percentage 0.15 --cos_distance_thresh 0.97

It has the flags and defaults of `1_cifar_100_train_loop_exposed.py`, published with gradient
agreement filtering, and `--dummy True` for small images without a download. Unlike there,
`--cos_distance_thresh` reaches the filter, and losses are means over samples. Needs torchvision
(`pip install "gradfilter[lab]"`), and the package wandb for `--wandb True`. Copy `_cifar.py` too.
"""

import random
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchvision import models

from _cifar import Data, draw, evaluate, flipped, load, make_optimizer, published_flags
from gradfilter.interop import step_GAF


def batch_of(data: Data, labels: list[int], indices: list[int]) -> tuple[Tensor, Tensor]:
    """Return images and labels as tensors."""
    images = torch.stack([data[i][0] for i in indices])
    return images, torch.tensor([labels[i] for i in indices])


def ordinary_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, x: Tensor, y: Tensor
) -> dict[str, float]:
    """Take a step without a filter, and return what `step_GAF` returns."""
    optimizer.zero_grad()
    logits = model(x)
    loss = criterion(logits, y)
    loss.backward()
    optimizer.step()
    right = (logits.argmax(1) == y).float().mean()
    return {"train_loss": float(loss), "train_accuracy": float(right), "agreed_count": 0}


def train(
    args: Namespace, model: nn.Module, data: Data, labels: list[int], test: Data, name: str
) -> None:
    """Train, print a line per validation, and save the weights to checkpoints/NAME.pt."""
    if args.wandb:
        import wandb

        wandb.init(project="gradfilter", name=name, config=vars(args))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    criterion, optimizer = nn.CrossEntropyLoss(), make_optimizer(model, args)
    scheduler = None
    if args.optimizer.endswith("val_plateau"):
        scheduler = ReduceLROnPlateau(
            optimizer, patience=args.scheduler_patience, factor=args.scheduler_factor
        )
    classes = sorted({*labels})
    members = [[i for i, y in enumerate(labels) if y == c] for c in classes]  # before the flips
    labels = flipped(labels, args.label_error_percentage, len(classes))
    count, per_class = args.num_batches_to_force_agreement, args.num_samples_per_class_per_batch
    size = per_class * len(classes) if args.GAF else args.batch_size
    for epoch in range(args.epochs):
        results = []
        for _ in range(len(labels) // size):
            if args.GAF:
                microbatches = [batch_of(data, labels, i) for i in draw(members, count, per_class)]
                result = step_GAF(
                    model,
                    optimizer,
                    criterion,
                    microbatches,
                    cos_distance_thresh=args.cos_distance_thresh,
                    wandb=args.wandb,
                    verbose=args.verbose,
                    device=device,
                )
            else:
                [indices] = draw(members, 1, size // len(classes))
                indices += random.sample(range(len(labels)), size - len(indices))
                x, y = batch_of(data, labels, indices)
                result = ordinary_step(model, optimizer, criterion, x.to(device), y.to(device))
            results.append(result)
        if epoch % args.num_val_epochs == 0:
            mean = {key: sum(r[key] for r in results) / len(results) for key in results[0]}
            loss, accuracy = evaluate(model, test, args.batch_size)
            agreed = mean["agreed_count"] / max(count - 1, 1)  # of the microbatches after the first
            print(
                f"epoch {epoch}: loss {mean['train_loss']:.4f}, train accuracy "
                f"{mean['train_accuracy']:.4f}, val loss {loss:.4f}, val accuracy {accuracy:.4f}, "
                f"accepted {agreed:.4f}"
            )
            if args.wandb:
                wandb.log({**mean, "val_loss": loss, "val_accuracy": accuracy, "epoch": epoch})
            Path("checkpoints").mkdir(exist_ok=True)
            torch.save(model.state_dict(), f"checkpoints/{name}.pt")
            if scheduler is not None:
                scheduler.step(loss)


def main(argv: Sequence[str] | None = None) -> None:
    """Train on CIFAR-100."""
    args = published_flags(__doc__.splitlines()[0]).parse_args(argv)
    random.seed(0)
    torch.manual_seed(0)
    data, labels, test = load(args.dummy)
    model = models.resnet18(num_classes=max(labels) + 1)
    train(args, model, data, labels, test, "cifar100_step")


if __name__ == "__main__":
    main()
