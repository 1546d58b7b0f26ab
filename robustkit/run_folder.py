"""What commands on a finished run need of its folder: a variant's row and model, the recipe, the data."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from torch import nn

from robustkit import registry
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset
from robustkit.errors import ModelError, UsageError, did_you_mean
from robustkit.models.artefact import load_model
from robustkit.recipe.spec import Recipe, Use
from robustkit.report.inside import inside
from robustkit.results import VariantResult, read_results
from robustkit.store import Store


def row_of(folder: Path, variant: str, seed: int | None) -> VariantResult:
    """Return a variant's row in results.json, the first seed's for None.

    Raises:
        UsageError: the folder holds no results, or none of this variant or seed.
    """
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


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe that the folder was made by.

    Raises:
        UsageError: it is not there, or not what robustkit writes.
    """
    path = inside(folder, "resolved.json")
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}") from error


def model_file(folder: Path, row: VariantResult) -> Path:
    """Return the path of a row's model.

    Raises:
        UsageError: results.json names none.
        ModelError: it is not there as the run left it.
    """
    if row.model is None:
        raise UsageError(f"{folder}: its results.json names no model; run the recipe again, which trains nothing again")
    path = inside(folder, row.model)
    if Store(folder).record(path.parent.name) is None:
        raise ModelError(f"{path}: not there, or not as the run left it; run the recipe again")
    return path


def model_of(path: Path, recipe: Recipe, trust_plugins: bool, *, wrapped: bool = True) -> nn.Module:
    """Return the model in a file of a run; `wrapped`: with its inference wrappers, as deployed."""
    return load_model(path, folder=recipe.folder, plugins=recipe.plugins, trust_plugins=trust_plugins, wrapped=wrapped)


def data_of(recipe: Recipe, variant: str, trust_plugins: bool) -> Dataset:
    """Return the run's data, split as for the training of a variant, or the last one before it.

    Raises:
        UsageError: they come from code that is not trusted.
        DataError: they are no longer there.
    """
    uses: list[tuple[registry.Kind, Use]] = [("data", recipe.data)]
    uses += [("poison", recipe.poison)] if recipe.poison else []
    for kind, use in uses:
        entry = registry.find(kind, use.name, folder=recipe.folder, plugins=recipe.plugins)
        if registry.runs_user_code(entry) and not trust_plugins:
            raise UsageError(
                f"the run's data come from {use.name}, which is code: read it; if you trust it, add "
                "--trust-plugins, or trust_plugins=True from Python"
            )
    return load_dataset(
        recipe.data,
        validation=_held_out(recipe, variant),
        poison=recipe.poison,
        folder=recipe.folder,
        plugins=recipe.plugins,
    )


def _held_out(recipe: Recipe, variant: str) -> float:
    known = {one.label: one for one in recipe.variants}
    one = known.get(variant)
    while one is not None and one.train is None:
        one = known.get(one.parent or "")
    return one.train.validation if one is not None and one.train is not None else 0.1
