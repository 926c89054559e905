"""Load data for experiments: sets, label noise, splits, sampling, augmentation, batches."""
