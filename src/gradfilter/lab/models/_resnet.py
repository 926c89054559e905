"""Residual networks of a chosen width, without max-pool."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from gradfilter.lab.models._images import Shape

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """y = relu(shortcut(x) + conv2(relu(conv1(x)))), each convolution followed by its norm.

    The shortcut is the identity, or a 1 x 1 convolution where the shape changes.
    """

    def __init__(self, width: int, out: int, stride: int, batchnorm: bool) -> None:
        """Make the layers, from ``width`` to ``out`` channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=not batchnorm)
        self.norm1 = _norm(out, batchnorm)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=not batchnorm)
        self.norm2 = _norm(out, batchnorm)
        same = stride == 1 and width == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, out, h / stride, w / stride)."""
        y = self.norm1(self.conv1(x)).relu()
        sum_: Tensor = self.shortcut(x) + self.norm2(self.conv2(y))
        return sum_.relu()


def resnet(
    depth: int, width: int = 64, *, classes: int, shape: Shape, batchnorm: bool = False
) -> nn.Module:
    """A convolution of stride 1, four stages of basic blocks, global average pool, Linear.

    Args:
        depth: 18 or 34, which sets the blocks of the four stages.
        width: k; the stages have k, 2k, 4k and 8k channels.
        classes: C.
        shape: Of one image; of any size.
        batchnorm: After every 3 x 3 convolution, which has no bias then.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(resnet(18, 1, classes=10, shape=(3, 32, 32)))
        2902

    References:
        He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015,
        https://arxiv.org/abs/1512.03385; Nakkiran et al., "Deep Double Descent", 2019,
        https://arxiv.org/abs/1912.02292
    """
    blocks: list[nn.Module] = []
    inside = width
    for stage, count in enumerate(BLOCKS[depth]):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(BasicBlock(inside, width * 2**stage, stride, batchnorm))
            inside = width * 2**stage
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(shape[0], width, 3, 1, 1, bias=not batchnorm),
            norm=_norm(width, batchnorm),
            relu=nn.ReLU(),
            blocks=nn.Sequential(*blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(inside, classes),
        )
    )


def _norm(width: int, batchnorm: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if batchnorm else nn.Identity()
