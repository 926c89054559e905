"""Cautious update rules against Algorithm 1 of the paper, entry by entry."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import gradfilter as gf
import gradfilter.schedules as gs
from _naive import assert_close, assert_same, normal, normal_tree

STEPS = 100
LR = gs.cosine(0.05, 80, min_value=0.001, warmup_steps=10)
LRS = [LR(k).item() for k in range(STEPS)]


def masked(direction, g):
    """The entries that agree with the gradient, over their share. Plain loops."""
    flat, grads = direction.flatten().tolist(), g.flatten().tolist()
    agree = [(d > 0 and h > 0) or (d < 0 and h < 0) for d, h in zip(flat, grads, strict=True)]
    share = max(sum(agree) / len(agree), 1e-3)
    kept = [d / share if yes else 0.0 for d, yes in zip(flat, agree, strict=True)]
    return torch.tensor(kept, dtype=g.dtype).reshape(g.shape)


def naive_adamw(params, grads, lrs, betas, decay, eps=1e-8):
    p = {n: leaf.clone() for n, leaf in params.items()}
    m, v = ({n: torch.zeros_like(leaf) for n, leaf in params.items()} for _ in range(2))
    for k, (lr, tree) in enumerate(zip(lrs, grads, strict=True), 1):
        for n, g in tree.items():
            m[n] = betas[0] * m[n] + (1 - betas[0]) * g
            v[n] = betas[1] * v[n] + (1 - betas[1]) * g * g
            d = m[n] / (1 - betas[0] ** k) / ((v[n] / (1 - betas[1] ** k)).sqrt() + eps)
            p[n] = (1 - lr * decay) * p[n] - lr * masked(d, g)
    return p


def naive_sgd(params, grads, lrs, momentum, decay, nesterov):
    p = {n: leaf.clone() for n, leaf in params.items()}
    b = {n: torch.zeros_like(leaf) for n, leaf in params.items()}
    for lr, tree in zip(lrs, grads, strict=True):
        for n, g in tree.items():
            g = g + decay * p[n]
            b[n] = momentum * b[n] + g
            p[n] = p[n] - lr * masked(g + momentum * b[n] if nesterov else b[n], g)
    return p


def naive_lion(params, grads, lrs, betas, decay):
    p = {n: leaf.clone() for n, leaf in params.items()}
    m = {n: torch.zeros_like(leaf) for n, leaf in params.items()}
    for lr, tree in zip(lrs, grads, strict=True):
        for n, g in tree.items():
            d = (betas[0] * m[n] + (1 - betas[0]) * g).sign()
            p[n] = p[n] - lr * (masked(d, g) + decay * p[n])
            m[n] = betas[1] * m[n] + (1 - betas[1]) * g
    return p


def draws(steps=STEPS):
    return normal_tree(0), [normal_tree(k + 1) for k in range(steps)]


def trained(update, params, grads, **extra):
    state = update.init(params)
    for g in grads:
        params, state, _ = update(params, state, g, **extra)
    return params, state


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_hundred_steps_of_adamw_are_those_of_the_paper(decay):
    params, grads = draws()
    rule = gf.adamw(LR, betas=(0.9, 0.99), weight_decay=decay)
    found, state = trained(gf.cautious(rule), params, grads)
    assert_close(found, naive_adamw(params, grads, LRS, (0.9, 0.99), decay))
    plain, own = trained(rule, params, grads)
    assert_close(state["m"], own["m"])  # the moments do not change
    assert all((found[n] != plain[n]).any() for n in params)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_hundred_steps_of_sgd_have_their_l2_inside_the_gradient(nesterov, decay):
    params, grads = draws()
    rule = gf.sgd(LR, momentum=0.9, weight_decay=decay, nesterov=nesterov)
    found, _ = trained(gf.cautious(rule), params, grads)
    assert_close(found, naive_sgd(params, grads, LRS, 0.9, decay, nesterov))


def test_a_hundred_steps_of_lion_decay_outside_the_mask():
    params, grads = draws()
    rule = gf.lion(LR, betas=(0.9, 0.95), weight_decay=0.2)
    found, _ = trained(gf.cautious(rule), params, grads)
    assert_close(found, naive_lion(params, grads, LRS, (0.9, 0.95), 0.2))


# --- The authors' code, step by step ---


def gradient(p, noise):
    """That of a bowl, so that the steps depend on each other."""
    return {n: 0.5 * (leaf - 1) + noise[n] for n, leaf in p.items()}


def by_gradient(update, params, noises):
    state = update.init(params)
    for noise in noises:
        params, state, _ = update(params, state, gradient(params, noise))
    return params


def authors_adamw(params, noises, lr, betas, decay, eps=1e-6):
    """The mask of m, divided by its mean. (One branch of theirs masks by m · m, so nothing.)"""
    p = {n: leaf.clone() for n, leaf in params.items()}
    m, v = ({n: torch.zeros_like(leaf) for n, leaf in params.items()} for _ in range(2))
    for k, noise in enumerate(noises, 1):
        for n, g in gradient(p, noise).items():
            m[n] = m[n] + (1 - betas[0]) * (g - m[n])
            v[n] = v[n] + (1 - betas[1]) * (g * g - v[n])
            root = v[n].sqrt() / (1 - betas[1] ** k) ** 0.5 + eps
            mask = (m[n] * g > 0).double()
            p[n] = p[n] * (1 - lr * decay)
            step = m[n] * mask / root * (lr / (1 - betas[0] ** k))
            p[n] = p[n] - step / max(mask.mean().item(), 1e-3)
    return p


def authors_lion(params, noises, lr, betas, decay, extra):
    """Their C-Lion; ``extra`` is what they add to the number of entries that agree, 1."""
    p = {n: leaf.clone() for n, leaf in params.items()}
    m = {n: torch.zeros_like(leaf) for n, leaf in params.items()}
    for noise in noises:
        for n, g in gradient(p, noise).items():
            p[n] = p[n] * (1 - lr * decay)
            d = (betas[0] * m[n] + (1 - betas[0]) * g).sign()
            mask = (d * g > 0).double()
            p[n] = p[n] - lr * d * mask * (mask.numel() / max(mask.sum().item() + extra, 1))
            m[n] = betas[1] * m[n] + (1 - betas[1]) * g
    return p


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_twenty_steps_are_those_of_the_authors_adamw(decay):
    params, noises = draws(20)
    rule = gf.adamw(0.05, betas=(0.9, 0.99), eps=1e-6, weight_decay=decay)
    expected = authors_adamw(params, noises, 0.05, (0.9, 0.99), decay)
    assert_close(by_gradient(gf.cautious(rule), params, noises), expected, rtol=1e-10, atol=1e-12)
    plain = by_gradient(rule, params, noises)
    assert max((plain[n] - p).abs().max() for n, p in expected.items()) > 1e-2


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_twenty_steps_are_those_of_the_authors_lion_but_for_its_one_more_entry(decay):
    params, noises = draws(20)
    update = gf.cautious(gf.lion(0.05, betas=(0.95, 0.98), weight_decay=decay))
    found = by_gradient(update, params, noises)
    given = params, noises, 0.05, (0.95, 0.98), decay
    assert_close(found, authors_lion(*given, extra=0), rtol=1e-10, atol=1e-12)
    published = authors_lion(*given, extra=1)
    assert max((found[n] - p).abs().max() for n, p in published.items()) > 1e-3


@pytest.mark.slow
def test_steps_are_those_of_pytorch_optimizer_but_for_its_one_more_entry():
    others = pytest.importorskip("pytorch_optimizer")
    params, grads = draws(20)
    lr, betas = 0.05, (0.95, 0.98)
    theirs = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = others.Lion(theirs.values(), lr=lr, betas=betas, weight_decay=0.0, cautious=True)
    update = gf.cautious(gf.lion(lr, betas=betas))
    state = update.init(params)
    for g in grads:
        before = {n: p.detach().clone() for n, p in theirs.items()}
        for n, p in theirs.items():
            p.grad = g[n].clone()
        optimizer.step()
        after, state, _ = update(params, state, g)
        for n, p in theirs.items():
            moved = p.detach() - before[n]
            kept = moved.count_nonzero()  # they divide by the number that agrees, and 1
            expected = moved * (kept + 1) / kept.clamp(min=1)
            assert_close(after[n] - params[n], expected, rtol=1e-9, atol=1e-12)
        params = after


def test_maximize_is_the_mirror_image():
    params, grads = draws(20)
    mirrored = [{n: -g for n, g in tree.items()} for tree in grads]
    rule = lambda maximize: gf.cautious(gf.adamw(0.1, weight_decay=0.1, maximize=maximize))
    assert_close(trained(rule(True), params, mirrored)[0], trained(rule(False), params, grads)[0])


def test_gradients_of_a_module_by_an_ordinary_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(normal(8, 4, seed=k), (torch.arange(8) + k) % 3) for k in range(6)]
    update = gf.chain(gf.mean_rows(), gf.cautious(gf.sgd(0.5, momentum=0.9)))
    step = gf.train_step(gf.model_loss(model, F.cross_entropy), update, microbatches=2)
    state = step.init(model)
    b = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in batches:
        state, _ = step(state, (x, y))
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                b[n] = 0.9 * b[n] + p.grad
                p -= 0.5 * masked(b[n], p.grad)
    assert_close(state["params"], {n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.parametrize(
    "rule",
    [gf.sgd(0.1), gf.adam(0.1, betas=(0.0, 0.9)), gf.rmsprop(0.1), gf.lion(0.1, betas=(0.0, 0.9))],
    ids=lambda rule: rule.name,
)
def test_without_momentum_nothing_changes(rule):
    params, grads = draws(5)
    assert_close(trained(gf.cautious(rule), params, grads)[0], trained(rule, params, grads)[0])


def test_a_leaf_that_disagrees_everywhere_stays_and_decays():
    rule = gf.adamw(0.1, weight_decay=0.5)
    params = {"w": torch.ones(3, dtype=torch.float64)}
    grads = [{"w": torch.full((3,), g, dtype=torch.float64)} for g in (1.0, -0.01)]
    first, state = trained(gf.cautious(rule), params, grads[:1])
    second = gf.cautious(rule)(first, state, grads[1])[0]
    assert_close(second["w"], first["w"] * (1 - 0.1 * 0.5))


def test_few_entries_that_agree_grow_a_thousandfold_at_most():
    momentum = torch.ones(5000, dtype=torch.float64)
    grads = torch.full((5000,), -0.1, dtype=torch.float64)
    grads[7] = 0.1
    update = gf.cautious(gf.sgd(1.0, momentum=0.9))
    params, state = trained(update, {"w": torch.zeros_like(momentum)}, [{"w": momentum}])
    moved = update(params, state, {"w": grads})[0]["w"] - params["w"]
    assert_close(moved[7], torch.tensor(-1e3, dtype=torch.float64))
    assert moved.count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_numbers_agree_although_their_product_is_zero(dtype):
    params = {"w": torch.zeros(4, dtype=dtype)}
    grads = {"w": torch.full((4,), 1e-30, dtype=dtype)}
    update = gf.cautious(gf.sgd(1.0, momentum=0.9))
    assert_same(trained(update, params, [grads])[0], {"w": -grads["w"]})


def test_what_is_not_a_number_shows():
    params = {"w": torch.zeros(3)}
    update = gf.cautious(gf.sgd(0.1, momentum=0.9))
    bad, good = {"w": torch.tensor([torch.nan, 1.0, 1.0])}, {"w": torch.tensor([0.0, 1.0, 1.0])}
    after, state = trained(update, params, [bad])
    assert after["w"].isnan().tolist() == [True, False, False]
    assert update(params, state, good)[0]["w"].isnan().tolist() == [True, False, False]
    guarded = gf.chain(gf.finite_filter(), update)
    assert_same(trained(guarded, params, [bad])[0], params)


def test_a_skipped_step_changes_no_bit():
    params, grads = draws(3)
    update = gf.cautious(gf.adamw(0.1))
    params, state = trained(update, params, grads[:2])
    after = update(params, state, grads[2], keep=torch.tensor(False))[:2]
    assert_same(after, (params, state))


def test_inside_msam_and_schedule_free():
    params, grads = draws(6)
    ahead, state = trained(gf.msam(gf.cautious(gf.adamw(0.1)), 0.5), params, grads)
    # The gradients are given, so that w is where the rule alone would be.
    w = trained(gf.cautious(gf.adamw(0.1)), params, grads)[0]
    assert_close(gf.evaluated_params(ahead, state), w)
    free = gf.cautious(gf.adam(0.1, betas=(0.0, 0.9)))
    found = trained(gf.schedule_free(free), params, grads)[0]
    plain = trained(gf.schedule_free(gf.adam(0.1, betas=(0.0, 0.9))), params, grads)[0]
    assert_close(found, plain)
    with pytest.raises(ValueError, match="without momentum, found cautious"):
        gf.schedule_free(gf.cautious(gf.adamw(0.1)))


def test_muon_refuses_the_same_leaves_and_keeps_its_decay():
    update = gf.cautious(gf.muon(0.1, weight_decay=0.5))
    with pytest.raises(ValueError, match="muon: expected leaves with two dims"):
        update.init(normal_tree(0))
    params, g = {"w": normal(4, 3)}, normal(4, 3, seed=1)
    found = trained(update, params, [{"w": g}])[0]["w"]
    plain = gf.muon(0.1, weight_decay=0.0)
    direction = (params["w"] - trained(plain, params, [{"w": g}])[0]["w"]) / 0.1
    assert_close(found, params["w"] * (1 - 0.1 * 0.5) - 0.1 * masked(direction, g))


def factory(lr, weight_decay):
    return gf.cautious(gf.adamw(lr, weight_decay=weight_decay))


@pytest.mark.parametrize("compiled", [False, True])
def test_scheduled_numbers_by_a_function_of_ones_own(compiled):
    params, grads = draws(6)
    params, grads = params, grads
    decay = gs.linear(0.3, 5)
    update = gf.scheduled(factory, lr=LR, weight_decay=decay)
    state, hand, hand_state = update.init(params), params, None
    run = torch.compile(update, backend="eager", fullgraph=True) if compiled else update
    for k, g in enumerate(grads):
        by_hand = factory(LR(k).item(), decay(k).item())
        hand_state = by_hand.init(params) if hand_state is None else hand_state
        hand, hand_state, _ = by_hand(hand, hand_state, g)
        params, state, info = run(params, state, g)
        assert_close(params, hand)
        assert info["cautious/weight_decay"] == decay(k)


def test_the_share_of_a_sharded_leaf_is_that_of_all_entries(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        update = gf.cautious(gf.adamw(0.1))
        params, grads = {"w": normal(5, 3)}, [{"w": normal(5, 3, seed=k)} for k in range(1, 4)]
        spread = lambda tree: {"w": distribute_tensor(tree["w"], mesh, [Shard(0)])}
        found = trained(update, spread(params), [spread(g) for g in grads])[0]
        assert_close(found["w"].full_tensor(), trained(update, params, grads)[0]["w"])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "given",
    [
        gf.chain(gf.sgd(0.1, momentum=0.9)),
        gf.partition({"a": gf.sgd(0.1)}, lambda name: "a"),
        gf.schedule_free(gf.sgd(0.1)),
        gf.msam(gf.sgd(0.1, momentum=0.9), 0.3),
        gf.agc_clip(),
        gf.scheduled(gf.sgd, lr=0.1, momentum=gs.linear(0.9, 3)),
        gf.transform("mine", "tree -> update", lambda g, s, p, /, **extra: (g, s, {})),
        gf.adamw,
        0.1,
    ],
    ids=lambda given: getattr(given, "name", "") or type(given).__name__,
)
def test_only_one_update_rule_is_wrapped(given):
    with pytest.raises(TypeError, match="cautious: expected one update rule of this package"):
        gf.cautious(given)
