"""The info of a step: its type, and its numbers for a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import override

from gradfilter import _tree

if TYPE_CHECKING:

    class Info(dict[str, Tensor]):
        """The info of a step of `train_step`: ``loss``, ``keep`` and the metrics, all tensors.

        Only ``info["aux"]`` may be another tree of tensors, the aux of the loss. At run time an
        info is a plain dict.
        """

        @overload
        def __getitem__(self, name: Literal["aux"], /) -> Any: ...
        @overload
        def __getitem__(self, name: str, /) -> Tensor: ...
        @override
        def __getitem__(self, name: str, /) -> Any: ...

else:
    Info = dict

AUX = "aux"
"""The name of the only entry that may be another tree: the aux of the loss."""


def scalars(info: Mapping[str, Any]) -> dict[str, float]:
    """Return one number for each entry of an info, for a log.

    An entry with more than one element, such as a metric of every row, is given by its mean. NaN
    elements of metrics are left out of it: a row that is not finite has a cosine of NaN, which must
    not hide those of the others. The leaves of aux are named ``aux/`` and their dotted name, and a
    NaN in them shows. Entries that are not real numbers are omitted.

    This waits for the device, as ``.item()`` does: call it in the steps that are logged.

    Args:
        info: The info of ``update(...)`` or of a step of `train_step`, or ``result.info`` of
            `gradfilter.interop.Filtered`.

    Raises:
        TypeError: ``info`` is not a dict, for example the pair that a step returns.

    Examples:
        >>> import torch, gradfilter as gf
        >>> info = {
        ...     "loss": torch.tensor(0.5),
        ...     "keep": torch.tensor(True),
        ...     "agree_filter/cosine": torch.tensor([0.25, torch.nan, 0.75]),
        ...     "aux": {"accuracy": torch.tensor([1.0, 0.5])},
        ... }
        >>> gf.scalars(info)
        {'loss': 0.5, 'keep': 1.0, 'agree_filter/cosine': 0.5, 'aux/accuracy': 0.75}
    """
    if not isinstance(info, Mapping):
        raise TypeError(
            f"scalars: expected the info of a step, a dict, found {type(info).__name__}. Unpack "
            "the result first: state, info = step(state, batch)."
        )
    return {name: value.item() for name, value in means(info).items()}


def means(info: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the numbers of `scalars` as tensors (), without waiting for the device.

    Args:
        info: As in `scalars`.
        dtype: The dtype of the means; by default at least float32, and that of the entry.
    """
    found = {}
    for name, entry in info.items():
        if name == AUX:
            leaves = _tree.flatten_with_names(entry)[0]
            named = {f"{AUX}/{leaf}" if leaf else AUX: value for leaf, value in leaves.items()}
        else:
            named = {name: entry}
        for key, value in named.items():
            if not isinstance(value, Tensor | float | int):
                continue
            numbers = torch.as_tensor(value).detach()
            if not numbers.is_complex():
                wide = torch.promote_types(numbers.dtype, torch.float32)
                numbers = numbers.to(dtype or wide)
                found[key] = numbers.mean() if name == AUX else numbers.nanmean()
    return found
