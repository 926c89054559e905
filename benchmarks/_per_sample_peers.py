"""Per-sample gradients and their norms with other libraries, used as in their documentation.

Each function takes a model and a batch, and returns the function that is measured. The model does
not change. Row n is the gradient of the loss of sample n.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks._consensus import consensus_weights
from benchmarks._models import Batch

Tree = dict[str, Tensor]
GradSamples = Callable[[], Tree]  # one tensor (N, *shape) per parameter


def opacus(model: nn.Module, batch: Batch) -> GradSamples:
    """Compute rows by the hooks of Opacus, which has a rule per kind of layer."""
    from opacus.grad_sample import GradSampleModule

    inputs, targets = batch
    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")

    def compute() -> Tree:
        F.cross_entropy(hooked(inputs), targets, reduction="sum").backward()
        grads = {name: p.grad_sample for name, p in hooked._module.named_parameters()}
        hooked.zero_grad(set_to_none=True)
        return grads

    return compute


def expanded_weights(model: nn.Module, batch: Batch) -> GradSamples:
    """Compute rows by ExpandedWeights of torch."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    inputs, targets = batch
    model = copy.deepcopy(model)

    def compute() -> Tree:
        logits = call_for_per_sample_grads(model, loss_reduction="sum")(inputs)
        F.cross_entropy(logits, targets, reduction="sum").backward()
        grads = {name: p.grad_sample for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = p.grad_sample = None
        return grads

    return compute


def vmap_grad(model: nn.Module, batch: Batch) -> GradSamples:
    """Compute rows as in the tutorial of torch.func."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Tree, sample: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, params, (sample[None],))
        return F.cross_entropy(logits, target[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda: per_sample(params, *batch)


def opacus_ghost_norms(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """Compute squared norms by ghost clipping of Opacus, without per-sample gradients."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    inputs, targets = batch
    hooked = GradSampleModuleFastGradientClipping(
        copy.deepcopy(model), loss_reduction="sum", use_ghost_clipping=True
    )

    def compute() -> Tensor:
        F.cross_entropy(hooked(inputs), targets, reduction="sum").backward()
        norms = hooked.get_norm_sample().square()
        hooked.zero_grad(set_to_none=True)
        return norms

    return compute


def torchjd_norms(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """Compute squared norms as the diagonal of the Gram of TorchJD."""
    gram = _torchjd_gram(copy.deepcopy(model), batch)
    return lambda: gram()[1].diagonal()


def torchjd_consensus(model: nn.Module, batch: Batch) -> Callable[[], Tree]:
    """Compute consensus by TorchJD: weights from its Gram, then one more backward pass."""
    model = copy.deepcopy(model)
    gram = _torchjd_gram(model, batch)
    names, params = zip(*model.named_parameters(), strict=True)

    def compute() -> Tree:
        losses, k = gram()
        inverse = k.diagonal().rsqrt()
        weights = consensus_weights((k * inverse * inverse[:, None]).sum(1))
        return dict(zip(names, torch.autograd.grad(losses, params, weights), strict=True))

    return compute


def _torchjd_gram(model: nn.Module, batch: Batch) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function for the losses with their graph, and the Gram of their gradients."""
    from torchjd.autogram import Engine

    inputs, targets = batch
    engine = Engine(model, batch_dim=0)

    def compute() -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(model(inputs), targets, reduction="none")
        return losses, engine.compute_gramian(losses)

    return compute


STACKS = {"opacus": opacus, "ExpandedWeights": expanded_weights, "vmap(grad)": vmap_grad}
"""Libraries that compute the rows; all answers are computed from the rows."""

DIRECT = {
    "norms": {"opacus ghost": opacus_ghost_norms, "torchjd": torchjd_norms},
    "consensus": {"torchjd": torchjd_consensus},
}
"""Libraries that answer a question without the rows."""
