"""Pure losses from modules: `model_loss`, `extract`, `insert`, and checks of results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradfilter import _tree
from gradfilter._types import Params, Tree
from gradfilter.grads._batch import MarkedBatch, plain
from gradfilter.grads._error_notes import add_notes
from gradfilter.grads._module_tensors import ModuleTensors, remove_new_parts

# --- Checks of the result of a loss ---


class RefusedByAll(ValueError):
    """Raised for a loss that no plan can differentiate, so that no other plan is tried."""


def split_aux(result: Any) -> tuple[Any, Any]:
    """Split the result of a loss that returns ``(loss, aux)``.

    Raises:
        TypeError: The result is not a pair.
    """
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        size = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise TypeError(
            f"Expected a pair (loss, aux) with has_aux=True, found {type(result).__name__}{size}. "
            "Return the loss first, and everything else as one tree of tensors."
        )
    return result[0], result[1]


def loss_of_row(value: Any, batch: Any) -> Any:
    """Return the loss of a row: the (weighted) mean, if there is one loss per sample.

    A row without a sample of weight > 0 is empty: its loss is NaN, and its gradient zero.

    Args:
        value: The result of the loss; anything else than one loss per sample passes unchanged.
        batch: The row, with its weights if it is `MarkedBatch`.

    Raises:
        RefusedByAll: There are weights but not one loss per sample.
    """
    weights = batch.weights if isinstance(batch, MarkedBatch) else None
    if not isinstance(value, Tensor) or (weights is None and value.ndim != 1):
        return value
    if weights is None:
        leaves = _tree.leaves(plain(batch))
        sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        return value.mean() if sizes and value.shape[0] == sizes[0] else value
    if value.ndim == 0 and weights.shape[0] == 1:
        value = value.unsqueeze(0)
    if value.shape != weights.shape:
        found = f"one of shape {tuple(value.shape)}" if value.ndim else "one number for all of them"
        raise RefusedByAll(
            f"Expected a loss per sample with sample_weights=, found {found}: a weighted mean "
            f"needs the losses of all {weights.shape[0]} samples of a row. Let the criterion "
            'return them: torch.nn.CrossEntropyLoss(reduction="none"), or '
            'functools.partial(cross_entropy, reduction="none"); more dims need .mean(1).'
        )
    wide = _tree.at_least_float32(value)
    weights = weights.to(wide.dtype)
    total = weights.sum()
    shares = weights / torch.where(total == 0, 1.0, total)
    # A sample of weight 0 may have a loss that is not finite.
    mean = torch.where(weights == 0, 0.0, shares * wide).sum()
    return torch.where(total == 0, torch.nan, mean).to(value.dtype)


def check_value(value: Any, aux: Any) -> None:
    """Refuse a loss that is not a scalar tensor, and an aux that is not a tree of tensors."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Expected the loss to be a scalar tensor, found {type(value).__name__}. A loss that "
            "returns (scalar, aux) needs has_aux=True."
        )
    if value.ndim:
        raise ValueError(
            f"Expected a scalar loss per microbatch, or one loss per sample, found shape "
            f"{tuple(value.shape)}. Average over all other dims: a criterion with "
            'reduction="none" needs .mean(), or .mean(1) to keep one loss per sample.'
        )
    strangers = [] if aux is None else [x for x in _tree.leaves(aux) if not isinstance(x, Tensor)]
    if strangers:
        raise TypeError(
            f"Expected aux as a tree of tensors, found {type(strangers[0]).__name__}. Return "
            "tensors, without .item(), which are stacked over the rows."
        )


def check_differentiable(value: Tensor) -> None:
    """Refuse a loss without a gradient."""
    if not value.requires_grad:
        raise unreached_error()


def unreached_error() -> ValueError:
    """Return the error for a loss that depends on no parameter."""
    return ValueError(
        "Expected a loss that depends on the parameters, found one without a gradient with "
        "respect to any of them. Is it detached, computed under no_grad or inference_mode, or are "
        "other parameters used than those passed in? Use params: "
        "torch.func.functional_call(model, params, (x,)), or model_loss(model, criterion)."
    )


# --- From a module and a criterion to a pure loss ---


@dataclass(frozen=True, eq=False)
class ModelLoss:
    """The pure loss of a module: ``(params, batch, buffers) -> (loss, new buffers)``.

    Made by `model_loss`. With ``has_aux`` the criterion returns ``(loss, aux)`` and the call
    returns ``(loss, new buffers, aux)``. ``in_place`` means that a training loop writes into the
    module: hooks on parameters then run on the combined gradient instead of on every row, and
    embeddings are renormalised.

    Examples:
        >>> import torch, gradfilter as gf
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> loss = gf.model_loss(model, torch.nn.functional.mse_loss)
        >>> params = {"weight": torch.ones(1, 3)}
        >>> loss(params, (torch.ones(4, 3), torch.ones(4, 1)), {})
        (tensor(4.), {})
    """

    model: nn.Module
    criterion: Callable[..., Any] | None
    has_aux: bool = False
    in_place: bool = False

    def __call__(self, params: Params, batch: Any, buffers: Tree) -> tuple[Any, ...]:
        """Evaluate on copies of the buffers; the buffers and the module are not changed."""
        places = ModuleTensors.of(self.model)
        check_names("buffers", buffers, places.buffers)
        return self.run(params, batch, {name: b.clone() for name, b in buffers.items()}, places)

    def run(
        self, params: Params, batch: Any, buffers: Tree, places: ModuleTensors
    ) -> tuple[Any, ...]:
        """Evaluate as a call does, but let the model write into the given buffers."""
        try:
            return self._run(params, batch, buffers, places)
        except Exception as error:
            add_notes(error, params, batch.batch if isinstance(batch, MarkedBatch) else batch)
            raise

    def _run(
        self, params: Params, batch: Any, buffers: Tree, places: ModuleTensors
    ) -> tuple[Any, ...]:
        empty, tables = places.still_empty(), places.tables()
        # The criterion also sees the given tensors in the module: it may penalise parameters, or
        # call the model again.
        with places.filled({**params, **buffers}) as after:
            try:
                result = self._evaluate(batch.batch if isinstance(batch, MarkedBatch) else batch)
            except BaseException:
                places.empty_again(empty)
                remove_new_parts(tables)
                raise
            if empty:
                places.refuse_new_buffers(empty)
            _refuse_new_parts(remove_new_parts(tables))
        _refuse_lost_buffers(buffers.keys() - after.keys())
        new_buffers = {name: after[name] for name in buffers}
        if self.has_aux:
            loss, aux = split_aux(result)
            return loss_of_row(loss, batch), new_buffers, aux
        return loss_of_row(result, batch), new_buffers

    def _evaluate(self, batch: Any) -> Any:
        """Evaluate the user's loss with the tensors that are in the module."""
        if isinstance(batch, Mapping):
            output = self.model(**batch)
            return (
                _own_loss(output)
                if self.criterion is None
                else self._apply_criterion(output, batch)
            )
        inputs, targets = _pair(batch)
        if self.criterion is None:
            raise TypeError(
                "Expected a criterion for (inputs, targets) batches, found None. Pass "
                "model_loss(model, criterion), or give batches as dicts to a model that "
                "returns its own .loss."
            )
        if isinstance(inputs, Mapping):
            output = self.model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = self.model(*inputs)
        else:
            output = self.model(inputs)
        return self._apply_criterion(output, targets)

    def _apply_criterion(self, output: Any, targets: Any) -> Any:
        """Return the criterion's result; a subclass may add to it.

        A wrapper around the criterion would hide its attributes and random numbers.
        """
        assert self.criterion is not None
        return self.criterion(output, targets)


def model_loss(
    model: nn.Module, criterion: Callable[..., Any] | None = None, *, has_aux: bool = False
) -> ModelLoss:
    """Make a pure loss of a module and a criterion; the module is never mutated.

    For one microbatch, ``loss = criterion(model(x), y)``. The criterion should average over its
    samples, as `torch.nn.functional.cross_entropy` does, or return one loss per sample, (B,), as
    with ``reduction="none"``, whose mean is then taken. `GradFunction` can weigh those.

    Args:
        model: Any module. Training or evaluation mode is read when the loss is called. Frozen
            parameters (``requires_grad=False``) keep their values in the module.
        criterion: ``criterion(output, targets) -> scalar``, or one loss per sample. None for models
            that return their own ``.loss``, as Hugging Face models do.
        has_aux: True if the criterion returns ``(scalar, aux)``, with aux any tree of tensors.

    Batches: ``(x, y)`` calls ``criterion(model(x), y)``, where x may be a tuple of positional or a
    dict of keyword arguments. A dict calls ``model(**batch)`` and takes ``.loss`` if criterion is
    None, else ``criterion(output, batch)``.

    Raises:
        TypeError: ``model`` is not a module, or ``criterion`` is not callable or still a class.

    Examples:
        >>> import torch, gradfilter as gf
        >>> model = torch.nn.Linear(3, 2)
        >>> loss = gf.model_loss(model, torch.nn.functional.cross_entropy)
        >>> params, buffers = gf.extract(model)
        >>> value, buffers = loss(params, (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), buffers)
        >>> value.shape
        torch.Size([])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected `model` to be a torch.nn.Module, found {type(model).__name__}. Pass a pure "
            "function loss(params, batch) straight to microbatch_grads."
        )
    if criterion is not None and not callable(criterion):
        raise TypeError(
            f"Expected `criterion` to be callable or None, found {type(criterion).__name__}."
        )
    refuse_class(criterion)
    return ModelLoss(model, criterion, has_aux)


def refuse_class(criterion: Any, caller: str = "") -> None:
    """Refuse the class of a criterion: a call would take the outputs as its options."""
    if isinstance(criterion, type):
        name, expected = criterion.__name__, f"{caller}: expected" if caller else "Expected"
        raise TypeError(f"{expected} a criterion, found the class {name}. Call it: {name}().")


def extract(model: nn.Module) -> tuple[Params, Tree]:
    """Copy a module's trainable parameters and its buffers into plain dicts.

    Args:
        model: Any module. Frozen parameters are omitted; a tied weight appears once.

    Returns:
        ``(params, buffers)``, each ``dict[str, Tensor]`` under the module's own dotted names.

    Raises:
        ValueError: The model has a lazy module that has not run yet.

    Examples:
        >>> import torch, gradfilter as gf
        >>> params, buffers = gf.extract(torch.nn.BatchNorm1d(2))
        >>> sorted(params), sorted(buffers)
        (['bias', 'weight'], ['num_batches_tracked', 'running_mean', 'running_var'])
    """
    refuse_lazy(model)
    params = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return params, {name: b.detach().clone() for name, b in model.named_buffers()}


def insert(model: nn.Module, params: Params, buffers: Tree | None = None) -> None:
    """Write parameters and buffers back into a module, in place.

    A forward pass may give a buffer another shape; such a buffer replaces the module's own.

    Args:
        model: The module that they were extracted from, or one of the same structure.
        params: ``dict[str, Tensor]``; parameters that are omitted stay as they are.
        buffers: ``dict[str, Tensor]`` or None.

    Raises:
        TypeError: ``model`` is not a module, or ``params`` is not a dict.
        ValueError: A name is unknown or a parameter's shape differs; nothing is written.

    Examples:
        >>> import torch, gradfilter as gf
        >>> model = torch.nn.Linear(1, 1)
        >>> gf.insert(model, {"weight": torch.tensor([[2.0]])})
        >>> model.weight.item()
        2.0
    """
    if not isinstance(model, nn.Module) or not isinstance(params, Mapping):
        raise TypeError(
            "Expected insert(model, params, buffers), a module and dicts of tensors, found "
            f"insert({type(model).__name__}, {type(params).__name__})."
        )
    own_buffers = dict(model.named_buffers(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = [
        *_targets("parameter", parameters, params),
        *_targets("buffer", own_buffers, buffers or {}),
    ]
    for name, value in params.items():
        if parameters[name].shape != value.shape:
            raise ValueError(
                f"Expected parameter {name!r} of shape {tuple(parameters[name].shape)}, found "
                f"{tuple(value.shape)}."
            )
    # A forward pass may have replaced a buffer by one of another shape (a table of positions for
    # images of another size), which cannot be written into the module's own.
    replaced = {
        id(target): value.detach().clone() for target, value in pairs if target.shape != value.shape
    }
    with torch.no_grad():
        for target, value in pairs:
            if id(target) not in replaced:
                target.copy_(value)
    for module in model.modules() if replaced else ():
        for key, buffer in module._buffers.items():
            if id(buffer) in replaced:
                module._buffers[key] = replaced[id(buffer)]


def _targets(
    what: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    for name in given:
        if name not in own:
            raise ValueError(
                f"Expected a {what} of the model, found unknown name {name!r}. Insert into the "
                "model that `extract` was called on."
            )
    return [(own[name], value) for name, value in given.items()]


def check_names(what: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse missing or unknown names: the model would use its own tensors instead."""
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or extra:
        raise ValueError(
            f"Expected the {what} of the model, missing {missing}, extra {extra}. Pass what "
            "`extract(model)` gives (and from then on the stacks' `buffers`); freeze parameters "
            "with requires_grad_(False)."
        )
    if what == "parameters":  # a forward pass may replace a buffer by one of another shape
        for name, tensor in own.items():
            if given[name].shape != tensor.shape:
                raise ValueError(
                    f"Expected {name!r} of shape {tuple(tensor.shape)}, found "
                    f"{tuple(given[name].shape)}: parameters of another model with the same names. "
                    "Pass what `extract(model)` gives for the model in model_loss(model, ...)."
                )


def _refuse_new_parts(names: list[str]) -> None:
    if names:
        raise ValueError(
            f"Expected a forward pass that keeps the parts of the module, found {names[0]!r} "
            "registered in it. Register it before `extract`, or run one forward pass first: "
            "model(x)."
        )


def _refuse_lost_buffers(names: Collection[str]) -> None:
    if names:
        raise ValueError(
            f"Expected a forward pass that keeps the set of buffers, found {min(names)!r} removed "
            "or set to None in it. Keep what may be None in a plain attribute."
        )


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a module whose tensors have no shape before its first forward pass.

    Raises:
        ValueError: The module has such a tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"Expected tensors with a shape, found the lazy {name!r} of "
                f"{type(model).__name__}. Run one forward pass first: model(x)."
            )


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{type(batch).__name__}" + (
            f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        )
        raise TypeError(
            f"Expected a batch (inputs, targets) or a dict of keyword arguments, found {found}. "
            "Group several inputs: ((x1, x2), y); or write your own loss(params, batch)."
        )
    return batch[0], batch[1]


def _own_loss(output: Any) -> Any:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise TypeError(
            f"Expected the model to return an object with .loss, found {type(output).__name__}. "
            "Pass labels in the batch, or a criterion to model_loss."
        )
    return loss
