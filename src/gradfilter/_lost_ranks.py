"""Say what happened where a collective fails because another rank is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

BACKENDS = ("gloo", "NCCL", "process group", "Connection")
"""Words in the errors of collectives."""


LOST = "gradfilter/lost"
"""The key under which a rank tells the others that it lost some."""

MOMENT = 3
"""The seconds for which a rank that lost others waits for them to say the same."""


class LostRanksError(RuntimeError):
    """Raised if a collective fails: another rank died, raised an error or does not answer."""


@contextmanager
def explained(
    doing: str, group: dist.ProcessGroup | None, *, among_others: bool = False
) -> Iterator[None]:
    """Replace the error of a failed collective by an explanation.

    Args:
        doing: What the collective is for.
        group: The ranks that take part; None if no ranks can be lost.
        among_others: True if errors of other operations, which are not replaced, may come too.
    """
    try:
        yield
    except LostRanksError:
        raise
    except RuntimeError as error:
        if group is None or (among_others and not any(w in str(error) for w in BACKENDS)):
            raise
        raise _lost(doing, group, error) from error


def _lost(doing: str, group: dist.ProcessGroup, error: RuntimeError) -> LostRanksError:
    return LostRanksError(
        f"Rank {dist.get_rank()} of {dist.get_world_size()} lost the others while "
        f"{doing}: one of them died, raised an error, or was silent for longer than "
        f"the process group's timeout. {_silent(group)}"
        "Nothing was updated in this step. Look for the first error among the ranks, and "
        f"start all of them again from a checkpoint. torch.distributed says: {error}"
    )


def _silent(group: dist.ProcessGroup) -> str:
    """Name the ranks that do not say within a moment that they lost others, too."""
    silent = dist.get_process_group_ranks(group)
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{LOST}/{dist.get_rank()}", "")
        end = time.monotonic() + MOMENT
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([f"{LOST}/{rank}"])]
            time.sleep(0.05)
    except Exception:  # whatever a store of a dying group raises: the first error counts
        return ""
    if not silent:
        return ""
    names = ", ".join(map(str, silent))
    return f"No word within {MOMENT} s from rank{'s' * (len(silent) > 1)} {names}. "
