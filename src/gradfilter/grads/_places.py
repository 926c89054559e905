"""Where the tensors of a module live, also those of shared modules and tied tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Places:
    """The places of parameters and buffers in a module.

    Attributes:
        canonical: Place -> the name under which ``named_parameters`` or ``named_buffers`` lists
            what is there. A tied tensor has several places; a submodule registered under two
            names has its places once.
        empty: Buffers registered as None, which a forward pass could fill behind our back.
    """

    canonical: dict[str, str]
    empty: list[tuple[nn.Module, str]]

    @classmethod
    def of(cls, model: nn.Module) -> Places:
        """The places of a module."""
        listed = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        first = {id(tensor): name for name, tensor in reversed(listed)}
        canonical, empty = {}, []
        for prefix, module in model.named_modules():
            for own in (module._parameters, module._buffers):
                for key, tensor in own.items():
                    if tensor is not None:
                        canonical[f"{prefix}.{key}" if prefix else key] = first[id(tensor)]
                    elif own is module._buffers:
                        empty.append((module, key))
        return cls(canonical, empty)

    def fill(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A tensor for every place whose name is given."""
        return {place: tensors[name] for place, name in self.canonical.items() if name in tensors}

    def refuse_new_buffers(self) -> None:
        """Take back and refuse what a forward pass put where there was no buffer."""
        filled = [(module, key) for module, key in self.empty if module._buffers[key] is not None]
        for module, key in filled:
            module._buffers[key] = None
        if filled:
            module, key = filled[0]
            raise ValueError(
                f"Expected a forward pass that keeps the set of buffers, found {key!r} of "
                f"{type(module).__name__} filled in it. Register the buffer with a tensor before "
                "`extract`."
            )
