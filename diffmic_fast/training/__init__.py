"""Training: the run, the optimizer step of each model, learning rates, moving average, logs."""
