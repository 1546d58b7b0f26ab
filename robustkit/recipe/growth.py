"""Which models may start from another variant's weights although they differ: larger ones of the same kind."""

from __future__ import annotations

from collections.abc import Mapping

from robustkit import registry
from robustkit.recipe.spec import Use, VariantSpec

GROWS = "small_cnn"


def growth_problem(parent: VariantSpec, chosen: Use, done: Mapping[str, VariantSpec]) -> tuple[str, str] | None:
    """Return why a variant with this model cannot start from its parent, and what to do; None where it can."""
    if chosen.name != GROWS or parent.model.name != GROWS:
        hint = f"drop `from:` to train another architecture, or drop `model:`; only {GROWS} grows"
        return "a variant that starts from another one has its model", hint
    old, new = _widths(parent.model), _widths(chosen)
    if len(old) != len(new) or any(before > after for before, after in zip(old, new, strict=False)):
        return f"{GROWS} cannot grow from widths {old} to {new}", "as many groups, none of them narrower"
    if parent.model.parameters.get("whiten", "none") != chosen.parameters.get("whiten", "none"):
        return f"{GROWS} cannot grow where `whiten` differs", "give both the same `whiten`"
    line: VariantSpec | None = parent
    while line is not None:
        if line.compress:
            return "a compressed variant cannot grow: its zeros have no place in a larger model", "grow, then compress"
        line = done.get(line.parent) if line.parent else None
    return None


def _widths(use: Use) -> list[int]:
    default = next(one.default for one in registry.parameters(registry.find("model", GROWS)) if one.name == "widths")
    found = use.parameters.get("widths", default)
    assert isinstance(found, list | tuple)
    return [int(width) for width in found]
