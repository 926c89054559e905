"""Train many times as one study, shared by any number of workers and machines."""
