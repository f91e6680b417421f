"""What some versions of PyTorch cannot do."""

import pytest
import torch

_TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
traces_context_managers = pytest.mark.skipif(
    _TORCH < (2, 11), reason="torch 2.7 and 2.8 do not trace the context managers of predict"
)
