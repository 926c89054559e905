"""Rows on several ranks, or parameters sharded over them, on torch.distributed."""

from gradfilter.distributed._across import across_ranks as across_ranks
from gradfilter.distributed._rank_stack import RankStack as RankStack
