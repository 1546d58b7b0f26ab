"""Uses and variants in words. Imports no torch."""

from __future__ import annotations

from robustkit.recipe.spec import Use, VariantSpec


def describe_use(use: Use) -> str:
    """Return a use in words: `pgd(steps=20, restarts=2)`."""
    inside = ", ".join(f"{key}={_short(value)}" for key, value in use.parameters.items())
    return f"{use.name}({inside})" if inside else use.name


def describe_variant(variant: VariantSpec) -> str:
    """Return what is done to a variant, in words."""
    parts = [describe_use(use) for use in (*variant.compress, *variant.defenses)]
    taught = f", teacher {variant.teacher}" if variant.teacher else ""
    if parts:
        return " + ".join(parts) + taught
    if variant.train is None:
        return "no change"
    return "standard training" if variant.parent is None else "trained further"


def _short(value: object) -> str:
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return f"[{', '.join(value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
