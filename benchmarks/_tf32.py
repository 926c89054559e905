"""Multiply float32 with full precision, and not with the 10 bits of TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_off() -> Iterator[None]:
    """Multiply float32 with full precision inside this context."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was
