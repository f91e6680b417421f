"""The operations in plain PyTorch: the definitions that every kernel is held against (read beside the mathematics).

Nothing here is written to be fast, and nothing here checks more than it needs: the public calls are `diffmic_fast.ops`.
"""
