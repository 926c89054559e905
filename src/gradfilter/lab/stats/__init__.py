"""``gradfilter stats``: measure the checkpoints of a run around every sample."""
