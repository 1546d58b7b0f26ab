"""Which models may start from another variant's weights although they differ: larger ones of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from robustkit import registry
from robustkit.recipe.spec import Use, VariantSpec

SMALL = "small_cnn"
BASELINE = "baseline_cnn"
Wrong = tuple[str, str]
"""What is wrong, and what to do."""


def growth_problem(
    parent: VariantSpec, chosen: Use, done: Mapping[str, VariantSpec], side: int | None = None
) -> Wrong | None:
    """Return why a variant with this model cannot start from its parent, and what to do; None where it can.

    side: pixels a side of the images, where they are known.
    """
    if chosen.name != parent.model.name or chosen.name not in (SMALL, BASELINE):
        hint = f"drop `from:` to train another architecture, or drop `model:`; {SMALL} and {BASELINE} grow"
        return "a variant that starts from another one has its model", hint
    old, new = _parameters(parent.model), _parameters(chosen)
    wrong = _small(old, new, side) if chosen.name == SMALL else _baseline(old, new)
    return wrong or _compressed(parent, done)


def _compressed(parent: VariantSpec, done: Mapping[str, VariantSpec]) -> Wrong | None:
    line: VariantSpec | None = parent
    while line is not None:
        if line.compress:
            return "a compressed variant cannot grow: its zeros have no place in a larger model", "grow, then compress"
        line = done.get(line.parent) if line.parent else None
    return None


def _small(old: Mapping[str, Any], new: Mapping[str, Any], side: int | None) -> Wrong | None:
    if old["whiten"] != new["whiten"]:
        return f"{SMALL} cannot grow where `whiten` differs", "give both the same `whiten`"
    if side is not None and new["whiten"] != "none":
        side -= 1
    before, after = list(old["widths"]), list(new["widths"])
    wrong = wrong_widths(before, after, side)
    hint = "keep every group, as wide or wider; new groups stand at the end"
    return (f"{SMALL} cannot grow from widths {before} to {after}: {wrong}", hint) if wrong else None


def _baseline(old: Mapping[str, Any], new: Mapping[str, Any]) -> Wrong | None:
    for name in ("batch_norm", "residual"):
        if old[name] and not new[name]:
            return f"{BASELINE} cannot grow out of its `{name}`", f"keep `{name}: true`"
    sizes = [(*values["widths"], values["hidden"], values["extra"]) for values in (old, new)]
    if any(before > after for before, after in zip(*sizes, strict=False)):
        return f"{BASELINE} cannot grow into a smaller one", "no less of widths, hidden and extra than its parent has"
    return None


def wrong_widths(old: list[int], new: list[int], side: int | None = None) -> str | None:
    """Return why a small_cnn of the old widths cannot grow into one of the new widths; None where it can.

    side: pixels of the images, where they are known. A new group pools by two, and what a max-pool leaves out at the
    border of an odd map cannot be found again; of a single pixel it does not pool.
    """
    if len(old) > len(new) or any(before > after for before, after in zip(old, new, strict=False)):
        return "no group may be missing or narrower"
    added = new[len(old) - 1 :]
    if any(before > after for before, after in pairwise(added)):
        return "a new group must be as wide as the one before it"
    if side is not None:
        for number in range(len(new)):
            if number >= len(old) and side > 1 and side % 2:
                return f"group {number + 1} would pool maps of {side} pixels a side, an odd number, and lose the last"
            side = max(1, side // 2)
    return None


def _parameters(use: Use) -> dict[str, Any]:
    defaults = {one.name: one.default for one in registry.parameters(registry.find("model", use.name))}
    return {**defaults, **use.parameters}
