"""Train a classifier with an ordinary loop whose gradients are filtered per sample.

    python examples/plain_loop.py --wrong 0.3

Some labels of scikit-learn's digits are wrong. Every sample is a row of its own: long rows are
clipped, and `consensus_filter` weights each row by its cosine with the sum of the others. Replace
`digits()` by your data and `network()` by your model; the optimizer, the scheduler and the
evaluation are torch's. Each epoch prints how many rows with right and with wrong labels were
accepted. Needs scikit-learn (`pip install "gradfilter[lab]"`).
"""

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradfilter as gf
from gradfilter.interop import Filtered


def digits(wrong: float, device: str) -> tuple[TensorDataset, TensorDataset]:
    """Return training samples (x, y, whether y is wrong), and test samples (x, y)."""
    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32, device=device)
    y = torch.tensor(found.target, device=device)
    order = torch.randperm(len(y)).to(device)
    train, test = order[:1200], order[1200:]
    x = (x - x[train].mean()) / x[train].std()
    is_wrong = torch.rand(len(train)).to(device) < wrong
    other = (y[train] + torch.randint(1, 10, (len(train),)).to(device)) % 10
    labels = torch.where(is_wrong, other, y[train])
    return TensorDataset(x[train], labels, is_wrong), TensorDataset(x[test], y[test])


def network() -> nn.Module:
    """Return a new model."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Return the fraction of samples whose class is predicted."""
    model.eval()
    right = sum((model(x).argmax(1) == y).sum() for x, y in loader)
    model.train()
    return float(right) / len(loader.dataset)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print a line per epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=80)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--wrong", type=float, default=0.3, help="fraction of wrong labels")
    parser.add_argument("--threshold", type=float, default=1.0, help="largest accepted 1 - cosine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    train, test = digits(args.wrong, args.device)
    loader = DataLoader(train, args.batch_size, shuffle=True)
    test_loader = DataLoader(test, 512)
    model = network().to(args.device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    # Rows in, one gradient out: the update is the optimizer's. microbatches=None: a row per sample.
    rule = gf.chain(gf.clip_per_row(1.0), gf.consensus_filter(args.threshold))
    filtered = Filtered(model, criterion, rule, optimizer, microbatches=None)
    for epoch in range(1, args.epochs + 1):
        losses, accepted, wrong = [], [], []
        for x, y, is_wrong in loader:
            result = filtered.step(x, y)  # in place of zero_grad, backward and step
            losses.append(result.loss)
            accepted.append(result.info["consensus_filter/accepted"])
            wrong.append(is_wrong)
        scheduler.step()
        mask, rows = torch.cat(wrong), torch.cat(accepted).float()
        print(
            f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}, "
            f"test accuracy {accuracy(model, test_loader):.4f}, accepted {rows.mean():.4f} "
            f"(right labels {rows[~mask].mean():.4f}, wrong labels {rows[mask].mean():.4f})"
        )


if __name__ == "__main__":
    main()
