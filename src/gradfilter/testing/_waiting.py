"""A context in which a program cannot wait for the value of a tensor, also on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    *("local_scalar_dense", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "bincount"),
    *("unique", "unique2", "unique_dim", "unique_consecutive"),
    *("linalg_check_errors", "linalg_eig", "linalg_eigvals", "linalg_eigh", "linalg_svd"),
}
# On a CPU these reach no operation: there is nothing to copy.
COPIES = (Tensor.cpu, Tensor.numpy, Tensor.tolist)


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Refuses everything by which a program waits for the value of a tensor."""
    with _NoWaiting(), _NoCopies():
        yield


class _NoWaiting(TorchDispatchMode):
    """Operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0].strip("_")
        if name in WAITING or (name in ("index", "index_put") and _by_a_mask(*args)):
            _refuse(func)
        return func(*args, **(kwargs or {}))


class _NoCopies(TorchFunctionMode):
    """Methods that end in the memory of the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPIES:
            _refuse(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


def _by_a_mask(tensor: Tensor, indices: Any, values: Tensor | None = None, *rest: Any) -> bool:
    """Whether places have to be counted; one number is written without that."""
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and (values is None or values.numel() > 1)


def _refuse(what: Any) -> None:
    raise AssertionError(
        f"{what} makes the host wait for the device. Instead of .item(), float(), `if` or an index "
        "by a mask, use torch.where"
    )
