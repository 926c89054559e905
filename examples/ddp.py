"""Train in several processes, and filter the gradients of all of them together.

    torchrun --nproc-per-node 2 examples/ddp.py

Every process has its own samples (`DistributedSampler`) and computes a row per microbatch.
`across_ranks()` joins the rows of all processes where DDP would average them away; everything after
it gives the same bits in every process, so the parameters stay equal without being sent. With
`--checkpoint FILE`, `torchrun --max-restarts 2` resumes from the last epoch if a process is lost.
Replace `digits()` by your data and the model in `main()` by yours. Needs scikit-learn
(`pip install "gradfilter[lab]"`).
"""

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
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
    """Return the accuracy over the samples of all processes."""
    model.eval()
    counts = torch.zeros(2, device=device)  # right, all
    for x, y in loader:
        hits = (model(x.to(device)).argmax(1) == y.to(device)).sum()
        counts += torch.stack([hits, torch.full_like(hits, len(y))])
    model.train()
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def equal_everywhere(model: nn.Module) -> bool:
    """Return whether all processes have the same parameters, bit for bit."""
    own = nn.utils.parameters_to_vector(model.parameters()).detach()
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    return all(torch.equal(own, other) for other in others)


def main(argv: Sequence[str] | None = None) -> None:
    """Train in this process of the group that torchrun started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=60, help="samples per process and step")
    parser.add_argument("--microbatches", type=int, default=2, help="rows per process")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--threshold", type=float, default=0.97, help="largest accepted 1 - cosine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="file for the weights of the model")
    parser.add_argument("--checkpoint", help="file of the last epoch, from which a run resumes")
    args = parser.parse_args(argv)

    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    first = dist.get_rank() == 0

    torch.manual_seed(args.seed)  # the same split in every process
    train, test = random_split(digits(), [0.7, 0.3])
    sampler = DistributedSampler(train, seed=args.seed)
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True)
    test_loader = DataLoader(test, 512, sampler=DistributedSampler(test, shuffle=False))

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    ddp = DistributedDataParallel(model)  # sends the parameters of the first process to all
    optimizer = torch.optim.SGD(ddp.parameters(), lr=args.lr, momentum=0.9)
    filters = gf.chain(across_ranks(), gf.agree_filter(args.threshold))
    filtered = Filtered(ddp.module, nn.CrossEntropyLoss(), filters, optimizer, args.microbatches)

    start = 0
    if args.checkpoint and os.path.exists(args.checkpoint):
        weights, states, start = torch.load(args.checkpoint, device, weights_only=True)
        model.load_state_dict(weights)
        filtered.load_state_dict(states)
    for epoch in range(start + 1, args.epochs + 1):
        sampler.set_epoch(epoch)  # another order in every epoch
        losses, accepted = [], []
        for x, y in loader:
            result = filtered.step(x.to(device), y.to(device))
            losses.append(result.loss)  # of this process
            accepted.append(result.info["agree_filter/accepted"])  # of all rows of all processes
        loss = torch.stack(losses).mean() / dist.get_world_size()
        dist.all_reduce(loss)
        right, rows = accuracy(model, test_loader, device), torch.stack(accepted).float().mean()
        if first:
            print(f"epoch {epoch}: loss {loss:.4f}, test accuracy {right:.4f}, accepted {rows:.4f}")
        if first and args.checkpoint:
            torch.save((model.state_dict(), filtered.state_dict(), epoch), args.checkpoint + "~")
            os.replace(args.checkpoint + "~", args.checkpoint)  # the one before or this one
    equal = equal_everywhere(model)
    if first:
        print(f"{dist.get_world_size()} processes, equal parameters: {equal}")
        if args.save:
            torch.save(model.state_dict(), args.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
