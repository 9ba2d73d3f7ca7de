"""Intervals: the formulas against hand-worked and SciPy's figures, and coverage where the truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interval_coverage import Setting, chosen_and_single, invent, search, simulate, summarize
from scipy.stats import binomtest, ttest_1samp

from orchestrator.ensembling import choose
from orchestrator.scoring import INTERVALS
from orchestrator.statistics import (
    bounded_loss_interval,
    difference_interval,
    fraction_gain_interval,
    fraction_interval,
    loss_interval,
)

SEEDS = st.integers(0, 2**32 - 1)
DRAWS = 6
POOLS = 60
POOLS_PER_POPULATION = 12
ONE_IN_A_HUNDRED = 2.33
"""Standard errors that chance exceeds so often."""


@pytest.fixture(scope="module")
def simulated() -> pd.DataFrame:
    """Twelve choices in each of five populations, and six draws of estimate for each choice."""
    setting = Setting(estimate=300, select=100, mislabelled=0.0, draws=DRAWS)
    return simulate(setting, pools=POOLS, seed=0, per_population=POOLS_PER_POPULATION)


def coverage(table: pd.DataFrame, *, scale: float) -> pd.Series:
    """The share of intervals on estimate, made so much wider around the value, that hold the truth."""
    on_estimate = table[table["split"] == "estimate"]
    low = on_estimate["value"] + scale * (on_estimate["ci_low"] - on_estimate["value"])
    high = on_estimate["value"] + scale * (on_estimate["ci_high"] - on_estimate["value"])
    inside = (low <= on_estimate["truth"]) & (on_estimate["truth"] <= high)
    return inside.groupby(on_estimate["quantity"]).mean()


THREE_ERRORS = 3 * np.sqrt(0.95 * 0.05 / (POOLS * DRAWS))
"""360 draws of estimate, independent once the ensemble is chosen: 3.4 points."""


def test_intervals_on_estimate_cover_the_truth_95_percent_of_the_time(simulated: pd.DataFrame) -> None:
    covered = coverage(simulated, scale=1.0)
    assert len(covered) == 6
    assert (covered - 0.95).abs().max() < THREE_ERRORS, covered


@pytest.mark.parametrize("scale", [0.8, 1.4])
def test_intervals_of_another_width_would_fail_that_test(simulated: pd.DataFrame, scale: float) -> None:
    covered = coverage(simulated, scale=scale)
    assert (covered - 0.95).abs().max() > THREE_ERRORS, covered


def test_estimate_is_unbiased(simulated: pd.DataFrame) -> None:
    bias = summarize(simulated).set_index(["split", "quantity"]).loc["estimate"]
    assert (bias["bias"] / bias["bias_se"]).abs().max() < 3, bias


@pytest.mark.parametrize(
    ("quantity", "flattering"), [("single accuracy", 1), ("accuracy", 1), ("nll", -1), ("brier", -1)]
)
def test_select_flatters_what_was_chosen_on_it(simulated: pd.DataFrame, quantity: str, flattering: int) -> None:
    on_select = simulated[(simulated["split"] == "select") & (simulated["quantity"] == quantity)]
    optimism = flattering * (on_select["value"] - on_select["truth"])
    assert optimism.mean() > ONE_IN_A_HUNDRED * optimism.sem()


def test_the_simulation_chooses_what_the_command_chooses() -> None:
    population = invent(np.random.default_rng(1), mislabelled=0.02)
    select, _ = search(population, 150, np.random.default_rng(2))
    setting = Setting(estimate=100, select=150)
    ours = chosen_and_single(select, setting, np.random.default_rng(3))
    rows = choose(select, k=5, selection="diverse", combiner="mean", rng=np.random.default_rng(3))
    theirs = [row for row in rows if row.chosen or row.baseline]
    for one, other in zip(ours, theirs, strict=True):
        assert one.ensembles[0].members == other.ensembles[0].members
        assert one.ensembles[0].combination.temperature == other.ensembles[0].combination.temperature


@settings(deadline=None)
@given(count=st.integers(2, 300), seed=SEEDS)
def test_the_interval_of_a_fraction_is_wilsons(count: int, seed: int) -> None:
    correct = np.random.default_rng(seed).random(count) < 0.95
    theirs = binomtest(int(correct.sum()), count).proportion_ci(method="wilson")
    assert fraction_interval(correct.astype(float)) == pytest.approx((theirs.low, theirs.high))


def test_a_fraction_that_is_always_right_has_an_interval_with_a_width() -> None:
    # 3.8415 is the square of 1.96: of 117 right out of 117, from 117 / (117 + 3.8415) up.
    assert fraction_interval(np.ones(117)) == pytest.approx((117 / 120.8415, 1.0), abs=1e-5)


def test_the_interval_of_a_gain_in_accuracy_worked_by_hand() -> None:
    # Of 98 examples 6 are won and 2 lost; with the two added ones: mean 4 / 100, mean square 9 / 100.
    gains = np.array([1.0] * 6 + [-1.0] * 2 + [0.0] * 90)
    reach = 1.959964 * np.sqrt(0.09 - 0.04**2) / 10
    assert fraction_gain_interval(gains) == pytest.approx((0.04 - reach, 0.04 + reach))


def test_two_systems_that_never_differ_may_still_differ_a_little() -> None:
    low, high = fraction_gain_interval(np.zeros(98))
    assert (low, high) == pytest.approx((-0.0195996, 0.0195996), abs=1e-6)


@settings(deadline=None)
@given(seed=SEEDS, count=st.integers(2, 200))
def test_the_interval_of_a_difference_is_students_or_wider(seed: int, count: int) -> None:
    differences = np.random.default_rng(seed).normal(size=count)
    theirs = ttest_1samp(differences, 0).confidence_interval()
    low, high = difference_interval(differences)
    assert low + high == pytest.approx(theirs.low + theirs.high)
    assert high - low >= (theirs.high - theirs.low) * (1 - 1e-9)
    without_tails = np.where(np.arange(count) % 2, 1.0, -1.0)
    if count % 2 == 0:
        theirs = ttest_1samp(without_tails, 0).confidence_interval()
        assert difference_interval(without_tails) == pytest.approx((theirs.low, theirs.high))


def test_of_a_single_difference_nothing_is_known() -> None:
    assert difference_interval(np.array([0.3])) == (-np.inf, np.inf)


def test_the_interval_of_a_loss_is_students_statistic_without_its_skewness() -> None:
    losses = np.random.default_rng(0).lognormal(sigma=1.5, size=150)
    count, mean, deviation = len(losses), losses.mean(), losses.std()
    skewness = ((losses - mean) ** 3).mean() / deviation**3

    def transformed(truth: float) -> float:
        """The cubic of Hall (1992), written with Student's statistic."""
        student = (mean - truth) / deviation
        cubic = student + skewness * student**2 / 3 + skewness**2 * student**3 / 27
        return float(np.sqrt(count) * (cubic + skewness / (6 * count)))

    low, high = bounded_loss_interval(losses)
    assert transformed(low) == pytest.approx(1.959964)
    assert transformed(high) == pytest.approx(-1.959964)
    assert high - mean > mean - low > 0


def test_losses_without_skewness_have_the_normal_interval_and_equal_ones_no_width() -> None:
    assert bounded_loss_interval(np.array([1.0, 3.0] * 50)) == pytest.approx((2 - 0.1959964, 2 + 0.1959964))
    assert bounded_loss_interval(np.full(10, 0.5)) == loss_interval(np.full(10, 0.5)) == (0.5, 0.5)


def test_losses_with_the_kurtosis_of_normal_ones_have_students_interval() -> None:
    # Mean 2, variance (3 + 3) / 6 = 1, kurtosis (9 + 9) / 6 = 3; of 120, Student's quantile is 1.9801.
    losses = np.array([2 - np.sqrt(3), 2, 2, 2, 2, 2 + np.sqrt(3)] * 20)
    assert loss_interval(losses) == pytest.approx((2 - 1.9801 / np.sqrt(120), 2 + 1.9801 / np.sqrt(120)), abs=1e-5)


def test_the_heavier_the_tail_of_losses_the_wider_their_interval_than_that_of_bounded_ones() -> None:
    def wider(sigma: float) -> float:
        losses = np.random.default_rng(0).lognormal(sigma=sigma, size=300)
        (low, high), (bounded_low, bounded_high) = loss_interval(losses), bounded_loss_interval(losses)
        return (high - low) / (bounded_high - bounded_low)

    assert 1 < wider(0.2) < wider(0.8) < wider(1.6)


@pytest.mark.parametrize("metric", INTERVALS)
@settings(deadline=None)
@given(seed=SEEDS, count=st.integers(2, 300))
def test_a_gain_seen_from_the_other_side_is_the_loss(metric: str, seed: int, count: int) -> None:
    gains = np.random.default_rng(seed).integers(-1, 2, count).astype(float)
    _, interval = INTERVALS[metric]
    low, high = interval(gains)
    assert interval(-gains) == pytest.approx((-high, -low))
    assert low <= gains.mean() <= high


@settings(deadline=None)
@given(seed=SEEDS, count=st.integers(2, 300), sigma=st.floats(0.1, 3))
def test_the_interval_of_a_loss_holds_its_mean_and_scales_with_it(seed: int, count: int, sigma: float) -> None:
    losses = np.random.default_rng(seed).lognormal(sigma=sigma, size=count)
    low, high = loss_interval(losses)
    assert 0 <= low <= losses.mean() <= high
    assert loss_interval(7 * losses) == pytest.approx((7 * low, 7 * high))
