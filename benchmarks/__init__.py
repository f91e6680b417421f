"""Benchmarks: one file an operation, run by `python -m benchmarks NAME`."""
