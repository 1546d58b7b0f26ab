"""Which variants are quantized, and what a recipe cannot ask of them. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from robustkit.recipe.spec import Recipe, Use, VariantSpec

INT8 = "int8"
QUERIES = 1000
"""Queries of the Square attack on a quantized model, where the recipe gives none."""
NEEDS = "torchao"


def quantizer_of(compress: Iterable[Use]) -> Use | None:
    """Return the use that quantizes, or None."""
    return next((use for use in compress if use.name == INT8), None)


def queries_of(use: Use) -> int:
    """Return how often the Square attack may ask the quantized model for each example."""
    given = use.parameters.get("queries", QUERIES)
    assert isinstance(given, int)
    return given


def ancestors_of(recipe: Recipe, variant: VariantSpec) -> list[VariantSpec]:
    """Return the variants that one descends from, its parent first."""
    found = []
    while variant.parent is not None:
        variant = recipe.variant(variant.parent)
        found.append(variant)
    return found


def lacks_packages(variants: Iterable[VariantSpec]) -> str | None:
    """Return what to install where a variant is quantized and torchao is not there; None where nothing lacks."""
    named = next((one.label for one in variants if quantizer_of(one.compress)), None)
    if named is None or importlib.util.find_spec(NEEDS) is not None:
        return None
    return f"{named}: int8 needs {NEEDS}: pip install 'robustkit[int8]'"


def quantized_problem(
    compress: tuple[Use, ...], parent: VariantSpec | None, trains: bool
) -> tuple[str, str, str] | None:
    """Return the key where something is wrong with quantization, what it is and what to do; or None."""
    above = quantizer_of(parent.compress) if parent is not None else None
    if parent is not None and above is not None:
        return (
            "from",
            f"{parent.label!r} is quantized: a model of bytes cannot be trained, pruned or changed any more",
            "start from the float variant, and put int8 last",
        )
    uses = [use for use in compress if use.name == INT8]
    if len(uses) > 1:
        return "compress", "a model is quantized once", "keep one int8, or make a variant for each number of bits"
    if uses and uses[0].parameters.get("qat") and not trains:
        return (
            "compress",
            "int8 with qat trains with fake quantization, and this variant is not trained",
            ("add `train: {}`, or drop qat"),
        )
    return None
