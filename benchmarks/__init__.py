"""Benchmarks: one file an operation, run by `python -m benchmarks NAME` or `pytest --benchmark-only`."""

NAMES = ("conditioning", "denoise", "engines", "gpu", "mmd", "predict", "rois", "training")
