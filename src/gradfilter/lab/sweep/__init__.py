"""Many trainings as one study, which any number of workers and machines share."""
