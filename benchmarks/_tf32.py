"""Multiplications in float32 as they are meant, not with 10 bits of mantissa."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_off() -> Iterator[None]:
    """Multiply float32 as float32."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was
