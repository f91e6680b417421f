"""Ranges of numbers that are given on the command line, in configurations and to functions."""

from __future__ import annotations

# A seed is 64 bits; a negative one stands for its two's complement.
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1

# Upper bounds of what takes memory or time in proportion; a larger value is rejected as a mistake.
MAX_RESAMPLES = 1_000_000  # of the bootstrap
MAX_SAMPLES = 10_000  # chains per image
MAX_THREADS = 1024
MAX_TIMESTEPS = 1_000_000
MAX_WORKERS = 1024  # processes that load images
