"""The models of the lab: parameter counts, round trips, seeds and derivatives."""

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F

import gradfilter as gf
from _lab import command, metrics
from _lab_models import CIFAR, DIGITS, NAMES, RESIDUAL, SMALL, images, made, weights
from gradfilter.lab.models._build import (
    INITS,
    build_model,
    model_arguments,
    parameter_count,
    residual_blocks,
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("resnet18_1", 2902), ("resnet18_5", 68950), ("resnet18_10", 274090)),
        *(("resnet18_20", 1092970), ("resnet18_64", 11168266), ("resnet18", 11168266)),
        *(("cnn_1", 510), ("cnn_10", 39030), ("cnn_64", 1556106), ("cnn5_10", 39030)),
        # 9·3·k + k, 9·k·2k + 2k, and a linear layer of 2k channels at 8 x 8 places.
        ("cnn3_4", 112 + 296 + 512 * 10 + 10),
        # Convolutions as the literature counts them, and one linear layer of 5130.
        *(("vgg11", 9220480 + 5130), ("vgg13", 9404992 + 5130)),
        *(("vgg16", 14714688 + 5130), ("vgg19", 20024384 + 5130)),
        *(("wrn_28_10", 36479194), ("wrn_16_8", 10961370), ("wrn_40_2", 2243546)),
        *(("lenet", 62006), ("mlp_64", 3072 * 64 + 64 + 64 * 64 + 64 + 650)),
    ],
)
def test_parameter_counts(name, count):
    assert parameter_count(made(name)) == count


def test_resnet34_has_3463_blocks():
    blocks = [
        [second.out_channels for _, second in residual_blocks(made(name))].count(width)
        for name in ("resnet18", "resnet34")
        for width in (64, 128, 256, 512)
    ]
    assert blocks == [2, 2, 2, 2, 3, 4, 6, 3]
    # 8 blocks more than resnet18, each of two convolutions with bias.
    more = sum(n * 2 * (9 * w * w + w) for w, n in [(64, 1), (128, 2), (256, 4), (512, 1)])
    assert parameter_count(made("resnet34")) == 11168266 + more


def test_batchnorm_takes_the_place_of_biases():
    norms = {k: v.shape for k, v in made("resnet18_2", additions=["batchnorm"]).named_parameters()}
    plain = {k: v.shape for k, v in made("resnet18_2").named_parameters()}
    assert not any(k.endswith("bias") and "conv" in k for k in norms)
    # A bias becomes a scale and a shift, after each of 17 convolutions.
    assert sum(k.endswith("bias") and "conv" in k for k in plain) == 17
    assert len(norms) == len(plain) + 17


@pytest.mark.parametrize("depth", [18, 34])
def test_tv_resnets_are_torchvisions(depth):
    models = pytest.importorskip("torchvision.models")
    theirs = getattr(models, f"resnet{depth}")(weights=None, num_classes=7)
    ours = made(f"tv_resnet{depth}", classes=7)
    assert type(ours) is type(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


def test_first_convolution_of_tv_resnet_for_grey_images():
    weight = made("tv_resnet18", shape=(1, 64, 64)).conv1.weight
    assert weight.shape == (64, 1, 7, 7)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 49)), rel=0.05)


@pytest.mark.parametrize(
    ("name", "shape", "more", "init"),
    [
        (name, shape, more | {"additions": additions}, init)
        for name, shape, more in SMALL
        for init in INITS
        if name.startswith(RESIDUAL) or "fixup" not in init
        for additions in (
            ([], ["batchnorm"])
            if name.startswith(("resnet18_2", "cnn", "vgg8"))
            else (["dropout-0.25"],)
            if name.startswith(("vit", "mlp", "wrn"))
            else ([],)
        )
    ],
)
def test_checkpoint_round_trip(name, shape, more, init):
    arguments = model_arguments(name, classes=5, shape=shape, init=init, seed=7, **more)
    model = build_model(name, classes=5, shape=shape, init=init, seed=7, **more)
    x = images(shape)
    model(x)  # statistics of batch norm take part
    with torch.no_grad():
        for parameter in model.parameters():  # trained, in a way
            parameter.add_(0.01)
    file = io.BytesIO()
    torch.save({"model": arguments, "state": model.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert json.loads(json.dumps(loaded["model"])) == arguments
    again = build_model(**loaded["model"])
    again.load_state_dict(loaded["state"])
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_seed_gives_the_parameters_and_leaves_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights(made("resnet18_2", init="nkaiming", seed=1))
    assert torch.equal(torch.rand(3), expected)
    with torch.device("meta"):
        second = weights(made("resnet18_2", init="nkaiming", seed=1))
    other = weights(made("resnet18_2", init="nkaiming", seed=2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first if first[k].ndim > 1)


@pytest.mark.parametrize(
    ("name", "shape", "more"),
    [
        *SMALL[:1],
        ("resnet18_2", DIGITS, {"additions": ["batchnorm"]}),
        ("tv_resnet18", (3, 16, 16), {}),
        ("cnn_2", CIFAR, {}),
        ("cnn_2", CIFAR, {"additions": ["batchnorm"]}),
        ("cnn3_2", DIGITS, {}),
        ("cnn3_2", DIGITS, {"additions": ["batchnorm"]}),
        ("cnn5_2", DIGITS, {}),
        ("vgg11", (1, 32, 32), {"width": 2}),
        ("vit_8", DIGITS, {"depth": 2}),
        ("mlp_16", DIGITS, {}),
        ("wrn_10_1", DIGITS, {}),
        ("lenet", (1, 16, 16), {}),
    ],
)
def test_fused_plan_runs_without_a_warning(name, shape, more):
    """Warnings are errors here, and the fallback to the loop is one."""
    model = made(name, shape, 3, **more).double()
    loss = gf.model_loss(model, F.cross_entropy)
    params, buffers = gf.extract(model)
    batch = images(shape, 8).double(), torch.arange(8) % 3
    rows = gf.microbatch_grads(loss, 2)(params, batch, buffers=buffers).stacked()
    loop = gf.microbatch_grads(loss, 2, plan="loop")(params, batch, buffers=buffers).stacked()
    torch.testing.assert_close(rows, loop)


@pytest.mark.parametrize("name", ["mlp_8", "vit_8", "wrn_10_1"])
def test_fused_plan_runs_with_dropout(name):
    model = made(name, DIGITS, 3, additions=["dropout-0.5"])
    loss = gf.model_loss(model, F.cross_entropy)
    params, buffers = gf.extract(model)
    batch = images(DIGITS, 8), torch.arange(8) % 3
    rows = gf.microbatch_grads(loss, 2)(params, batch, buffers=buffers)
    assert rows.gram().isfinite().all()


# torch says so of itself when it loads its formulas of forward derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "shape", "more"), SMALL, ids=NAMES)
def test_second_and_forward_derivatives(name, shape, more):
    """Curvature and operator norms need both, torch's fused kernels do not have them all."""
    more = {**more, "depth": 1} if "vit" in name else more
    model = made(name, shape, 3, **more).double().eval()
    x, v = images(shape, 2).double(), images(shape, 2, seed=1).double()

    def loss(x):
        return F.cross_entropy(model(x), torch.tensor([0, 2]))

    _, along = torch.func.jvp(loss, (x,), (v,))
    gradient, curved = torch.func.jvp(torch.func.grad(loss), (x,), (v,))
    torch.testing.assert_close(along, (gradient * v).sum())
    assert curved.isfinite().all()


@pytest.mark.slow
def test_the_network_for_digits_learns_them_in_a_few_epochs(tmp_path):
    """96 % of the test split after 8 epochs, with every one of three seeds."""
    for seed in range(3):
        options = ("--seed", seed, "--save-dir", tmp_path, "--learning-rate", 0.05)
        code, *_ = command("train", "--model", "cnn3_16", "--epochs", 8, *options)
        assert code == 0
    runs = [path.parent for path in tmp_path.rglob("metrics.jsonl")]
    assert len(runs) == 3
    assert min(metrics(run)[-1]["test_accuracy"] for run in runs) > 0.96
