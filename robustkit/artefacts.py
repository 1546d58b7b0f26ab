"""Models out of a run, as files for other programs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor, nn

from robustkit import registry
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
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset, fixed_subset
from robustkit.errors import ModelError, UsageError, did_you_mean
from robustkit.models.artefact import load_model, read_architecture, save_model
from robustkit.models.onnx_model import OnnxModel
from robustkit.models.quantized import Quantized
from robustkit.models.wrapped import Wrapped
from robustkit.recipe.spec import Recipe, Use
from robustkit.report.inside import inside
from robustkit.results import VariantResult, read_results
from robustkit.store import MODEL, ONNX, Store, write_atomic

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
    row = _row(folder, variant, seed)
    recipe = _recipe(folder)
    source = _model_file(folder, row)
    model = load_model(source, folder=recipe.folder, plugins=recipe.plugins, trust_plugins=trust_plugins)
    _check_kind(model, kind)
    dataset = _dataset(recipe, trust_plugins)
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


def _row(folder: Path, variant: str, seed: int | None) -> VariantResult:
    results = read_results(inside(folder, "results.json"))
    named = [row for row in results.variants if row.name == variant]
    if not named:
        names = list(dict.fromkeys(row.name for row in results.variants))
        raise UsageError(f"{folder} has no variant {variant!r}; {did_you_mean(variant, names) or ', '.join(names)}")
    chosen = [row for row in named if seed in (None, row.seed)]
    if not chosen:
        raise UsageError(
            f"{folder}: {variant} was not made with seed {seed}; {', '.join(str(row.seed) for row in named)}"
        )
    return chosen[0]


def _recipe(folder: Path) -> Recipe:
    path = inside(folder, "resolved.json")
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}") from error


def _model_file(folder: Path, row: VariantResult) -> Path:
    if row.model is None:
        raise UsageError(f"{folder}: its results.json names no model; run the recipe again, which trains nothing again")
    path = inside(folder, row.model)
    if Store(folder).record(path.parent.name) is None:
        raise ModelError(f"{path}: not there, or not as the run left it; run the recipe again")
    return path


def _dataset(recipe: Recipe, trust_plugins: bool) -> Dataset:
    """Return the run's data; what was poisoned in its training images is not."""
    entry = registry.find("data", recipe.data.name, folder=recipe.folder, plugins=recipe.plugins)
    if registry.runs_user_code(entry) and not trust_plugins:
        raise UsageError(
            f"the run's data come from {recipe.data.name}, which is code: read it; if you trust it, add "
            "--trust-plugins, or trust_plugins=True from Python"
        )
    held_out = next((one.train.validation for one in recipe.variants if one.train), 0.1)
    return load_dataset(recipe.data, validation=held_out, folder=recipe.folder, plugins=recipe.plugins)


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
        again = load_model(copy, folder=recipe.folder, plugins=recipe.plugins, trust_plugins=True)
    return data, agreement(model, again, images, what)
