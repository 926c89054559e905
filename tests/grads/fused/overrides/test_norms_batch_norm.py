"""BatchNorm under plan "fused": running statistics are bit-equal to those of the loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _models import ConvBN, images
from _zoo_case import PLAN, Net, wavy

# What a BatchNorm sees is bit-equal between plans only where it is the first layer. There torch's
# own kernel is run on each microbatch, in order, so that its running statistics are bit-equal too.


def stack(model, batch, m, plan, buffers=None):
    params, own = gf.extract(model)
    loss = gf.model_loss(model, wavy)
    return gf.microbatch_grads(loss, m, plan=plan)(params, batch, buffers=buffers or own)


def assert_buffers_bit_equal(model, batch, m):
    loop, fused = stack(model, batch, m, "loop"), stack(model, batch, m, PLAN)
    fused.gram()
    assert set(loop.buffers) == set(fused.buffers)
    for name, buffer in loop.buffers.items():
        assert fused.buffers[name].dtype == buffer.dtype, name
        assert torch.equal(fused.buffers[name], buffer), name
    return fused


def on_inputs(norm, dims):
    """A BatchNorm that sees the inputs themselves: the same bits under every plan."""
    layer = {1: nn.Linear, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    size = () if dims == 1 else (1,)
    return nn.Sequential(norm, nn.ReLU(inplace=True), layer(4, 3, *size))


def data(n, dims, side=3):
    return torch.randn(n, 4, *[side] * (0 if dims == 1 else dims)), torch.arange(n) % 5


KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
VARIANTS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "fast": {"momentum": 0.9},
    "no-affine": {"affine": False},
    "eps": {"eps": 0.1},
    "untracked": {"track_running_stats": False},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_rank = pytest.mark.parametrize("dims", [1, 2, 3])


@every_variant
@every_rank
@pytest.mark.parametrize(("m", "b"), [(1, 5), (2, 3), (5, 2), (8, 4)])
def test_running_statistics_are_bit_equal(variant, dims, m, b):
    for seed in range(5):
        torch.manual_seed(seed)
        model = on_inputs(KINDS[dims](4, **VARIANTS[variant]), dims)
        assert_buffers_bit_equal(model, data(m * b, dims), m)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 2, 3)])
def test_maps_of_any_shape_and_layout_are_bit_equal(shape):
    norm = KINDS[len(shape)](4)
    x = 3 * torch.randn(6, 4, *shape) + 2
    y = torch.arange(6) % 5
    assert_buffers_bit_equal(nn.Sequential(norm), (x, y), 3)
    swapped = torch.randn(6, *shape, 4).movedim(-1, 1)
    assert_buffers_bit_equal(nn.Sequential(norm), (swapped, y), 3)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_per_sample_maps_are_bit_equal(m):
    model, batch = on_inputs(nn.BatchNorm2d(4), 2), data(m, 2)
    loss = gf.model_loss(model, wavy)
    params, buffers = gf.extract(model)
    loop, fused = (gf.per_sample_grads(loss, plan=p)(params, batch) for p in ("loop", PLAN))
    assert all(torch.equal(fused.buffers[name], loop.buffers[name]) for name in buffers)


@pytest.mark.usefixtures("float64")
@every_variant
@pytest.mark.parametrize("seed", range(3))
def test_a_deep_network_follows_the_loop(variant, seed):
    torch.manual_seed(seed)
    norms = [nn.BatchNorm2d(4, **VARIANTS[variant]) for _ in range(3)]
    convs = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
    model = nn.Sequential(*(f for c, n in zip(convs, norms, strict=True) for f in (c, n, nn.ELU())))
    batch = data(12, 2)
    loop, fused = stack(model, batch, 3, "loop"), stack(model, batch, 3, PLAN)
    torch.testing.assert_close(fused.buffers, loop.buffers, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fused.stacked(), loop.stacked(), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_buffers_handed_on_over_several_batches():
    model = ConvBN()
    after = dict.fromkeys(("loop", PLAN))
    for _ in range(3):
        batch = images()
        for plan in after:
            after[plan] = stack(model, batch, 4, plan, after[plan]).buffers
    torch.testing.assert_close(after[PLAN], after["loop"], rtol=1e-11, atol=1e-12)
    assert after[PLAN]["cumulative.num_batches_tracked"] == 24


@pytest.mark.usefixtures("float64")
def test_training_and_evaluation_mixed():
    model = ConvBN()
    model.bn.eval()
    for buffer in (model.bn.running_mean, model.bn.running_var):
        buffer.add_(torch.rand_like(buffer))
    batch = images()
    loop, fused = stack(model, batch, 3, "loop"), stack(model, batch, 3, PLAN)
    assert torch.equal(fused.buffers["bn.running_mean"], model.bn.running_mean)
    assert fused.buffers["bn.num_batches_tracked"] == 0
    assert fused.buffers["cumulative.num_batches_tracked"] == 6
    torch.testing.assert_close(fused.buffers, loop.buffers, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fused.stacked(), loop.stacked(), rtol=1e-9, atol=1e-12)
    assert fused.buffers["bn.running_mean"] is not model.bn.running_mean


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_norm_used_twice_per_pass_is_bit_equal(momentum):
    norm = nn.BatchNorm1d(4, momentum=momentum)
    model = Net(lambda net, x: net.out(net.norm(x) + net.norm(x[:, [1, 0, 3, 2]] * 2)),
                norm=norm, out=nn.Linear(4, 3))  # fmt: skip
    fused = assert_buffers_bit_equal(model, data(12, 1), 4)
    assert fused.buffers["norm.num_batches_tracked"] == 8


def test_one_norm_under_two_names_is_bit_equal():
    norm = nn.BatchNorm1d(4)
    model = Net(
        lambda net, x: net.out(net.second(net.first(x))),
        first=norm,
        second=norm,
        out=nn.Linear(4, 3),
    )
    loop, fused = stack(model, data(12, 1), 4, "loop"), stack(model, data(12, 1), 4, PLAN)
    assert set(fused.buffers) == set(loop.buffers)
    assert fused.buffers["first.num_batches_tracked"] == 8


def test_at_starts_from_the_incoming_buffers_again():
    model, batch = ConvBN(), images()
    params, buffers = gf.extract(model)
    rows = stack(model, batch, 3, PLAN)
    first = {name: b.clone() for name, b in rows.buffers.items()}
    rows.combine(torch.ones(3))
    rows.gram()  # may run the forward pass again: the buffers do not move
    again = rows.at(params)
    again.gram()
    for name in buffers:
        assert torch.equal(rows.buffers[name], first[name])
        assert torch.equal(again.buffers[name], first[name])


@pytest.mark.parametrize("dims", [1, 2])
def test_one_value_per_channel_raises_as_in_the_loop(dims):
    model, batch = on_inputs(KINDS[dims](4), dims), data(4, dims, side=1)
    messages = set()
    for plan in ("loop", PLAN):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
            stack(model, batch, 4, plan)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_one_value_per_channel_is_fine_in_evaluation():
    model, batch = on_inputs(nn.BatchNorm1d(4), 1).eval(), data(4, 1)
    loop, fused = stack(model, batch, 4, "loop"), stack(model, batch, 4, PLAN)
    torch.testing.assert_close(fused.stacked(), loop.stacked())
    assert fused.buffers["0.num_batches_tracked"] == 0


@pytest.mark.usefixtures("float64")
def test_statistics_that_the_loss_reads_are_right_or_refused():
    """running_mean used after the layer: row m sees what rows before it left."""

    def run(net, x):
        return net.out(net.norm(x) + net.norm.running_mean)

    model, batch = Net(run, norm=nn.BatchNorm1d(4), out=nn.Linear(4, 3)), data(12, 1)
    loop = stack(model, batch, 3, "loop")
    try:
        fused = stack(model, batch, 3, PLAN)
    except RuntimeError as refusal:
        assert "running_mean" in str(refusal)
        return
    torch.testing.assert_close(fused.losses, loop.losses, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fused.stacked(), loop.stacked(), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_gradients_of_a_loss_with_every_mode_of_the_norm():
    """Weight frozen, bias frozen, both frozen."""
    for names in (["norm.weight"], ["norm.bias"], ["norm.weight", "norm.bias"]):
        parts = {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4), "out": nn.Conv2d(4, 2, 1)}
        model = Net(lambda net, x: net.out(F.relu(net.norm(net.conv(x)))), **parts)
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        batch = data(6, 2)
        loop, fused = stack(model, batch, 3, "loop"), stack(model, batch, 3, PLAN)
        torch.testing.assert_close(fused.stacked(), loop.stacked(), rtol=1e-9, atol=1e-12)
