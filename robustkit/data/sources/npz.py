"""Images and labels from one npz file."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit.data.arrays import Arrays, names_of
from robustkit.data.content import content_hash
from robustkit.errors import DataError
from robustkit.params import PathStr, PositiveInt

KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Npz:
    """Arrays x_train, y_train, x_test, y_test of one .npz file; images uint8, (N, H, W), (N, C, H, W) or NHWC."""

    path: PathStr
    size: PositiveInt | None = None
    limit: PositiveInt | None = None

    def read(self) -> Arrays:
        """Return the arrays as uint8 (N, C, H, W)."""
        path = Path(self.path).expanduser()
        found = _load(path)
        images = {key: _images(found[key], f"{path}: {key}") for key in ("x_train", "x_test")}
        labels = {key: _labels(found[key], f"{path}: {key}") for key in ("y_train", "y_test")}
        every = np.concatenate(list(labels.values()))
        count = int(every.max()) + 1 if every.size else 1
        return Arrays(images["x_train"], labels["y_train"], images["x_test"], labels["y_test"], names_of(count))

    def fingerprint(self) -> str:
        """Return a key of the file's content."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        return content_hash([path], ["npz"])


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        # Opened here: np.load leaves a broken file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file.files]
            if missing:
                raise DataError(f"{path}: holds {', '.join(file.files) or 'nothing'}; {', '.join(missing)} is missing")
            return {key: file[key] for key in KEYS}
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, AttributeError) as error:
        raise DataError(f"{path}: broken, or not an npz file of plain arrays: {error}") from error


def _images(array: NDArray[Any], where: str) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise DataError(f"{where}: images are {array.dtype}; uint8 in 0..255 is needed")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4:
        raise DataError(f"{where}: shape {array.shape}; (N, H, W), (N, C, H, W) or (N, H, W, C) is needed")
    return np.ascontiguousarray(array.astype(np.uint8, copy=False))


def _labels(array: NDArray[Any], where: str) -> NDArray[np.int64]:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{where}: labels are {array.dtype} {array.shape}; whole numbers (N,) are needed")
    if len(array) and (array.min() < 0 or array.max() > 100_000):
        raise DataError(f"{where}: labels lie in {array.min()}..{array.max()}")
    return array.astype(np.int64)
