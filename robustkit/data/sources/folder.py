"""Any folder of images, one subfolder a class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from robustkit.data.arrays import Arrays, Images, limited, scaled, subset
from robustkit.data.content import content_hash, file_hashes
from robustkit.errors import DataError
from robustkit.params import Fraction, PathStr, PositiveInt

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
MODES = {"gray": "L", "rgb": "RGB"}
SIXTEEN_BITS = "I;16"
UNBOUNDED = ("I", "F")
"""Pillow's modes whose pixels have no largest value that stands for white."""
VALIDATION = ("val", "valid", "validation")
"""What other layouts call a held-out split."""
Item = tuple[Path, int]


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images: train/<class>/* and test/<class>/*, or <class>/* that is split by content."""

    root: PathStr
    test: Fraction = 0.2
    channels: Literal["auto", "gray", "rgb"] = "auto"
    size: PositiveInt | None = None
    limit: PositiveInt | None = None

    def read(self) -> Arrays:
        """Return all images as uint8 (N, C, H, W), decoded in threads; resized while decoding where `size` is given."""
        classes, train, test = self._listing
        mode = MODES.get(self.channels) or _mode(train[0][0])
        images = [self._decode(items, mode) for items in (train, test)]
        labels = [np.array([label for _, label in items], dtype=np.int64) for items in (train, test)]
        return Arrays(images[0], labels[0], images[1], labels[1], classes)

    def fingerprint(self) -> str:
        """Return a key of every file's place below its class and of its content."""
        _, train, test = self._listing
        base = Path(self.root).expanduser()
        files = [path for path, _ in (*train, *test)]
        start = len(str(base)) + 1
        names = [f"train/{str(path)[start:]}" for path, _ in train]
        names += [f"test/{str(path)[start:]}" for path, _ in test]
        decoding = f"|{self.channels}|{self.size}"
        return content_hash(files, [name + decoding for name in names])

    @cached_property
    def _listing(self) -> tuple[tuple[str, ...], list[Item], list[Item]]:
        classes, train, test = self._all()
        return classes, self._limited(train), self._limited(test)

    def _limited(self, items: list[Item]) -> list[Item]:
        """Leave out here what `limit` would drop later, so that it is neither hashed nor decoded."""
        labels = np.array([label for _, label in items], dtype=np.int64)
        return [items[position] for position in limited(labels, self.limit)]

    def _all(self) -> tuple[tuple[str, ...], list[Item], list[Item]]:
        base = Path(self.root).expanduser()
        if not base.is_dir():
            raise DataError(f"{base}: there is no such folder")
        if _has_both_splits(base):
            classes, train = _items(base / "train")
            others, test = _items(base / "test")
            if classes != others:
                odd = sorted(set(classes) ^ set(others))
                raise DataError(f"{base}: train/ and test/ have different classes: {subset(odd)}")
            return classes, train, test
        classes, items = _items(base)
        train, test = _split(items, self.test)
        if not train or not test:
            raise DataError(f"{base}: {len(items)} images are too few to split")
        return classes, train, test

    def _decode(self, items: Sequence[Item], mode: str) -> Images:
        force = self.channels != "auto"
        shape = (self.size, self.size) if self.size else _open(items[0][0], mode, None, None, force=force).shape[:2]
        channels = len(mode)
        out = np.empty((len(items), channels, *shape), dtype=np.uint8)

        def fill(position: int) -> None:
            image = _open(items[position][0], mode, self.size, shape, force=force)
            out[position] = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)

        with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1)) as pool:
            for _ in pool.map(fill, range(len(items))):
                pass
        return out


def _has_both_splits(base: Path) -> bool:
    """Say whether the folder is laid out as train/ and test/; one of them alone is an error, not a class."""
    found = [name for name in ("train", "test") if (base / name).is_dir()]
    # A class may well be called "train", but then its images lie right in it.
    if len(found) != 1 or any(_is_image(entry.name) for entry in (base / found[0]).iterdir()):
        return len(found) == 2
    missing = "test" if found == ["train"] else "train"
    other = next((name for name in VALIDATION if missing == "test" and (base / name).is_dir()), None)
    has = f"{found[0]}/ and {other}/" if other else f"{found[0]}/"
    what = f"rename {other}/ to test/" if other else f"add {missing}/"
    raise DataError(
        f"{base}: has {has} but no {missing}/; {what}, or set `root` to {base / found[0]} to have it split in two"
        + (" (the validation split is cut from train/)" if other else "")
    )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def _items(folder: Path) -> tuple[tuple[str, ...], list[Item]]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{folder}: holds no class folders")
    items: list[Item] = []
    for label, name in enumerate(classes):
        files = sorted(
            Path(where, file) for where, _, names in os.walk(folder / name) for file in names if _is_image(file)
        )
        if not files:
            raise DataError(f"{folder / name}: holds no images ({', '.join(sorted(EXTENSIONS))})")
        items += [(path, label) for path in files]
    return tuple(classes), items


def _split(items: list[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Split each class by the hash of its images' content: moving or renaming a file moves no image across."""
    hashes = file_hashes([path for path, _ in items])
    train: list[Item] = []
    test: list[Item] = []
    for label in sorted({label for _, label in items}):
        members = sorted((digest, path) for digest, (path, its) in zip(hashes, items, strict=True) if its == label)
        # Equal images have equal hashes and stand together, so at most one of their runs is cut in two; move that one.
        count = round(share * len(members))
        while 0 < count < len(members) and members[count - 1][0] == members[count][0]:
            count += 1
        test += sorted((path, label) for _, path in members[:count])
        train += sorted((path, label) for _, path in members[count:])
    return train, test


@contextmanager
def _image(path: Path) -> Iterator[Image.Image]:
    """Open an image; whatever is wrong with it is a DataError that names the file."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode in UNBOUNDED:
                    kind = "32-bit whole numbers" if image.mode == "I" else "floats"
                    raise DataError(f"{path}: its pixels are {kind} without a known range; save it with 8 or 16 bits")
                yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: not an image, or a broken one: {error}") from error


def _is_gray(image: Image.Image) -> bool:
    return image.mode in ("1", "L") or image.mode.startswith(SIXTEEN_BITS)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a 16-bit gray image scaled to 8 bits (Pillow would clip it at 255), any other one as it is."""
    from PIL import Image

    if not image.mode.startswith(SIXTEEN_BITS):
        return image
    return Image.fromarray(np.rint(np.asarray(image, dtype=np.float32) / 257).astype(np.uint8))


def _mode(path: Path) -> str:
    with _image(path) as image:
        return "L" if _is_gray(image) else "RGB"


def _open(
    path: Path, mode: str, size: int | None, shape: tuple[int, ...] | None, *, force: bool = False
) -> NDArray[np.uint8]:
    with _image(path) as image:
        if not force and _is_gray(image) != (mode == "L"):
            kinds = ("gray", "colour") if mode != "L" else ("colour", "gray")
            raise DataError(
                f"{path}: a {kinds[0]} image among {kinds[1]} ones; set `channels: rgb` or `channels: gray`"
            )
        eight = _eight_bits(image)
        converted = eight if eight.mode == mode else eight.convert(mode)
        array = np.asarray(scaled(converted, size), dtype=np.uint8)
    if shape is not None and array.shape[:2] != tuple(shape):
        raise DataError(
            f"{path}: {array.shape[1]}x{array.shape[0]} pixels where the first image has {shape[1]}x{shape[0]}; "
            "set `size` to scale them all"
        )
    return array
