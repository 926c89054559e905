"""Compute gradients: pure losses, and stacks of microbatch or per-sample gradients."""
