"""Which examples an attack still works on."""

from __future__ import annotations

from torch import Tensor


def survivors(robust: Tensor) -> Tensor:
    """Return the positions (int64) where the mask (N,) holds: the one place where an attack step waits for the device.

    How many examples are left decides the shape of the next step, so the host has to know.
    """
    return robust.nonzero().squeeze(1)
