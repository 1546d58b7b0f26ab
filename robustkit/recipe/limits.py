"""What plugins refuse beside wrong types, above all those of torchattacks: said before anything runs, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustkit.attacks.torchattacks_table import EAD, EAD_LEAST, PROFILES
from robustkit.errors import did_you_mean
from robustkit.registry import Entry, parameters

ABOVE_ZERO = frozenset({
    "steps", "n_queries", "n_restarts", "restarts", "eot_iter", "max_iterations", "binary_search_steps",
    "num_iter_set", "nb_iter", "nb_sample", "max_batch_size", "m", "N", "pixels", "popsize", "inf_batch",
    "noise_batch_size", "batch_max", "len_kernel", "nsig", "alpha", "alpha_max", "lr", "delta", "c", "lam", "scale",
    "gamma", "initial_const", "resize_rate", "p_init", "eps_for_division",
})  # fmt: skip
FROM_ZERO = frozenset({"std", "noise_sd", "overshoot", "kappa", "decay", "momentum", "diversity_prob", "prob", "rho"})
UP_TO_ONE = frozenset({"diversity_prob", "prob", "p_init", "gamma", "rho"})
SPARSITY, CAP = "sparsity", "max_layer_sparsity"
TIMES = ("begin", "end", "schedule")
UPDATES = "updates"
EQUAL = frozenset({"layer_l1"})
"""Methods that drop the same share of every layer, up to all that it may lose; others do so with `layers: equal`."""
TYPO = "guassian"
"""As torchattacks spells it; both are taken."""
CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("APGD", "loss"): ("ce", "dlr"),
    ("AutoAttack", "version"): ("standard", "plus", "rand"),
    ("PGDRS", "noise_type"): ("gaussian", TYPO, "uniform"),
    ("PGDRSL2", "noise_type"): ("gaussian", TYPO, "uniform"),
    ("Pixle", "pixel_mapping"): ("random", "similarity", "similarity_random", "distance", "distance_random"),
    ("Square", "loss"): ("ce", "margin"),
    ("TIFGSM", "kernel_name"): ("gaussian", "linear", "uniform"),
    ("UPGD", "loss"): ("ce", "dlr", "margin"),
}
"""Texts that a class of torchattacks 3.5.1 knows; with another one it fails at its first step."""


def refusal(entry: Entry) -> str | None:
    """Return why a plugin cannot be used in a recipe at all; None where it can."""
    profile = PROFILES.get(entry.attribute) if entry.origin == "torchattacks" else None
    return profile.refused if profile else None


def beyond_limits(entry: Entry, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each parameter whose value its class cannot work with, and what is wrong with it."""
    if entry.kind == "compressor":
        return _over_cap(entry, values) + _out_of_order(entry, values)
    if entry.origin != "torchattacks":
        return []
    found = [(name, _wrong(entry.attribute, name, value)) for name, value in values.items()]
    return [(name, f"{name}: {message}") for name, message in found if message is not None]


def _over_cap(entry: Entry, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return that a share of all weights cannot be dropped where no layer may lose as much."""
    defaults = {one.name: one.default for one in parameters(entry)}
    if not {SPARSITY, CAP} <= set(defaults) or not isinstance(values.get(SPARSITY), float):
        return []
    sparsity, cap = values[SPARSITY], values.get(CAP, defaults[CAP])
    equal = entry.name in EQUAL or values.get("layers", defaults.get("layers")) == "equal"
    if sparsity < cap or cap == 1 or (sparsity == cap and equal):
        return []
    return [(SPARSITY, f"{SPARSITY}: no layer may lose more than {CAP}, {cap:g}; raise {CAP} (1 may empty a layer)")]


def _out_of_order(entry: Entry, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what says when a schedule prunes where there is no schedule, or one that ends before it begins."""
    defaults = {one.name: one.default for one in parameters(entry) if one.name in TIMES}
    begin, end, schedule = (values.get(name, defaults.get(name)) for name in TIMES)
    if set(defaults) != set(TIMES):
        return []
    if schedule == "one_shot":
        given = [name for name in ("begin", "end", UPDATES) if name in values]
        return [(name, f"{name}: pruned in one shot, so it says nothing; add `schedule: cubic`") for name in given[:1]]
    if not isinstance(begin, int | float) or not isinstance(end, int | float) or begin < end:
        return []
    name = "begin" if "begin" in values else "end"
    return [(name, f"{name}: a schedule from {begin:g} to {end:g} of the training has no length; end after begin")]


def _wrong(attack: str, name: str, value: object) -> str | None:
    choices = CHOICES.get((attack, name))
    if choices is not None and value not in choices:
        shown = [choice for choice in choices if choice != TYPO]
        return f"{value!r} is not one of {', '.join(shown)}" + _hint(value, shown)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if name in ABOVE_ZERO and not value > 0:
        return f"must be greater than 0, not {value!r}"
    if name in FROM_ZERO and not value >= 0:
        return f"must be at least 0, not {value!r}"
    if name in UP_TO_ONE and value > 1:
        return f"must be at most 1, not {value!r}"
    if attack in EAD and name == "max_iterations" and value < EAD_LEAST:
        return f"must be at least {EAD_LEAST}, not {value!r}"
    return None


def _hint(value: object, choices: Sequence[str]) -> str:
    close = did_you_mean(value, choices) if isinstance(value, str) else None
    return f"; {close}" if close else ""
