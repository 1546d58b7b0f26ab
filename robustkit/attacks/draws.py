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


class Stream:
    """Random numbers for the examples of one attack, a call at a time.

    What an example gets in a call depends on its pixels, the generator and the number of calls before: not on which
    other examples are still attacked.
    """

    def __init__(self, x: Tensor, generator: torch.Generator) -> None:
        seed = torch.randint(2**62, (1, 1), generator=generator, device=generator.device).to(x.device)
        self._keys = _mix_(_keys(x, _places(x)) ^ seed)
        self._calls = 0

    @property
    def device(self) -> torch.device:
        """Where the numbers are drawn."""
        return self._keys.device

    def seek(self, call: int) -> None:
        """Go on as after `call` calls: what comes then does not depend on how many there were."""
        self._calls = call

    def uniform(self, index: Tensor, count: int) -> Tensor:
        """Return numbers in [0, 1) (n, count) for the examples at `index` (n,), as float32."""
        self._calls += 1
        place = torch.arange(1, count + 1, device=self._keys.device)[None] * _GOLDEN
        # Both sums wrap around; the constant keeps one call's numbers from being another's, shifted.
        return _unit(_shift(_mix_(place + _mix_(self._keys[index] + _wrapped(self._calls * _FIRST))), 64 - _BITS))

    def normal(self, index: Tensor, count: int) -> Tensor:
        """Return standard normal numbers (n, count) for the examples at `index` (n,), by Box & Muller (1958)."""
        radius = torch.log1p(-self.uniform(index, count)).mul_(-2).sqrt_()
        return radius.mul_(self.uniform(index, count).mul_(2 * math.pi).cos_())

    def signs(self, index: Tensor, count: int) -> Tensor:
        """Return -1 and 1 (n, count), equally likely, for the examples at `index` (n,)."""
        return torch.where(self.uniform(index, count) < 0.5, -1.0, 1.0)

    def change(self, index: Tensor, x: Tensor, *, bounded: bool) -> Tensor:
        """Return a random change of the images x (n, ...) at `index` (n,): uniform in [-1, 1], else standard normal.

        Its length is no matter: a random start scales it to the surface of a ball, or lets it be projected.
        """
        count = x[:1].numel()
        return (2 * self.uniform(index, count) - 1 if bounded else self.normal(index, count)).view(x.shape)


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


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _unit(bits: Tensor) -> Tensor:
    return bits.to(torch.float32).mul_(2.0**-_BITS)
