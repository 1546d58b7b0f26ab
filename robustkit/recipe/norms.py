"""Attacks and defenses against the norm of the threat that they are to work under."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from robustkit.attacks.torchattacks_table import PROFILES
from robustkit.recipe.document import PathTuple
from robustkit.recipe.reader import Reader
from robustkit.recipe.spec import ThreatSpec, Use, VariantSpec
from robustkit.registry import TORCHATTACKS

DEFENSE_NORMS: dict[str, tuple[str, ...]] = {
    "input_gradient": ("linf", "l2", "l1"),
    "n_fgsm": ("linf",),
    "pgd_training": ("linf", "l2"),
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
        norms = ATTACK_NORMS.get(use.name)
        if norms is not None and threat.norm not in norms:
            reader.problem(
                (*path, *_position(reader, path, use)),
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
            (*path, *_position(reader, path, use)),
            f"{use.name} works under {' or '.join(profile.norms)}; the threat is {threat.norm}",
            f"use {' or '.join(['pgd', *others])}",
        )


def check_defenses(reader: Reader, variants: Iterable[VariantSpec]) -> None:
    """Note each defense that cannot train under its variant's norm: once, where the two first meet."""
    told: set[tuple[str, str, str]] = set()
    for variant in variants:
        norm = variant.threat.norm
        for use in variant.defenses:
            norms = DEFENSE_NORMS.get(use.name)
            inherited = (variant.parent or "", use.label, norm) in told
            if norms is None or norm in norms or variant.train is None:
                continue
            told.add((variant.label, use.label, norm))
            if not inherited:
                reader.problem(
                    _meeting(reader, variant, use),
                    f"{use.name} trains against {' or '.join(norms)}; the threat is {norm}",
                    "use pgd_training" if norm == "l2" else "change the threat's norm",
                )


def _meeting(reader: Reader, variant: VariantSpec, use: Use) -> PathTuple:
    """Return where a variant names a defense, or else the threat that it is to hold against."""
    path = ("variants", _written(reader, variant.label))
    given = _at(reader, path)
    if isinstance(given, dict) and given.get("defenses"):
        return (*path, "defenses", *_position(reader, (*path, "defenses"), use))
    return (*path, "threat") if isinstance(given, dict) and given.get("threat") else path


def _written(reader: Reader, label: str) -> str:
    """Return the label as it stands in the file, where a matrix made many of it."""
    labels = _at(reader, ("variants",))
    if not isinstance(labels, dict) or label in labels:
        return label
    for written in labels:
        plain = re.split(r"\$\{\w+\}|\$\w+", written)
        if len(plain) > 1 and re.fullmatch(".+".join(map(re.escape, plain)), label):
            return str(written)
    return label


def _position(reader: Reader, path: PathTuple, use: Use) -> PathTuple:
    """Return where in a list of uses one stands; () where there is no list, or where a matrix wrote its name."""
    items = _at(reader, path)
    for number, item in enumerate(items if isinstance(items, list) else []):
        name, given = next(iter(item.items()), ("", None)) if isinstance(item, dict) else (item, None)
        if name == use.name and use.label == (given.get("as", name) if isinstance(given, dict) else name):
            return (number,)
    return ()


def _at(reader: Reader, path: PathTuple) -> Any:  # noqa: ANN401
    place = reader.document.data
    for step in path:
        place = place.get(step) if isinstance(place, dict) else None
    return place
