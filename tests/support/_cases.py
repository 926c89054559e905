"""Complete chains for every public transform, for the conformance suite."""

import torch

import gradfilter as gf
import gradfilter.schedules as gs
from gradfilter.testing._laws import SHAPES as SHAPES
from gradfilter.testing._laws import M as M
from gradfilter.testing._laws import make_params as make_params
from gradfilter.testing._laws import make_rows as make_rows
from gradfilter.testing._laws import make_stack as make_stack


def is_head(name):
    return name.startswith("head")


def label(name):
    return "head" if is_head(name) else "body"


def is_matrix(name):
    """The leaf that has two dims in all models on which the cases run."""
    return "matrices" if name == "head.weight" else "rest"


def sgd():
    return gf.sgd(0.1, momentum=0.9, weight_decay=0.01)


def from_rows(link):
    return gf.chain(link, gf.mean_rows(), sgd())


def reducer(link):
    return gf.chain(link, sgd())


def on_tree(link):
    return gf.chain(gf.mean_rows(), link, sgd())


def rule(link):
    return gf.chain(gf.mean_rows(), link)


def flip():
    def update(grads, state, params, /, **extra):
        return {name: -g for name, g in grads.items()}, state, {}

    return gf.link("flip", "tree -> tree", update)


def remembered(gram, state):
    largest = torch.maximum(0.9 * state["largest"], gram.diagonal().amax())
    return (gram.diagonal() / largest).softmax(0), {"largest": largest}


def nothing_yet(params):
    return {"largest": next(iter(params.values())).new_zeros(())}


LR = gs.cosine(0.1, 20, warmup_steps=2)

# Public link -> variants, each a complete chain from rows to an update.
CASES = {
    "agree_filter": [
        lambda: reducer(gf.agree_filter(1.2)),
        lambda: reducer(gf.agree_filter(1.2, against="first", average="halving")),
        lambda: reducer(gf.agree_filter(1.2, per="leaf")),
        lambda: reducer(gf.agree_filter(1.2, per="layer", exclude=is_head, against="first")),
        lambda: reducer(gf.agree_filter(1.2, exclude=is_head)),
    ],
    "consensus_filter": [
        lambda: reducer(gf.consensus_filter()),
        lambda: reducer(gf.consensus_filter(0.9, soft=False)),
    ],
    "aggregate": [
        lambda: reducer(gf.aggregate(lambda gram: gram.diagonal().softmax(0))),
        lambda: reducer(gf.aggregate(remembered, nothing_yet)),
    ],
    "reference_filter": [
        lambda: reducer(gf.reference_filter("average")),
        lambda: reducer(gf.reference_filter("previous", by="cosine", soft=False, threshold=-0.2)),
        lambda: reducer(gf.reference_filter("average", by="cosine", decay=0.0)),
    ],
    "mean_rows": [lambda: reducer(gf.mean_rows())],
    "sign_agreement": [lambda: reducer(gf.sign_agreement(0.6))],
    "trimmed_mean": [lambda: reducer(gf.trimmed_mean(1)), lambda: reducer(gf.trimmed_mean(0))],
    "coordinate_median": [lambda: reducer(gf.coordinate_median())],
    "geometric_median": [
        lambda: reducer(gf.geometric_median()),
        lambda: reducer(gf.chain(gf.geometric_median(2), gf.sam_perturb(0.05))),
    ],
    "centered_clip": [
        lambda: reducer(gf.centered_clip(2.0)),
        lambda: reducer(gf.centered_clip(0.5, steps=3)),
    ],
    "clip_per_row": [
        lambda: from_rows(gf.clip_per_row(0.5)),
        lambda: from_rows(gf.clip_per_row(gf.quantile(0.5))),
        lambda: from_rows(gf.clip_per_row("smallest")),
        lambda: from_rows(gf.clip_per_row(0.5, per_leaf=True)),
        lambda: from_rows(gf.clip_per_row(gf.quantile(0.3, decay=0.5), per_leaf=True)),
    ],
    "normalize_rows": [lambda: from_rows(gf.normalize_rows())],
    "outlier_filter": [
        lambda: from_rows(gf.outlier_filter(1.1)),
        lambda: from_rows(gf.outlier_filter(1.1, of="loss", center="mean")),
    ],
    "trim_losses": [lambda: from_rows(gf.trim_losses(0.3))],
    "budget_clip": [
        lambda: from_rows(gf.budget_clip(0.3)),
        lambda: from_rows(gf.budget_clip(0.5, power=0)),
    ],
    "finite_filter": [
        lambda: from_rows(gf.finite_filter()),
        lambda: on_tree(gf.finite_filter()),
    ],
    "agc_clip": [lambda: on_tree(gf.agc_clip(0.01)), lambda: on_tree(gf.agc_clip(None))],
    "clip_by_global_norm": [lambda: on_tree(gf.clip_by_global_norm(0.5))],
    "spike_clip": [
        lambda: on_tree(gf.spike_clip(warmup=1)),
        lambda: on_tree(gf.spike_clip(factor=0.5, warmup=1, per_leaf=True)),
        lambda: on_tree(gf.spike_clip(factor=0.9, warmup=2, per_leaf=True, warmup_norm=0.5)),
    ],
    "spike_skip": [
        lambda: on_tree(gf.spike_skip(4, sigmas=3.0)),
        lambda: on_tree(gf.spike_skip(2, of="norm", max_consecutive=1)),
    ],
    "watch": [
        lambda: on_tree(gf.watch()),
        lambda: from_rows(gf.watch(decay=0.5, quantiles=(0.5,))),
        lambda: reducer(gf.chain(gf.agree_filter(1.2), gf.watch(2))),
    ],
    "sam_perturb": [
        lambda: on_tree(gf.sam_perturb(0.05)),
        lambda: from_rows(gf.sam_perturb(0.5, adaptive="asam")),
        lambda: on_tree(gf.sam_perturb(0.5, adaptive="gsam")),
        lambda: from_rows(gf.sam_perturb(0.05, per_microbatch=True)),
    ],
    "friendly_sam": [
        # With σ = 1 and the same rows in every step the direction would be rounding error.
        lambda: on_tree(gf.friendly_sam(0.05, sigma=0.9)),
        lambda: from_rows(gf.friendly_sam(0.5, sigma=0.7, decay=0.8, adaptive="asam")),
        lambda: on_tree(
            gf.chain(gf.friendly_sam(0.5, sigma=2.0, adaptive="gsam"), gf.gsam_decompose(0.4))
        ),
    ],
    "look_sam": [
        # Plain SAM on rows of `make_stack` gives h parallel to g, and nothing to reuse.
        lambda: on_tree(gf.look_sam(0.5, 2, adaptive="gsam")),
        lambda: on_tree(gf.look_sam(0.5, 3, 0.4, adaptive="asam")),
    ],
    "gsam_decompose": [
        lambda: on_tree(gf.chain(gf.sam_perturb(0.05), gf.gsam_decompose(0.4))),
        lambda: gf.chain(gf.sam_perturb(0.05), gf.mean_rows(), gf.gsam_decompose(0.4), sgd()),
    ],
    "sgd": [
        lambda: rule(gf.sgd(0.1)),
        lambda: rule(gf.sgd(LR, momentum=0.9, nesterov=True, weight_decay=0.01)),
    ],
    "adam": [lambda: rule(gf.adam(LR, amsgrad=True, weight_decay=0.01))],
    "adamw": [
        lambda: rule(gf.adamw(LR)),
        lambda: rule(gf.adamw(LR, weight_decay=0.1, decays=is_head)),
    ],
    "per_example_adam": [
        lambda: gf.chain(gf.clip_per_row(0.5), gf.per_example_adam(LR, weight_decay=0.01)),
        lambda: rule(gf.per_example_adam(LR)),
        lambda: gf.chain(gf.agree_filter(1.2), gf.agc_clip(0.01), gf.per_example_adam(0.1)),
    ],
    "rmsprop": [lambda: rule(gf.rmsprop(LR, centered=True, momentum=0.9))],
    "lion": [
        lambda: rule(gf.lion(LR, weight_decay=0.1)),
        lambda: rule(gf.lion(LR, weight_decay=0.1, decays=is_head)),
    ],
    "muon": [
        lambda: rule(gf.partition({"matrices": gf.muon(LR), "rest": gf.adamw(LR)}, is_matrix)),
    ],
    "schedule_free": [
        lambda: rule(gf.schedule_free(gf.sgd(LR, weight_decay=0.01))),
        lambda: rule(gf.schedule_free(gf.adamw(0.1, betas=(0.0, 0.99)), beta=0.7, r=1.0)),
    ],
    "msam": [
        lambda: rule(gf.msam(sgd(), 0.3)),
        lambda: rule(gf.msam(gf.adamw(LR), 0.3)),
    ],
    "cautious": [
        lambda: rule(gf.cautious(sgd())),
        lambda: rule(gf.cautious(gf.adamw(LR, weight_decay=0.1, decays=is_head))),
    ],
    "from_torch": [
        lambda: rule(gf.from_torch(torch.optim.NAdam, lr=LR, weight_decay=0.01)),
        lambda: rule(gf.from_torch(torch.optim.Adam, lr=0.01, amsgrad=True)),
        lambda: rule(gf.from_torch(torch.optim.SGD, lr=LR, momentum=0.9, dampening=0.1)),
        lambda: rule(gf.from_torch(torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.9)),
    ],
    "scheduled": [
        lambda: on_tree(gf.scheduled(gf.agc_clip, clipping=gs.linear(0.1, 10))),
        lambda: reducer(gf.scheduled(gf.agree_filter, threshold=gs.linear(1.2, 10))),
        lambda: rule(gf.scheduled(gf.sgd, lr=LR, momentum=gs.linear(0.9, 10))),
        lambda: on_tree(gf.scheduled(gf.sam_perturb, rho=gs.proportional(LR, 0.02, 0.05))),
    ],
    "masked": [
        lambda: on_tree(gf.masked(gf.agc_clip(0.01), is_head)),
        lambda: from_rows(gf.masked(gf.clip_per_row(0.5), is_head)),
        lambda: reducer(gf.masked(gf.agree_filter(1.2), is_head)),
    ],
    "partition": [
        lambda: gf.partition(
            {"head": reducer(gf.agree_filter(0.1)), "body": from_rows(flip_rows())}, label
        ),
        lambda: rule(gf.partition({"head": gf.freeze(), "body": gf.adam(LR)}, label)),
    ],
    "freeze": [
        lambda: gf.chain(gf.mean_rows(), sgd(), gf.freeze(is_head)),
        lambda: gf.chain(gf.mean_rows(), gf.freeze()),
    ],
    "ema_params": [lambda: gf.chain(gf.mean_rows(), sgd(), gf.ema_params(0.9))],
    "every": [
        lambda: on_tree(gf.every(2, gf.sam_perturb(0.05))),
        lambda: from_rows(gf.every(3, gf.sam_perturb(0.05, per_microbatch=True))),
        lambda: reducer(gf.every(2, gf.agree_filter(1.2))),
        lambda: reducer(gf.every(2, gf.agree_filter(1.2), gf.consensus_filter())),
        lambda: gf.chain(gf.mean_rows(), sgd(), gf.every(2, gf.ema_params(0.9))),
    ],
    "late": [
        lambda: on_tree(gf.late(gf.sam_perturb(0.05), 2)),
        lambda: rule(gf.late(sgd(), 1, gf.sgd(0.01))),
        lambda: rule(gf.partition({"head": gf.late(sgd(), 1), "body": sgd()}, label)),
    ],
    "gate": [
        lambda: on_tree(gf.gate(gf.agc_clip(0.01), "late")),
        lambda: from_rows(gf.gate(gf.clip_per_row(0.5), "late")),
        lambda: reducer(gf.gate(gf.agree_filter(1.2), "late")),
        lambda: rule(gf.gate(sgd(), "late")),
        lambda: gf.chain(gf.mean_rows(), sgd(), gf.gate(gf.ema_params(0.9), "late")),
    ],
    "named": [lambda: on_tree(gf.named("small", gf.agc_clip(0.01)))],
    "transform": [lambda: on_tree(flip())],
    "chain": [
        lambda: gf.chain(
            gf.finite_filter(),
            gf.clip_per_row(1.0),
            gf.agree_filter(1.2),
            gf.sam_perturb(0.05),
            gf.gsam_decompose(0.4),
            gf.agc_clip(0.01),
            gf.agc_clip(0.1),
            gf.adamw(LR),
            gf.ema_params(0.99),
        )
    ],
}


def flip_rows():
    def update(rows, state, params, /, **extra):
        return rows.scaled(-rows.live.to(torch.float64)), state, {}

    return gf.link("flip_rows", "rows -> rows", update)


VARIANTS = [(name, i) for name, variants in CASES.items() for i in range(len(variants))]


def build(variant):
    name, i = variant
    return CASES[name][i]()


EXTRA = {"late": torch.tensor(True)}


def step(update, params, state, rows, **extra):
    return update(params, state, make_stack(params, rows), **{**EXTRA, **extra})
