"""The models of the lab against their layers, written out."""

import pytest
import torch
import torch.nn.functional as F

from _lab_models import DIGITS, images, made
from gradfilter.lab.models._networks import resnet


def randomised(model, seed=0):
    """The model in float64 with all that it holds drawn anew, so that no layer is neutral."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            fan_in = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 9
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else noise / fan_in**0.5)
    return model


def taker(model):
    """Hands out the model's parameters and statistics in order, which is that of the layers."""
    tensors = iter(t for t in model.state_dict().values() if t.ndim)
    return lambda n: [next(tensors) for _ in range(n)]


def conv_norm(take, x, stride, batchnorm):
    if not batchnorm:
        return F.conv2d(x, *take(2), stride, 1)
    [weight] = take(1)
    scale, shift, mean, var = take(4)
    return F.batch_norm(F.conv2d(x, weight, None, stride, 1), mean, var, scale, shift)


def naive_resnet(model, x, blocks, batchnorm):
    take = taker(model)
    x = conv_norm(take, x, 1, batchnorm).relu()
    for stage, count in enumerate(blocks):
        for block in range(count):
            first = stage > 0 and block == 0
            y = conv_norm(take, x, 2 if first else 1, batchnorm).relu()
            y = conv_norm(take, y, 1, batchnorm)
            x = ((F.conv2d(x, *take(1), None, 2) if first else x) + y).relu()
    return F.linear(x.mean((2, 3)), *take(2))


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize(("depth", "blocks"), [(18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))])
def test_resnet_wiring(depth, blocks, batchnorm):
    shape = (2, 9, 12)
    model = randomised(resnet(depth, 3, classes=5, shape=shape, batchnorm=batchnorm))
    x = images(shape).double()
    torch.testing.assert_close(model(x), naive_resnet(model, x, blocks, batchnorm))


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("name", ["cnn_3", "cnn5_3", "vgg8", "vgg13"])
def test_plain_wiring(name, batchnorm):
    shape, options = (3, 33, 64), {"width": 2} if "vgg" in name else {}
    model = randomised(made(name, shape, 5, additions=["batchnorm"] * batchnorm, **options))
    x = expected = images(shape).double()
    # m, a: pool of 2; M: of 4; g: global average
    plan = {
        "cnn_3": "c cm cm cmM",
        "cnn5_3": "c ca ca cg",
        "vgg8": "cm cm cm cm cmg",
        "vgg13": "ccm ccm ccm ccm ccmg",
    }
    take = taker(model)
    for step in plan[name].replace(" ", ""):
        match step:
            case "c":
                expected = conv_norm(take, expected, 1, batchnorm).relu()
            case "m":
                expected = F.max_pool2d(expected, 2)
            case "M":
                expected = F.max_pool2d(expected, 4)
            case "a":
                expected = F.avg_pool2d(expected, 2)
            case "g":
                expected = expected.mean((2, 3))
    torch.testing.assert_close(model(x), F.linear(expected.flatten(1), *take(2)))


def test_wide_resnet_wiring():
    shape = (3, 8, 12)
    model = randomised(made("wrn_16_2", shape, 5, additions=["dropout-0.3"]))
    take, x = taker(model), images(shape).double()

    def norm_relu(x):
        scale, shift, mean, var = take(4)
        return F.batch_norm(x, mean, var, scale, shift).relu()

    expected = F.conv2d(x, *take(1), None, 1, 1)
    for group in range(3):
        for block in range(2):
            stride = 2 if group > 0 and block == 0 else 1
            z = norm_relu(expected)
            y = F.conv2d(z, *take(1), None, stride, 1)
            y = F.conv2d(norm_relu(y), *take(1), None, 1, 1)
            expected = y + (F.conv2d(z, *take(1), None, stride) if block == 0 else expected)
    expected = norm_relu(expected).mean((2, 3))
    torch.testing.assert_close(model(x), F.linear(expected, *take(2)))


@pytest.mark.parametrize("width", [16, 6])
def test_vit_wiring(width):
    shape = (3, 8, 12)
    model = randomised(made(f"vit_{width}", shape, 5, depth=2))
    x = images(shape).double()
    p = model.state_dict()
    patches = F.unfold(x, 4, stride=4).mT @ p["patches.weight"].flatten(1).T + p["patches.bias"]
    tokens = torch.cat([p["token"].expand(4, 1, width), patches], 1) + p["positions"]
    heads = {16: 8, 6: 2}[width]
    for i in range(2):
        block = torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        ).double()
        theirs = {
            "self_attn.in_proj_": "attention.qkv.",
            "self_attn.out_proj.": "attention.out.",
            "linear1.": "mlp.0.",
            "linear2.": "mlp.2.",
            "norm1.": "norm1.",
            "norm2.": "norm2.",
        }
        block.load_state_dict(
            {
                their + kind: p[f"blocks.{i}.{our}{kind}"]
                for their, our in theirs.items()
                for kind in ("weight", "bias")
            }
        )
        tokens = block(tokens)
    final = F.layer_norm(tokens[:, 0], (width,), p["norm.weight"], p["norm.bias"])
    expected = F.linear(final, p["head.weight"], p["head.bias"])
    torch.testing.assert_close(model(x), expected)


def test_lenet_and_mlp_wiring():
    model, x = randomised(made("lenet", (1, 21, 32), 5)), images((1, 21, 32)).double()
    take, expected = taker(model), x
    for _ in range(2):
        expected = F.max_pool2d(F.conv2d(expected, *take(2)).relu(), 2)
    expected = F.linear(expected.flatten(1), *take(2)).relu()
    expected = F.linear(F.linear(expected, *take(2)).relu(), *take(2))
    torch.testing.assert_close(model(x), expected)

    mlp, x = randomised(made("mlp_7", (2, 3, 5), 5, depth=3)), images((2, 3, 5)).double()
    take, expected = taker(mlp), x.flatten(1)
    for _ in range(3):
        expected = F.linear(expected, *take(2)).relu()
    torch.testing.assert_close(mlp(x), F.linear(expected, *take(2)))


@pytest.mark.parametrize("name", ["mlp_64", "vit_16", "wrn_10_1"])
def test_dropout_only_in_training(name):
    model, plain = (made(name, DIGITS, additions=a) for a in (["dropout-0.5"], []))
    x = images(DIGITS)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.equal(model.train()(x), model(x))
