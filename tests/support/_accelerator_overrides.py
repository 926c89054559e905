"""Operation overrides on the fake accelerator: the models of the zoo, asked every question."""

from __future__ import annotations

import re
from functools import partial

import _zoo_language
import _zoo_vision
import gradfilter as gf
from _accelerator import Accelerator, module_moved, moved
from _accelerator_chains import Case as Run
from _accelerator_chains import trained
from _accelerator_plans import questions
from _zoo import ZOO
from _zoo_case import Case

NO_KERNEL = r"empty_strided|NoneType.* 'device'|Expected dtype int32/int64"
WAITS = "waits for the value of a tensor"

# What stops here, with what stops it. None of these is an operation of this package.
STOPS = {
    **dict.fromkeys(
        (
            *("batch-norm-twice", "lstm-sequence-first", "loss-of-bytes"),
            *("gru", "gru-deep", "gru-given-state", "gru-partly-frozen"),
        ),
        ("torch has no kernel for tensors without numbers", NO_KERNEL),
    ),
    "indexed": ("the model indexes by a list, which torch copies from the host", NO_KERNEL),
    "batch-norm-cumulative": ("torch divides by float(num_batches_tracked)", WAITS),
    **{
        case.name: ("transformers asks whether a mask has padding", WAITS)
        for case in _zoo_language.CASES
    },
}
LARGE = {case.name for case in _zoo_vision.CASES}


def ask(case: Case, accelerator: Accelerator) -> None:
    """Ask plan "fused" every question about a model of the zoo."""
    model, batch = module_moved(case.build()), moved(case.batch(4))
    params, buffers = gf.extract(model)
    loss = gf.model_loss(model, case.criterion, has_aux=case.has_aux)
    grads_of = gf.microbatch_grads(loss, 2, plan="fused")
    with accelerator.guarded():
        questions(lambda: grads_of(params, batch, buffers=buffers), params, 2)


def run(case: Case, accelerator: Accelerator) -> None:
    """Run a case; one that `STOPS` has may stop for the reason given there."""
    stops = STOPS.get(case.name, ("", None))[1]
    expected = "|".join(filter(None, (stops, case.may_refuse)))
    try:
        ask(case, accelerator)
    except Exception as error:
        if not expected or not re.search(expected, str(error)):
            raise


def first_of_each() -> list[Case]:
    """Return the first model of the zoo for each override."""
    found: dict[str, Case] = {}
    for case in ZOO.values():
        if case.name not in STOPS and case.name not in LARGE:
            for rule in case.rules.split():
                found.setdefault(rule, case)
    return [*{case.name: case for case in found.values()}.values()]


FIRST = {case.name: partial(run, case) for case in first_of_each()}
GRAPHS = {
    f"{case.name} graph": partial(
        trained,
        lambda: gf.chain(gf.agree_filter(1.2), gf.sgd(0.1)),
        compiled=True,
        steps=1,
        model=lambda case=case: module_moved(case.build()),
        batch=lambda case=case: moved(case.batch(4)),
        criterion=case.criterion,
        microbatches=2,
    )
    for case in first_of_each()
    if not case.has_aux
}
CASES: dict[str, Run] = {**FIRST}
