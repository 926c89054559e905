"""Mistakes that a type checker finds before the script runs. Nothing here is called."""

import torch

import gradfilter as gf


def mistakes() -> None:
    model = torch.nn.Linear(2, 2)
    loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
    batch = torch.randn(8, 2), torch.arange(8) % 2
    rows = gf.microbatch_grads(loss, 2)(gf.extract(model)[0], batch)
    rows.gramm()  # error: no such method
    print(rows.losses + "1")  # error: a tensor and a text
    gf.step(0.1, 10)  # error: it is gf.schedules.step
    gf.schedules.cosine("0.1", 100)  # error: a number as text
    gf.diagnostics.agreed(rows)  # error: no such function
    gf.chain(gf.agree_filter)  # error: the factory instead of a transform
    update = gf.chain(gf.mean_rows(), gf.sgd(0.1))
    gf.train_step(loss, update, plan="fast")  # error: no such plan
    step = gf.train_step(loss, update, microbatches=2)
    state = step.init(model)
    print(state["parameters"])  # error: no such key
    step(state["params"], batch)  # error: the parameters instead of the state
