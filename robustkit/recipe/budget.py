"""What a recipe's use of `budget` must give. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from robustkit.recipe.spec import Use

BUDGET = "budget"
KINDS = ("macs", "latency", "bytes", "gzip_bytes")
SINGLE = ("global_l1", "layer_l1", "lamp", "random")
"""Methods that prune single weights: their zeros are stored and multiplied."""


def budget_problem(compress: Iterable[Use]) -> tuple[str, str] | None:
    """Return what is wrong with a use of budget and what to do, or None."""
    for use in compress:
        if use.name != BUDGET:
            continue
        given = [kind for kind in KINDS if use.parameters.get(kind) is not None]
        if len(given) != 1:
            return (
                f"budget takes exactly one of {', '.join(KINDS)}, not {len(given)} of them",
                "e.g. budget: {macs: 50%}",
            )
        method = use.parameters.get("method")
        if method in SINGLE and given != ["gzip_bytes"]:
            return (
                f"the zeros of {method} are stored and multiplied: they bring no {given[0]}",
                f"budget: {{method: {method}, gzip_bytes: 500kB}}, or a channel method with {given[0]}",
            )
    return None
