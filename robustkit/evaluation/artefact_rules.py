"""What it means where a quantized model is fooled by more, or less, than attacks on its surrogate. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from robustkit import stats
from robustkit.results import Flag, Severity

Bools = NDArray[np.bool_]
STRONGER = 0.02
"""So much more robust than the float model may a quantized one be."""
MISSED = 0.01
"""Such a share of the examples may attacks on the surrogate miss."""
LEAST = 2
"""One example more or less is chance."""
SIGNIFICANT = 0.05
BITS_HINT = "attack with more steps and restarts, and quote the union only"


def stronger_flags(quantized: Bools, floating: Bools, *, trained: bool) -> list[Flag]:
    """Return a flag where a quantized model is right under attack on 2 points more than the float one that it is of.

    Rounding adds no robustness (Bernhard et al. 2019, arXiv 1909.12741): *wrong* where it is significant, a note where
    the model was `trained` in between, which may be why.
    """
    found = stats.paired(floating, quantized)
    if found.difference <= STRONGER:
        return []
    if trained:
        message = (
            f"{found.difference:.1%} more withstand attacks than of its float parent (p = {found.p:.2g}): it was "
            "trained since, which may be why; rounding alone adds no robustness"
        )
        return [Flag(id="int8-stronger", severity="note", message=message)]
    message = (
        f"{found.difference:.1%} more withstand attacks than of the float model that it was made of (p = "
        f"{found.p:.2g}): rounding hides gradients and does not defend; {BITS_HINT}"
    )
    severity: Severity = "wrong" if found.p < SIGNIFICANT else "doubt"
    return [Flag(id="int8-stronger", severity=severity, message=message)]


def missed_flags(surrogate: Bools, transfer: Bools, square: Bools) -> list[Flag]:
    """Return a flag for each way that fools more than 1 % of the examples which attacks on the surrogate miss.

    surrogate, transfer, square (N,): right under the attacks on the surrogate, under the float models' images, and
    under queries of the quantized model.
    """
    found = []
    for name, other in (("images of the float models", transfer), ("queries of the quantized model (Square)", square)):
        missed = int(np.count_nonzero(surrogate & ~other))
        share = missed / max(1, surrogate.size)
        if missed >= LEAST and share > MISSED:
            message = (
                f"{name} fool {missed} examples ({share:.1%}) that attacks on the surrogate miss: its gradients "
                f"mislead; the worst case counts them; {BITS_HINT}"
            )
            found.append(Flag(id="int8-missed", severity="doubt", message=message))
    return found


def surrogate_flags(disagreeing: int, n: int, *, exact: bool = True) -> list[Flag]:
    """Return a *wrong* flag where the surrogate classifies clean test images otherwise than the quantized model.

    exact: it should be equal bit for bit. Another runtime rounds now and then to the neighbouring step of the grid, so
    that up to 1 % of the images are a *doubt*.
    """
    if not disagreeing:
        return []
    if not exact and disagreeing <= MISSED * n:
        message = (
            f"the view that attacks take and ONNX Runtime disagree on {disagreeing} of {n} clean test images; ONNX "
            "Runtime judged, so that the worst case counts, and attacks on the view may miss a little"
        )
        return [Flag(id="int8-surrogate", severity="doubt", message=message)]
    message = (
        f"the surrogate and the quantized model disagree on {disagreeing} of {n} clean test images: attacks on the "
        "surrogate say nothing of the model"
    )
    return [Flag(id="int8-surrogate", severity="wrong", message=message)]
