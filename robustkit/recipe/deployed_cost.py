"""What a variant costs each time it is asked, and how often its wrappers have it attacked. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from robustkit import registry
from robustkit.classes import hooks_of
from robustkit.errors import UsageError
from robustkit.recipe.spec import Recipe, Use, VariantSpec

SAMPLED = frozenset({"randomized_smoothing", "mc_dropout"})
"""Wrappers that ask the model `samples` times."""
ENSEMBLE = "ensemble"
"""The wrapper that hides nothing, and asks others beside the model."""
Parameter = Callable[[str, Use, str], object]


def networks(recipe: Recipe, variant: VariantSpec, parameter: Parameter) -> float:
    """Return how many forwards through a network one answer of a variant takes, as far as wrappers are known."""
    found = 1.0
    for use in variant.wrappers:
        if use.name in SAMPLED:
            samples = parameter("defense", use, "samples")
            found *= float(samples) if isinstance(samples, int | float) else 1.0
        found += sum(networks(recipe, recipe.variant(label), parameter) for label in variant.members.get(use.label, ()))
    return found


def ways(recipe: Recipe, variant: VariantSpec) -> int:
    """Return how often each attack is run: twice where a wrapper, or one of a member's, has a view of its own."""
    return 2 if any(_hides(recipe, variant, use) for use in variant.wrappers) else 1


def _hides(recipe: Recipe, variant: VariantSpec, use: Use) -> bool:
    beside = [recipe.variant(label) for label in variant.members.get(use.label, ())]
    return use.name != ENSEMBLE or any(ways(recipe, one) == 2 for one in beside)


def is_attacked_in_training(recipe: Recipe, variant: VariantSpec) -> bool:
    """Say whether a variant's epochs are measured under attack: its best and its last one are compared later."""
    if variant.train is None:
        return False
    return variant.train.select == "robust" or any(_perturbs(recipe, use) for use in variant.defenses)


def _perturbs(recipe: Recipe, use: Use) -> bool:
    try:
        entry = registry.find("defense", use.name, folder=recipe.folder, plugins=recipe.plugins)
    except UsageError:
        return False
    return entry.file is not None and "perturb" in hooks_of(entry.file, entry.attribute)
