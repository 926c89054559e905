"""A step inside of `torch.func.grad` has its derivative; rows that are constants are refused.

The reference is the same formulas written out, under torch.autograd.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
from _naive import assert_close

pytestmark = pytest.mark.usefixtures("float64")
P = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)}
ROWS = torch.tensor(
    [[[1.0, 0.2], [0.3, -1.0]], [[0.9, 0.4], [0.1, -0.7]], [[-1.0, 0.1], [0.2, 0.9]]],
    dtype=torch.float64,
)


def after(params):
    return (params["w"] ** 3).sum()


def written_out(name, w, rows, lr):
    """The parameters after one step from the first state."""
    g = rows.mean(0)
    if name == "agree":
        c = rows[0]
        d = 1 - (c * rows[1]).sum() / (c.norm() * rows[1].norm())
        assert d <= 0.97  # and the third row, which points away, is left out
        g = (rows[0] + rows[1]) / 2
    if name == "agc":
        unit = lambda t: t.norm(dim=1, keepdim=True)
        g = g * (0.01 * unit(w) / unit(g)).clamp(max=1)
    if name == "global":
        g = g * (0.1 / g.norm()).clamp(max=1)
    if name == "adam":
        return w - lr * g / (g.square().sqrt() + 1e-8)
    if name == "decay":
        g = g + 0.1 * w
    return w - lr * g


CHAINS = {
    "sgd": lambda lr: gf.chain(gf.mean_rows(), gf.sgd(lr)),
    "momentum": lambda lr: gf.chain(gf.mean_rows(), gf.sgd(lr, momentum=0.9)),
    "decay": lambda lr: gf.chain(gf.mean_rows(), gf.sgd(lr, weight_decay=0.1)),
    "adam": lambda lr: gf.chain(gf.mean_rows(), gf.adam(lr)),
    "agree": lambda lr: gf.chain(gf.agree_filter(0.97), gf.sgd(lr)),
    "agc": lambda lr: gf.chain(gf.mean_rows(), gf.agc_clip(0.01), gf.sgd(lr)),
    "global": lambda lr: gf.chain(gf.mean_rows(), gf.clip_by_global_norm(0.1), gf.sgd(lr)),
    "guarded": lambda lr: gf.chain(gf.finite_filter(), gf.mean_rows(), gf.sgd(lr)),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("of", ["params", "rows", "lr"])
def test_a_step_has_its_derivative(name, of):
    start = {"params": P["w"], "rows": ROWS, "lr": torch.tensor(0.3)}

    def stepped(value):
        given = start | {of: value}
        update, params = CHAINS[name](given["lr"]), {"w": given["params"]}
        return after(update(params, update.init(params), {"w": given["rows"]})[0])

    leaves = {key: value.clone().requires_grad_(key == of) for key, value in start.items()}
    moved = written_out(name, leaves["params"], leaves["rows"], leaves["lr"])
    (expected,) = torch.autograd.grad(after({"w": moved}), leaves[of])
    assert expected.abs().sum() > 0
    assert_close(torch.func.grad(stepped)(start[of]), expected, rtol=1e-8)
    tangent = torch.ones_like(start[of])
    _, along = torch.func.jvp(stepped, (start[of],), (tangent,))
    assert_close(along, (expected * tangent).sum(), rtol=1e-8)


def test_two_steps_one_after_the_other():
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1, momentum=0.9))

    def twice(rows):
        params, state = P, update.init(P)
        for _ in range(2):
            params, state, _ = update(params, state, {"w": rows})
        return after(params)

    rows = ROWS.clone().requires_grad_()
    g = rows.mean(0)
    moved = P["w"] - 0.1 * g - 0.1 * (1.9 * g)
    (expected,) = torch.autograd.grad(after({"w": moved}), rows)
    assert_close(torch.func.grad(twice)(ROWS), expected)


def test_outside_of_torch_func_a_step_is_part_of_no_graph():
    update, params = gf.sgd(0.1), {"w": nn.Parameter(P["w"])}
    new, _, _ = update(params, update.init(params), {"w": ROWS[0]})
    assert not new["w"].requires_grad


@pytest.mark.parametrize("plan", ["auto", "fused", "loop", "vmap"])
@pytest.mark.parametrize("of", ["params", "batch"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_rows_that_would_count_as_constants_are_refused(plan, of, transform):
    model = nn.Linear(2, 2)
    params, _ = gf.extract(model)
    x, y = torch.randn(6, 2), torch.arange(6) % 2
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 3, plan=plan)
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1))

    def stepped(value):
        own = params | {"weight": value} if of == "params" else params
        batch = (value if of == "batch" else x, y)
        return update(own, update.init(own), grads_of(own, batch))[0]["weight"].square().sum()

    with pytest.raises(ValueError, match="for which these rows would be constants"):
        transform(stepped)(params["weight"] if of == "params" else x)
