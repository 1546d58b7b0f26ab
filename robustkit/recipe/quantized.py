"""Which variants are quantized, and what a recipe cannot ask of them. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence

from robustkit.recipe.places import position
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import Recipe, Use, VariantSpec

INT8, ONNX = "int8", "onnx"
RESCALED = "spectral_norm"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUERIES = 1000
"""Queries of the Square attack on a quantized model, where the recipe gives none."""
NEEDS = "torchao"


def quantizer_of(compress: Iterable[Use]) -> Use | None:
    """Return the use that quantizes, or None."""
    return next((use for use in compress if use.name == INT8 or (use.name == ONNX and use.parameters.get(INT8))), None)


def is_file(variant: VariantSpec) -> bool:
    """Say whether a variant is an ONNX file."""
    return any(use.name == ONNX for use in variant.compress)


def check_certificates(reader: Reader, certify: Sequence[Use], variants: Sequence[VariantSpec]) -> None:
    """Note each certificate that follows the floats of a network where a variant is none."""
    unlike = {one.label for one in variants if quantizer_of(one.compress) is not None or is_file(one)}
    joined = {one.label for one in variants if unlike & {label for named in one.members.values() for label in named}}
    path = ("evaluate", "certify")
    for use in certify:
        if use.name == "interval" and (unlike or joined):
            reader.problem(
                (*path, *position(reader, path, use)),
                f"interval bounds networks of floats; {', '.join(sorted(unlike | joined))}: quantized, an ONNX "
                "file, or answering with one",
                "use randomized_smoothing, or certify the float variants in a recipe of their own",
            )


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
    """Return what to install where a variant needs packages that are missing; None where nothing lacks."""
    for variant in variants:
        for name, packages in ((INT8, (NEEDS,)), (ONNX, ONNX_PACKAGES)):
            missing = [one for one in packages if importlib.util.find_spec(one) is None]
            if missing and any(use.name == name for use in variant.compress):
                return f"{variant.label}: {name} needs {', '.join(missing)}: pip install 'robustkit[{name}]'"
    return None


def quantized_problem(
    compress: tuple[Use, ...], parent: VariantSpec | None, trains: bool, defenses: Sequence[Use]
) -> tuple[str, str, str] | None:
    """Return the key where something is wrong with quantization, what it is and what to do; or None."""
    above = quantizer_of(parent.compress) if parent is not None else None
    if parent is not None and above is not None:
        return (
            "from",
            f"{parent.label!r} is quantized: a model of bytes cannot be trained, pruned or changed any more",
            "start from the float variant, and put int8 last",
        )
    if parent is not None and is_file(parent):
        return (
            "from",
            f"{parent.label!r} is an ONNX file: it cannot be trained, pruned or changed any more",
            "start from the variant that it was made of, and put onnx last",
        )
    files = [number for number, use in enumerate(compress) if use.name == ONNX]
    if len(files) > 1 or (files and files[0] < len(compress) - 1):
        return "compress", "onnx makes a file of what everything else has made", "put one onnx last"
    uses = [use for use in compress if use.name == INT8]
    if len(uses) > 1:
        return "compress", "a model is quantized once", "keep one int8, or make a variant for each number of bits"
    if sum(quantizer_of([use]) is not None for use in compress) > 1:
        return "compress", "a model is quantized once", "keep int8 and a plain onnx, or onnx: {int8: true} alone"
    if uses and uses[0].parameters.get("qat") and not trains:
        return (
            "compress",
            "int8 with qat trains with fake quantization, and this variant is not trained",
            "add `train: {}`, or drop qat",
        )
    if uses and uses[0].parameters.get("qat") and any(one.name == RESCALED for one in defenses):
        return (
            "compress",
            f"qat rounds the weights of layers, and {RESCALED} computes them from others",
            "drop qat, which rounds after the training, or give the variant defenses without it",
        )
    return None
