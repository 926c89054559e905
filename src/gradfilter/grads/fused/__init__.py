"""Plan "fused": one forward pass and one backward pass over all rows.

`_forward` runs the loss, with `overrides` for the operations that need one; `_tape` collects what
the backward pass leaves; `_factors` answer questions from it; `_fused_stack` is the stack.
"""

from __future__ import annotations
