"""The optimizers of torch, by the names of their classes: a new one is tested by itself."""

import torch

TORCH_CLASSES = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
