"""What a recipe's use of `budget` must give. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from robustkit.recipe.spec import Use

BUDGET = "budget"
KINDS = ("macs", "latency", "bytes")


def budget_problem(compress: Iterable[Use]) -> tuple[str, str] | None:
    """Return what is wrong with a use of budget and what to do, or None."""
    for use in compress:
        given = [kind for kind in KINDS if use.parameters.get(kind) is not None]
        if use.name == BUDGET and len(given) != 1:
            return (
                f"budget takes exactly one of {', '.join(KINDS)}, not {len(given)} of them",
                "e.g. budget: {macs: 50%}",
            )
    return None
