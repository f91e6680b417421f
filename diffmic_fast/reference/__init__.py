"""The operations in plain PyTorch: the definitions that all kernels are tested against.

Written to be read next to docs/algorithm.md, not to be fast, and with few checks: the public calls are in
`diffmic_fast.ops`.
"""
