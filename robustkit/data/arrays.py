"""What every source reads: images and labels as numpy arrays. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from robustkit.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
LIMIT_SEED = 20_260_102


@dataclass(frozen=True)
class Arrays:
    """Images as uint8 (N, C, H, W) and labels (N,) int64 of both splits, with the names of the classes."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]


class Source(Protocol):
    """A source of images: parameters at construction, nothing read before `read` or `fingerprint`."""

    @property
    def size(self) -> int | None: ...  # noqa: D102

    @property
    def limit(self) -> int | None: ...  # noqa: D102

    def read(self) -> Arrays:
        """Return everything, at its own size."""
        ...

    def fingerprint(self) -> str:
        """Return a key of the content: equal content, equal key, wherever it lies."""
        ...


@runtime_checkable
class Downloads(Protocol):
    """A source that can get its files by itself; its `fingerprint` gets none."""

    def fetch(self) -> None:
        """Get the files where that is asked for and they are not there."""
        ...


def checked(arrays: Arrays, where: str) -> Arrays:
    """Return the arrays if they make sense.

    Raises:
        DataError: no examples, counts that differ, labels outside the classes, images of another shape.
    """
    count = len(arrays.classes)
    if count < 2:
        raise DataError(f"{where}: {count} class; a classifier needs at least 2")
    for name in ("train", "test"):
        images: NDArray[Any] = getattr(arrays, f"{name}_images")
        labels: NDArray[Any] = getattr(arrays, f"{name}_labels")
        if images.ndim != 4 or images.dtype != np.uint8:
            raise DataError(f"{where}: {name} images are {images.dtype} {images.shape}, not uint8 (N, C, H, W)")
        if len(images) != len(labels):
            raise DataError(f"{where}: {len(images)} {name} images but {len(labels)} labels")
        if not len(images):
            raise DataError(f"{where}: no {name} images")
        if labels.min() < 0 or labels.max() >= count:
            raise DataError(f"{where}: {name} labels lie in {labels.min()}..{labels.max()}, not in 0..{count - 1}")
    if arrays.train_images.shape[1:] != arrays.test_images.shape[1:]:
        raise DataError(
            f"{where}: train images are {arrays.train_images.shape[1:]}, test images {arrays.test_images.shape[1:]}"
        )
    return arrays


def stratified(labels: Labels, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (kept, cut) positions: `share` of each class is cut off, at least one of a class with two or more."""
    generator = np.random.default_rng(seed)
    cut: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        cut.append(generator.permutation(members)[:count])
    taken = np.sort(np.concatenate(cut)) if cut else np.zeros(0, dtype=np.int64)
    kept = np.setdiff1d(np.arange(len(labels)), taken)
    return kept, taken


def limited(labels: Labels, limit: int | None, seed: int = LIMIT_SEED) -> NDArray[np.int64]:
    """Return the positions of at most `limit` examples, with the classes in proportion."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * limit / len(labels)
    quota = np.floor(exact).astype(int)
    for position in np.argsort(quota - exact, kind="stable")[: limit - int(quota.sum())]:
        quota[position] += 1
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in zip(classes, quota, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def resized(images: Images, size: int | None) -> Images:
    """Return the images scaled to size x size, bilinear with antialiasing when they shrink (Pillow)."""
    if size is None or images.shape[2:] == (size, size):
        return images
    from PIL import Image

    planes = images.reshape(-1, *images.shape[2:])
    done = [np.asarray(scaled(Image.fromarray(plane), size)) for plane in planes]
    return np.stack(done).reshape(*images.shape[:2], size, size)


def scaled(image: Image.Image, size: int | None) -> Image.Image:
    """Return the image scaled to size x size, bilinear with antialiasing; as it is without a size."""
    from PIL import Image

    return image if size is None else image.resize((size, size), Image.Resampling.BILINEAR)


def names_of(count: int) -> tuple[str, ...]:
    """Return class names where a source has none."""
    return tuple(str(number) for number in range(count))


def subset(values: Sequence[str], limit: int = 5) -> str:
    """Return the first few of a list of names, for a message."""
    shown = ", ".join(values[:limit])
    return f"{shown}, ... ({len(values)} in all)" if len(values) > limit else shown
