"""Intervals and paired tests for accuracies. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from robustkit.results import Paired, Rate

CONFIDENCE = 0.95
Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def worst_case(correct: Iterable[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Return which examples (N,) are right in every one of the arrays (N,)."""
    return np.asarray(np.stack(list(correct)).all(axis=0))


def clopper_pearson(correct: int, n: int, confidence: float = CONFIDENCE) -> Rate:
    """Return correct/n with its exact binomial interval (Clopper & Pearson, Biometrika 1934).

    With n = 0 nothing is known: the value is 0 and the interval [0, 1].
    """
    from scipy.special import betaincinv

    if not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} cannot be right")
    if n == 0:
        return Rate(value=0.0, low=0.0, high=1.0, n=0)
    tail = (1 - confidence) / 2
    low = float(betaincinv(correct, n - correct + 1, tail)) if correct else 0.0
    high = float(betaincinv(correct + 1, n - correct, 1 - tail)) if correct < n else 1.0
    return Rate(value=correct / n, low=low, high=high, n=n)


def hypergeometric(hits: int, drawn: int, total: int, confidence: float = CONFIDENCE) -> tuple[int, int]:
    """Return bounds on how many of `total` are hits when `drawn` of them, taken without replacement, have `hits`.

    Exact: the numbers for which neither tail of the hypergeometric distribution is below (1 - confidence) / 2
    (Buonaccorsi, The American Statistician 1987).
    """
    from scipy.stats import hypergeom

    if not 0 <= hits <= drawn <= total:
        raise ValueError(f"{hits} hits in {drawn} of {total} cannot be")
    if drawn == total:
        # All are known; of none at all, scipy knows no distribution.
        return hits, hits
    tail = (1 - confidence) / 2
    numbers = np.arange(hits, total - (drawn - hits) + 1)
    # P(X >= hits) grows with the number of hits there are, P(X <= hits) falls.
    likely = (hypergeom.sf(hits - 1, total, numbers, drawn) > tail) & (
        hypergeom.cdf(hits, total, numbers, drawn) > tail
    )
    found = numbers[likely]
    return int(found.min()), int(found.max())


def mean_of_shares(shares: NDArray[np.float64]) -> Rate:
    """Return the mean of one share an example (N,), each in [0, 1], with a 95 % interval over examples.

    A share that is neither 0 nor 1 varies less than a coin of its mean, so the exact interval of as many right examples
    as the shares add up to is on the safe side; a part of an example counts against it on either end.
    """
    total, n = float(shares.sum()), int(shares.size)
    low, high = clopper_pearson(math.floor(total + 1e-9), n), clopper_pearson(math.ceil(total - 1e-9), n)
    return Rate(value=min(max(total / n, low.low), high.high) if n else 0.0, low=low.low, high=high.high, n=n)


def paired(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Paired:
    """Return the difference in accuracy, after minus before, on the same examples (N,).

    The interval is d +- z sqrt(b + c - (b - c)^2 / n) / n with b lost and c gained examples, widened so that it is
    never empty; p is the exact McNemar test (McNemar, Psychometrika 1947; the binomial form).
    """
    if before.shape != after.shape:
        raise ValueError(f"paired accuracies need the same examples, got {before.shape} and {after.shape}")
    n = int(before.size)
    lost = int(np.count_nonzero(before & ~after))
    gained = int(np.count_nonzero(~before & after))
    if n == 0:
        return Paired(difference=0.0, low=-1.0, high=1.0, p=1.0, lost=0, gained=0)
    difference = (gained - lost) / n
    variance = lost + gained - (gained - lost) ** 2 / n
    # Where none or all changed the formula gives an interval of width 0; the rule of three bounds what was not seen.
    spread = Z * math.sqrt(variance) / n if variance > 0 else 3.0 / n
    return Paired(
        difference=difference,
        low=max(-1.0, difference - spread),
        high=min(1.0, difference + spread),
        p=mcnemar(lost, gained),
        lost=lost,
        gained=gained,
    )


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided exact p-value for `lost` against `gained` discordant pairs."""
    from scipy.special import bdtr

    trials = lost + gained
    return min(1.0, 2 * float(bdtr(min(lost, gained), trials, 0.5))) if trials else 1.0


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and the sample standard deviation (0 for a single seed)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def examples_needed(difference: float, changed: float = 0.05) -> int:
    """Return how many examples a paired difference (a fraction of 1) needs to lie outside its own 95 % interval.

    `changed`: the share of examples on which the two sides disagree; 5 % is usual between relatives.
    """
    if not 0 < difference <= 1:
        raise ValueError(f"a difference in (0, 1] is needed, got {difference}")
    return math.ceil(Z * Z * (max(changed, difference) - difference**2) / difference**2)


def half_width(n: int, changed: float = 0.05) -> float:
    """Return the half-width of the 95 % interval of a paired difference near 0 on n examples, as a fraction of 1."""
    return Z * math.sqrt(changed / n) if n else 1.0
