"""``gradfilter stats``: what the checkpoints of a run are like around every sample."""
