"""Build the models that a run can train."""
