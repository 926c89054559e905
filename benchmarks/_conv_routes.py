"""Routes to the weight gradients of M microbatches of one convolution.

Given the input of the layer (M·B, c, h, w) and the gradient of its output (M·B, p, h', w'), each
route returns the M weight gradients, (M, p, c, k, k).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

backward = torch.ops.aten.convolution_backward
WEIGHT_ONLY = [False, True, False]


@dataclass(frozen=True)
class Layer:
    """A convolution without groups or dilation, with the shapes of its input and weight."""

    inputs: tuple[int, ...]  # (N, c, h, w)
    weight: tuple[int, ...]  # (p, c, k, k)
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def title(self) -> str:
        """Return the line that names the layer in a table."""
        p, c, k, _ = self.weight
        return f"{c} -> {p}, {k} x {k} / {self.stride[0]}, {self.inputs[2]} x {self.inputs[3]}"

    def weight_gradient(self, x: Tensor, d: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """Compute the weight gradient for the input x and the output gradient d."""
        zero = [0, 0]
        return backward(
            d, x, weight, None, self.stride, self.padding, [1, 1], False, zero, groups, WEIGHT_ONLY
        )[1]


def layers_of(model: nn.Module, inputs: Tensor) -> list[Layer]:
    """Return the different convolutions that a forward pass uses."""
    found = {}

    def note(module: nn.Conv2d, arguments: tuple[Tensor], output: Tensor) -> None:
        shapes = tuple(arguments[0].shape), tuple(module.weight.shape)
        layer = Layer(*shapes, module.stride, module.padding)
        found[layer] = None

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    model(inputs)
    return list(found)


def loop(layer: Layer, x: Tensor, d: Tensor, weight: Tensor, microbatches: int) -> Tensor:
    """Make one call per microbatch."""
    parts = zip(x.chunk(microbatches), d.chunk(microbatches), strict=True)
    return torch.stack([layer.weight_gradient(part, own, weight) for part, own in parts])


def groups(layer: Layer, x: Tensor, d: Tensor, weight: Tensor, microbatches: int) -> Tensor:
    """Make one call in which every microbatch is a group of channels."""
    x, d = (rearrange(t, "(m b) c h w -> b (m c) h w", m=microbatches) for t in (x, d))
    wide = weight.repeat(microbatches, 1, 1, 1)
    return layer.weight_gradient(x, d, wide, microbatches).unflatten(0, (microbatches, -1))


def unfold(layer: Layer, x: Tensor, d: Tensor, weight: Tensor, microbatches: int) -> Tensor:
    """Make a matrix of the patches of the input, and one batched product."""
    patches = F.unfold(x, weight.shape[2:], padding=layer.padding, stride=layer.stride)
    a = rearrange(patches, "(m b) d t -> m (b t) d", m=microbatches)
    d = rearrange(d, "(m b) p h w -> m p (b h w)", m=microbatches)
    return torch.bmm(d, a).unflatten(2, weight.shape[1:])


ROUTES = {"loop": loop, "groups": groups, "unfold": unfold}
