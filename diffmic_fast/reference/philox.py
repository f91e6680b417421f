"""Philox4x32-10 noise: standard normal numbers that depend on their key alone (docs/algorithm.md, "Philox noise").

A number is addressed by (seed, image, sample, timestep, class), so it is the same in every batch, on every device and
from every backend. The generator is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    key      seed[0:32], seed[32:64]
    counter  image[0:32], image[32:64], sample, timestep << 12 | class // 4

The four words of a counter give four normals by Box-Muller: words 0 and 1 those of classes 4b and 4b + 1, words 2 and
3 those of classes 4b + 2 and 4b + 3. The transform uses float64 additions, multiplications, divisions and one square
root, each rounded separately (no fused multiply-add), and is rounded to float32 at the end. IEEE 754 specifies each of
these exactly, so `csrc/include/philox.h` gives the same bits, which no library's `log` or `cos` guarantees.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TIMESTEP = 2**20 - 1
MAX_CLASSES = 4 * 2**12

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_HALF_PI = 1.5707963267948966

# ln m = 2 s (1 + s^2/3 + s^4/5 + ...), s = (m - 1) / (m + 1); |s| <= 0.1716 leaves 3e-17 after the term s^20 / 21.
_LOG_TERMS = tuple(1.0 / (2 * i + 1) for i in range(10, -1, -1))
# Taylor series around 0 up to x^17 and x^18; |x| <= pi/4 leaves less than 1e-19.
_SIN_TERMS = (
    1.0 / 355687428096000.0,
    -1.0 / 1307674368000.0,
    1.0 / 6227020800.0,
    -1.0 / 39916800.0,
    1.0 / 362880.0,
    -1.0 / 5040.0,
    1.0 / 120.0,
    -1.0 / 6.0,
    1.0,
)
_COS_TERMS = (
    -1.0 / 6402373705728000.0,
    1.0 / 20922789888000.0,
    -1.0 / 87178291200.0,
    1.0 / 479001600.0,
    -1.0 / 3628800.0,
    1.0 / 40320.0,
    -1.0 / 720.0,
    1.0 / 24.0,
    -1.0 / 2.0,
    1.0,
)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), values in [0, 2**32).
        seed: 64-bit key; its low word is the first key word.

    Returns:
        Four int64 tensors of uniform 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The int64 product wraps, but its 64 bits are those of the unsigned one.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _polynomial(x: Tensor, terms: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, terms[0])
    for term in terms[1:]:
        value = value * x
        value = value + term
    return value


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two uniform 32-bit words.

    u = (first + 0.5) / 2**32 gives the radius sqrt(-2 ln u); second / 2**32 is the angle in turns, split exactly into
    a quarter turn and an angle in [-pi/4, pi/4].

    Args:
        first, second: int64 tensors of one shape, values in [0, 2**32).

    Returns:
        Two float32 tensors: radius * cos(angle), radius * sin(angle).
    """
    uniform = (first.double() + 0.5) * 2.0**-32
    mantissa, exponent = torch.frexp(uniform)
    low = mantissa < _SQRT_HALF
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    power = torch.where(low, exponent - 1, exponent).double()
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(ratio * ratio, _LOG_TERMS)
    log = power * _LN2
    log = log + (ratio * 2.0) * series
    radius = torch.sqrt(log * -2.0)

    shifted = (second + 2**29) & _MASK
    quarter = shifted >> 30
    fraction = ((shifted & (2**30 - 1)) - 2**29).double() * 2.0**-30
    angle = fraction * _HALF_PI
    square = angle * angle
    sin = angle * _polynomial(square, _SIN_TERMS)
    cos = _polynomial(square, _COS_TERMS)
    odd = (quarter & 1) == 1
    cos_turned = torch.where(odd, sin, cos)
    sin_turned = torch.where(odd, cos, sin)
    cos_turned = torch.where((quarter == 1) | (quarter == 2), -cos_turned, cos_turned)
    sin_turned = torch.where(quarter >= 2, -sin_turned, sin_turned)
    return (radius * cos_turned).float(), (radius * sin_turned).float()


def normal(
    seed: int, image_ids: Tensor, sample_ids: Tensor, timesteps: Tensor, classes: int
) -> Tensor:
    """Standard normal noise, addressed by its key.

    Args:
        seed: 64-bit integer.
        image_ids: [M] int64, one key per image (any 64-bit pattern).
        sample_ids: [M] int64 in [0, 2**32), the index of the sample.
        timesteps: [K] int64 in [0, 2**20).
        classes: C in [1, 16384].

    Returns:
        [K, M, C] float32 on the device of `image_ids`.

    Raises:
        ValueError: a size or value is outside these ranges. Values on a GPU are not read back: the noise of one out of
            range is NaN.
    """
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"philox: classes must be in [1, {MAX_CLASSES}], got {classes}")
    if image_ids.ndim != 1 or sample_ids.shape != image_ids.shape or timesteps.ndim != 1:
        raise ValueError(
            "philox: image_ids and sample_ids must be [M] and timesteps [K], got "
            f"{tuple(image_ids.shape)}, {tuple(sample_ids.shape)}, {tuple(timesteps.shape)}"
        )
    for name, values, most in (
        ("timesteps", timesteps, MAX_TIMESTEP),
        ("sample_ids", sample_ids, _MASK),
    ):
        on_host = values.device.type == "cpu" and values.numel() > 0
        if on_host and not 0 <= int(values.min()) <= int(values.max()) <= most:
            raise ValueError(f"philox: {name} must be in [0, {most}]")
    return unchecked_normal(seed, image_ids, sample_ids, timesteps, classes)


def unchecked_normal(
    seed: int, image_ids: Tensor, sample_ids: Tensor, timesteps: Tensor, classes: int
) -> Tensor:
    """`normal` without its checks: on a GPU the noise of a sample or timestep out of range is NaN."""
    device = image_ids.device
    timesteps = timesteps.to(device, non_blocking=timesteps.device.type == "cpu")
    sample_ids = sample_ids.to(device, non_blocking=sample_ids.device.type == "cpu")
    blocks = -(-classes // 4)
    image = image_ids.long()[None, :, None]
    last = (timesteps.long() << 12)[:, None, None] | torch.arange(blocks, device=device)
    shape = (len(timesteps), len(image_ids), blocks)
    counter = (
        (image & _MASK).expand(shape),
        ((image >> 32) & _MASK).expand(shape),
        sample_ids.long()[None, :, None].expand(shape),
        last.expand(shape),
    )
    words = philox4x32(counter, seed)
    normals = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    drawn = torch.stack(normals, dim=-1).flatten(2)[..., :classes].contiguous()
    if device.type == "cpu":
        return drawn
    valid = (timesteps >= 0) & (timesteps <= MAX_TIMESTEP)
    valid = valid[:, None] & ((sample_ids >= 0) & (sample_ids <= _MASK))[None, :]
    return drawn.masked_fill(~valid[..., None], torch.nan)
