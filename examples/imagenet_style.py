"""Train a network of torchvision on folders of images, with all that a long training has.

    python examples/imagenet_style.py DATA --model resnet50 --epochs 90 --amp --compile

`DATA/train/CLASS/*` and `DATA/val/CLASS/*` are images, as of ImageNet. There are automatic mixed
precision (bfloat16; float16 with a GradScaler on older GPUs), an exponential moving average of the
weights, OneCycle, and a checkpoint per epoch: the same command resumes an interrupted training, bit
for bit on a CPU. `--compile` computes loss, rows and filter as one graph of `gf.compile`. Needs
torchvision (`pip install "gradfilter[lab]"`).
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import gradfilter as gf
from gradfilter.interop import Filtered


def images(root: str, size: int) -> tuple[ImageFolder, ImageFolder]:
    """Return the training images, cropped and flipped at random, and the validation images."""
    floats = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *floats])
    centre = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *floats])
    return ImageFolder(f"{root}/train", random), ImageFolder(f"{root}/val", centre)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader, device: str) -> float:
    """Return the fraction of images whose class is predicted."""
    model.eval()
    right = sum((model(x.to(device)).argmax(1) == y.to(device)).sum() for x, y in loader)
    model.train()
    return float(right) / len(loader.dataset)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print a line per epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--model", default="resnet50", help="a name of torchvision.models")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--threshold", type=float, default=0.97, help="largest accepted 1 - cosine")
    parser.add_argument("--lr", type=float, default=0.5, help="the peak of OneCycle")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument("--compile", nargs="?", const="inductor", default=False, help="a backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/imagenet_style", help="folder for the checkpoint")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float16 if half else torch.bfloat16
    torch.manual_seed(args.seed)
    train, val = images(args.data, args.image_size)
    options = {"num_workers": args.workers, "pin_memory": device == "cuda"}
    loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, **options)
    val_loader = DataLoader(val, args.batch_size, **options)

    model = models.get_model(args.model, num_classes=len(train.classes)).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-5, nesterov=True
    )
    scheduler = OneCycleLR(optimizer, args.lr, args.epochs * len(loader))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = torch.amp.GradScaler(device) if args.amp and half else None
    rule = gf.chain(gf.agree_filter(args.threshold), gf.clip_by_global_norm(5.0))
    filtered = Filtered(
        model, criterion, rule, optimizer, args.microbatches, scaler=scaler, compile=args.compile
    )
    parts = {"model": model, "ema": average, "filtered": filtered, "scheduler": scheduler}

    file, start = Path(args.out) / "checkpoint.pt", 0
    if file.exists():
        saved = torch.load(file, map_location=device, weights_only=True)
        start = saved.pop("epoch")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for epoch in range(start + 1, args.epochs + 1):
        torch.manual_seed(args.seed + epoch)  # order, crops and dropout do not depend on the start
        losses, accepted = [], []
        for x, y in loader:
            with torch.autocast(device, dtype, enabled=args.amp):
                result = filtered.step(x.to(device), y.to(device))
            scheduler.step()
            average.update_parameters(model)
            losses.append(result.loss)
            accepted.append(result.info["agree_filter/accepted"])
        loss, rows = torch.stack(losses).mean(), torch.stack(accepted).float().mean()
        right = accuracy(average.module, val_loader, device)
        print(f"epoch {epoch}: loss {loss:.4f}, val accuracy {right:.4f}, accepted {rows:.4f}")
        states = {name: part.state_dict() for name, part in parts.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"epoch": epoch, **states}, f"{file}.part")
        os.replace(f"{file}.part", file)  # the checkpoint before or this one, never a part


if __name__ == "__main__":
    main()
