"""Where gradients come from: pure losses, and stacks of microbatch or per-sample gradients."""
