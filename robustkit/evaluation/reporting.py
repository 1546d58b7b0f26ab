"""What a report must hold to be believed: an attack that was not trained on, and a curve to its end. Imports no torch.

After Carlini et al. 2019 (arXiv 1902.06705, sections 3 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from robustkit import registry
from robustkit.evaluation.compare import ONE_STEP, group_of
from robustkit.recipe.spec import Recipe, Use
from robustkit.results import Curve, Flag

SINGLE_STEP = frozenset({"ensemble_training", "fgsm", "fgsm_rs", "free", "n_fgsm"})
MANY_STEPS = frozenset({"ard", "mart", "pgd_training", "rslad", "trades"})
PLAIN_PGD = frozenset({"pgd", "torchattacks.PGD", "torchattacks.PGDL2", "torchattacks.BIM"})
Parameter = Callable[[registry.Kind, Use, str], object]
"""(kind, use, parameter) -> its value in the recipe, else its default, else None."""


def default_of(kind: registry.Kind, use: Use, name: str) -> object:
    """Return a parameter of a built-in's use: as given, else its default, else None."""
    if name in use.parameters:
        return use.parameters[name]
    known = registry.parameters(registry.find(kind, use.name))
    return next((one.default for one in known if one.name == name), None)


def training_of(recipe: Recipe, label: str) -> tuple[Use, ...]:
    """Return the defenses that a variant's weights were last trained with: its own, or an ancestor's."""
    variant = recipe.variant(label)
    while variant.train is None and variant.parent is not None:
        variant = recipe.variant(variant.parent)
    return variant.defenses if variant.train is not None else ()


def trained_steps(defenses: Iterable[Use], parameter: Parameter) -> int:
    """Return how many steps the adversarial training took for an image; 0 where there was none."""
    found = [0]
    for use in defenses:
        if use.name in SINGLE_STEP:
            found.append(1)
        elif use.name in MANY_STEPS:
            found.append(_number(parameter("defense", use, "steps")))
    return max(found)


def same_attack_flags(defenses: Sequence[Use], attacks: Sequence[Use], parameter: Parameter) -> list[Flag]:
    """E13: a model that was only met by the attack that it was trained against, or by less."""
    steps = trained_steps(defenses, parameter)
    met = [use for use in attacks if group_of(use.name) not in ("noise", "few")]
    if not steps or not met or not all(_no_stronger(use, steps, parameter) for use in met):
        return []
    names = ", ".join(use.label for use in met)
    message = (
        f"trained against {steps} step{'s' if steps > 1 else ''} and attacked by nothing else "
        f"({names}): it may have learned this attack alone; add cascade"
    )
    return [Flag(id="E13", severity="doubt", message=message)]


def _no_stronger(use: Use, steps: int, parameter: Parameter) -> bool:
    if use.name in ONE_STEP:
        return True
    if use.name not in PLAIN_PGD or parameter("attack", use, "loss") == "margin":
        return False
    restarts = _number(parameter("attack", use, "restarts")) or 1
    return restarts == 1 and _number(parameter("attack", use, "steps")) <= steps


def curve_flags(curves: Sequence[Curve], classes: int) -> list[Flag]:
    """E16: a security curve shows that the attack works by going down to chance."""
    attacked = [curve for curve in curves if group_of(curve.attack) != "noise" and curve.rates]
    if not attacked:
        message = "no security curve: give evaluate.eps_curve budgets up to where accuracy is that of guessing"
        return [Flag(id="E16", severity="note", message=message)]
    found = []
    for curve in attacked:
        left = min(curve.rates, key=lambda rate: rate.value)
        chance = 1 / max(1, classes)
        if left.low > chance:
            message = (
                f"the security curve of {curve.attack} ends with {left.value:.1%} at eps {max(curve.eps):.4g}, above "
                f"chance ({chance:.0%}): that nothing stops the attack is not shown; add larger eps to "
                "evaluate.eps_curve"
            )
            found.append(Flag(id="E16", severity="note", message=message))
    return found


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0
