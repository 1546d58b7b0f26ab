"""Mid-training state on disk: replaced atomically every epoch, read back without pickle's code."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robustkit.store import write_atomic


class StateFile:
    """One file that holds the state of a training after its last whole epoch."""

    def __init__(self, path: Path, on_broken: Callable[[str], None]) -> None:
        self.path = path
        self._on_broken = on_broken

    def load(self) -> dict[str, Any] | None:
        """Return the saved state on the CPU; None where there is none, or where the file is broken (then said so)."""
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (
            OSError,
            RuntimeError,
            ValueError,
            EOFError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            self._on_broken(f"{self.path}: broken state, training starts again: {type(error).__name__}")
            return None
        return state if isinstance(state, dict) else None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.path, buffer.getvalue())
