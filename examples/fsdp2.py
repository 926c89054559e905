"""Train a model that is sharded over processes by FSDP2, with filtered gradients.

    torchrun --nproc-per-node 2 examples/fsdp2.py

`fully_shard` leaves a shard of every parameter in each process. `Filtered` gathers a layer when an
operation needs it, and computes a row per microbatch of the process's own samples;
`across_ranks()` joins the rows of all processes, and the optimizer steps on the shards. Replace
`digits()` by your data and the model in `main()` by yours, and shard its blocks before the whole.
Needs scikit-learn (`pip install "gradfilter[lab]"`).
"""

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

import gradfilter as gf
from gradfilter.distributed import across_ranks
from gradfilter.interop import Filtered


def digits() -> TensorDataset:
    """Return scikit-learn's digits."""
    found = load_digits()
    return TensorDataset(
        torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    )


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], device: str) -> float:
    """Return the accuracy over the samples of all processes, each with as many batches."""
    model.eval()
    counts = torch.zeros(2, device=device)  # right, all
    for x, y in loader:
        hits = model(x.to(device)).argmax(1) == y.to(device)
        counts += torch.stack([hits.sum(), torch.full_like(hits.sum(), len(hits))])
    model.train()
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Train in this process of the group that torchrun started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=60, help="samples per process and step")
    parser.add_argument("--microbatches", type=int, default=4, help="rows per process")
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--threshold", type=float, default=0.97, help="largest accepted 1 - cosine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="file for the weights of the whole model")
    args = parser.parse_args(argv)

    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    first = dist.get_rank() == 0

    torch.manual_seed(args.seed)  # the same split and the same first weights in every process
    train, test = random_split(digits(), [0.7, 0.3])
    sampler = DistributedSampler(train, seed=args.seed)
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True)
    test_loader = DataLoader(test, 512, sampler=DistributedSampler(test, shuffle=False))

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    criterion = nn.CrossEntropyLoss()

    filters = gf.chain(across_ranks(), gf.agree_filter(args.threshold))
    filtered = Filtered(model, criterion, filters, optimizer, args.microbatches)
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)  # another order in every epoch
        losses, accepted = [], []
        for x, y in loader:
            result = filtered.step(x.to(device), y.to(device))
            losses.append(result.loss)
            accepted.append(result.info["agree_filter/accepted"])  # the same in every process
        loss, kept = torch.stack(losses).mean(), torch.stack(accepted).float().mean()
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
        right = accuracy(model, test_loader, device)
        if first:
            print(f"epoch {epoch}: loss {loss:.4f}, test accuracy {right:.4f}, accepted {kept:.4f}")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if first and args.save:  # every process takes part in gathering the weights
        torch.save(weights, args.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
