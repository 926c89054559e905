"""Where the tensors of a module live, also those of shared modules and tied tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gradfilter._types import Tree


@dataclass(frozen=True)
class Places:
    """The places of parameters and buffers in a module, found in one walk through it.

    Attributes:
        canonical: Place -> the name under which ``named_parameters`` or ``named_buffers`` lists
            what is there. A tied tensor has several places; a submodule registered under two
            names has its places once.
        trainable: The parameters that are not frozen, by those names.
        buffers: The buffers, by those names.
        empty: Buffers registered as None, which a forward pass could fill behind our back.
        renormalised: Embeddings with max_norm, which a forward pass writes into.
    """

    canonical: dict[str, str]
    trainable: Tree
    buffers: Tree
    empty: list[tuple[nn.Module, str]]
    renormalised: set[str]

    @classmethod
    def of(cls, model: nn.Module) -> Places:
        """The places of a module."""
        first: dict[int, str] = {}
        canonical: dict[str, str] = {}
        trainable: Tree = {}
        buffers: dict[int, tuple[str, Tensor]] = {}
        empty, renormalised = [], set()
        modules = [(f"{prefix}." if prefix else "", m) for prefix, m in model.named_modules()]
        for prefix, module in modules:
            if getattr(module, "max_norm", None) is not None:
                renormalised.add(f"{prefix}weight")
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    place = prefix + key
                    name = canonical[place] = first.setdefault(id(tensor), place)
                    if tensor.requires_grad:
                        trainable[name] = tensor
        for prefix, module in modules:
            for key, tensor in module._buffers.items():
                if tensor is None:
                    empty.append((module, key))
                else:
                    place = prefix + key
                    canonical[place] = first.setdefault(id(tensor), place)
                    buffers.setdefault(id(tensor), (place, tensor))
        written = {name for place, name in canonical.items() if place in renormalised}
        return cls(canonical, trainable, dict(buffers.values()), empty, written)

    def fill(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A tensor for every place whose name is given."""
        return {place: tensors[name] for place, name in self.canonical.items() if name in tensors}

    def still_empty(self) -> list[tuple[nn.Module, str]]:
        """The buffers that are None at present: the user may have filled some since."""
        return [(module, key) for module, key in self.empty if module._buffers.get(key) is None]

    def refuse_new_buffers(self, empty: list[tuple[nn.Module, str]]) -> None:
        """Take back and refuse what a forward pass put where there was no buffer before it."""
        filled = [(module, key) for module, key in empty if module._buffers.get(key) is not None]
        for module, key in filled:
            module._buffers[key] = None
        if filled:
            module, key = filled[0]
            raise ValueError(
                f"Expected a forward pass that keeps the set of buffers, found {key!r} of "
                f"{type(module).__name__} filled in it. Register the buffer with a tensor before "
                "`extract`."
            )
