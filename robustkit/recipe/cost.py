"""What a recipe costs before it runs, in passes over an image: a forward counts 1, an input-only backward 1,
a backward with weight gradients 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from robustkit import registry
from robustkit.attacks.torchattacks_cost import torchattacks_passes
from robustkit.recipe.facts import Facts, facts_of
from robustkit.recipe.quantized import quantizer_of, queries_of
from robustkit.recipe.spec import Recipe, Use, VariantSpec

STANDARD_STEP = 3.0
TORCHATTACKS = "torchattacks."
STEP_NAMES = ("steps", "n_queries", "max_iterations", "nb_iter", "num_iter_set", "tries")
"""What attacks of users' own may call their steps."""
INNER = {
    "fgsm": 2.0,
    "fgsm_rs": 2.0,
    "n_fgsm": 2.0,
    "ensemble_training": 2.0 + STANDARD_STEP,
    "awp": STANDARD_STEP,
    "grad_align": 15.0,
}
"""What a defense adds to a step; of grad_align two gradients and the backward through them, as measured."""
TWICE = frozenset({"trades", "mart"})
"""What trains on both the clean and the adversarial image."""
DISTILLED = frozenset({"ard", "rslad"})
"""What trains on both where the perturbed image does not have all the weight."""
CURVE = 22.0 + 5.0
"""Each eps of the security curve: 10 steps of pgd, 4 tries of noise."""
CHECKS = 203.0 + 271.0 + 42.0
"""The sanity checks: a look at the model (163 of it 40 steps of pgd from 2 starts), small attacks against each other
(pgd of 40, 20, 20, 10 and 10 steps, 50 queries, 10 draws), and pgd of 20 steps on a parent."""
CASCADE = {"quick": 219.0, "standard": 1777.0, "thorough": 8520.0}
"""Every stage of the cascade on an example that stays close to being fooled; most leave far earlier."""
MINIMUM_NORM = frozenset({"fmn", "ddn", "pdpgd", "sigma_zero"})
CORRUPTED = 13.0 * 5.0
"""A forward for each corruption at each severity."""
CHECKED = 64
"""How many images the sanity checks look at."""
Parameter = Callable[[str, Use, str], object]
"""(kind, use, parameter) -> its value in the recipe, else its default, else None."""


def parameter_of(recipe: Recipe) -> Parameter:
    """Return what looks up a parameter of a use in this recipe, else the plugin's default."""

    def parameter(kind: str, use: Use, name: str) -> object:
        if name in use.parameters:
            return use.parameters[name]
        entry = registry.find(cast(registry.Kind, kind), use.name, folder=recipe.folder, plugins=recipe.plugins)
        return next((one.default for one in registry.parameters(entry) if one.name == name), None)

    return parameter


def training_passes(variant: VariantSpec, parameter: Parameter) -> float:
    """Return the passes over each training image: epochs times a step with its inner maximisation."""
    if variant.train is None:
        return 0.0
    inner = sum(_inner_passes(use, parameter) for use in variant.defenses)
    # A teacher answers once for each image that a step sees; how large it is does not count here.
    inner += 1.0 if variant.teacher else 0.0
    replays = [_number(parameter("defense", use, "replay")) for use in variant.defenses if use.name == "free"]
    return variant.train.epochs * (STANDARD_STEP + inner) * max([1.0, *replays])


def _inner_passes(use: Use, parameter: Parameter) -> float:
    if use.name in INNER:
        return INNER[use.name]
    steps = _number(parameter("defense", use, "steps"))
    if not steps:
        return 0.0
    restarts = _number(parameter("defense", use, "restarts")) or 1.0
    twice = use.name in TWICE or (use.name in DISTILLED and _number(parameter("defense", use, "weight")) < 1)
    return 2.0 * steps * restarts + (STANDARD_STEP if twice else 0.0)


def attack_passes(recipe: Recipe, parameter: Parameter) -> float:
    """Return an upper bound of the passes over each test image for one variant: no example is fooled early.

    The clean accuracy, every attack, the security curve, the sanity checks, certificates and corruptions. An attack of
    a user's own is taken to cost a forward and a backward a step, a certificate of a user's own a forward.
    """
    facts = facts_of(recipe)
    attacks = sum(one_attack_passes(use, parameter, facts, recipe.threat.norm) for use in recipe.evaluate.attacks)
    budgets = set(recipe.evaluate.eps_curve) - {0.0}
    beside = sum(certificate_passes(use, parameter) for use in recipe.evaluate.certify)
    beside += CORRUPTED if recipe.evaluate.corruptions else 0.0
    share = min(recipe.evaluate.audit, facts.test) / facts.test
    beside += share * autoattack_passes(facts.classes, recipe.threat.norm)
    return 1.0 + attacks + beside + len(budgets) * CURVE + CHECKS * min(CHECKED, facts.test) / facts.test


def artefact_passes(variant: VariantSpec) -> float:
    """Return the passes over each test image that a quantized variant takes beside the recipe's attacks.

    Two starts of 40 steps of pgd on its float model, a look at what came of them, and queries.
    """
    quantizer = quantizer_of(variant.compress)
    return 0.0 if quantizer is None else _pgd(40.0, 2.0) + 1.0 + queries_of(quantizer) + 1.0


def certificate_passes(use: Use, parameter: Parameter) -> float:
    """Return the passes of one certificate over an image."""
    if use.name == "interval":
        return 3.0
    draws = [_number(parameter("certificate", use, name)) for name in ("n0", "n")]
    return sum(draws) or 1.0


def one_attack_passes(use: Use, parameter: Parameter, facts: Facts, norm: str = "linf") -> float:
    """Return an upper bound of the passes of one attack over an image, the look at its result among them."""

    def value(name: str) -> float:
        return _number(parameter("attack", use, name))

    if use.name.startswith(TORCHATTACKS):
        name = use.name.removeprefix(TORCHATTACKS)
        known = torchattacks_passes(name, value, parameter("attack", use, "version"), facts)
        if known is not None:
            return known
    if use.name == "noise":
        return value("tries") + 1.0
    if use.name == "fgsm":
        return 3.0
    if use.name == "cascade":
        return CASCADE[str(parameter("attack", use, "budget"))] + 1.0
    if use.name == "square":
        return value("restarts") * (value("n_queries") + 1.0) + 1.0
    if use.name == "apgd":
        return value("restarts") * 2.0 * (value("steps") + 1.0) * value("eot") + 1.0
    if use.name in MINIMUM_NORM:
        polish = 3.0 * facts.values.bit_length() + 3.0 if use.name == "sigma_zero" else 21.0
        return value("restarts") * (2.0 * value("steps") + polish + min(9, facts.classes - 1) + 1.0) + 1.0
    if use.name == "autoattack":
        version = str(parameter("attack", use, "version"))
        return autoattack_passes(facts.classes, norm, version, value("steps"), value("n_queries"))
    steps = next((found for name in STEP_NAMES if (found := value(name))), 1.0)
    return _pgd(steps, value("restarts") or 1.0)


def autoattack_passes(
    classes: int, norm: str, version: str = "standard", steps: float = 100.0, queries: float = 5000.0
) -> float:
    """Return the passes of AutoAttack over an image that withstands it; under l1 it starts five times."""
    climb = 2.0 * (steps + 1.0)
    if version == "rand":
        return 2.0 * (20.0 * climb + 2.0) + 1.0
    targets = min(9, classes - 1)
    aimed = targets * (1.0 + climb) + targets * (3.0 + 3.0 * steps) + 2.0
    searched = queries + 4.0
    plus = 5.0 * (climb + 1.0) + 5.0 * (2.0 + steps * (1.0 + classes)) if version == "plus" else 0.0
    return (5.0 if norm == "l1" else 1.0) * (climb + 3.0) + 2.0 + aimed + searched + plus + 1.0


def _pgd(steps: float, restarts: float) -> float:
    return restarts * (2.0 * steps + 1.0) + 1.0


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
