"""List all names of one operation: `torch.f`, the method, `torch.ops.aten.f` and its overloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]  # no stub

from gradfilter.grads.fused._host import Host, Override

# torch.f takes the arguments of F.f in another order, or one more that does not change the result.
RUNNING = ("input", "weight", "bias", "running_mean", "running_var")
ORDERS: dict[str, tuple[str, ...]] = {
    "batch_norm": (*RUNNING, "training", "momentum", "eps", "cudnn_enabled"),
    "instance_norm": (*RUNNING, "use_input_stats", "momentum", "eps", "cudnn_enabled"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
}
WITHOUT_EFFECT = ("cudnn_enable", "cudnn_enabled")


def spellings(name: str) -> list[Callable[..., Any]]:
    """List the functions below `torch.nn.functional` that run one operation of torch."""
    homes = (torch, torch.Tensor, _nn)
    found = [getattr(home, name) for home in homes if hasattr(home, name)]
    packet = getattr(torch.ops.aten, name)
    overloads = [o for o in packet.overloads() if not o.endswith("out")]
    return [*found, packet, *(getattr(packet, overload) for overload in overloads)]


def override_spellings(name: str, override: Override) -> dict[Callable[..., Any], Override]:
    """Return the override of `torch.nn.functional.f`, for `torch.f` and all other spellings."""
    order = ORDERS.get(name)

    def reordered(host: Host, *args: Any, **kwargs: Any) -> Any:
        assert order is not None
        given = dict(zip(order, args, strict=False)) | kwargs
        return override(host, **{k: v for k, v in given.items() if k not in WITHOUT_EFFECT})

    return dict.fromkeys(spellings(name), override if order is None else reordered)
