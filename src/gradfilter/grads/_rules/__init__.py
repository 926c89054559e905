"""One file per hot operation: how all rows run in one kernel, and what their gradients are."""
