"""The rows of a perceptron, computed by hand: a floor for every plan on the same machine."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._setting import THRESHOLD, Setting
from benchmarks._timing import Contender
from gradfilter.transforms._agreement import against_running


def by_hand(setting: Setting, microbatches: int) -> Contender:
    """Return the computation of plan "fused" for linear layers and ReLUs in few calls of torch.

    It knows the model, so it needs no autograd, no vmap and no checks: forward pass, gradients of
    the layers' inputs, Gram, filter, and the weighted sum of all rows. The Gram of a layer is
    ((X Xᵀ + 1) ∘ (D Dᵀ)) summed over the samples of two rows, for its inputs X and output gradients
    D; the 1 is the bias.

    Returns:
        A function of no arguments. It returns the gradients by name.
    """
    model, (inputs, targets) = setting.model, setting.batch
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    size = len(inputs) // microbatches
    samples = torch.arange(len(inputs), device=setting.device)
    blocks = microbatches, size, microbatches, size

    @torch.no_grad()
    def compute() -> dict[str, Tensor]:
        x, used = inputs.flatten(1), list[Tensor]()
        for layer in layers.values():
            used.append(x if not used else x.relu_())
            x = F.linear(used[-1], layer.weight, layer.bias)
        grad = x.softmax(1)
        grad[samples, targets] -= 1
        grad /= size
        gram = grad.new_zeros(microbatches, microbatches, dtype=torch.float64)
        outputs = list[Tensor]()
        for layer, x in zip(reversed(layers.values()), reversed(used), strict=True):
            outputs.insert(0, grad)
            products = (x @ x.T).add_(1).mul_(grad @ grad.T)
            gram += products.view(blocks).sum((1, 3), dtype=torch.float64)
            if len(outputs) < len(layers):
                grad = (grad @ layer.weight).mul_(x > 0)
        weights = against_running(gram, gram.diagonal().isfinite(), THRESHOLD, "mean")[0]
        per_sample = weights.to(inputs.dtype).repeat_interleave(size)[:, None]
        found = dict[str, Tensor]()
        for name, x, grad in zip(layers, used, outputs, strict=True):
            weighted = grad * per_sample
            found |= {f"{name}.weight": weighted.T @ x, f"{name}.bias": weighted.sum(0)}
        return found

    return compute
