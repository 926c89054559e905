"""Image models of torchvision and timm with random weights."""

from torch import nn
from torch.nn import functional as F

from _zoo_case import Case, inputs


def of_torchvision(name, **options):
    def build():
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10, **options)

    return build


def of_timm(name, **options):
    def build():
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return build


def vision_transformer():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # zero at first: no gradient would pass
    return model


def swin():
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        [2, 2], 12, [2, 2], [2, 4], [3, 3], stochastic_depth_prob=0.0, num_classes=10
    )


def convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)]
    return ConvNeXt(blocks, layer_scale=0.1, num_classes=10)


def mixer():
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(10, img_size=16, patch_size=4, num_blocks=2, embed_dim=24)


def convmixer():
    from timm.models.convmixer import ConvMixer

    return ConvMixer(dim=16, depth=2, kernel_size=5, patch_size=2, num_classes=10)


def standardised():
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    return ResNetV2((1, 1), (128, 128), num_classes=10, stem_chs=32, conv_layer=StdConv2d)


def case(name, build, side, rules, *, channels=3, sizes=((2, 2),), slow=False):
    batch = inputs(channels, side, side, classes=10)
    return Case(name, build, batch, F.cross_entropy, rules, sizes, large=True, slow=slow)


def group_norm(channels):
    return nn.GroupNorm(4, channels)


CASES = [
    case("resnet18", of_torchvision("resnet18"), 64, "conv batch_norm linear", slow=True),
    case(
        *("resnet18-gn", of_torchvision("resnet18", norm_layer=group_norm), 32, "conv group_norm"),
        slow=True,
    ),
    case(
        *("mobilenet-v2", of_torchvision("mobilenet_v2", dropout=0.0), 64, "conv batch_norm"),
        slow=True,
    ),
    case("densenet121", of_torchvision("densenet121"), 64, "conv batch_norm", slow=True),
    case("shufflenet", of_torchvision("shufflenet_v2_x0_5"), 64, "conv batch_norm"),
    case(
        "efficientnet-b0",
        of_torchvision("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0),
        64,
        "conv batch_norm",
        slow=True,
    ),
    case(
        "convnext",
        convnext,
        32,
        "conv layer_norm linear",
    ),
    case("vision-transformer", vision_transformer, 16, "conv layer_norm multi_head_attention"),
    case("swin-transformer", swin, 24, "conv layer_norm linear"),
    case(
        "timm-vit",
        of_timm(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3
        ),
        16,
        "conv layer_norm linear attention",
    ),
    case(
        "timm-mixer",
        mixer,
        16,
        "conv layer_norm linear",
    ),
    case(
        "timm-resnetv2",
        of_timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_chs=8),
        64,
        "conv",
    ),
    case(
        "timm-nfnet",
        of_timm("nf_regnet_b0", channels=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
        64,
        "conv",
    ),
    case(
        "timm-standardised",
        standardised,
        32,
        "conv group_norm",
    ),
    case(
        "timm-convmixer",
        convmixer,
        16,
        "conv batch_norm",
    ),
]
