"""Answer a loss that asks about one row: values on the host, and attributes of autograd.

A question has one answer if all rows agree. Otherwise `gradfilter.grads.fused._row_groups` splits
the rows into groups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # no stub

from gradfilter.grads._loop import hooked_parameter
from gradfilter.grads._writes import tensor_property
from gradfilter.grads.fused._autocast import under_autocast
from gradfilter.grads.fused._host import Host, Override

# --- Random numbers that decide a branch, such as a layer that is sometimes skipped. ---
#
# Each row draws its own. A pass over all rows continues only where the answers agree, and answers
# that agree by chance are not those of M passes in order: layers would be skipped too rarely. So a
# loss that has drawn a single number per row must not ask further questions.


def _drawn(function: Callable[..., Any]) -> Override:
    def override(host: Host, *args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if isinstance(found, Tensor) and found.numel() == 1:
            host.drew = True
        return found

    return override


DRAWS: dict[Callable[..., Any], Override] = {
    function: _drawn(function)
    for function in (
        *(torch.rand, torch.randn, torch.randint, torch.bernoulli, torch.normal),
        *(torch.rand_like, torch.randn_like, torch.randint_like),
        *(torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.uniform_),
        *(torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.exponential_),
    )
}


# --- Questions that only ask whether work can be saved: no is correct for every row ---


SHORTCUTS = {
    ("transformers.masking_utils", "_ignore_bidirectional_mask_sdpa"),
    ("transformers.masking_utils", "_ignore_causal_mask_sdpa"),
    ("transformers.masking_utils", "create_recurrent_attention_mask"),
}
"""Functions that omit a mask if nothing is masked.

Each of them was read: it asks whether all of a padding mask is true, and if so returns that the
mask may be omitted. If the answer is no, the mask is created, and masks nothing of a full row.
`tests/grads/test_transformers_padded.py` asks the installed ones.
"""

OURS = {"gradfilter", "torch"}


def asks_for_a_shortcut() -> bool:
    """Return whether the present question comes from one of `SHORTCUTS`."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        frame = frame.f_back
    return (frame.f_globals.get("__name__", ""), frame.f_code.co_name) in SHORTCUTS


# --- Values on the host, such as ``if mask.all():`` ---


class Disagreement(RuntimeError):
    """Raised if rows answer the host differently.

    Attributes:
        answers: The answer of each row as text: nan equals nan, and 0.0 differs from -0.0.
    """

    def __init__(self, question: str, answers: list[str]) -> None:
        """Take one question and its answers."""
        super().__init__(
            f"{question} cannot run over all rows at once: the loss asks for a value that differs "
            "from row to row"
        )
        self.answers = answers


def value_of(convert: Callable[..., Any]) -> Override:
    """Return the override of `torch.Tensor.__bool__`, `item` and their like."""

    def override(host: Host, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not host.level.batched(tensor) or host.batched(*args):
            return NotImplemented
        if host.drew:
            raise RuntimeError(
                f"{convert.__name__} cannot run over all rows at once: the loss draws a random "
                "number and asks for a value, which may be another one in every row"
            )
        rows = host.level.lower(tensor)
        with host.level.on_all_rows():
            answers: list[Any] = [convert(row, *args, **kwargs) for row in rows.detach().unbind()]
        texts = [_answer_text(answer) for answer in answers]
        if any(text != texts[0] for text in texts):
            if convert is torch.Tensor.__bool__ and asks_for_a_shortcut():
                return False
            raise Disagreement(convert.__name__, texts)
        return answers[0]

    return override


def _answer_text(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"{tuple(answer.shape)} {answer.tolist()}"
    if isinstance(answer, tuple):
        return " ".join(map(_answer_text, answer))
    return repr(answer)


def indices_of(convert: Callable[..., Any]) -> Override:
    """Return the override of a function that returns indices, whose number the host must know."""
    override = value_of(convert)

    def indices(host: Host, *args: Any, **kwargs: Any) -> Any:
        # With three arguments torch.where selects between two tensors.
        if len(args) != 1 or not isinstance(args[0], Tensor) or kwargs.keys() - {"as_tuple"}:
            return NotImplemented
        return override(host, *args, **kwargs)

    return indices


VALUES: dict[Callable[..., Any], Override] = {
    **{
        convert: value_of(convert)
        for convert in (
            torch.Tensor.__bool__,
            torch.Tensor.__int__,
            torch.Tensor.__float__,
            torch.Tensor.__index__,
            torch.Tensor.item,
            torch.Tensor.tolist,
        )
    },
    **{
        convert: indices_of(convert)
        for convert in (
            torch.Tensor.nonzero,
            torch.nonzero,
            torch.Tensor.argwhere,
            torch.argwhere,
            torch.where,
        )
    },
    **DRAWS,
}


# --- Questions to autograd. ---
#
# The row's view of a tensor has no graph of its own: the graph belongs to the tensor of all rows.


class RowNode:
    """The ``grad_fn`` of a row: the node of all rows, without registering hooks."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the node; refuse to register hooks."""
        if name in ("register_hook", "register_prehook"):
            raise RuntimeError(
                f"grad_fn.{name} cannot run over all rows at once: use the tensor's own "
                'register_hook, or plan="loop"'
            )
        return getattr(self._node, name)


def _answer(read: Callable[[Tensor], Any]) -> Override:
    def override(host: Host, tensor: Tensor, *_: Any) -> Any:
        if not host.level.batched(tensor):
            return NotImplemented
        rows = _functorch.get_unwrapped(tensor)
        with host.level.on_all_rows():
            return read(rows)

    return override


def _node(tensor: Tensor) -> RowNode | None:
    return None if tensor.grad_fn is None else RowNode(tensor.grad_fn)


def _require_grad(host: Host, tensor: Tensor, requires_grad: bool = True) -> Any:
    """Replace `torch.Tensor.requires_grad_` and the attribute's setter."""
    if not host.level.batched(tensor):
        return NotImplemented
    rows = _functorch.get_unwrapped(tensor)
    with host.level.on_all_rows():
        rows.requires_grad_(requires_grad)
    return tensor


def _register_hook(host: Host, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
    """Replace `torch.Tensor.register_hook`: the hook sees the gradient of a row."""
    if not host.level.batched(tensor):
        return NotImplemented
    rows: Any = _functorch.get_unwrapped(tensor)
    for name, leaf in host.tape.leaves.items():
        if leaf is rows:
            raise hooked_parameter(name)
    host.hook_on(rows)
    # A hook need not be linear, so it must see the unweighted gradient of every row.
    host.tape.linear = False
    on_rows = RowHook(host, _functorch.maybe_get_bdim(tensor), hook)
    with host.level.on_all_rows():
        return rows.register_hook(on_rows)


@dataclass(frozen=True, eq=False)
class RowHook:
    """A hook on the gradient of all rows, which runs the user's hook on the gradient of a row.

    Attributes:
        host: The forward pass in which the hook was registered.
        place: The dim of the rows.
        hook: The user's hook.
    """

    host: Host
    place: int
    hook: Callable[[Tensor], Any]

    def __call__(self, grad: Tensor) -> Tensor | None:
        """Return the changed gradient, or None if the user's hook returns None."""
        level = self.host.level
        with self.host.in_pass(), torch.no_grad():
            found = self.hook(_functorch._add_batch_dim(grad, self.place, level.number))
            rows = None if found is None else level.lower(found)
        return None if rows is None else rows.movedim(0, self.place).to(grad.dtype)


def _refused(name: str) -> Override:
    def override(host: Host, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{name} inside the loss cannot run over all rows at once: the graph is that of all "
            'rows. Use plan="loop"'
        )

    return override


def _linear_cross_entropy(host: Host, *args: Any, options: Any = None, **kwargs: Any) -> Any:
    """Replace `torch.nn.functional.linear_cross_entropy`, whose chunks ask for requires_grad."""
    function: Any = under_autocast(F.linear_cross_entropy)
    return NotImplemented if options is None else function(*args, options=None, **kwargs)


def _set(host: Host, tensor: Tensor, value: bool) -> Any:
    found = _require_grad(host, tensor, value)
    return NotImplemented if found is NotImplemented else None


GRAPH: dict[Callable[..., Any], Override] = {
    tensor_property("requires_grad").__get__: _answer(lambda t: t.requires_grad),
    tensor_property("is_leaf").__get__: _answer(lambda t: t.is_leaf),
    tensor_property("grad_fn").__get__: _answer(_node),
    tensor_property("requires_grad").__set__: _set,
    torch.Tensor.requires_grad_: _require_grad,
    torch.Tensor.register_hook: _register_hook,
    torch.Tensor.register_post_accumulate_grad_hook: _refused("register_post_accumulate_grad_hook"),
    torch.Tensor.retain_grad: _refused("retain_grad"),
    torch.Tensor.backward: _refused("backward"),
    torch.autograd.backward: _refused("torch.autograd.backward"),
    torch.autograd.grad: _refused("torch.autograd.grad"),
}
if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
    GRAPH[F.linear_cross_entropy] = _linear_cross_entropy
