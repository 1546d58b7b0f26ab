"""CIFAR-10, CIFAR-100 and SVHN through torchvision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustkit.data.arrays import Arrays, names_of
from robustkit.data.content import content_hash
from robustkit.errors import DataError
from robustkit.params import PathStr, PositiveInt

Open = Callable[[bool], Any]
"""(train) -> torchvision data set; torchvision checks the md5 of the files before it reads them."""


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

    def fingerprint(self) -> str:
        """Return a key of the batch files."""
        files = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        return _fingerprint("CIFAR10", self.root, self.download, "cifar-10-batches-py", files)


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

    def fingerprint(self) -> str:
        """Return a key of the batch files."""
        return _fingerprint("CIFAR100", self.root, self.download, "cifar-100-python", ["train", "test"])


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

    def fingerprint(self) -> str:
        """Return a key of the two files."""
        return _fingerprint("SVHN", self.root, self.download, "", ["train_32x32.mat", "test_32x32.mat"])


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


def _fingerprint(name: str, root: str, download: bool, folder: str, files: list[str]) -> str:
    base = Path(root).expanduser() / folder
    paths = [base / file for file in files]
    if download and not all(path.is_file() for path in paths):
        _fetch(name, root)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: there is no such file; set `root` to the folder of {name}, or `download: true`")
    return content_hash(paths)


def _fetch(name: str, root: str) -> None:
    from torchvision import datasets

    base = str(Path(root).expanduser())
    if name == "SVHN":
        for split in ("train", "test"):
            _open(lambda split=split: datasets.SVHN(base, split=split, download=True), name, root)  # type: ignore[misc]
    else:
        _open(lambda: getattr(datasets, name)(base, download=True), name, root)
