"""Wide residual networks."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from gradfilter.lab._usage import check
from gradfilter.lab.models._images import Shape


class WideBlock(nn.Module):
    """y = s(x) + conv2(dropout(relu(norm2(conv1(z))))), with z = relu(norm1(x)).

    s is the identity, or a 1 x 1 convolution of z where the shape changes.
    """

    def __init__(self, width: int, out: int, stride: int, dropout: float) -> None:
        """Make the layers, from ``width`` to ``out`` channels."""
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        same = stride == 1 and width == out
        self.shortcut = None if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, out, h / stride, w / stride)."""
        z = self.norm1(x).relu()
        y: Tensor = self.conv2(self.dropout(self.norm2(self.conv1(z)).relu()))
        return y + (x if self.shortcut is None else self.shortcut(z))


def wide_resnet(
    depth: int, widen: int, *, classes: int, shape: Shape, dropout: float = 0.0
) -> nn.Module:
    """A WideResNet: three groups of 16w, 32w and 64w channels, batch norm before every activation.

    Args:
        depth: 6n + 4 layers, n >= 1 blocks in each group: 10, 16, 22, 28, 40 ...
        widen: w, the widening factor.
        classes: C.
        shape: Of one image; of any size.
        dropout: Between the two convolutions of a block.

    Raises:
        UsageError: There is no WideResNet of this depth.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(wide_resnet(40, 2, classes=10, shape=(3, 32, 32)))
        2243546

    References:
        Zagoruyko, Komodakis, "Wide Residual Networks", 2016, https://arxiv.org/abs/1605.07146
    """
    check(
        depth >= 10 and depth % 6 == 4,
        "--model",
        "a depth of 6n + 4 in wrn_D_W",
        depth,
        "wrn_16_4, wrn_28_10 and wrn_40_2 are usual.",
    )
    blocks: list[nn.Module] = []
    inside = 16
    for group in range(3):
        for block in range((depth - 4) // 6):
            stride = 2 if group > 0 and block == 0 else 1
            blocks.append(WideBlock(inside, 16 * widen * 2**group, stride, dropout))
            inside = 16 * widen * 2**group
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False),
            blocks=nn.Sequential(*blocks),
            norm=nn.BatchNorm2d(inside),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(inside, classes),
        )
    )
