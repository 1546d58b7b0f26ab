"""Adversarial images as PNG data URIs: clean, attacked, and the change ten times as strong."""

from __future__ import annotations

import base64
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from robustkit.errors import UsageError
from robustkit.report.inside import inside
from robustkit.results import Results, VariantResult

SCALE = 10
MAX_IMAGES = 8
MAX_ROWS = 16
SIDE = 64
BROKEN = (OSError, ValueError, LookupError, TypeError, ArithmeticError, SystemError, EOFError, BadZipFile, zlib.error)
"""What NumPy and Pillow raise on files and arrays that are not what they should be."""


@dataclass(frozen=True)
class Picture:
    """One example: three images as data URIs, and what the model said."""

    clean: str
    adversarial: str
    change: str
    label: str
    before: str
    after: str
    fooled: bool
    norm: str


def galleries(run: Path, results: Results) -> list[tuple[VariantResult, list[Picture]]]:
    """Return the pictures of each variant that has any (first seed, at most 16 variants).

    Raises:
        UsageError: a gallery's file is broken.
    """
    found: list[tuple[VariantResult, list[Picture]]] = []
    first = results.variants[0].seed if results.variants else 0
    for row in results.variants:
        if row.gallery and row.seed == first and len(found) < MAX_ROWS:
            found.append((row, _pictures(inside(run, row.gallery), results)))
    return found


def _pictures(path: Path, results: Results) -> list[Picture]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            data = {name: arrays[name] for name in arrays.files}
        return [_picture(data, number, results) for number in range(min(MAX_IMAGES, len(data["label"])))]
    except BROKEN as error:
        raise UsageError(f"{path}: broken gallery: {error}") from error


def _picture(data: dict[str, NDArray[Any]], number: int, results: Results) -> Picture:
    clean = np.asarray(data["clean"][number], dtype=np.float32) / 255
    adversarial = np.asarray(data["adversarial"][number], dtype=np.float32)
    label = int(data["label"][number])
    before, after = (int(data[f"prediction_{which}"][number]) for which in ("clean", "adversarial"))
    sure = [float(data[f"confidence_{which}"][number]) for which in ("clean", "adversarial")]
    return Picture(
        clean=data_uri(clean),
        adversarial=data_uri(adversarial),
        change=data_uri(0.5 + SCALE * (adversarial - clean) / 2),
        label=_class(label, results),
        before=f"{_class(before, results)} {sure[0]:.0%}",
        after=f"{_class(after, results)} {sure[1]:.0%}",
        fooled=after != label,
        norm=f"{float(data['norm'][number]):.3g}",
    )


def _class(number: int, results: Results) -> str:
    return results.classes[number] if 0 <= number < len(results.classes) else str(number)


def data_uri(image: NDArray[np.floating]) -> str:
    """Return an image (C, H, W) in [0, 1] as a PNG data URI of at most 64 pixels a side."""
    from PIL import Image

    pixels = (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels[0]) if pixels.shape[0] != 3 else Image.fromarray(pixels.transpose(1, 2, 0))
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
