"""CIFAR-10, CIFAR-100 and SVHN through torchvision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustkit.data.arrays import Arrays, names_of
from robustkit.data.content import content_hash
from robustkit.errors import DataError, NotDownloaded
from robustkit.params import PathStr, PositiveInt

Open = Callable[[bool], Any]
"""(train) -> torchvision data set; torchvision checks the md5 of the files before it reads them."""
FILES = {
    "CIFAR10": [f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")],
    "CIFAR100": ["cifar-100-python/train", "cifar-100-python/test"],
    "SVHN": ["train_32x32.mat", "test_32x32.mat"],
}


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10: 32x32 colour images, 10 classes, 50,000 + 10,000, in torchvision's layout."""

    root: PathStr = "~/datasets"
    download: bool = False
    size: PositiveInt | None = None
    limit: PositiveInt | None = None

    def read(self) -> Arrays:
        """Return the images as uint8 (N, 3, 32, 32)."""
        return _cifar("CIFAR10", self.root, self.download)

    def fetch(self) -> None:
        """Download the files where `download` says so and they are not there."""
        if self.download and _missing("CIFAR10", self.root):
            _fetch("CIFAR10", self.root)

    def fingerprint(self) -> str:
        """Return a key of the batch files."""
        return _fingerprint("CIFAR10", self.root, self.download)


@dataclass(frozen=True)
class Cifar100:
    """CIFAR-100: 32x32 colour images, 100 classes, 50,000 + 10,000, in torchvision's layout."""

    root: PathStr = "~/datasets"
    download: bool = False
    size: PositiveInt | None = None
    limit: PositiveInt | None = None

    def read(self) -> Arrays:
        """Return the images as uint8 (N, 3, 32, 32)."""
        return _cifar("CIFAR100", self.root, self.download)

    def fetch(self) -> None:
        """Download the files where `download` says so and they are not there."""
        if self.download and _missing("CIFAR100", self.root):
            _fetch("CIFAR100", self.root)

    def fingerprint(self) -> str:
        """Return a key of the batch files."""
        return _fingerprint("CIFAR100", self.root, self.download)


@dataclass(frozen=True)
class Svhn:
    """SVHN: 32x32 house numbers, 10 classes, 73,257 + 26,032, in torchvision's layout."""

    root: PathStr = "~/datasets"
    download: bool = False
    size: PositiveInt | None = None
    limit: PositiveInt | None = None

    def read(self) -> Arrays:
        """Return the images as uint8 (N, 3, 32, 32)."""
        from torchvision import datasets

        base = str(Path(self.root).expanduser())

        def one(split: str) -> Any:  # noqa: ANN401
            return _open(lambda: datasets.SVHN(base, split=split, download=self.download), "SVHN", self.root)

        train, test = one("train"), one("test")
        return Arrays(
            np.ascontiguousarray(train.data),
            train.labels.astype(np.int64),
            np.ascontiguousarray(test.data),
            test.labels.astype(np.int64),
            names_of(10),
        )

    def fetch(self) -> None:
        """Download the files where `download` says so and they are not there."""
        if self.download and _missing("SVHN", self.root):
            _fetch("SVHN", self.root)

    def fingerprint(self) -> str:
        """Return a key of the two files."""
        return _fingerprint("SVHN", self.root, self.download)


def _cifar(name: str, root: str, download: bool) -> Arrays:
    from torchvision import datasets

    base = str(Path(root).expanduser())

    def one(train: bool) -> Any:  # noqa: ANN401
        return _open(lambda: getattr(datasets, name)(base, train=train, download=download), name, root)

    train, test = one(True), one(False)
    return Arrays(
        np.ascontiguousarray(train.data.transpose(0, 3, 1, 2)),
        np.asarray(train.targets, dtype=np.int64),
        np.ascontiguousarray(test.data.transpose(0, 3, 1, 2)),
        np.asarray(test.targets, dtype=np.int64),
        tuple(train.classes),
    )


def _open(make: Callable[[], Any], name: str, root: str) -> Any:  # noqa: ANN401
    try:
        return make()
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise DataError(
            f"{Path(root).expanduser()}: {name} is not there or broken ({error}); set `root`, or `download: true`"
        ) from error


def _paths(name: str, root: str) -> list[Path]:
    return [Path(root).expanduser() / file for file in FILES[name]]


def _missing(name: str, root: str) -> list[Path]:
    return [path for path in _paths(name, root) if not path.is_file()]


def _fingerprint(name: str, root: str, download: bool) -> str:
    missing = _missing(name, root)
    if missing and download:
        raise NotDownloaded(f"{name} is not in {Path(root).expanduser()} yet; a run downloads it there")
    if missing:
        raise DataError(f"{missing[0]}: there is no such file; set `root` to the folder of {name}, or `download: true`")
    return content_hash(_paths(name, root))


def _fetch(name: str, root: str) -> None:
    from torchvision import datasets

    base = str(Path(root).expanduser())
    if name == "SVHN":
        for split in ("train", "test"):
            _open(lambda split=split: datasets.SVHN(base, split=split, download=True), name, root)  # type: ignore[misc]
    else:
        _open(lambda: getattr(datasets, name)(base, download=True), name, root)
