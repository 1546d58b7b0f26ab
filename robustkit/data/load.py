"""From a source to a data set: resized, limited, with a validation split cut from the training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from robustkit.data.arrays import Arrays, Source, checked, limited, resized, stratified
from robustkit.data.cache import cached
from robustkit.data.fingerprint import fingerprint, poisoned_fingerprint, scaling, source_of
from robustkit.data.poison.plant import planted, poison_of
from robustkit.data.split import Dataset, Split, split_of
from robustkit.errors import DataError
from robustkit.recipe.spec import Use

VALIDATION_SEED = 20_260_101
CHUNK = 4096


def load_dataset(
    use: Use,
    *,
    validation: float = 0.1,
    poison: Use | None = None,
    cache: Path | None = None,
    folder: Path | None = None,
    plugins: Sequence[Path] = (),
) -> Dataset:
    """Return the data of a recipe as uint8 tensors on the CPU.

    `validation` is the share of each training class that is cut off for choosing checkpoints; the cut does not depend
    on the run's seed. `poison` is put into the training data before the cut, as nobody knows which examples will be
    held out; the test data stay as they are. Decoded data are cached under `cache` (default: ROBUSTKIT_CACHE or the
    user's cache folder). `folder` is where relative paths start; `plugins` are files in which a source of yours is
    found by its bare name.

    Raises:
        DataError: a file is missing or broken; the message names it. Or there are too few images to hold any out.
    """
    key = fingerprint(use, folder=folder, plugins=plugins)
    source = source_of(use, folder, plugins)

    def read() -> Arrays:
        arrays = checked(source.read(), _where(use, source))
        return _prepared(arrays, *scaling(source))

    arrays, mask = cached(key, read, cache), None
    if poison is not None:
        arrays, mask = planted(poison_of(poison, folder, plugins), arrays)
        key = poisoned_fingerprint(key, poison, folder=folder, plugins=plugins)
    kept, cut = stratified(np.asarray(arrays.train_labels), validation, VALIDATION_SEED)
    if not len(cut):
        raise DataError(
            f"{_where(use, source)}: {len(kept)} training images, no two of one class: none can be held out for "
            f"validation; {'raise `limit`' if source.limit else 'add images'}"
        )
    train = _split(arrays.train_images, arrays.train_labels, kept)
    mean, std = channel_statistics(train)
    return Dataset(
        train=train,
        validation=_split(arrays.train_images, arrays.train_labels, cut),
        test=_split(arrays.test_images, arrays.test_labels, np.arange(len(arrays.test_labels))),
        classes=arrays.classes,
        fingerprint=key,
        mean=mean,
        std=std,
        poisoned=None if mask is None else torch.from_numpy(mask[kept]),
        held_out_poisoned=None if mask is None else torch.from_numpy(mask[cut]),
    )


def _where(use: Use, source: Source) -> str:
    """Return what a message calls the data: the source's name, and its file or folder where it has one."""
    place = getattr(source, "path", None) or getattr(source, "root", None)
    return f"data {use.name}" if place is None else f"data {use.name}: {Path(place).expanduser()}"


def _prepared(arrays: Arrays, size: int | None, limit: int | None) -> Arrays:
    train = limited(arrays.train_labels, limit)
    test = limited(arrays.test_labels, limit)
    return Arrays(
        resized(arrays.train_images[train], size),
        arrays.train_labels[train],
        resized(arrays.test_images[test], size),
        arrays.test_labels[test],
        arrays.classes,
    )


def _split(images: NDArray[np.uint8], labels: NDArray[np.int64], positions: NDArray[np.int64]) -> Split:
    # Indexing copies out of the memory map into ordinary, writable memory.
    return split_of(torch.from_numpy(np.array(images[positions])), torch.from_numpy(np.array(labels[positions])))


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel in [0, 1]; a constant channel gets a deviation of 1."""
    total = torch.zeros(split.shape[0], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(split), CHUNK):
        block = split.images[start : start + CHUNK].to(torch.float32).div_(255)
        total += block.sum((0, 2, 3))
        squares += block.square_().sum((0, 2, 3))
    count = len(split) * split.shape[1] * split.shape[2]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return tuple(mean.tolist()), tuple(std.tolist())
