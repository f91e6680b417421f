"""Configuration, training, checkpoints, evaluation and prediction; what the command line runs."""
