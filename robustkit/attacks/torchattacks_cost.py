"""What each class of torchattacks 3.5.1 costs at most, in passes over an image: no example is fooled early.

Read off its source. The model is asked twice more by robustkit: for the number of classes, and for the result.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from robustkit.recipe.facts import Facts

Value = Callable[[str], float]
"""A parameter's value in the recipe, else its default; 0 for one that is no number."""
Rule = Callable[[Value, Facts], float]
AROUND = 2.0
TARGETS = 9.0
"""At most the nine best other classes are targets."""
INNER_STEPS = 50
"""SparseFool runs DeepFool with its default."""
BIM_STEPS = 318
"""BIM counts its own steps where it is given 0: 1.25 * 255 * eps of them at most."""
ITERATIONS = 10
"""Steps of each attack inside AutoAttack."""
QUERIES = 5000


def torchattacks_passes(name: str, value: Value, version: object, facts: Facts) -> float | None:
    """Return what an attack costs an image at most; None for a class without a rule. `version`: of AutoAttack."""
    if name == "AutoAttack":
        return AROUND + _autoattack(version, facts)
    rule = RULES.get(name)
    return None if rule is None else AROUND + rule(value, facts)


def _fixed(passes: float) -> Rule:
    return lambda value, facts: passes


def _gradients(*factors: str, steps: str = "steps", extra: float = 0.0) -> Rule:
    """A forward and a backward a step, times the parameters named."""
    return lambda value, facts: extra + 2 * value(steps) * math.prod(value(factor) for factor in factors)


def _bim(value: Value, facts: Facts) -> float:
    return 2 * (value("steps") or BIM_STEPS)


def _variance(value: Value, facts: Facts) -> float:
    return 2 * value("steps") * (1 + value("N"))


def _apgd(value: Value, facts: Facts) -> float:
    return _apgd_runs(value("steps"), value("n_restarts"), value("eot_iter"))


def _apgd_runs(steps: float, restarts: float, averaged: float = 1.0) -> float:
    return 1 + restarts * 2 * averaged * (steps + 1)


def _apgdt(value: Value, facts: Facts) -> float:
    return _apgdt_runs(value("steps"), value("n_restarts"), value("eot_iter"))


def _apgdt_runs(steps: float, restarts: float, averaged: float = 1.0) -> float:
    return 1 + TARGETS * restarts * (1 + 2 * averaged * (steps + 1))


def _fab(value: Value, facts: Facts) -> float:
    if value("multi_targeted"):
        return _fab_targeted(value("steps"), value("n_restarts"))
    return _fab_runs(value("steps"), value("n_restarts"), facts)


def _fab_runs(steps: float, restarts: float, facts: Facts) -> float:
    """The gradient of every class a step."""
    return 1 + restarts * (2 + steps * (2 + facts.classes))


def _fab_targeted(steps: float, restarts: float) -> float:
    return 1 + TARGETS * restarts * (3 + 3 * steps)


def _square(value: Value, facts: Facts) -> float:
    return _square_runs(value("n_queries"), value("n_restarts"))


def _square_runs(queries: float, restarts: float) -> float:
    return 1 + restarts * (queries + 2)


def _autoattack(version: object, facts: Facts) -> float:
    """Its attacks in turn; each result is asked for once more."""
    targeted = [_apgdt_runs(ITERATIONS, 1), _fab_targeted(ITERATIONS, 1)]
    runs = {
        "rand": [_apgd_runs(ITERATIONS, 1, 20)] * 2,
        "plus": [
            *[_apgd_runs(ITERATIONS, 5)] * 2,
            _fab_runs(ITERATIONS, 5, facts),
            _square_runs(QUERIES, 1),
            *targeted,
        ],
    }.get(str(version), [_apgd_runs(ITERATIONS, 1), *targeted, _square_runs(QUERIES, 1)])
    return sum(runs) + len(runs)


def _spsa(value: Value, facts: Facts) -> float:
    return 2 * value("nb_iter") * value("nb_sample")


def _deepfool(value: Value, facts: Facts) -> float:
    return value("steps") * (1 + facts.classes)


def _sparsefool(value: Value, facts: Facts) -> float:
    return value("steps") * (3 + INNER_STEPS * (1 + facts.classes))


def _ead(value: Value, facts: Facts) -> float:
    return 1 + 3 * value("binary_search_steps") * value("max_iterations")


def _one_pixel(value: Value, facts: Facts) -> float:
    # A candidate is a place and a colour for each pixel; the population is a multiple of its length.
    lengths = [max(1, value("pixels")) * (2 + channels) for channels in range(1, facts.channels + 1)]
    population = max(5, *(max(1, value("popsize") // length) * length for length in lengths))
    return population + value("steps") * (population + 1)


def _pixle(value: Value, facts: Facts) -> float:
    restarts = 1 if value("update_each_iteration") else value("restarts")
    return 1 + 2 * restarts * value("max_iterations")


def _jsma(value: Value, facts: Facts) -> float:
    return 1 + math.ceil(facts.values * value("gamma") / 2) * (2 + facts.classes)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("VANILA", "GN"), _fixed(0)),
    **dict.fromkeys(("FGSM", "FFGSM"), _fixed(2)),
    **dict.fromkeys(
        ("RFGSM", "PGD", "PGDL2", "MIFGSM", "NIFGSM", "DIFGSM", "TIFGSM", "Jitter", "CW"),
        _gradients(),
    ),
    **dict.fromkeys(("EOTPGD", "UPGD"), _gradients("eot_iter")),
    **dict.fromkeys(("PGDRS", "PGDRSL2"), _gradients("noise_batch_size")),
    **dict.fromkeys(("PIFGSM", "PIFGSMPP"), _gradients(steps="num_iter_set")),
    **dict.fromkeys(("VMIFGSM", "VNIFGSM"), _variance),
    **dict.fromkeys(("EADL1", "EADEN"), _ead),
    "BIM": _bim,
    "TPGD": _gradients(extra=1.0),
    "SINIFGSM": _gradients("m"),
    "SPSA": _spsa,
    "APGD": _apgd,
    "APGDT": _apgdt,
    "FAB": _fab,
    "Square": _square,
    "DeepFool": _deepfool,
    "SparseFool": _sparsefool,
    "OnePixel": _one_pixel,
    "Pixle": _pixle,
    "JSMA": _jsma,
}
