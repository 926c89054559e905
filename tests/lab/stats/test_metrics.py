"""Every metric against its formula, one sample at a time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import hessian, jacrev

from _stats_case import CHANNELS, CLASSES, SIDE, network, restored
from gradfilter.lab.stats._metrics import MEASURES, grey_image, jittered, measure_of, seeds, uniform
from gradfilter.lab.stats._recorder import recorder
from gradfilter.lab.stats._stats_config import METRICS, StatsConfig
from gradfilter.lab.stats._stats_files import origin

# torch itself, when a derivative is taken forwards for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

NORMALIZATIONS = ["none", "softmax", "logsoftmax", "crossentropy", "jacobian"]


def batch(case, stop=6):
    places = torch.arange(stop)
    train = case.data.train
    return train.images.fetch(places), train.labels[places], train.ids[places]


def measured(case, metric, images=None, **settings):
    own, labels, ids = batch(case)
    x = own if images is None else images
    return measure_of(StatsConfig(metric=metric, **settings), case)(x, labels, ids)


def g(model, x, y, normalization, only):
    """Return the function that is differentiated, for one sample."""
    logits = model(x[None])[0]
    if normalization == "crossentropy":
        return -logits.log_softmax(0)[y : y + 1]
    if normalization == "softmax":
        logits = logits.softmax(0)
    elif normalization == "logsoftmax":
        logits = logits.log_softmax(0)
    return logits[y : y + 1] if only else logits


def jacobian(model, x, y, normalization, only):
    whole = jacrev(lambda x: g(model, x, y, normalization, False))(x).flatten(1)
    if normalization == "jacobian":
        whole = whole / whole.norm()
    return whole[y : y + 1] if only else whole


def every(case, function):
    images, labels, ids = batch(case)
    return torch.stack([function(*one) for one in zip(images, labels, ids, strict=True)])


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_every_metric_of_the_catalogue_can_be_measured():
    assert set(MEASURES) == set(METRICS)


# Outputs


def test_crossentropy_accuracy_and_confidence():
    case = restored()
    p = every(case, lambda x, y, i: case.model(x[None])[0].softmax(0)).detach()
    _, labels, _ = batch(case)
    own = p[torch.arange(6), labels]
    close(measured(case, "crossentropy").numbers, -own.log())
    close(measured(case, "confidence").numbers, ((p**2).sum(1) - own**2 + (1 - own) ** 2).sqrt())
    predicted = p.argmax(1)
    labels = torch.where(torch.arange(6) % 2 == 0, predicted, (predicted + 1) % CLASSES)
    images, _, ids = batch(case)
    found = measure_of(StatsConfig(metric="accuracy"), case)(images, labels, ids).numbers
    assert found.tolist() == [1, 0] * 3


# Jacobians

CASES = [(n, only) for n in NORMALIZATIONS for only in (False, True)]
CASES.remove(("crossentropy", True))


@pytest.mark.parametrize(("normalization", "only"), CASES)
def test_jacobian_and_operator_norm(normalization, only):
    case = restored()
    settings = {"normalization": normalization, "target_logit_only": only}
    each = lambda f: every(case, lambda x, y, i: f(jacobian(case.model, x, y, normalization, only)))
    close(measured(case, "jacobian", **settings).numbers, each(torch.linalg.norm))
    expected = each(lambda j: torch.linalg.svdvals(j)[0])
    for method, tolerance in (("gram", 1e-9), ("power", 1e-4)):
        found = measured(case, "jacobian_operator_norm", method=method, **settings)
        close(found.numbers, expected, tolerance)
        assert found.residual.max() < 1e-3


def test_bigmem_changes_no_number():
    case = restored()
    for metric in ("jacobian", "jacobian_operator_norm", "tangent_hessian"):
        close(measured(case, metric).numbers, measured(case, metric, bigmem=True).numbers, 1e-12)


# Tangents


def test_jitter_of_colours():
    case = restored()
    images, _, ids = batch(case)
    mean, std = case.data.mean, case.data.std
    copies = jittered(images, ids, mean, std, 3)
    factors = uniform(3, "jitter", ids, (4, 3), 0.99, 1.01)
    assert copies.shape == (4, *images.shape)
    assert (factors >= 0.99).all() and (factors <= 1.01).all() and factors.std() > 0.004
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    for j in range(4):
        for n in range(6):
            b, c, s = factors[n, j]
            raw = (images[n] * std + mean) * b
            raw = raw.clamp(0, 1)
            raw = (c * raw + (1 - c) * (raw * weights).sum(0).mean()).clamp(0, 1)
            raw = (s * raw + (1 - s) * (raw * weights).sum(0)).clamp(0, 1)
            assert ((raw - mean) / std - copies[j, n]).abs().max() < 1e-12


def test_jitter_of_grey_images_and_of_numbers_that_are_no_colours():
    ids = torch.arange(2)
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    images = torch.tensor([[-3.0, 5.0], [0.2, 1.0]])[:, None, None]
    copies = jittered(images, ids, zero, one, 0)
    assert copies.shape == (4, 2, 1, 1, 2)
    assert torch.equal(grey_image(images), images)
    assert (copies - images).abs().max() < 0.2  # not clamped to [0, 1]
    assert copies.max() <= 5 and copies[:, 1].max() <= 1
    assert (copies != images).any()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("normalization", "only"), CASES)
@pytest.mark.parametrize("metric", ["tangent_jacobian", "tangent_hessian"])
def test_tangents(metric, normalization, only, legacy):
    if normalization == "jacobian" and metric == "tangent_jacobian":
        return
    case = restored()
    images, _, ids = batch(case)
    copies = jittered(images, ids, case.data.mean, case.data.std, 0)
    place = {int(i): n for n, i in enumerate(ids)}
    function = g if metric == "tangent_jacobian" else jacobian

    def slow(x, y, i):
        h = lambda x: function(case.model, x, y, normalization, only)
        terms = []
        for copy in copies[:, place[int(i)]]:
            delta = 0.1 if legacy else (x - copy).norm()
            terms.append(((h(x) - h(copy)).norm() / delta) ** 2)
        return (sum(terms) / 4).sqrt().detach()

    settings = {"normalization": normalization, "target_logit_only": only, "legacy_scale": legacy}
    close(measured(case, metric, **settings).numbers, every(case, slow), 1e-7)


def test_tangent_of_a_black_image_is_no_number():
    case = restored()
    black = (-case.data.mean / case.data.std).expand(6, CHANNELS, SIDE, SIDE)
    assert measured(case, "tangent_jacobian", images=black).numbers.isnan().all()
    assert (measured(case, "tangent_jacobian", images=black, legacy_scale=True).numbers == 0).all()


# The loss around an image


def loss(model, x, y):
    return -model(x[None])[0].log_softmax(0)[y]


def test_loss_gradient_trace_and_top():
    case = restored()
    slope = lambda x, y, i: jacrev(lambda x: loss(case.model, x, y))(x).norm()
    close(measured(case, "loss_gradient").numbers, every(case, slope))

    def dense(x, y):
        return hessian(lambda x: loss(case.model, x, y))(x).reshape(x.numel(), x.numel())

    tops = every(case, lambda x, y, i: torch.linalg.eigvalsh(dense(x, y))[-1])
    found = measured(case, "loss_hessian_top")
    close(found.numbers, tops, 1e-4)
    assert found.residual.max() < 1e-2
    traces = every(case, lambda x, y, i: dense(x, y).trace())
    # As many probes as pixels: exact.
    many = measured(case, "loss_hessian_trace", num_probes=CHANNELS * SIDE * SIDE)
    close(many.numbers, traces, 1e-9)
    few = measured(case, "loss_hessian_trace", num_probes=8).numbers
    assert (few - traces).abs().max() > 1e-6
    assert (few - traces).abs().max() < traces.abs().max()


# Random numbers belong to samples

RANDOM = {
    "jacobian_operator_norm": {"method": "power", "num_power_iters": 2},
    "tangent_jacobian": {},
    "tangent_hessian": {},
    "loss_hessian_trace": {"num_probes": 3},
    "loss_hessian_top": {"num_power_iters": 3},
}


@pytest.mark.parametrize("metric", RANDOM)
def test_numbers_do_not_depend_on_batch_or_order(metric):
    case = restored()
    measure = measure_of(StatsConfig(metric=metric, **RANDOM[metric]), case)
    images, labels, ids = batch(case)
    whole = measure(images, labels, ids).numbers
    order = torch.tensor([4, 1, 3])
    some = measure(images[order], labels[order], ids[order]).numbers
    close(some, whole[order], 1e-9)
    close(measure(images[2:3], labels[2:3], ids[2:3]).numbers, whole[2:3], 1e-9)
    other = StatsConfig(metric=metric, mc_sample_seed=1, **RANDOM[metric])
    assert (measure_of(other, case)(images, labels, ids).numbers - whole).abs().max() > 1e-9


@pytest.mark.parametrize("metric", RANDOM)
def test_the_same_image_under_two_ids_has_two_draws(metric):
    case = restored()
    settings = {
        **RANDOM[metric],
        **({"num_power_iters": 1} if "num_power_iters" in RANDOM[metric] else {}),
    }
    measure = measure_of(StatsConfig(metric=metric, **settings), case)
    images, labels, _ = batch(case)
    same = images[:1].expand(3, -1, -1, -1), labels[:1].expand(3)
    one, again, other = measure(*same, torch.tensor([4, 4, 5])).numbers
    assert one.item() == pytest.approx(again.item(), rel=1e-12)
    assert one.item() != pytest.approx(other.item(), rel=1e-9)


def test_every_sample_and_purpose_has_its_own_seed():
    ids = torch.arange(50)
    found = [*seeds(0, "start", ids), *seeds(0, "probes", ids), *seeds(1, "start", ids)]
    assert len(set(found)) == 150
    assert seeds(0, "start", ids.flip(0)) == found[:50][::-1]
    torch.Generator().manual_seed(max(found))


# Records


def test_record_has_ids_labels_and_numbers_of_its_stretch():
    case = restored()
    train = case.data.train
    config = StatsConfig(metric="crossentropy")
    record = recorder(config, train, measure_of(config, case))(3, 7)
    assert (record.start, record.stop) == (3, 7)
    assert record.sample_ids == [121, 128, 135, 142]
    assert record.targets == train.labels[3:7].tolist() != record.ground_truths
    assert record.ground_truths == train.clean[3:7].tolist()
    expected = measure_of(config, case)(
        train.images.fetch(torch.arange(3, 7)), train.labels[3:7], train.ids[3:7]
    )
    assert record.stats == expected.numbers.tolist()
    assert record.path_distances is record.residual is None


def test_restored_targets_are_the_true_labels():
    case = restored()
    config = StatsConfig(metric="crossentropy", restored_targets=True)
    record = recorder(config, case.data.train, measure_of(config, case))(0, 4)
    assert record.targets == record.ground_truths == case.data.train.clean[:4].tolist()
    noisy = StatsConfig(metric="crossentropy")
    other = recorder(noisy, case.data.train, measure_of(noisy, case))(0, 4)
    assert [a != b for a, b in zip(record.stats, other.stats, strict=True)] == [
        *(True, False, False, True)
    ]


@pytest.mark.parametrize(
    ("settings", "shape", "distances"),
    [
        ({}, (4,), None),
        ({"cumulative": True}, (4, 6), None),
        ({"raw_path": True}, (4, 3, 7), (4, 3, 6)),
    ],
)
def test_paths_in_a_record(settings, shape, distances):
    case = restored()
    config = StatsConfig(metric="jacobian", gen_strategy="svd-path", num_directions=3, **settings)
    record = recorder(config, case.data.train, measure_of(config, case))(2, 6)
    assert torch.tensor(record.stats).shape == shape
    if distances is None:
        assert record.path_distances is None
    else:
        assert torch.tensor(record.path_distances).shape == distances
        alone = StatsConfig(metric="jacobian")
        base = recorder(alone, case.data.train, measure_of(alone, case))(2, 6)
        assert [sample[1][0] for sample in record.stats] == base.stats


def test_residual_of_a_record_is_the_worst_one():
    case = restored()
    settings = {"metric": "jacobian_operator_norm", "method": "power", "num_power_iters": 2}
    config = StatsConfig(gen_strategy="svd-5", num_directions=2, **settings)
    found = []

    def measure(*batch):
        values = measure_of(config, case)(*batch)
        found.append(values.residual.max().item())
        return values

    record = recorder(config, case.data.train, measure)(0, 6)
    assert len(found) == 3 and record.residual == max(found) > min(found)


def test_a_path_has_the_mean_up_to_its_last_anchor():
    case = restored()
    stats = []
    for cumulative in (False, True):
        config = StatsConfig(
            metric="jacobian", gen_strategy="svd-path", num_directions=2, cumulative=cumulative
        )
        stats.append(recorder(config, case.data.train, measure_of(config, case))(0, 3).stats)
    whole, running = stats
    assert whole == [row[-1] for row in running]
    assert whole != [row[0] for row in running]


def test_a_network_gone_bad_gives_nulls():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
    case = restored(model)
    for metric in ("crossentropy", "jacobian", "jacobian_operator_norm", "loss_hessian_top"):
        config = StatsConfig(metric=metric)
        record = recorder(config, case.data.train, measure_of(config, case))(0, 3)
        assert record.stats == [None] * 3, metric


# Origins


def test_other_weights_or_buffers_are_another_origin():
    config = StatsConfig()
    facts = origin(config, restored())
    assert origin(config, restored(network())) == facts
    for place in ("4.bias", "1.running_var"):
        model = network()
        model.state_dict()[place][2] += 1e-9
        other = origin(config, restored(model))
        assert [name for name in facts if facts[name] != other[name]] == ["weights"]


# Batches


@pytest.mark.parametrize("alike", [False, True])
def test_agreement_of_microbatches(alike):
    case = restored(n=8)
    train = case.data.train
    if alike:
        train = replace(train, labels=torch.zeros_like(train.labels))
    config = StatsConfig(metric="agreement", batch_size=8, microbatches=4)
    record = recorder(config, train, measure_of(config, case))(0, 8)
    images, labels = train.images.fetch(torch.arange(8)), train.labels
    rows = []
    for m in range(4):
        own = slice(2 * m, 2 * m + 2)
        value = nn.functional.cross_entropy(case.model(images[own]), labels[own])
        grads = torch.autograd.grad(value, [*case.model.parameters()])
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    gram = torch.stack(rows) @ torch.stack(rows).T
    norms = gram.diagonal().sqrt()
    cosines = gram / norms[:, None] / norms
    mean = gram.sum() / 16
    noise = (gram.trace() - 4 * mean) / 3
    square = mean - noise / 4
    expected = [(cosines.sum() - 4) / 12, 2 * noise / square, noise, square]
    assert (square > 0) == alike
    found = record.stats[0]
    if not alike:  # the noise drowns the gradient: the noise scale is infinite
        assert found[1] is None
        del found[1], expected[1]
    assert found == pytest.approx([e.item() for e in expected], rel=1e-9)
    assert len(record.sample_ids) == 8


def test_agreement_of_a_last_batch_that_is_short():
    case = restored(n=8)
    config = StatsConfig(metric="agreement", batch_size=8, microbatches=4)
    record = recorder(config, case.data.train, measure_of(config, case))
    other = StatsConfig(metric="agreement", batch_size=4, microbatches=2)
    full = recorder(other, case.data.train, measure_of(other, case))(0, 4).stats
    assert record(0, 5).stats == [pytest.approx(full[0])]  # two whole microbatches of 2
    assert record(0, 3).stats == [[None] * 4]  # one has nobody to agree with


def test_sharpness_of_a_batch():
    case = restored(n=8)
    parameters = sum(p.numel() for p in case.model.parameters())
    config = StatsConfig(
        metric="sharpness", rho=0.1, num_probes=parameters, num_power_iters=parameters
    )
    record = recorder(config, case.data.train, measure_of(config, case))(0, 6)
    images, labels, _ = batch(case)
    names = [name for name, _ in case.model.named_parameters()]
    sizes = [p.numel() for p in case.model.parameters()]
    shapes = [p.shape for p in case.model.parameters()]

    def f(flat):
        parts = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        logits = torch.func.functional_call(
            case.model, dict(zip(names, parts, strict=True)), (images,)
        )
        return nn.functional.cross_entropy(logits, labels)

    w = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    slope = jacrev(f)(w)
    dense = hessian(f)(w)
    expected = [
        (f(w + 0.1 * slope / slope.norm()) - f(w)).item(),
        torch.linalg.eigvalsh(dense)[-1].item(),
        dense.trace().item(),
    ]
    assert record.stats == [pytest.approx(expected, rel=1e-3)]


def test_sharpness_is_seeded_by_its_batch():
    case = restored(n=8)
    make = lambda seed: StatsConfig(
        metric="sharpness", num_probes=2, num_power_iters=2, mc_sample_seed=seed
    )
    one, other = (recorder(make(s), case.data.train, measure_of(make(s), case)) for s in (0, 1))
    assert one(0, 4).stats == one(0, 4).stats
    assert one(0, 4).stats[0][2] != other(0, 4).stats[0][2]
    images, labels, ids = batch(case)
    measure = measure_of(make(0), case)
    here, there = (measure(images, labels, i).numbers[0] for i in (ids, ids + 1))
    assert here[0] == there[0] and (here[1:] != there[1:]).all()
