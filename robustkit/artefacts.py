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
from robustkit.data.load import load_dataset
from robustkit.data.split import fixed_subset
from robustkit.errors import ModelError, UsageError, did_you_mean
from robustkit.models.architecture import read_architecture
from robustkit.models.artefact import load_model
from robustkit.recipe.spec import Recipe
from robustkit.report.inside import inside
from robustkit.results import VariantResult, read_results
from robustkit.store import Store, write_atomic

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
    row = _row(folder, variant, seed)
    recipe = _recipe(folder)
    source = _model_file(folder, row)
    model = load_model(source, folder=recipe.folder, plugins=recipe.plugins, trust_plugins=trust_plugins)
    images = _images(recipe, trust_plugins)
    data, found = _written(model, source, kind, images, recipe, f"{variant} as {kind}")
    path = Path(out) if out is not None else inside(folder, f"exports/{row.name}-seed{row.seed}.{kind}")
    write_atomic(path, data)
    return Exported(path, row.name, row.seed, kind, len(data), found)


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


def _images(recipe: Recipe, trust_plugins: bool) -> Tensor:
    """Return the first of the test images that the run measured on, as float32 in [0, 1]."""
    entry = registry.find("data", recipe.data.name, folder=recipe.folder, plugins=recipe.plugins)
    if registry.runs_user_code(entry) and not trust_plugins:
        raise UsageError(
            f"the run's data come from {recipe.data.name}, which is code: read it; if you trust it, add "
            "--trust-plugins, or trust_plugins=True from Python"
        )
    held_out = next((one.train.validation for one in recipe.variants if one.train), 0.1)
    data = load_dataset(recipe.data, validation=held_out, folder=recipe.folder, plugins=recipe.plugins)
    return fixed_subset(data.test, recipe.evaluate.examples).floats(0, IMAGES)


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
        again = load_model(copy, folder=recipe.folder, plugins=recipe.plugins, trust_plugins=True)
    return data, agreement(model, again, images, what)
