"""Train with Ray Train, which starts the workers, and filter the gradients of all of them together.

    python examples/ray_train.py --workers 2

Ray runs `train` in every worker, in a process group of torch that it has opened: gradfilter needs
nothing else. `across_ranks()` joins the rows of the workers to one stack, so the training does not
depend on the number of workers, but for rounding. Replace `digits()` by your data and the model by
yours. Needs Ray and scikit-learn (`pip install "gradfilter[lab]" "ray[train]"`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer, get_device
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradfilter as gf
from gradfilter.distributed import across_ranks
from gradfilter.interop import Filtered


def digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, in a random order that is the same in every worker."""
    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data, dtype=dtype)[order] / 16, torch.tensor(found.target)[order]


def train(config: dict[str, Any]) -> None:
    """Train in this worker of the group that Ray has opened."""
    rank, size = dist.get_rank(), dist.get_world_size()
    device, dtype = get_device(), getattr(torch, config["dtype"])
    x, y = digits(dtype)
    x, y, held_x, held_y = (t.to(device) for t in (x[:1200], y[:1200], x[1200:], y[1200:]))

    torch.manual_seed(0)  # the same first weights in every worker; across_ranks() compares them
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)
    model = nn.Sequential(*layers).to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    filters = gf.chain(across_ranks(), gf.agree_filter(config["threshold"]))
    own = config["microbatches"] // size  # rows of this worker
    filtered = Filtered(model, nn.CrossEntropyLoss(), filters, optimizer, own)

    shuffled = torch.Generator().manual_seed(1)
    for epoch in range(1, config["epochs"] + 1):
        losses, accepted = [], []
        order = torch.randperm(len(x), generator=shuffled)  # the same in every worker
        for batch in order.split(config["batch_size"]):
            part = batch.chunk(size)[rank].to(device)
            result = filtered.step(x[part], y[part])
            losses.append(result.loss)  # of this worker
            accepted.append(result.info["agree_filter/accepted"])  # of all rows of all workers
        loss = torch.stack(losses).mean()
        dist.all_reduce(loss)
        with torch.no_grad():
            right = (model(held_x).argmax(1) == held_y).double().mean()
        numbers = {
            "epoch": epoch,
            "loss": float(loss) / size,
            "accuracy": float(right),
            "accepted": float(torch.stack(accepted).double().mean()),
        }
        with TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                torch.save(model.state_dict(), Path(folder, "model.pt"))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(numbers, checkpoint=saved)  # every worker reports


def main(argv: Sequence[str] | None = None) -> None:
    """Let Ray start the workers, and print what they report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=120, help="samples of all workers")
    parser.add_argument("--microbatches", type=int, default=4, help="rows of all workers")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--threshold", type=float, default=0.97, help="largest accepted 1 - cosine")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--out", default="ray_results", help="folder for the checkpoints")
    args = parser.parse_args(argv)
    if args.microbatches % args.workers or args.batch_size % args.microbatches:
        parser.error("expected --workers to divide --microbatches, and those --batch-size")

    trainer = TorchTrainer(
        train,
        train_loop_config=vars(args),
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.workers, use_gpu=torch.cuda.is_available()
        ),
        run_config=ray.train.RunConfig(storage_path=str(Path(args.out).resolve())),
    )
    result = trainer.fit()
    for _, row in result.metrics_dataframe.iterrows():
        print(
            f"epoch {row.epoch:.0f}: loss {row.loss:.4f}, test accuracy {row.accuracy:.4f}, "
            f"accepted {row.accepted:.4f}"
        )
    print(f"checkpoint: {result.checkpoint.path}")


if __name__ == "__main__":
    main()
