"""Which models may start from another variant's weights although they differ: larger ones of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustkit import registry
from robustkit.recipe.spec import Use, VariantSpec

SMALL = "small_cnn"
BASELINE = "baseline_cnn"
Wrong = tuple[str, str]
"""What is wrong, and what to do."""


def growth_problem(parent: VariantSpec, chosen: Use, done: Mapping[str, VariantSpec]) -> Wrong | None:
    """Return why a variant with this model cannot start from its parent, and what to do; None where it can."""
    if chosen.name != parent.model.name or chosen.name not in (SMALL, BASELINE):
        hint = f"drop `from:` to train another architecture, or drop `model:`; {SMALL} and {BASELINE} grow"
        return "a variant that starts from another one has its model", hint
    old, new = _parameters(parent.model), _parameters(chosen)
    wrong = _small(old, new) if chosen.name == SMALL else _baseline(old, new)
    return wrong or _compressed(parent, done)


def _compressed(parent: VariantSpec, done: Mapping[str, VariantSpec]) -> Wrong | None:
    line: VariantSpec | None = parent
    while line is not None:
        if line.compress:
            return "a compressed variant cannot grow: its zeros have no place in a larger model", "grow, then compress"
        line = done.get(line.parent) if line.parent else None
    return None


def _small(old: Mapping[str, Any], new: Mapping[str, Any]) -> Wrong | None:
    if old["whiten"] != new["whiten"]:
        return f"{SMALL} cannot grow where `whiten` differs", "give both the same `whiten`"
    before, after = list(old["widths"]), list(new["widths"])
    if len(before) != len(after) or any(one > other for one, other in zip(before, after, strict=False)):
        return f"{SMALL} cannot grow from widths {before} to {after}", "as many groups, none of them narrower"
    if old["extra"] > new["extra"]:
        return f"{SMALL} cannot grow from extra {old['extra']} to {new['extra']}", "no fewer than its parent has"
    return None


def _baseline(old: Mapping[str, Any], new: Mapping[str, Any]) -> Wrong | None:
    for name in ("batch_norm", "residual"):
        if old[name] and not new[name]:
            return f"{BASELINE} cannot grow out of its `{name}`", f"keep `{name}: true`"
    sizes = [(*values["widths"], values["hidden"], values["extra"]) for values in (old, new)]
    if any(before > after for before, after in zip(*sizes, strict=False)):
        return f"{BASELINE} cannot grow into a smaller one", "no less of widths, hidden and extra than its parent has"
    return None


def _parameters(use: Use) -> dict[str, Any]:
    defaults = {one.name: one.default for one in registry.parameters(registry.find("model", use.name))}
    return {**defaults, **use.parameters}
