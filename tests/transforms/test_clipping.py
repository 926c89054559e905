"""`agc_clip` against timm and against a loop over units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradfilter as gf
from _naive import assert_close, assert_same, normal, run
from gradfilter.transforms import _clipping as _clip

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "conv1d": lambda: nn.Conv1d(3, 4, 5),
    "conv2d": lambda: nn.Conv2d(4, 6, (2, 3), groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, (1, 2, 3)),
}


def timms():
    """The clipping of timm; the tests that compare with it skip themselves where it is missing."""
    return pytest.importorskip("timm.utils.agc", reason="timm is not installed")


def uneven(shape, seed, dim=0):
    """Normal numbers whose units along ``dim`` have very different norms."""
    values = normal(*shape, seed=seed)
    if len(shape) > dim:
        along = [-1 if d == dim else 1 for d in range(len(shape))]
        values = values * 10 ** normal(shape[dim], seed=seed + 1).reshape(along)
    return values


def uneven_layer(make, seed):
    """The parameters of a layer, with gradients of about the size at which they are clipped."""
    params = {name: uneven(p.shape, seed) for name, p in make().named_parameters()}
    grads = {name: 0.1 * uneven(p.shape, seed + 7) for name, p in params.items()}
    return params, grads


def clip_unit(w, g, clipping, eps):
    """One unit by the formula; inside, the limit is never below the 1e-6 that floors ‖G‖."""
    limit = clipping * max(w.norm().item(), eps)
    return g * min(1.0, limit / max(g.norm().item(), 1e-6))


def by_units(w, g, dim, clipping=0.01, eps=1e-3):
    """The formula in a loop over the units along ``dim``; None takes the tensor as one unit."""
    if dim is None:
        return clip_unit(w, g, clipping, eps)
    pairs = zip(w.unbind(dim), g.unbind(dim), strict=True)
    units = [clip_unit(*pair, clipping, eps) for pair in pairs]
    return torch.stack(units, dim)


def unit_norms(tensor):
    """Norms over all dims but the first, of a vector or scalar the norm of all."""
    return tensor.flatten(1).norm(dim=1) if tensor.ndim > 1 else tensor.norm()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("clipping", [0.01, 0.1, 2.0])
def test_equals_timm_and_the_formula_unit_by_unit(layer, clipping):
    """timm's rule is the formula wherever units are finite, and either λ·eps or ‖G‖ is >= 1e-6."""
    clipped_units, units = 0, 0
    for seed in range(10):
        params, grads = uneven_layer(LAYERS[layer], 10 * seed)
        theirs = {name: nn.Parameter(p.clone()) for name, p in params.items()}
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        timms().adaptive_clip_grad(theirs.values(), clip_factor=clipping, eps=1e-3)
        ours, out = run(gf.agc_clip(clipping), grads, params)
        assert_close(ours, {name: p.grad for name, p in theirs.items()})
        for name, p in params.items():
            dim = 0 if p.ndim >= 2 else None
            assert_close(ours[name], by_units(p, grads[name], dim, clipping))
        factors = torch.cat([(unit_norms(ours[n]) / unit_norms(grads[n])).view(-1) for n in ours])
        assert_close(out["clipped_fraction"].double(), (factors < 1).double().mean(), atol=1e-6)
        clipped_units, units = clipped_units + (factors < 1).sum(), units + len(factors)
    assert 0 < clipped_units < units


@given(
    seed=st.integers(0, 2**20),
    clipping=st.floats(1e-9, 1e3),
    eps=st.floats(1e-9, 10),
    layer=st.sampled_from(sorted(LAYERS)),
)
def test_never_raises_a_norm_and_clipping_twice_is_clipping_once(seed, clipping, eps, layer):
    params, grads = uneven_layer(LAYERS[layer], seed)
    link = gf.agc_clip(clipping, eps=eps)
    once, _ = run(link, grads, params)
    twice, _ = run(link, once, params)
    assert_close(twice, once, atol=0)
    for name, g in grads.items():
        limit = clipping * unit_norms(params[name]).clamp(min=eps)
        assert (unit_norms(once[name]) <= unit_norms(g)).all()
        assert (unit_norms(once[name]) <= limit * (1 + 1e-12)).all()
        below = unit_norms(g) < limit
        assert_same(once[name][below], g[below])


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_none_and_zero_switch_it_off(off):
    params, grads = uneven_layer(LAYERS["conv2d"], 1)
    clipped, out = run(gf.agc_clip(off), grads, params)
    assert_same(clipped, grads)
    assert out["clipped_fraction"] == 0


def test_many_small_blocks_are_one_large_one(monkeypatch):
    params, grads = {}, {}
    for i, (name, make) in enumerate(LAYERS.items()):
        more = uneven_layer(make, 10 * i)
        for tree, part in zip((params, grads), more, strict=True):
            tree |= {f"{name}.{leaf}": value for leaf, value in part.items()}
    expected, out = run(gf.agc_clip(), grads, params)
    monkeypatch.setattr(_clip, "BLOCK", 30)
    clipped, out_blocks = run(gf.agc_clip(), grads, params)
    assert list(clipped) == list(grads)
    assert_same(clipped, expected)
    assert 0 < out["clipped_fraction"] < 1
    assert_same(out_blocks, out)


def test_exclude_goes_by_name():
    params, grads = {}, {}
    for i, name in enumerate(("body.weight", "head.weight", "body.bias", "head.bias")):
        params[name] = uneven((3, 4) if "weight" in name else (3,), i)
        grads[name] = 10 * uneven(params[name].shape, i + 20)
    clipped, out = run(gf.agc_clip(exclude=lambda name: name == "head.weight"), grads, params)
    everywhere, _ = run(gf.agc_clip(), grads, params)
    assert_same(clipped["head.weight"], grads["head.weight"])
    for name in ("body.weight", "body.bias", "head.bias"):
        assert_same(clipped[name], everywhere[name])
        assert not torch.equal(clipped[name], grads[name])
    assert out["clipped_fraction"] == 1  # of the units it looked at
    nothing, out = run(gf.agc_clip(exclude=lambda name: True), grads, params)
    assert_same(nothing, grads)
    assert out["clipped_fraction"] == 0


def test_one_link_with_exclude_fits_every_branch():
    """In most branches of a partition there is nothing to exclude, which is no mistake."""
    params = {name: uneven((3, 4), i) for i, name in enumerate(("body.weight", "head.weight"))}
    grads = {name: 10 * uneven(p.shape, 20) for name, p in params.items()}
    chain = gf.chain(gf.agc_clip(exclude=lambda name: name == "head.weight"), gf.sgd(1.0))
    update = gf.partition({"body": chain, "head": chain}, lambda name: name.split(".")[0])
    _, _, info = update(params, update.init(params), grads)
    assert info["partition/body/agc_clip/clipped_fraction"] == 1
    assert info["partition/head/agc_clip/clipped_fraction"] == 0


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 3, 2, 3), (2, 3, 1, 2, 2)])
def test_units_of_a_transposed_convolution_lie_along_dim_one(shape):
    w, g = uneven(shape, 3, dim=1), uneven(shape, 4, dim=1)
    expected = by_units(w, g, 1, 0.1)
    for unit_dims in (1, (1,), 1 - len(shape)):
        link = gf.agc_clip(0.1, unit_dims=lambda name, dims=unit_dims: dims)
        assert_close(run(link, {"up.weight": g}, {"up.weight": w})[0]["up.weight"], expected)
    assert not torch.allclose(expected, by_units(w, g, 0, 0.1))


def test_unit_dims_may_be_none_nothing_or_several():
    shape = (3, 2, 4)
    names = ("rule", "one unit", "heads", "entries")
    dims = {"rule": None, "one unit": (), "heads": (0, 1), "entries": (0, 1, 2)}
    params = {name: uneven(shape, i) for i, name in enumerate(names)}
    grads = {name: uneven(shape, i + 9) for i, name in enumerate(names)}
    clipped, _ = run(gf.agc_clip(0.1, unit_dims=dims.get), grads, params)

    def per_unit(name, leading):
        w, g = (tree[name].reshape(leading, -1) for tree in (params, grads))
        return by_units(w, g, 0, 0.1).reshape(shape)

    for name, units in zip(names, (3, 1, 6, 24), strict=True):
        assert_close(clipped[name], per_unit(name, units))


def test_unit_dims_outside_the_tensor_are_refused():
    with pytest.raises(ValueError, match=r"within the 2 dims of 'w', found \(2,\)"):
        run(gf.agc_clip(unit_dims=lambda name: 2), {"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2)})


def test_rows_of_an_embedding_are_units():
    table = uneven((6, 3), 5)
    table[2] = 0
    loss = (nn.functional.embedding(torch.tensor([1, 1, 4, 2]), table.requires_grad_()) ** 3).sum()
    (g,) = torch.autograd.grad(loss + table[2].sum(), table)
    w = table.detach()
    clipped = run(gf.agc_clip(0.01), {"table": g}, {"table": w})[0]["table"]
    assert_close(clipped, by_units(w, g, 0))
    assert_same(clipped[[0, 3, 5]], torch.zeros(3, 3, dtype=torch.float64))
    assert_close(clipped[2].norm().item(), 0.01 * 1e-3)


def test_parameters_that_start_at_zero_do_move():
    params = {"w": torch.zeros(3, 4, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}
    grads = {"w": uneven((3, 4), 6), "b": uneven((3,), 7)}
    update = gf.chain(gf.agc_clip(0.5, eps=1e-2), gf.sgd(1.0))
    moved, _, _ = update(params, update.init(params), grads)
    assert_close(unit_norms(moved["w"]), torch.full((3,), 5e-3, dtype=torch.float64))
    assert_close(unit_norms(moved["b"]).item(), 5e-3)
    further, _, _ = update(moved, update.init(params), grads)
    assert (unit_norms(further["w"]) > unit_norms(moved["w"])).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_unit_that_is_not_finite_is_left_alone_and_the_others_are_clipped(bad):
    """timm would turn the finite entries of such a unit into 0 or NaN."""
    w, g = uneven((4, 5), 8), 10 * uneven((4, 5), 9)
    expected = by_units(w, g, 0)
    g[1, 2] = bad
    expected[1] = g[1]
    bias = g[1].clone()
    clipped, _ = run(gf.agc_clip(0.01), {"w": g, "b": bias}, {"w": w, "b": w[1]})
    assert_close(clipped["w"], expected)
    assert_same(clipped["w"][1], g[1])
    assert_same(clipped["b"], bias)


def test_norms_of_bfloat16_are_taken_in_float32():
    # Norms of 1.003 and 0.997: in bfloat16 both are 1 or less, and neither unit is clipped.
    small = torch.tensor([0.0776, 0.0772]).bfloat16()
    g = torch.stack([torch.stack([torch.ones(()).bfloat16(), small[0]]), small.new_tensor([1, 0])])
    g[1, 0] = 0.997
    w = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).bfloat16()
    clipped, out = run(gf.agc_clip(1.0), {"w": g}, {"w": w})
    assert out["clipped_fraction"] == 0.5
    assert clipped["w"].dtype == torch.bfloat16
    assert (unit_norms(clipped["w"].float()) <= unit_norms(g.float())).all()


def test_long_units_of_bfloat16_follow_the_formula():
    w, g = (uneven((3, 5000), seed).bfloat16() for seed in (11, 12))
    clipped = run(gf.agc_clip(0.01), {"w": g}, {"w": w})[0]["w"]
    assert_close(clipped.double(), by_units(w.double(), g.double(), 0), rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipping": -0.1}, r"0 <= clipping, found clipping=-0.1.*None \(or 0\)"),
        ({"clipping": float("nan")}, "found clipping=nan"),
        ({"eps": 0}, "0 < eps, found eps=0"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.agc_clip(**arguments)


@pytest.mark.parametrize("unit_dims", [None, lambda name: ()], ids=["units", "whole leaves"])
def test_agc_of_several_runs_at_once_is_that_of_each(unit_dims):
    params = {"w": torch.randn(5, 4, 3), "scale": torch.randn(5, 6), "b": torch.randn(5)}
    grads = {name: 10 * torch.randn_like(p) for name, p in params.items()}
    clip = gf.agc_clip(0.1, unit_dims=unit_dims)

    def clipped(grads, params):
        return clip.update(grads, {}, params)[0]

    together = torch.func.vmap(clipped)(grads, params)
    for i in range(5):
        alone = clipped({n: g[i] for n, g in grads.items()}, {n: p[i] for n, p in params.items()})
        for name, leaf in alone.items():
            torch.testing.assert_close(together[name][i], leaf)
            assert not torch.equal(leaf, grads[name][i])
