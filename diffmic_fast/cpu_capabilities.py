"""Which bfloat16 instructions the processor has, for the choice between bfloat16 and float32 at run time."""

from __future__ import annotations

import platform

import torch

from diffmic_fast import _native

# Names of `_C.cpu_features`, from the fastest products of bfloat16 to the slowest.
_FEATURES = (("amx", "AMX"), ("avx512bf16", "AVX-512"), ("bf16", "Arm"))


def bfloat16_instructions() -> str:
    """ "AMX", "AVX-512" or "Arm", whose products of bfloat16 oneDNN uses; empty where there are none.

    Only private functions of torch tell. Where a version of torch lacks them, the extension does; without both the
    answer is empty, so that nothing is computed in emulated bfloat16.
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
