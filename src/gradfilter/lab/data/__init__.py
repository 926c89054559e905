"""Data for the experiments: sets, label noise, splits, sampling, augmentation, batches."""
