"""Intervals and tests against published values and the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from robustkit import stats


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Clopper & Pearson intervals as R's binom.test prints them.
    [(0, 10, 0.0, 0.3085), (10, 10, 0.6915, 1.0), (5, 10, 0.1871, 0.8129), (50, 100, 0.3983, 0.6017)],
)
def test_clopper_pearson(correct: int, n: int, low: float, high: float) -> None:
    found = stats.clopper_pearson(correct, n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(n=st.integers(1, 400), data=st.data())
def test_clopper_pearson_is_the_definition(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    found = stats.clopper_pearson(correct, n)
    assert found.low <= found.value <= found.high
    if correct:
        assert binom.sf(correct - 1, n, found.low) == pytest.approx(0.025, rel=1e-6)
    if correct < n:
        assert binom.cdf(correct, n, found.high) == pytest.approx(0.025, rel=1e-6)


def test_nothing_is_known_of_no_examples() -> None:
    found = stats.clopper_pearson(0, 0)
    assert (found.low, found.high, found.n) == (0.0, 1.0, 0)
    with pytest.raises(ValueError, match="cannot be right"):
        stats.clopper_pearson(3, 2)


@given(lost=st.integers(0, 60), gained=st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert stats.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_the_paired_difference() -> None:
    before = np.array([True] * 60 + [False] * 40)
    after = np.array([True] * 50 + [False] * 10 + [True] * 5 + [False] * 35)
    found = stats.paired(before, after)
    assert (found.lost, found.gained) == (10, 5)
    assert found.difference == pytest.approx(-0.05)
    half = 1.959964 * (15 - 25 / 100) ** 0.5 / 100
    assert (found.low, found.high) == (pytest.approx(-0.05 - half), pytest.approx(-0.05 + half))
    same = stats.paired(before, before)
    assert same.low < 0 < same.high, "no interval is empty"
    with pytest.raises(ValueError, match="same examples"):
        stats.paired(before, after[:50])


def test_examples_that_a_difference_needs() -> None:
    n = stats.examples_needed(0.01)
    assert stats.half_width(n) * 0.98 < 0.01
    assert stats.examples_needed(0.1) < n
    assert stats.mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert stats.mean_and_spread([1.0]) == (1.0, 0.0)
