"""Rows on several ranks, or parameters sharded over them, on torch.distributed."""

from gradfilter.distributed._rank_stack import RankStack as RankStack
from gradfilter.distributed._rank_stack import across_ranks as across_ranks
from gradfilter.distributed._sharded import ShardedStack as ShardedStack
from gradfilter.distributed._sharded import sharded_rows as sharded_rows
