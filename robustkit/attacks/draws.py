"""Random numbers that belong to an example and not to its place in a batch.

Each example's numbers are a hash of its own pixels and of one seed drawn from the generator. An attack then finds the
same thing whatever the batch size, the order of the examples and the company that an example has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Constants of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), as signed 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_BITS = 24


def uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers in [0, 1) shaped and typed like x (N, ...), each example's from its pixels and the generator."""
    return _unit(_shift(_hash(x, generator), 64 - _BITS)).view(x.shape).to(x.dtype)


def normal(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers shaped and typed like x (N, ...), by Box & Muller (1958)."""
    bits = _hash(x, generator)
    radius = torch.log1p(-_unit(_shift(bits, 64 - _BITS))).mul_(-2).sqrt_()
    angle = _unit(bits & (2**_BITS - 1)).mul_(2 * math.pi)
    return radius.mul_(angle.cos_()).view(x.shape).to(x.dtype)


def radial(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return one number in [0, 1) for each example of x (N, ...), shaped (N, 1, ..., 1)."""
    seed = torch.randint(2**62, (1, 1), generator=generator, device=generator.device).to(x.device)
    key = _mix_(_keys(x, _places(x)) ^ seed)
    return _unit(_shift(key, 64 - _BITS)).view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def _hash(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return 64 random bits for each value of x, shaped (N, D)."""
    seed = torch.randint(2**62, (1, 1), generator=generator, device=generator.device).to(x.device)
    place = _places(x)
    return _mix_(place + _mix_(_keys(x, place) ^ seed))


def _places(x: Tensor) -> Tensor:
    """Return one number (1, D) for each value of an example."""
    count = x[:1].numel() if len(x) else 0
    return torch.arange(1, count + 1, device=x.device)[None] * _GOLDEN


def _keys(x: Tensor, place: Tensor) -> Tensor:
    """Return one number (N, 1) an example, a linear hash of the bits of its pixels."""
    bits = x.detach().flatten(1).to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
    return _mix_(bits.mul_(_mix_(place.clone()) | 1).sum(1, keepdim=True))


def _mix_(z: Tensor) -> Tensor:
    z = z.bitwise_xor_(_shift(z, 30)).mul_(_FIRST)
    z = z.bitwise_xor_(_shift(z, 27)).mul_(_SECOND)
    return z.bitwise_xor_(_shift(z, 31))


def _shift(z: Tensor, count: int) -> Tensor:
    # torch shifts signed numbers arithmetically: the copies of the sign bit have to go.
    return (z >> count).bitwise_and_(2 ** (64 - count) - 1)


def _unit(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2.0**-_BITS)
