"""The link that makes the rows of all ranks one stack."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from gradfilter._made import remembered
from gradfilter._types import Out, Params, State, Transform
from gradfilter.distributed._rank_stack import RankStack
from gradfilter.distributed._ranks import Ranks
from gradfilter.distributed._same_start import check_same_chain, check_same_start
from gradfilter.grads._lift import untraced
from gradfilter.grads._stack import GradStack
from gradfilter.transforms._fingerprint import whole_chain
from gradfilter.transforms._link import link


@remembered
def across_ranks(group: dist.ProcessGroup | None = None) -> Transform:
    """From here on the chain sees the rows of all ranks: `RankStack` as a link.

    What stands before it happens on every rank by itself, what stands after it is the same on all.
    Its place in a chain is therefore a choice::

        chain(across_ranks(), agree_filter(t), sam_perturb(r), sgd(lr))  # one perturbation for all
        chain(sam_perturb(r), across_ranks(), mean_rows(), sgd(lr))      # m-sharpness: every rank
                                                       # perturbs along its own gradient, unasked
        chain(clip_per_row(c), across_ranks(), consensus_filter(), sgd(lr))

    All ranks start from the same parameters, and run the same chain from this link on: ``init``
    compares both, hyperparameters too. They then keep their parameters, to the bit. A step that
    one of them would skip, by a ``keep`` from its caller or a link before this one, all skip: put
    `finite_filter` behind this link to reject the rows of such a rank instead.

    What is computed before this link stays as it is: ``info["loss"]`` of a `train_step`, the
    ``loss`` of a `Filtered` step and metrics of earlier links are those of this rank's rows alone.
    ``value`` for a `plateau` schedule is to be the same on all ranks; `RankStack.losses` has all.

    Args:
        group: The process group; None for all processes.

    Needs: rows, as many on every rank.

    Publishes: ``keep`` () if an earlier link or the caller did; ``clean_grads``, as rows of all
    ranks, if a sam_perturb before it did.

    Raises:
        ValueError: On every rank: at ``init`` parameters, links from here on or their
            hyperparameters differ between ranks, or at a step rows.
        RuntimeError: At either: there is no process group, or another rank is gone.

    Examples:
        >>> import torch, torch.distributed as dist, gradfilter as gf
        >>> from gradfilter.distributed import across_ranks
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> update = gf.chain(across_ranks(), gf.agree_filter(0.97), gf.sgd(1.0))
        >>> params = {"w": torch.zeros(2)}
        >>> rows = {"w": torch.tensor([[1.0, 0.0], [1.0, 0.2]])}
        >>> update(params, update.init(params), rows)[0]
        {'w': tensor([-1.0000, -0.1000])}
        >>> dist.destroy_process_group()
    """

    def update(
        rows: GradStack, state: State, params: Params, /, **extra: Any
    ) -> tuple[GradStack, State, Out]:
        keep, clean = extra.get("keep"), extra.get("clean_grads")
        spread_out = untraced(RankStack)  # ranks talk between the graphs of torch.compile
        spread = spread_out(rows, group, keep=keep)
        out: Out = {} if keep is None else {"keep": spread.keep}
        if isinstance(clean, GradStack):
            out["clean_grads"] = spread_out(clean, group)
        return spread, state, out

    def init(params: Params) -> State:
        ranks = Ranks.of(group)
        check_same_start(params, ranks)
        check_same_chain(whole_chain(), ranks)
        return {}

    return link("across_ranks", "rows -> rows", update, init=init)
