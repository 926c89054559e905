"""Pickled chains, schedules and steps: they do the same in another process."""

import copy
import io
import multiprocessing
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfilter as gf
import gradfilter.schedules as gs
from _cases import EXTRA, LR, is_matrix, make_params, make_rows, step
from _naive import assert_same
from gradfilter._types import Kind
from gradfilter.distributed import across_ranks


def head(name):
    return name.startswith("head")


def label(name):
    return "head" if head(name) else "body"


def flipped(grads, state, params, /, **extra):
    return {name: -g for name, g in grads.items()}, state, {}


def by_size(gram):
    return gram.diagonal().softmax(0)


def averaged(gram, state):
    average = 0.9 * state["average"] + 0.1 * gram.diagonal().mean()
    return (gram.diagonal() / average).softmax(0), {"average": average}


def ones(params):
    return {"average": torch.ones(())}


def none(params):
    return {}


RULE = gf.sgd(LR, momentum=0.9)
CHAINS = {
    "everything": gf.chain(
        gf.finite_filter(),
        gf.clip_per_row(1.0),
        gf.budget_clip(0.3, power=0),
        gf.agree_filter(1.2, against="first", average="halving"),
        gf.sam_perturb(0.05, adaptive="asam"),
        gf.gsam_decompose(0.4),
        gf.masked(gf.agc_clip(0.01, exclude=head), head),
        gf.clip_by_global_norm(3.0),
        gf.gate(gf.named("small", gf.agc_clip(0.1)), "late"),
        gf.link("flip", "tree -> tree", flipped),
        gf.adamw(LR, betas=(0.8, 0.9)),
        gf.ema_params(0.99),
        gf.freeze(head),
    ),
    "scheduled": gf.chain(
        gf.scheduled(gf.consensus_filter, threshold=gs.linear(1.0, 10), soft=False),
        gf.scheduled(gf.sgd, lr=gs.plateau(0.1), momentum=gs.poly(0.9, -0.5)),
    ),
    "partition": gf.partition(
        {"head": gf.chain(gf.aggregate(by_size), RULE), "body": gf.chain(gf.mean_rows(), RULE)},
        label,
    ),
    "nested": gf.chain(gf.chain(gf.chain(gf.sign_agreement(0.6)), gf.adam(1e-3)), gf.ema_params()),
    "rms": gf.chain(gf.mean_rows(), gf.rmsprop(gs.step(0.1, 3), centered=True)),
    "sharpness": gf.chain(
        gf.mean_rows(),
        gf.friendly_sam(0.05, sigma=0.9, adaptive="gsam"),
        gf.look_sam(0.05, 2, adaptive="asam"),
        gf.sgd(0.1),
    ),
    "lion": gf.chain(gf.mean_rows(), gf.lion(LR, betas=(0.8, 0.9), weight_decay=0.1)),
    "muon": gf.chain(
        gf.mean_rows(), gf.partition({"matrices": gf.muon(LR), "rest": RULE}, is_matrix)
    ),
    "schedule-free": gf.chain(gf.mean_rows(), gf.schedule_free(gf.sgd(LR), beta=0.8, r=1.0)),
    "ahead": gf.chain(gf.mean_rows(), gf.msam(RULE, 0.3)),
    "cautious": gf.chain(gf.mean_rows(), gf.msam(gf.cautious(gf.adamw(LR)), 0.3)),
    "squares": gf.chain(gf.clip_per_row(1.0), gf.per_example_adam(LR, betas=(0.8, 0.9))),
    "frozen": gf.chain(gf.mean_rows(), gf.freeze()),
    "agreement per layer": gf.chain(gf.agree_filter(1.2, per="layer", exclude=head), gf.sgd(0.1)),
    "memory": gf.chain(gf.aggregate(averaged, ones), gf.sgd(0.1)),
    "trimmed": gf.chain(gf.trimmed_mean(1), gf.sgd(0.1)),
    "medians": gf.partition(
        {
            "head": gf.chain(gf.coordinate_median(), RULE),
            "body": gf.chain(gf.geometric_median(3, eps=0.1), RULE),
        },
        label,
    ),
    "centered": gf.chain(gf.centered_clip(1.0, steps=2), gf.sgd(0.1)),
    "of torch": gf.chain(gf.mean_rows(), gf.from_torch(torch.optim.NAdam, lr=LR, betas=(0.8, 0.9))),
    "some decay": gf.chain(gf.mean_rows(), gf.sgd(0.1, weight_decay=0.1, decays=head)),
    "schedule in a schedule": gf.chain(
        gf.mean_rows(),
        gf.scheduled(gf.sam_perturb, rho=gs.proportional(LR, 0.02, 0.05)),
        gf.sgd(gs.constant(0.1, warmup_steps=3)),
    ),
}


def three_steps(update):
    params = make_params()
    state = update.init(params)
    for seed in range(3):
        given = {**EXTRA, "value": torch.tensor(float(seed))}
        params, state, info = step(update, params, state, make_rows(params, seed), **given)
    return params, state, info


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_was_pickled_does_the_same(name):
    update = CHAINS[name]
    again = pickle.loads(pickle.dumps(update))
    assert repr(again) == repr(update)
    assert again.kinds == update.kinds and again.publishes == update.publishes
    assert_same(three_steps(again), three_steps(update))


@pytest.mark.parametrize("name", CHAINS)
def test_a_copy_of_a_chain_is_the_chain(name):
    assert copy.deepcopy(CHAINS[name]) is CHAINS[name]
    assert copy.copy(CHAINS[name]) is CHAINS[name]


@pytest.mark.parametrize(
    "schedule",
    [
        *(gs.constant(0.1), gs.linear(0.1, 10), gs.cosine(0.1, 10, warmup_steps=2)),
        *(gs.poly(0.1, -0.5), gs.step(0.1, 3, 0.5), gs.proportional(LR, 0.02, 0.05)),
    ],
)
def test_a_schedule_that_was_pickled_has_the_same_values(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert isinstance(again, gf.Schedule)
    assert [again(k) for k in range(12)] == [schedule(k) for k in range(12)]


def test_across_ranks_of_all_processes_is_pickled():
    assert repr(pickle.loads(pickle.dumps(across_ranks()))) == repr(across_ranks())


def make_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3))
    step = gf.train_step(
        gf.model_loss(model, F.cross_entropy), CHAINS["nested"], microbatches=3, plan="loop"
    )
    return step, step.init(model, seed=1), (torch.randn(6, 4), torch.arange(6) % 3)


def steps(args):
    step, state, batch = args
    for _ in range(2):
        state, info = step(state, batch)
    return {name: leaf.tolist() for name, leaf in gf.state_dict(state).items()}, info["loss"].item()


def test_a_step_goes_to_a_process_that_was_spawned():
    made = make_step()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(steps, [made]) == [steps(made)]


def test_a_file_of_a_chain():
    file = io.BytesIO()
    torch.save(CHAINS["nested"], file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_same(three_steps(again), three_steps(CHAINS["nested"]))


def test_what_was_changed_since_is_not_pickled_as_what_it_was():
    for changed in (
        replace(gf.agc_clip(), name="mine"),
        replace(gf.agc_clip(), compute=flipped),
        replace(gf.chain(gf.sgd(0.1)), init=none),
    ):
        with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
            pickle.dumps(changed)
    bare = gf.Transform("bare", (Kind.TREE_TO_TREE,), none, flipped)
    assert pickle.loads(pickle.dumps(bare)).compute is flipped


def test_a_function_that_has_no_name_elsewhere_is_refused_by_pickle():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(gf.masked(gf.agc_clip(), lambda name: True))
