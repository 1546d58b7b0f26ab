"""What a recipe costs before it runs, in passes over an image: a forward counts 1, an input-only backward 1,
a backward with weight gradients 2."""

from __future__ import annotations

from collections.abc import Callable

from robustkit.recipe.spec import Recipe, Use, VariantSpec

STANDARD_STEP = 3.0
Parameter = Callable[[str, Use, str], object]
"""(kind, use, parameter) -> its value in the recipe, else its default, else None."""


def training_passes(variant: VariantSpec, parameter: Parameter) -> float:
    """Return the passes over each training image: epochs times a step with its inner maximisation."""
    if variant.train is None:
        return 0.0
    inner = sum(_inner_passes(use, parameter) for use in variant.defenses)
    return variant.train.epochs * (STANDARD_STEP + inner)


def _inner_passes(use: Use, parameter: Parameter) -> float:
    if use.name == "n_fgsm":
        return 2.0
    steps = _number(parameter("defense", use, "steps"))
    if not steps:
        return 0.0
    restarts = _number(parameter("defense", use, "restarts")) or 1.0
    # TRADES trains on both the clean and the adversarial image.
    return 2.0 * steps * restarts + (STANDARD_STEP if use.name == "trades" else 0.0)


def attack_passes(recipe: Recipe, parameter: Parameter) -> float:
    """Return an upper bound of the passes over each test image for one variant: no example is fooled early."""
    total = 1.0
    for use in recipe.evaluate.attacks:
        steps = next(
            (
                value
                for name in ("steps", "n_queries", "max_iterations", "nb_iter", "num_iter_set", "tries")
                if (value := _number(parameter("attack", use, name)))
            ),
            1.0,
        )
        restarts = _number(parameter("attack", use, "restarts")) or 1.0
        gradient_free = use.name in ("noise", "torchattacks.Square", "torchattacks.GN")
        total += restarts * (steps * (1.0 if gradient_free else 2.0) + 1.0)
    return total


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
