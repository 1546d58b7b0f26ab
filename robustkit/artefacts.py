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
from robustkit.compress.export_int8 import CALIBRATION, Changed, as_int8, changed_by
from robustkit.data.split import fixed_subset
from robustkit.errors import UsageError
from robustkit.models.architecture import read_architecture
from robustkit.models.artefact import save_model
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantized import Quantized
from robustkit.models.wrapped import Wrapped
from robustkit.recipe.spec import Recipe, Use
from robustkit.report.inside import inside
from robustkit.run_folder import data_of, model_file, model_of, recipe_of, row_of
from robustkit.store import MODEL, ONNX, write_atomic

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
    """With the model; with `int8`, with the quantized model of it."""
    changed: Changed | None = None
    """With `int8`: what that changed."""


def export(
    run: str | Path,
    variant: str,
    format: str = "safetensors",
    *,
    int8: bool = False,
    out: str | Path | None = None,
    seed: int | None = None,
    trust_plugins: bool = False,
) -> Exported:
    """Write the model of a variant of a run (its folder) as `safetensors`, `onnx` or `pt2`.

    The file takes batches of any size, images in [0, 1], and holds no image. Before it is written, its logits are
    compared with the model's on up to 256 test images of the run. `out`: default RUN/exports/VARIANT-seedN.FORMAT.
    `int8`: the model is quantized first, with 512 training images of the run for the ranges of activations: by ONNX
    Runtime for onnx, by PyTorch (extra `[int8]`) for the others. A variant that is int8 needs no such word; of int8
    models predictions must agree, not logits. `seed`: default the run's first. A run on code of a user's own needs
    `trust_plugins=True`: that code is run.

    Raises:
        UsageError: no such run, variant, seed or format; packages are missing; code is not trusted; the variant is an
            ONNX file and the format another; `int8` of what is int8.
        ModelError: the model's file is broken, the model cannot be traced, or the file answers otherwise.
        DataError: the run's data are no longer there.
    """
    kind, folder = check_format(format), Path(run)
    row = row_of(folder, variant, seed)
    recipe = recipe_of(folder)
    source = model_file(folder, row)
    model = model_of(source, recipe, trust_plugins)
    _check_kind(model, kind)
    dataset = data_of(recipe, row.name, trust_plugins)
    images = fixed_subset(dataset.test, recipe.evaluate.examples).floats(0, IMAGES)
    changed, floating = None, model
    if int8 and isinstance(model, Wrapped):
        raise UsageError(f"{variant} has inference wrappers, which cannot be quantized: leave --int8 out")
    if int8:
        training = fixed_subset(dataset.train, CALIBRATION)
        model = as_int8(model, kind, training.floats(0, CALIBRATION))
        changed = changed_by(floating, model, images)
    with tempfile.TemporaryDirectory() as place:
        if int8:
            source = _saved(model, source, Path(place))
        data, found = _written(model, source, kind, images, recipe, f"{variant} as {kind}")
    suffix = "-int8" if int8 else ""
    path = Path(out) if out is not None else inside(folder, f"exports/{row.name}-seed{row.seed}{suffix}.{kind}")
    write_atomic(path, data)
    return Exported(path, row.name, row.seed, kind, len(data), found, changed)


def _check_kind(model: nn.Module, kind: Format) -> None:
    plain = model.plain if isinstance(model, Wrapped) else model
    if isinstance(plain, OnnxModel) and (kind != "onnx" or plain is not model):
        raise UsageError("the variant is an ONNX file: it is exported with --format onnx, without inference wrappers")


def _saved(model: nn.Module, source: Path, place: Path) -> Path:
    """Write an int8 model with the architecture of the float one's file, and return where."""
    told = read_architecture(source)
    use = Use(name=told.model, parameters=told.parameters, label=told.model)
    path = place / (ONNX if isinstance(model, OnnxModel) else MODEL)
    save_model(model, path, use, shape=told.shape, classes=told.classes)
    return path


def _written(
    model: nn.Module, source: Path, kind: Format, images: Tensor, recipe: Recipe, what: str
) -> tuple[bytes, Agreement]:
    """Return the bytes of the file and how what they hold agrees with the model."""
    shape, exact = read_architecture(source).shape, not isinstance(model, Quantized)
    traced = model.artefact if isinstance(model, Quantized) else model
    if kind == "pt2":
        data = to_pt2(traced, shape)
        return data, agreement(model, pt2_runner(data), images, what, exact=exact)
    if kind == "onnx":
        data = source.read_bytes() if isinstance(model, OnnxModel) else to_onnx(traced, shape)
        return data, agreement(model, onnx_runner(data), images, what, exact=exact)
    data = source.read_bytes()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / source.name
        copy.write_bytes(data)
        # Its class was trusted when the model itself was loaded.
        again = model_of(copy, recipe, trust_plugins=True)
    return data, agreement(model, again, images, what)
