"""Seeds that belong to one plugin of one step, so that adding a plugin shifts nobody else's randomness."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: str | int) -> int:
    """Return a seed in [0, 2**63) from the sha256 of the parts, e.g. `derive_seed(seed, step_key, label, epoch)`."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
