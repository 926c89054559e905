"""Define the networks: MLP, LeNet, small CNNs, VGG, ResNet, Wide ResNet and ViT."""

from __future__ import annotations

import importlib
import math
from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import override

from gradfilter.lab._usage import check

# --- The shape of the images ---


Shape = tuple[int, int, int]
"""(channels, height, width)."""


def check_side(model: str, shape: Shape, least: int) -> None:
    """Refuse images that are too small for the model's pools.

    Args:
        model: Name of the model.
        shape: Shape of one image.
        least: Smallest side in pixels.

    Raises:
        UsageError: A side is smaller.
    """
    _, height, width = shape
    check(
        min(height, width) >= least,
        "--model",
        f"images of at least {least} x {least} pixels for {model}",
        f"{height} x {width}",
        "resnet18_K, wrn_D_W and mlp_H take images of any size.",
    )


# --- Layers of plain networks ---


def conv(inside: int, out: int, batchnorm: bool) -> list[nn.Module]:
    """Return a 3 x 3 convolution, without bias if batch norm follows, and ReLU."""
    layer = nn.Conv2d(inside, out, 3, 1, 1, bias=not batchnorm)
    norm = [nn.BatchNorm2d(out)] if batchnorm else []
    return [layer, *norm, nn.ReLU()]


def with_head(features: list[nn.Module], head: nn.Linear) -> nn.Module:
    """Return the layers in sequence; the last one has the name that all models use."""
    return nn.Sequential(OrderedDict(features=nn.Sequential(*features), head=head))


# --- MLP ---


def mlp(
    hidden: int, *, classes: int, shape: Shape, dropout: float = 0.0, depth: int = 2
) -> nn.Module:
    """Build an MLP: flattened image, hidden layers of h units with ReLU, Linear.

    Args:
        hidden: Number of units per hidden layer, h.
        classes: Number of classes, C.
        shape: Shape of one image.
        dropout: Probability of dropout after every hidden layer.
        depth: Number of hidden layers.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(mlp(64, classes=10, shape=(1, 8, 8)))
        8970
    """
    layers: list[nn.Module] = [nn.Flatten()]
    inside = math.prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(inside, hidden), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        inside = hidden
    return with_head(layers, nn.Linear(inside, classes))


# --- LeNet ---


def lenet(*, classes: int, shape: Shape) -> nn.Module:
    """Build LeNet-5 with ReLU and max-pools: two 5 x 5 convolutions, linear layers of 120 and 84.

    Args:
        classes: Number of classes, C.
        shape: Shape of one image, at least 16 x 16.

    Raises:
        UsageError: The image is too small.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(lenet(classes=10, shape=(3, 32, 32)))
        62006

    References:
        LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition",
        1998, https://doi.org/10.1109/5.726791
    """
    check_side("lenet", shape, 16)
    height, width = (((side - 4) // 2 - 4) // 2 for side in shape[1:])
    layers = [
        *(nn.Conv2d(shape[0], 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(16 * height * width, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
    ]
    return with_head(layers, nn.Linear(84, classes))


# --- Three small convolutional networks ---


def cnn(width: int, *, classes: int, shape: Shape, batchnorm: bool = False) -> nn.Module:
    """Build convolutions of k, 2k, 4k, 8k channels, max-pools of 2 after all but the first, then 4.

    Args:
        width: Number of channels, k.
        classes: Number of classes, C.
        shape: Shape of one image, at least 32 x 32. The Linear has 8k inputs for 32 x 32.
        batchnorm: Add batch norm after every convolution, which then has no bias.

    Raises:
        UsageError: The image is too small.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(cnn(1, classes=10, shape=(3, 32, 32)))
        510

    References:
        Nakkiran et al., "Deep Double Descent", 2019, https://arxiv.org/abs/1912.02292
    """
    check_side("cnn_K", shape, 32)
    layers = conv(shape[0], width, batchnorm)
    for stage in range(3):
        layers += conv(width * 2**stage, width * 2 ** (stage + 1), batchnorm)
        layers.append(nn.MaxPool2d(2))
    layers += [nn.MaxPool2d(4), nn.Flatten()]
    left = (shape[1] // 32) * (shape[2] // 32)
    return with_head(layers, nn.Linear(8 * width * left, classes))


def cnn5(width: int, *, classes: int, shape: Shape, batchnorm: bool = False) -> nn.Module:
    """Build the convolutions of `cnn` with average pools of 2 after the 2nd and 3rd, then global.

    Args:
        width: Number of channels, k.
        classes: Number of classes, C.
        shape: Shape of one image, at least 4 x 4.
        batchnorm: Add batch norm after every convolution, which then has no bias.

    Raises:
        UsageError: The image is too small.
    """
    check_side("cnn5_K", shape, 4)
    layers = [
        *conv(shape[0], width, batchnorm),
        *conv(width, 2 * width, batchnorm),
        nn.AvgPool2d(2),
        *conv(2 * width, 4 * width, batchnorm),
        nn.AvgPool2d(2),
        *conv(4 * width, 8 * width, batchnorm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return with_head(layers, nn.Linear(8 * width, classes))


def cnn3(width: int, *, classes: int, shape: Shape, batchnorm: bool = False) -> nn.Module:
    """Build two convolutions of k and 2k channels, each with a max-pool of 2, and a Linear.

    Made for small images such as the digits of 8 x 8: the Linear sees where a feature is, because
    there is no global pool. It has 8k inputs for 8 x 8 pixels.

    Args:
        width: Number of channels, k.
        classes: Number of classes, C.
        shape: Shape of one image, at least 4 x 4.
        batchnorm: Add batch norm after every convolution, which then has no bias.

    Raises:
        UsageError: The image is too small.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(cnn3(16, classes=10, shape=(1, 8, 8)))
        6090
    """
    check_side("cnn3_K", shape, 4)
    layers = [
        *conv(shape[0], width, batchnorm),
        nn.MaxPool2d(2),
        *conv(width, 2 * width, batchnorm),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    left = (shape[1] // 4) * (shape[2] // 4)
    return with_head(layers, nn.Linear(2 * width * left, classes))


# --- VGG with one linear layer ---


STAGES = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions per stage of a VGG; its name also counts three linear layers."""


def vgg(
    depth: int, *, classes: int, shape: Shape, batchnorm: bool = False, width: int = 64
) -> nn.Module:
    """Build five stages of convolutions, each with a max-pool of 2, global average pool, Linear.

    Args:
        depth: Depth in the name: 8, 11, 13, 16 or 19.
        classes: Number of classes, C.
        shape: Shape of one image, at least 32 x 32.
        batchnorm: Add batch norm after every convolution, which then has no bias.
        width: k; the stages have k, 2k, 4k, 8k and 8k channels.

    Raises:
        UsageError: The image is too small.

    Examples:
        >>> from gradfilter.lab.models._build import parameter_count
        >>> parameter_count(vgg(8, classes=10, shape=(3, 32, 32), width=1))
        1094

    References:
        Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        2014, https://arxiv.org/abs/1409.1556
    """
    check_side(f"vgg{depth}", shape, 32)
    layers: list[nn.Module] = []
    inside = shape[0]
    for stage, count in enumerate(STAGES[depth]):
        for _ in range(count):
            layers += conv(inside, width * min(2**stage, 8), batchnorm)
            inside = width * min(2**stage, 8)
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return with_head(layers, nn.Linear(inside, classes))


# --- ResNet of a chosen width, without max-pool ---


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

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, out, h / stride, w / stride)."""
        y = self.norm1(self.conv1(x)).relu()
        sum_: Tensor = self.shortcut(x) + self.norm2(self.conv2(y))
        return sum_.relu()


def resnet(
    depth: int, width: int = 64, *, classes: int, shape: Shape, batchnorm: bool = False
) -> nn.Module:
    """Build a convolution of stride 1, four stages of basic blocks, global average pool, Linear.

    Args:
        depth: 18 or 34, which sets the blocks of the four stages.
        width: k; the stages have k, 2k, 4k and 8k channels.
        classes: Number of classes, C.
        shape: Shape of one image; of any size.
        batchnorm: Add batch norm after every 3 x 3 convolution, which then has no bias.

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


# --- Wide ResNet ---


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

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, out, h / stride, w / stride)."""
        z = self.norm1(x).relu()
        y: Tensor = self.conv2(self.dropout(self.norm2(self.conv1(z)).relu()))
        return y + (x if self.shortcut is None else self.shortcut(z))


def wide_resnet(
    depth: int, widen: int, *, classes: int, shape: Shape, dropout: float = 0.0
) -> nn.Module:
    """Build a WideResNet: groups of 16w, 32w and 64w channels, batch norm before every activation.

    Args:
        depth: 6n + 4 layers, n >= 1 blocks in each group: 10, 16, 22, 28, 40 ...
        widen: w, the widening factor.
        classes: Number of classes, C.
        shape: Shape of one image; of any size.
        dropout: Probability of dropout between the two convolutions of a block.

    Raises:
        UsageError: A WideResNet cannot have this depth.

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


# --- The residual networks of torchvision ---


def torchvision_resnet(depth: int, *, classes: int, shape: Shape) -> nn.Module:
    """Build the ResNet of torchvision, untrained: made for images of 224 pixels, with batch norm.

    Its weight initialisation "pytorch" is that of torchvision. For images without three channels
    the first convolution is replaced.

    Args:
        depth: 18 or 34.
        classes: Number of classes, C.
        shape: Shape of one image; of any size.
    """
    # Imported on use: the import takes a second, and no other model needs it.
    models = importlib.import_module("torchvision.models")
    model: nn.Module = getattr(models, f"resnet{depth}")(weights=None, num_classes=classes)
    if shape[0] != 3:
        conv = nn.Conv2d(shape[0], 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = conv
    return model


# --- A small vision transformer ---


HEADS = 8


class Attention(nn.Module):
    """softmax(Q Kᵀ / √size) V for each head, and a linear layer of all heads.

    Written out, because the fused kernels of torch have neither second nor forward derivatives,
    which curvature and Jacobians need. For a few dozen patches they would not be faster.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        q, k, v = (
            rearrange(part, "b t (heads size) -> b heads t size", heads=self.heads)
            for part in self.qkv(x).chunk(3, -1)
        )
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        mixed: Tensor = self.out(rearrange(attention @ v, "b heads t size -> b t (heads size)"))
        return mixed


class EncoderBlock(nn.Module):
    """x ← x + attention(norm1(x)); x ← x + mlp(norm2(x)), with dropout of what is added."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the layers."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        added: Tensor = self.dropout(self.mlp(self.norm2(x)))
        return x + added


class VisionTransformer(nn.Module):
    """Patches and a class token through encoder blocks; the token's last state is classified."""

    def __init__(
        self, width: int, depth: int, patch: int, dropout: float, classes: int, shape: Shape
    ) -> None:
        """Make the layers and the position embedding."""
        super().__init__()
        channels, height, wide = shape
        tokens = 1 + (height // patch) * (wide // patch)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        for embedding in (self.token, self.positions):
            nn.init.trunc_normal_(embedding, std=0.02)
        self.dropout = nn.Dropout(dropout)
        heads = math.gcd(width, HEADS)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to (B, classes)."""
        patches = rearrange(self.patches(x), "b width rows columns -> b (rows columns) width")
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        tokens = self.blocks(self.dropout(tokens + self.positions))
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


def vit(
    width: int,
    *,
    classes: int,
    shape: Shape,
    dropout: float = 0.0,
    patch: int = 4,
    depth: int = 6,
) -> nn.Module:
    """Build a vision transformer with norms before the layers, hidden layers of 4d, GELU.

    It has gcd(d, 8) heads.

    Args:
        width: Width of the tokens, d.
        classes: Number of classes, C.
        shape: Shape of one image; its sides are multiples of ``patch``.
        dropout: Probability of dropout in the embedding and in the output of every layer.
        patch: Side of a patch in pixels.
        depth: Number of encoder blocks.

    Raises:
        UsageError: The image does not divide into patches.

    References:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020,
        https://arxiv.org/abs/2010.11929
    """
    _, height, wide = shape
    check(
        height % patch == 0 and wide % patch == 0,
        "--model",
        f"images whose sides are multiples of the {patch} pixels of a patch",
        f"{height} x {wide}",
        "resnet18_K, wrn_D_W and mlp_H take images of any size.",
    )
    return VisionTransformer(width, depth, patch, dropout, classes, shape)
