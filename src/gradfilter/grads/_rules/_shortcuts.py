"""Questions that only ask whether work may be saved: no is a right answer for every row."""

from __future__ import annotations

import sys

SHORTCUTS = {
    ("transformers.masking_utils", "_ignore_bidirectional_mask_sdpa"),
    ("transformers.masking_utils", "_ignore_causal_mask_sdpa"),
    ("transformers.masking_utils", "create_recurrent_attention_mask"),
}
"""Functions that leave a mask out where nothing is masked.

They are read, not guessed: each asks whether all of a padding mask is true, and where it is,
returns that the mask may be omitted. Where it is told no, the mask is made, and masks nothing of a
row that is full. `tests/test_transformers_padded.py` asks the installed ones.
"""

OURS = {"gradfilter", "torch"}


def asks_for_a_shortcut() -> bool:
    """Whether the question that is being answered comes from one of `SHORTCUTS`."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        frame = frame.f_back
    return (frame.f_globals.get("__name__", ""), frame.f_code.co_name) in SHORTCUTS
