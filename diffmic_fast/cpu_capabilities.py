"""Detects bfloat16 instructions, for the choice between bfloat16 and float32 at run time."""

from __future__ import annotations

import platform

import torch

from diffmic_fast import _native

# By name in `_C.cpu_features`, the fastest matrix products first.
_FEATURES = (("amx", "AMX"), ("avx512bf16", "AVX-512"), ("bf16", "Arm"))


def bfloat16_instructions() -> str:
    """The bfloat16 instructions that oneDNN's matrix products use on this processor.

    Only private functions of torch tell; where a version of torch lacks them, the extension does.

    Returns:
        "AMX", "AVX-512" or "Arm"; empty if there are none or if that is unknown, so that no product is
        computed in emulated bfloat16.
    """
    if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686"):
        amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
        avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        if amx is not None and avx512 is not None:
            return "AMX" if amx() else "AVX-512" if avx512() else ""
    else:
        # On x86 this is also true of processors for which oneDNN emulates the products.
        arm = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        if arm is not None:
            return "Arm" if arm() else ""
    module, _ = _native.attempt()
    features = module.cpu_features() if module else []
    return next((name for feature, name in _FEATURES if feature in features), "")
