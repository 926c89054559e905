"""A script of a user: type checkers find no error in it, and infer its types."""

from typing import reveal_type

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradfilter as gf
from gradfilter import diagnostics, testing
from gradfilter.interop import Filtered


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return cross_entropy(logits, labels), {"accuracy": accuracy}


def halve(
    grads: gf.Tree, state: dict[str, Tensor], params: gf.Params, /, **extra: object
) -> tuple[gf.Tree, dict[str, Tensor], dict[str, Tensor]]:
    return {name: g / 2 for name, g in grads.items()}, state, {}


def spread(rows: gf.GradStack) -> float:
    return rows.sq_norms().std().item()


def update_rule(lr: gf.Schedule | float) -> gf.Transform:
    return gf.chain(gf.transform("halve", "tree -> tree", halve), gf.sgd(lr, momentum=0.9))


def log(number: int, info: gf.Info | dict[str, Tensor]) -> None:
    print(number, {name: round(value, 3) for name, value in gf.scalars(info).items()})


def main() -> None:
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    x, y = torch.randn(64, 20), torch.randint(0, 5, (64,))

    # Rows, and questions that they answer.
    params, buffers = gf.extract(model)
    grads_of = gf.microbatch_grads(gf.model_loss(model, cross_entropy), 8)
    reveal_type(grads_of)  # GradFunction
    rows = grads_of(params, (x, y), buffers=buffers)
    reveal_type(rows)  # ComputedStack
    reveal_type(rows.losses)  # Tensor
    reveal_type(rows.buffers)  # dict[str, Tensor]
    reveal_type(rows.gram())  # Tensor
    reveal_type(rows.explain())  # str
    reveal_type(spread(rows))  # float
    reveal_type(diagnostics.agreement(rows))  # Tensor
    reveal_type(diagnostics.noise_scale(rows, batch_size=8).samples)  # Tensor

    # An update that is applied by hand.
    lr = gf.schedules.cosine(0.1, total_steps=100, warmup_steps=10)
    threshold = gf.schedules.linear(1.5, 100, min_value=1.0)
    agree = gf.scheduled(gf.agree_filter, threshold=threshold)
    update = gf.chain(agree, gf.agc_clip(0.01), update_rule(lr))
    reveal_type(lr)  # Schedule
    reveal_type(update)  # Transform
    params, chain_state, info = update(params, update.init(params), rows)
    params, chain_state, info = update(params, chain_state, grads_of(params, (x, y)))
    reveal_type(params)  # dict[str, Tensor]
    reveal_type(info)  # dict[str, Tensor]
    reveal_type(info["keep"])  # Tensor
    testing.check_laws(update)

    # The same as one step with one state.
    plan: gf.Plan = "fused"
    loss = gf.model_loss(model, loss_and_accuracy, has_aux=True)
    step = gf.train_step(loss, update, microbatches=8, plan=plan)
    state = step.init(model, seed=0)
    reveal_type(state)  # TrainState
    for number in range(2):
        state, info = step(state, (x, y))
        reveal_type(info)  # Info
        reveal_type(info["loss"])  # Tensor
        reveal_type(info["aux"])  # Any
        log(number, info)
    saved = gf.state_dict(state)
    reveal_type(saved)  # dict[str, Tensor]
    state = gf.load_state_dict(step.init(model), saved)
    reveal_type(state)  # TrainState
    reveal_type(state["params"])  # dict[str, Tensor]
    gf.insert(model, state["params"], state["buffers"])

    # The filter alone, in an ordinary loop.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    filtered = Filtered(model, nn.CrossEntropyLoss(), gf.agree_filter(2.0), optimizer, 8)
    result = filtered.step(x, y)
    reveal_type(result.loss)  # Tensor
    reveal_type(result.info)  # dict[str, Tensor]
    log(2, result.info)


if __name__ == "__main__":
    main()
