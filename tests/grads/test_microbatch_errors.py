"""Wrong arguments: one error that says what, why and how to fix it, before any computation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import gradfilter as gf
from gradfilter.interop import Filtered, step_gaf

MODEL = nn.Linear(3, 2)
BATCH = (torch.randn(6, 3), torch.arange(6) % 2)
every_plan = pytest.mark.parametrize("plan", ["loop", "vmap", "fused"])


def grads(m=2, batch=BATCH, params=None, criterion=F.cross_entropy, plan="auto", **kwargs):
    params = gf.extract(MODEL)[0] if params is None else params
    return gf.microbatch_grads(gf.model_loss(MODEL, criterion), m, plan=plan)(
        params, batch, **kwargs
    )


def test_n_not_divisible_by_m():
    with pytest.raises(ValueError, match=r"N = 6 samples and M = 4\. Use a batch of 4, or drop"):
        grads(4)


def test_more_microbatches_than_samples():
    with pytest.raises(ValueError, match=r"N = 6 samples and M = 7\. Use a batch of 7"):
        grads(7)


def test_leaves_disagree_on_n():
    with pytest.raises(ValueError, match=r"sizes \[5, 6\]\. Every leaf needs one entry per sample"):
        grads(batch=(torch.randn(6, 3), torch.zeros(5, dtype=torch.long)))


@pytest.mark.parametrize(
    "batch, found",
    [((torch.randn(6, 3), torch.tensor(1)), "a 0-d tensor"), ((1, 2), "no tensor at all")],
)
def test_no_leading_axis(batch, found):
    with pytest.raises(ValueError, match=f"found {found}"):
        grads(batch=batch)


def test_empty_batch():
    with pytest.raises(ValueError, match="empty batch"):
        grads(batch=(torch.randn(0, 3), torch.zeros(0, dtype=torch.long)))


@every_plan
def test_loss_that_is_not_scalar(plan):
    each = lambda out, y: F.mse_loss(out, out.detach() + 1, reduction="none")
    with pytest.raises(ValueError, match=r"one loss per sample, found shape \(3, \d\)"):
        grads(criterion=each, plan=plan)


@every_plan
def test_loss_that_is_no_tensor(plan):
    with pytest.raises(TypeError, match=r"scalar tensor, found tuple.*has_aux=True"):
        grads(criterion=lambda out, y: (out.sum(), out), plan=plan)


@every_plan
def test_detached_loss(plan):
    with pytest.raises(ValueError, match="Is it detached"):
        grads(criterion=lambda out, y: out.detach().sum(), plan=plan)


def ignores(params, batch):
    """A loss of the module's own parameters."""
    return F.cross_entropy(MODEL(batch[0]), batch[1])


@pytest.mark.parametrize("plan", ["auto", "loop", "vmap", "fused"])
@pytest.mark.parametrize("m", [1, 2, None])
def test_a_loss_of_other_parameters(m, plan):
    make = gf.per_sample_grads if m is None else partial(gf.microbatch_grads, microbatches=m)
    with pytest.raises(ValueError, match=r"depends on the parameters.*functional_call\(model, p"):
        make(ignores, plan=plan)(gf.extract(MODEL)[0], BATCH)


def test_the_advice_of_that_error_works():
    def uses(params, batch):
        return F.cross_entropy(functional_call(MODEL, params, (batch[0],)), batch[1])

    params, _ = gf.extract(MODEL)
    found = gf.microbatch_grads(uses, 2)(params, BATCH).gram()
    torch.testing.assert_close(found, grads().gram())
    assert found.diagonal().gt(0).all()


@pytest.mark.parametrize("plan", ["auto", "loop", "vmap", "fused"])
@pytest.mark.parametrize("m", [1, 2])
def test_one_used_parameter_is_enough(m, plan):
    """Also where it is the loss itself, or the graph first leads elsewhere."""
    losses = {
        "w": lambda p, b: p["w"] * 1,
        "itself": lambda p, b: p["w"],
        "elsewhere": lambda p, b: p["w"] * MODEL(b).mean() + MODEL(b).mean(),
    }
    params = {"unused": torch.ones(2), "w": torch.tensor(2.0)}
    for loss in losses.values():
        rows = gf.microbatch_grads(loss, m, plan=plan)(params, BATCH[0]).stacked()
        assert rows["unused"].eq(0).all() and rows["w"].ne(0).all()


@pytest.mark.parametrize("constant", [torch.zeros(()), MODEL.bias.sum()])
def test_a_row_may_be_constant(constant):
    loss = lambda p, b: (p["w"] * b).sum() if b.sum() > 0 else constant
    rows = gf.microbatch_grads(loss, 2, plan="loop")({"w": torch.ones(())}, torch.tensor([1.0, -1]))
    assert rows.stacked()["w"].tolist() == [1, 0]


def test_integer_parameter():
    with pytest.raises(TypeError, match=r"found 'table' of torch\.int64.*no gradient"):
        gf.microbatch_grads(lambda p, b: b.sum(), 2)({"table": torch.arange(3)}, BATCH[0])


@pytest.mark.parametrize("params, found", [({}, "an empty one"), ([torch.ones(1)], "list")])
def test_parameters_that_are_no_dict(params, found):
    with pytest.raises(TypeError, match=f"dict\\[str, Tensor\\], found {found}"):
        gf.microbatch_grads(lambda p, b: b.sum(), 2)(params, BATCH[0])


def test_batch_on_another_device():
    elsewhere = tuple(t.to("meta") for t in BATCH)
    with pytest.raises(ValueError, match=r"batch on cpu, where the parameters are, found .* meta"):
        grads(batch=elsewhere)


def test_inputs_on_another_device():
    with pytest.raises(ValueError, match=r"Move the batch with \.to\('cpu'\)"):
        grads(batch=(BATCH[0].to("meta"), BATCH[1]))


def test_sequence_lengths_may_stay_on_the_cpu():
    from gradfilter.grads._batch import check_device

    params = {"w": torch.ones(1, device="meta")}
    check_device(params, [torch.ones(2, device="meta"), torch.tensor([1, 2])])
    with pytest.raises(ValueError, match="on meta"):
        check_device(params, [torch.tensor([1, 2])])


@pytest.mark.parametrize("m", [0, -1, 2.0, "8"])
def test_bad_number_of_microbatches(m):
    with pytest.raises(ValueError, match="whole number of microbatches >= 1"):
        gf.microbatch_grads(lambda p, b: b.sum(), m)


def test_bad_plan_and_chunk_size():
    with pytest.raises(ValueError, match="found 'fast'"):
        gf.microbatch_grads(lambda p, b: b.sum(), 2, plan="fast")
    with pytest.raises(ValueError, match="chunk_size as a whole number of rows >= 1"):
        gf.microbatch_grads(lambda p, b: b.sum(), 2, chunk_size=0)


def test_a_module_is_no_loss():
    with pytest.raises(TypeError, match=r"found Linear\. Use model_loss"):
        gf.microbatch_grads(MODEL, 2)
    with pytest.raises(TypeError, match=r"`model` to be a torch.nn.Module, found function"):
        gf.model_loss(lambda x: x)
    with pytest.raises(TypeError, match="`criterion` to be callable"):
        gf.model_loss(MODEL, "cross_entropy")


def test_has_aux_in_the_wrong_place():
    with pytest.raises(ValueError, match="model_loss"):
        gf.microbatch_grads(gf.model_loss(MODEL, F.cross_entropy), 2, has_aux=True)


@pytest.mark.parametrize(
    "batch, found",
    [(BATCH[0], "Tensor"), ((*BATCH, BATCH[1]), "tuple of 3")],
)
def test_batches_of_another_form(batch, found):
    with pytest.raises(TypeError, match=f"found {found}"):
        grads(batch=batch)


def test_pair_without_criterion_and_dict_without_loss():
    with pytest.raises(TypeError, match="Expected a criterion"):
        grads(criterion=None)
    with pytest.raises(TypeError, match=r"object with \.loss, found Tensor"):
        grads(criterion=None, batch={"input": BATCH[0]})


def test_buffers_for_a_plain_loss():
    with pytest.raises(TypeError, match="plain loss"):
        gf.microbatch_grads(lambda p, b: (p["w"] * b).sum(), 2)(
            {"w": torch.ones(3)}, BATCH[0], buffers={"b": torch.ones(1)}
        )


def test_buffers_that_are_not_the_models():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    params, buffers = gf.extract(model)
    del buffers["1.running_var"]
    grads_of = gf.microbatch_grads(gf.model_loss(model, F.cross_entropy), 2)
    with pytest.raises(ValueError, match=r"missing \['1.running_var'\], extra \['stray'\]"):
        grads_of(params, BATCH, buffers={**buffers, "stray": torch.ones(1)})


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(affine=False), nn.Linear(4, 3))


def test_a_lazy_module_has_to_run_once_first():
    model, x, y = lazy(), torch.randn(8, 5), torch.arange(8) % 3
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.functional.cross_entropy
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    step = gf.train_step(gf.model_loss(model, criterion), update, microbatches=2)
    for meet in (
        lambda: gf.extract(model),
        lambda: step.init(model),
        lambda: Filtered(model, criterion, gf.mean_rows(), sgd, 2),
        lambda: step_gaf(model, sgd, criterion, [(x, y), (x, y)]),
    ):
        with pytest.raises(ValueError, match=r"the lazy '0\.weight' .* Run one forward pass first"):
            meet()
    model(x)
    step(step.init(model), (x, y))


@pytest.mark.parametrize("plan", ["auto", "fused", "loop", "vmap"])
def test_parameters_of_another_model_with_the_same_names_are_named(plan):
    model, other = nn.Linear(5, 3), nn.Linear(6, 3)
    loss = gf.model_loss(model, nn.functional.cross_entropy)
    batch = torch.randn(8, 5), torch.arange(8) % 3
    with pytest.raises(
        ValueError, match=r"Expected 'weight' of shape \(3, 5\), found \(3, 6\): par"
    ):
        gf.microbatch_grads(loss, 2, plan=plan)(gf.extract(other)[0], batch)
