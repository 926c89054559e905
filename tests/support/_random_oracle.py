"""Rows of a plain training loop: one ordinary backward pass per row, without the library."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gradfilter as gf
from _random_cases import Case, Samples, Unknown, reseed


class PlainRows(gf.GradStack):
    """Stored rows, which answer every question by its definition, in float64.

    Args:
        leaves: (M, *shape) by name.
        evaluate: ``(params, per_row) -> PlainRows`` at other parameters; its attribute
            ``incoming`` has the parameters of these rows.
        factors: (M,), the scales of the rows.
    """

    def __init__(self, leaves, losses, buffers, evaluate=None, factors=None, of=None):
        self.leaves, self.losses, self.buffers, self.aux = leaves, losses, buffers, None
        self.evaluate, self.of = evaluate, of or len(losses)
        self.factors = torch.ones(len(losses), dtype=torch.float64) if factors is None else factors

    def __len__(self):
        return len(self.losses)

    @property
    def shapes(self):
        return {name: leaf.shape[1:] for name, leaf in self.leaves.items()}

    @property
    def live(self):
        return self.factors != 0

    def wide(self) -> dict[str, Tensor]:
        scaled = {}
        for name, leaf in self.leaves.items():
            factors = self.factors.view(-1, *[1] * (leaf.ndim - 1))
            scaled[name] = torch.where(factors == 0, 0.0, leaf.double() * factors)
        return scaled

    def matrix(self) -> Tensor:
        return torch.cat([leaf.reshape(len(self), -1) for leaf in self.wide().values()], 1)

    def gram(self):
        return self.matrix() @ self.matrix().T

    def sq_norms(self):
        return self.matrix().square().sum(1)

    def combine(self, weights):
        return {
            name: torch.where(
                (weights == 0).view(-1, *[1] * (leaf.ndim - 1)),
                0.0,
                leaf * weights.double().view(-1, *[1] * (leaf.ndim - 1)),
            )
            .sum(0)
            .to(self.leaves[name].dtype)
            for name, leaf in self.wide().items()
        }

    def dot(self, tree):
        flat = torch.cat([tree[name].double().flatten() for name in self.leaves])
        return self.matrix() @ flat

    def stacked(self):
        return {name: leaf.to(self.leaves[name].dtype) for name, leaf in self.wide().items()}

    def _with(self, leaves, losses, factors):
        return PlainRows(leaves, losses, self.buffers, self.evaluate, factors, self.of)

    def scaled(self, factors):
        return self._with(self.leaves, self.losses, self.factors * factors.double())

    def columns(self, names):
        kept = {name: leaf for name, leaf in self.leaves.items() if name in set(names)}
        return self._with(kept, self.losses, self.factors)

    def first(self, count):
        kept = {name: leaf[:count] for name, leaf in self.leaves.items()}
        return self._with(kept, self.losses[:count], self.factors[:count])

    def like(self, stack):
        cut = stack.first(len(self)).columns(list(self.leaves))
        return cut.scaled(self.factors)

    def at(self, params):
        return self.like(self.evaluate(params, False))

    def at_rows(self, params):
        return self.like(self.evaluate(params, True))

    def _points(self, factors):
        incoming = self.evaluate.incoming
        steps = factors.double()
        return {
            name: incoming[name] + steps.view(-1, *[1] * (leaf.ndim - 1)) * leaf
            for name, leaf in self.wide().items()
        }

    def release(self):
        pass


class PlainTraining:
    """A plain model and its criterion, trained row by row.

    Args:
        case: The case to build.
        dtype: The dtype of the computation; that of the case if None.
        hooks: Whether the hooks on parameters run.
    """

    def __init__(self, case: Case, dtype: torch.dtype | None = None, hooks: bool = True):
        self.case, self.dtype, self.hooks = case, dtype, hooks
        self.model, self.criterion = case.build(dtype)
        if not hooks:
            for name in ("parameter_hook", "late_hook"):
                if hasattr(self.model, name):
                    getattr(self.model, name).remove()

    def rows(self, seed: int) -> PlainRows:
        """Return the rows of the case's batch, and change the model as training does."""
        before = _copied(self.state())
        incoming = {name: p.detach().clone() for name, p in self.model.named_parameters()}

        def evaluate(params: dict[str, Tensor], per_row: bool) -> PlainRows:
            other = PlainTraining(self.case, self.dtype, self.hooks)
            other.load(before, incoming)
            generators = _global_states()
            reseed(seed)
            try:
                return other._run(evaluate, params, per_row, incoming)
            finally:
                _set_global_states(generators)

        evaluate.incoming = incoming
        reseed(seed)
        return self._run(evaluate, {}, False, incoming)

    def _run(
        self,
        evaluate: Callable[..., PlainRows],
        given: dict[str, Tensor],
        per_row: bool,
        incoming: dict[str, Tensor],
    ) -> PlainRows:
        case, model = self.case, self.model
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not per_row:
            _fill(named, given)
        leaves: dict[str, list[Tensor]] = {name: [] for name in named}
        losses = []
        for m, (x, y) in enumerate(microbatches(case, case.make_batch(self.dtype))):
            if per_row:
                own = {name: p[m] if m < len(p) else incoming[name] for name, p in given.items()}
                _fill(named, own)
            for p in model.parameters():
                p.grad = None
            loss = self.loss(x, y)
            loss.backward()
            losses.append(loss.detach().clone())
            for name, p in named.items():
                g = torch.zeros_like(p) if p.grad is None else p.grad
                leaves[name].append((g.to_dense() if g.is_sparse else g).detach().clone())
        for p in model.parameters():
            p.grad = None
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        stacked = {name: torch.stack(grads) for name, grads in leaves.items()}
        return PlainRows(stacked, torch.stack(losses), buffers, evaluate)

    def loss(self, x: Any, y: Any) -> Tensor:
        """Return the loss of one microbatch, as a training loop computes it."""
        if y is None:
            return self.model(**x).loss
        if isinstance(x, tuple):
            return self.criterion(self.model(*x), y)
        if isinstance(x, dict):
            return self.criterion(self.model(**x), y)
        return self.criterion(self.model(x), y)

    def state(self) -> dict[str, Any]:
        """Return buffers, generators, and remembered attributes of the modules."""
        generators = {
            (name, key): value.get_state()
            for name, module in self.model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Generator)
        }
        remembered = {
            (name, key): copy.deepcopy(value)
            for name, module in self.model.named_modules()
            for key, value in vars(module).items()
            if not key.startswith("_") and _is_memory(value)
        }
        return {
            "buffers": dict(self.model.named_buffers()),
            "generators": generators,
            "remembered": remembered,
        }

    def load(self, state: dict[str, Any], params: dict[str, Tensor]) -> None:
        """Restore buffers, generators and parameters."""
        _fill(dict(self.model.named_parameters()), params)
        for name, value in state["buffers"].items():
            owner, _, key = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if module._buffers[key] is None or module._buffers[key].shape != value.shape:
                module._buffers[key] = value.clone()
            else:
                with torch.no_grad():
                    module._buffers[key].copy_(value)
        for (name, key), value in state["generators"].items():
            getattr(self.model.get_submodule(name), key).set_state(value)
        for (name, key), value in state["remembered"].items():
            setattr(self.model.get_submodule(name), key, copy.deepcopy(value))


def microbatches(case: Case, batch: Any):
    """Return inputs and targets of every row; targets are None if the model has its own loss."""
    cut = lambda t, m: t[m * case.samples : (m + 1) * case.samples]
    for m in range(case.rows):
        if case.batch == "dict":
            yield {name: cut(t, m) for name, t in batch.items()}, None
            continue
        x, y = batch
        if isinstance(x, tuple):
            x = tuple(cut(t, m) for t in x)
        elif isinstance(x, dict):
            x = {name: cut(t, m) for name, t in x.items()}
        elif isinstance(x, (Samples, Unknown)):
            x = type(x)(cut(x.x, m), cut(x.scale, m))
        else:
            x = cut(x, m)
        yield x, cut(y, m)


def _fill(named: dict[str, nn.Parameter], given: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in given.items():
            named[name].copy_(value)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    clone = lambda value: value.clone() if isinstance(value, Tensor) else value
    return {part: {k: clone(v) for k, v in values.items()} for part, values in state.items()}


def _is_memory(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(v, (int, float)) for v in value)
    if isinstance(value, Tensor):
        return not value.requires_grad
    return isinstance(value, (int, float, random.Random, np.random.Generator))


def _global_states() -> Any:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_global_states(states: Any) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
