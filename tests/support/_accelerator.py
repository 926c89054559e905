"""An accelerator without hardware: its tensors have a shape and a device, but no numbers.

torch can register a device whose backend is written in Python. Here every operation on it is given
to fake tensors, which find out the shape, the dtype and the device of the result and compute
nothing. Tensors on the CPU stay what they are. So whatever a GPU would wait for has no answer, and
tensors of the two devices do not mix.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from gradfilter import _tree
from gradfilter._state_rules import COUNTER
from gradfilter.testing._laws import waits

DEVICE = "accel"
REGISTER = "_setup_privateuseone_for_python_backend"
AUTOCAST = torch.library.Library("_", "IMPL")
RANDOM = "random"  # the entry of a TrainState: states of generators are on the CPU, on any machine
READS = torch.ops.aten._local_scalar_dense.default


class _Backend(types.ModuleType):
    """What torch asks of the module of a device: one device, whose generator has no state."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    _lazy_init = staticmethod(lambda: None)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda device=DEVICE: torch.empty(16, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=DEVICE: None)


def missing() -> str | None:
    """Return why this torch cannot have such a device, or None."""
    if hasattr(backend_registration, REGISTER):
        return None
    return f"torch {torch.__version__} has no {REGISTER} to register a device written in Python"


def register() -> None:
    """Register the device, for the whole process: never in the process of other tests."""
    getattr(backend_registration, REGISTER)(DEVICE, backend_module=_Backend(DEVICE))
    # The device has no table of casts: under autocast torch's operations run as they are.
    AUTOCAST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


class Accelerator(TorchDispatchMode):
    """Give every operation on the accelerator to fake tensors, and leave the CPU to torch."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode()
        self._answers: list[Any] | None = None  # None: not guarded

    @contextmanager
    def guarded(self, answers: Iterable[Any] = ()) -> Iterator[None]:
        """Refuse what waits for the accelerator, copies from or to it, or mixes it with the CPU.

        Args:
            answers: The numbers that reads get, in order: there must be as many reads.
        """
        self._answers = left = list(answers)
        try:
            yield
        finally:
            self._answers = None
        if left:
            raise AssertionError(f"{len(left)} reads of a number fewer than expected")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        devices = {tensor.device.type for tensor in given}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if DEVICE not in devices:
            return func(*args, **kwargs)
        if self._answers is not None:
            if func is READS and self._answers:
                return self._answers.pop(0)
            _check(func, args, kwargs, given, devices)
        with self._fake:
            return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check(func: Any, args: Any, kwargs: Any, given: list[Tensor], devices: set[str]) -> None:
    if waits(func, args):
        raise AssertionError(f"{func} waits for the value of a tensor on the accelerator")
    if len(devices) > 1:
        shapes = ", ".join(f"{t.device.type}{[*t.shape]}" for t in given)
        raise AssertionError(
            f"{func} of {shapes} mixes {sorted(devices)}: a copy waits, and a constant belongs on "
            "the device of the tensors that it meets"
        )
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type not in devices:
        raise AssertionError(f"{func} draws on the accelerator from a generator of the CPU")


# --- Tensors and modules on the accelerator ---


def there(tensor: Tensor) -> Tensor:
    """Return a tensor like this one on the accelerator: a copy would carry its numbers along."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


def moved(tree: Any) -> Any:
    """Return a tree with its tensors on the accelerator."""
    return _tree.tree_map(lambda leaf: there(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def module_moved(module: nn.Module) -> nn.Module:
    """Move a module in place: `Module.to` cannot exchange a parameter for one without numbers."""
    known: dict[int, Any] = {}  # shared tensors stay shared
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                new = nn.Parameter(there(p), requires_grad=p.requires_grad)
                setattr(part, name, known.setdefault(id(p), new))  # updates lists of weights too
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = known.setdefault(id(b), there(b))
    return module


def ensure_there(tree: Any, what: str) -> None:
    """Refuse tensors on the CPU, except for counters and the states of generators."""
    left = [
        name
        for name, leaf in _tree.flatten_with_names(tree)[0].items()
        if isinstance(leaf, Tensor)
        and leaf.device.type != DEVICE
        and name.split(".")[-1] != COUNTER
        and RANDOM not in name.split(".")
    ]
    if left:
        raise AssertionError(f"{what}: {left} are on the CPU")
