"""Models out of a run, as files for other programs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from robustkit.compress.export import (
    Agreement,
    Format,
    agreement,
    check_format,
    onnx_runner,
    pt2_runner,
    to_onnx,
    to_pt2,
)
from robustkit.data.split import fixed_subset
from robustkit.models.architecture import read_architecture
from robustkit.recipe.spec import Recipe
from robustkit.report.inside import inside
from robustkit.run_folder import data_of, model_file, model_of, recipe_of, row_of
from robustkit.store import write_atomic

IMAGES = 256


@dataclass(frozen=True)
class Exported:
    """A file that was written: of which variant and seed, its size, and how it agrees with the model."""

    path: Path
    variant: str
    seed: int
    format: Format
    bytes: int
    agreement: Agreement


def export(
    run: str | Path,
    variant: str,
    format: str = "safetensors",
    *,
    out: str | Path | None = None,
    seed: int | None = None,
    trust_plugins: bool = False,
) -> Exported:
    """Write the model of a variant of a run (its folder) as `safetensors`, `onnx` or `pt2`.

    The file takes batches of any size, images in [0, 1], and holds no image. Before it is written, its logits are
    compared with the model's on up to 256 test images of the run. `out`: default RUN/exports/VARIANT-seedN.FORMAT.
    `seed`: default the run's first. A run on code of a user's own needs `trust_plugins=True`: that code is run.

    Raises:
        UsageError: no such run, variant, seed or format; packages are missing; code is not trusted.
        ModelError: the model's file is broken, the model cannot be traced, or the file answers otherwise.
        DataError: the run's data are no longer there.
    """
    kind, folder = check_format(format), Path(run)
    row = row_of(folder, variant, seed)
    recipe = recipe_of(folder)
    source = model_file(folder, row)
    model = model_of(source, recipe, trust_plugins)
    test = data_of(recipe, row.name, trust_plugins).test
    images = fixed_subset(test, recipe.evaluate.examples).floats(0, IMAGES)
    data, found = _written(model, source, kind, images, recipe, f"{variant} as {kind}")
    path = Path(out) if out is not None else inside(folder, f"exports/{row.name}-seed{row.seed}.{kind}")
    write_atomic(path, data)
    return Exported(path, row.name, row.seed, kind, len(data), found)


def _written(
    model: nn.Module, source: Path, kind: Format, images: Tensor, recipe: Recipe, what: str
) -> tuple[bytes, Agreement]:
    """Return the bytes of the file and how what they hold agrees with the model."""
    shape = read_architecture(source).shape
    if kind == "pt2":
        data = to_pt2(model, shape)
        return data, agreement(model, pt2_runner(data), images, what)
    if kind == "onnx":
        data = to_onnx(model, shape)
        return data, agreement(model, onnx_runner(data), images, what)
    data = source.read_bytes()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / source.name
        copy.write_bytes(data)
        # Its class was trusted when the model itself was loaded.
        again = model_of(copy, recipe, trust_plugins=True)
    return data, agreement(model, again, images, what)
