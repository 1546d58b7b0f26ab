"""Decoded data on disk as memory-mapped arrays, keyed by content. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from robustkit.data.arrays import Arrays
from robustkit.data.content import cache_folder
from robustkit.store import write_json

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")

__all__ = ["cache_folder", "cached"]


def cached(key: str, read: Callable[[], Arrays], folder: Path | None = None) -> Arrays:
    """Return what `read` returns, from the cache where it is there and whole; arrays come back memory-mapped."""
    place = (folder or cache_folder()) / "decoded" / key
    found = _load(place)
    if found is not None:
        return found
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        found = _load(place)
        if found is None:
            _save(place, read())
            found = _load(place)
    if found is None:
        raise OSError(f"{place} cannot be read back")
    return found


def _save(place: Path, arrays: Arrays) -> None:
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in ARRAYS:
        np.save(temporary / f"{name}.npy", getattr(arrays, name), allow_pickle=False)
    sizes = {name: (temporary / f"{name}.npy").stat().st_size for name in ARRAYS}
    # Written last: without it, or with other sizes than it says, the folder counts as broken.
    write_json(temporary / "index.json", {"classes": list(arrays.classes), "sizes": sizes})
    shutil.rmtree(place, ignore_errors=True)
    temporary.replace(place)


def _load(place: Path) -> Arrays | None:
    try:
        index = json.loads((place / "index.json").read_bytes())
        if any((place / f"{name}.npy").stat().st_size != index["sizes"][name] for name in ARRAYS):
            return None
        arrays: dict[str, NDArray[Any]] = {
            name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS
        }
        return Arrays(classes=tuple(str(name) for name in index["classes"]), **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None
