"""The number format in which a model computes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast(device_type: str, precision: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context in which operations run at `precision`; None leaves them as they are."""
    return nullcontext() if precision is None else torch.autocast(device_type, dtype=precision)


def has_bf16(device: torch.device) -> bool:
    """Say whether a device multiplies in bfloat16 in hardware, so that it is worth a trial."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = processor() if device.type == "cpu" else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def processor() -> Mapping[str, Any]:
    """Return what torch knows of the processor, by the names of `torch.cpu.get_capabilities`; before 2.11 nothing."""
    asked = getattr(torch.cpu, "get_capabilities", dict)
    known: Mapping[str, Any] = asked()
    return known
