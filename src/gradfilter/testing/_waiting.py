"""A mode in which a program cannot wait for the value of a tensor, also on a CPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    *("local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("unique", "unique2"),
}


class NoHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Refuses the operations by which a program waits for the value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, unless it is of those."""
        if func.name().split("::")[1].split(".")[0].lstrip("_") in WAITING:
            raise AssertionError(
                f"{func} makes the host wait for the device. Instead of .item(), float(), `if` or "
                "an index by a mask, use torch.where"
            )
        return func(*args, **(kwargs or {}))
