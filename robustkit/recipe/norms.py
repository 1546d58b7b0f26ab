"""Attacks and defenses against the norm of the threat that they are to work under."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

from robustkit import registry
from robustkit.attacks.torchattacks_table import PROFILES
from robustkit.errors import UsageError
from robustkit.recipe.document import PathTuple
from robustkit.recipe.places import at, position, written
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import ThreatSpec, Use, VariantSpec
from robustkit.registry import TORCHATTACKS

DEFENSE_NORMS: dict[str, tuple[str, ...]] = {
    "ard": ("linf", "l2"),
    "ensemble_training": ("linf", "l2"),
    "fgsm": ("linf", "l2"),
    "fgsm_rs": ("linf",),
    "free": ("linf", "l2"),
    "grad_align": ("linf", "l2"),
    "mart": ("linf", "l2"),
    "input_gradient": ("linf", "l2", "l1"),
    "n_fgsm": ("linf",),
    "pgd_training": ("linf", "l2"),
    "rslad": ("linf", "l2"),
    "trades": ("linf", "l2"),
}
"""The adversarial trainings that do not work under every norm."""
ATTACK_NORMS: dict[str, tuple[str, ...]] = {
    "apgd": ("linf", "l2", "l1"),
    "square": ("linf", "l2", "l1"),
    "cascade": ("linf", "l2", "l1"),
    "autoattack": ("linf", "l2", "l1"),
    "fmn": ("linf", "l2", "l1"),
    "ddn": ("l2",),
    "pdpgd": ("linf", "l2", "l1"),
    "sigma_zero": ("l0",),
}
"""The attacks of robustkit's own that do not work under every norm."""
INSTEAD = {"linf": "fmn", "l2": "ddn", "l1": "pdpgd", "l0": "sigma_zero"}
"""What looks for the smallest change under a norm."""


def check_attacks(reader: Reader, path: PathTuple, attacks: Iterable[Use], threat: ThreatSpec) -> None:
    """Note each attack that cannot be run under the threat's norm."""
    for use in attacks:
        norms = ATTACK_NORMS.get(use.name) or _declared(reader, "attack", use)
        if norms and threat.norm not in norms:
            reader.problem(
                (*path, *position(reader, path, use)),
                f"{use.name} works under {' or '.join(norms)}; the threat is {threat.norm}",
                f"use {INSTEAD[threat.norm] if use.name in INSTEAD.values() or threat.norm == 'l0' else 'pgd'}",
            )
        profile = PROFILES.get(use.name.removeprefix(TORCHATTACKS)) if use.name.startswith(TORCHATTACKS) else None
        if profile is None or profile.refused or threat.norm in profile.norms:
            continue
        others = [
            f"{TORCHATTACKS}{name}"
            for name, other in PROFILES.items()
            if use.name.removeprefix(TORCHATTACKS) in name and threat.norm in other.norms and not other.refused
        ]
        reader.problem(
            (*path, *position(reader, path, use)),
            f"{use.name} works under {' or '.join(profile.norms)}; the threat is {threat.norm}",
            f"use {' or '.join(['pgd', *others])}",
        )


def check_defenses(reader: Reader, variants: Iterable[VariantSpec]) -> None:
    """Note each defense that cannot train under its variant's threat: once, where the two first meet."""
    told: set[tuple[str, str, str]] = set()
    for variant in variants:
        norm = variant.threat.norm
        for use in variant.defenses:
            message, hint, parameter = _unfit(reader, use, norm)
            if message is None or variant.train is None:
                continue
            told.add((variant.label, use.label, norm))
            if (variant.parent or "", use.label, norm) not in told:
                reader.problem(_meeting(reader, variant, use, parameter), message, hint)


def _unfit(reader: Reader, use: Use, norm: str) -> tuple[str | None, str | None, str | None]:
    """Return why a defense cannot train under a norm, what to do, and the parameter that is wrong; Nones if it can."""
    norms = DEFENSE_NORMS.get(use.name) or _declared(reader, "defense", use)
    if norms and norm not in norms:
        hint = "use pgd_training" if norm in DEFENSE_NORMS["pgd_training"] else "change the threat's norm"
        return f"{use.name} trains against {' or '.join(norms)}; the threat is {norm}", hint, None
    alpha = use.parameters.get("alpha")
    if use.name in DEFENSE_NORMS and norm == "linf" and isinstance(alpha, int | float) and alpha > 1:
        return f"alpha is in [0, 1] pixel units, not {alpha:g}", f"did you mean {alpha:g}/255?", "alpha"
    return None, None, None


def _declared(reader: Reader, kind: Literal["attack", "defense"], use: Use) -> tuple[str, ...]:
    """Return the norms that the class of a user's own declares."""
    with suppress(UsageError):
        return registry.declared_norms(registry.find(kind, use.name, folder=reader.folder, plugins=reader.plugins))
    return ()


def _meeting(reader: Reader, variant: VariantSpec, use: Use, parameter: str | None = None) -> PathTuple:
    """Return where a variant names a defense and its parameter, or else the threat that it is to hold against."""
    path = ("variants", written(reader, variant.label))
    given = at(reader, path)
    if isinstance(given, dict) and given.get("defenses"):
        place = position(reader, (*path, "defenses"), use)
        return (*path, "defenses", *place, *((use.name, parameter) if place and parameter else ()))
    return (*path, "threat") if isinstance(given, dict) and given.get("threat") else path
