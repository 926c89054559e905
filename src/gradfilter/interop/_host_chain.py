"""Check the chain that a host runs, from rows to one gradient, and use its results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradfilter._types import Kind, Out, Transform, Tree
from gradfilter.transforms._chain import chain
from gradfilter.transforms._reducers import finite_filter
from gradfilter.transforms._transform import REDUCERS


def filter_chain(transforms: Transform, *, guarded: bool) -> Transform:
    """Check that a chain takes rows and ends in a tree.

    Args:
        transforms: A chain, or one transform.
        guarded: True to put `finite_filter` in front, or behind `across_ranks`, unless a transform
            before the reducer already removes such rows. In front of `across_ranks` it would skip
            the step on all ranks if one rank has no row left.

    Raises:
        TypeError: The chain applies updates itself, gives rows, or takes a tree.
    """
    built = chain(transforms)
    if built.kinds != (Kind.ROWS_TO_TREE,):
        raise TypeError(
            f"Filtered: expected a chain from rows to one gradient tree, found {built.kind!r}. "
            f"{_remedy(built)}"
        )
    if guarded and not _guards_rows(built):
        names = [part.name for part in built.parts]
        start = names.index("across_ranks") + 1 if "across_ranks" in names else 0
        return chain(*built.parts[:start], finite_filter(), *built.parts[start:])
    return built


def _remedy(built: Transform) -> str:
    if any(kind.gives == "update" for kind in built.kinds):
        rules = [part.name for part in built.parts if part.kinds[0].gives == "update"]
        return (
            f"Remove {', '.join(map(repr, rules))}: the wrapped optimizer makes the update, with "
            "its own learning rate and momentum."
        )
    if "rows" not in built.kind:
        return f"Insert a reducer before {built.parts[0].name!r}: {REDUCERS}."
    return f"Insert a reducer after {built.parts[-1].name!r}: {REDUCERS}."


def _guards_rows(built: Transform) -> bool:
    """Return whether rows that are not finite are removed before they are reduced."""
    for part in built.parts:
        if Kind.ROWS_TO_ROWS not in part.kinds:
            return False
        if any(key.split("/")[-1] == "finite" for key in part.publishes):
            return True
    return False


def overflowed(out: Out, losses: Tensor) -> Tensor:
    """Return whether a row is not finite though its loss is, by the first `finite_filter`. ().

    Args:
        out: The published values of a guarded chain.
        losses: The losses of this process's rows. (M,)
    """
    finite: Tensor = next(v for k, v in out.items() if k.split("/")[-1] == "finite" and v.ndim)
    # All ranks must decide alike about the rows of all ranks, so local losses are not used.
    excused = ~losses.isfinite() if finite.shape == losses.shape else finite
    return (~finite & ~excused).any()


def who_gave_up(out: Out) -> list[str]:
    """Return the names of the transforms that have given up.

    It reads bools from the device, which wait for nothing where ``keep`` has been read before.
    """
    flags = {name: value for name, value in out.items() if name.split("/")[-1] == "gave_up"}
    return [name.rpartition("/")[0] or "spike_skip" for name, flag in flags.items() if bool(flag)]


def gave_up(caller: str, names: list[str]) -> RuntimeError:
    """Return the error for transforms that have given up."""
    return RuntimeError(
        f"{caller}: {', '.join(names)} gave up, after max_consecutive spikes in a row. The "
        "parameters are those of the last step that was applied. Load an earlier checkpoint, and "
        "lower the learning rate or look at the data of these steps; max_consecutive=None never "
        "gives up."
    )


def check_owned(module: nn.Module, optimizer: torch.optim.Optimizer, caller: str) -> None:
    """Refuse an optimizer of trainable parameters that get no gradient here.

    Args:
        module: The differentiated module, including the criterion's tensors.
        optimizer: The optimizer whose groups are checked.
        caller: The beginning of the error.

    Raises:
        ValueError: None of its parameters is the module's, or some are not.
    """
    own = {id(p) for p in module.parameters()}
    held = alien = 0
    example = ""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if p.requires_grad and id(p) not in own:
                alien += 1
                example = example or group.get("param_names", {i: f"shape {tuple(p.shape)}"})[i]
            held += p.requires_grad
    if held == alien:
        raise ValueError(
            f"{caller}: expected an optimizer over trainable parameters of the model, found none "
            "of them in its groups. Make it from model.parameters(), after any copy or move of the "
            "model."
        )
    if alien:
        raise ValueError(
            f"{caller}: expected an optimizer over parameters of the model and of a criterion that "
            f"is a module, found {alien} of neither ({example}), which no gradient would reach. "
            "Make the module that holds them the criterion or a submodule of the model, or give "
            "them another optimizer."
        )


def note_skip(optimizer: Any) -> None:
    """Tell torch's schedulers that a step was skipped on purpose.

    Otherwise they would warn at their first step that the optimizer's step must come before it.
    """
    while isinstance(optimizer, torch.optim.Optimizer):
        vars(optimizer)["_opt_called"] = True
        optimizer = getattr(optimizer, "optimizer", None)  # accelerate's has the one that they know


def write_grads(module: nn.Module, optimizer: torch.optim.Optimizer, grads: Tree) -> None:
    """Write the gradients into ``p.grad`` and run the parameters' own hooks on them."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None  # the parameter has been frozen since
    with_hooks: list[Tensor] = []
    combined: list[Tensor] = []
    for name, p in module.named_parameters():
        if name in grads and (p._backward_hooks or p._post_accumulate_grad_hooks):
            p.grad = None
            with_hooks.append(p)
            combined.append(grads[name])
        elif name in grads:
            # Copy, because optimizers may write into gradients and need the parameters' layout.
            p.grad = torch.empty_like(p, requires_grad=False).copy_(grads[name])
    if with_hooks:
        # In a backward pass from the parameters themselves, torch runs their hooks and copies.
        torch.autograd.backward(with_hooks, combined)
