"""MNIST and Fashion-MNIST from their four IDX files, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustkit.data.arrays import Arrays, names_of
from robustkit.data.content import content_hash
from robustkit.errors import DataError, NotDownloaded
from robustkit.params import PathStr, PositiveInt

FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
MAX_BYTES = 2**31


@dataclass(frozen=True)
class FashionMnist:
    """Fashion-MNIST: 28x28 clothes, 10 classes, 60,000 + 10,000, from a folder with its IDX files."""

    root: PathStr = "~/datasets"
    download: bool = False
    size: PositiveInt | None = None
    limit: PositiveInt | None = None

    def read(self) -> Arrays:
        """Return the images as uint8 (N, 1, 28, 28)."""
        return _read(_files(self.root, "FashionMNIST", self.download), FASHION)

    def fetch(self) -> None:
        """Download the files where `download` says so and they are not there."""
        if self.download:
            _files(self.root, "FashionMNIST", True)

    def fingerprint(self) -> str:
        """Return a key of the four files."""
        return content_hash(list(_files(self.root, "FashionMNIST", self.download, fetch=False).values()))


@dataclass(frozen=True)
class Mnist:
    """MNIST: 28x28 digits, 10 classes, 60,000 + 10,000, from a folder with its IDX files."""

    root: PathStr = "~/datasets"
    download: bool = False
    size: PositiveInt | None = None
    limit: PositiveInt | None = None

    def read(self) -> Arrays:
        """Return the images as uint8 (N, 1, 28, 28)."""
        return _read(_files(self.root, "MNIST", self.download), names_of(10))

    def fetch(self) -> None:
        """Download the files where `download` says so and they are not there."""
        if self.download:
            _files(self.root, "MNIST", True)

    def fingerprint(self) -> str:
        """Return a key of the four files."""
        return content_hash(list(_files(self.root, "MNIST", self.download, fetch=False).values()))


def _files(root: str, name: str, download: bool, *, fetch: bool = True) -> dict[str, Path]:
    """Find the four files in the folder, in <folder>/raw, or where torchvision lays them."""
    base = Path(root).expanduser()
    found = _search(base, name)
    if isinstance(found, dict):
        return found
    if download and not fetch:
        raise NotDownloaded(f"{name} is not in {base} yet; a run downloads it there")
    if download:
        _download(base, name)
        found = _search(base, name)
        if isinstance(found, dict):
            return found
    if not base.is_dir():
        raise DataError(f"{base}: there is no such folder; set `root` to the folder of {name}, or `download: true`")
    raise DataError(f"{base}: {found} (or .gz) is missing; set `root` to the folder of {name}'s four IDX files")


def _search(base: Path, name: str) -> dict[str, Path] | str:
    missing = FILES["train_images"]
    for folder in (base, base / "raw", base / name / "raw", base / name):
        found: dict[str, Path] = {}
        for key, file in FILES.items():
            for candidate in (folder / file, folder / f"{file}.gz"):
                if candidate.is_file():
                    found[key] = candidate
                    break
        if len(found) == len(FILES):
            return found
        if found:
            missing = next(file for key, file in FILES.items() if key not in found)
    return missing


def _download(base: Path, name: str) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, name)(str(base), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} could not be downloaded to {base}: {error}") from error


def _read(files: dict[str, Path], classes: tuple[str, ...]) -> Arrays:
    arrays = {key: read_idx(path, 3 if key.endswith("images") else 1) for key, path in files.items()}
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if len(images) != len(labels):
            path = files[f"{split}_labels"]
            raise DataError(f"{path}: {len(labels)} labels for {len(images)} images in {files[f'{split}_images']}")
    return Arrays(
        arrays["train_images"][:, None],
        arrays["train_labels"].astype(np.int64),
        arrays["test_images"][:, None],
        arrays["test_labels"].astype(np.int64),
        classes,
    )


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of an IDX file of unsigned bytes (LeCun et al., the MNIST database).

    Raises:
        DataError: not IDX, another number of dimensions, or a size that is not the header's.
    """
    raw = _bytes(path)
    head = 4 + 4 * dimensions
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path}: not an IDX file of bytes with {dimensions} dimensions")
    shape = tuple(int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dimensions))
    expected = int(np.prod([int(extent) for extent in shape], dtype=object))
    if len(raw) - head != expected:
        raise DataError(f"{path}: {len(raw) - head:,} bytes of data, but its header says {shape} ({expected:,})")
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape).copy()


def _bytes(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            raw: bytes = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: truncated or not readable: {error}") from error
    if len(raw) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES:,} bytes")
    return raw
