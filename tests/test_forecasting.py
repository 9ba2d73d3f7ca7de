"""Early stopping by forecasts: the regression, what it decides, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.forecasting import FinalScores
from orchestrator.halving import LEAST_ENDED, Candidate, Forecasting, Ladder

LADDER = Ladder(grace_epochs=3, max_epochs=9, factor=3.0)


def train(strategy: Forecasting, name: str, *, strength: float, at_rung: float, end: float | None = None) -> str:
    """A trial that reports at the rung, and at the end if it has one; the verdict at the rung."""
    candidate = Candidate(name, strength)
    verdict = strategy.judge(candidate, epoch=3, score=at_rung).verdict
    if end is not None:
        strategy.judge(candidate, epoch=9, score=end)
    return verdict


def crossing(strategy: Forecasting, *, trials: int) -> None:
    """Trials whose score at the rung is 0.5 - 0.3 strength, and whose final score is 0.5 + 0.1 strength."""
    for number, strength in enumerate(np.linspace(0, 1, trials)):
        train(strategy, f"t{number}", strength=strength, at_rung=0.5 - 0.3 * strength, end=0.5 + 0.1 * strength)


def test_many_trials_outweigh_the_prior() -> None:
    rng = np.random.default_rng(0)
    score_N, strength_N = rng.uniform(0.2, 0.4, 500), rng.uniform(size=500)
    final_N = 0.1 + 0.8 * score_N + 0.3 * strength_N
    fitted = FinalScores.fit(score_N, strength_N, final_N, spread=float(score_N.std()))
    expected_N = fitted.mean(np.array([0.3, 0.25]), np.array([0.5, 1.0]))
    assert expected_N == pytest.approx([0.1 + 0.24 + 0.15, 0.1 + 0.2 + 0.3], abs=1e-3)


def test_without_evidence_every_trial_is_expected_to_gain_the_same() -> None:
    fitted = FinalScores.fit(np.array([0.3]), np.array([0.5]), np.array([0.6]), spread=0.05)
    expected_N = fitted.mean(np.array([0.2, 0.3]), np.array([0.5, 0.5]))
    assert expected_N == pytest.approx([0.5, 0.6], abs=1e-4)


def test_a_strength_of_which_no_trial_has_ended_is_less_certain() -> None:
    score_N, strength_N = np.linspace(0.3, 0.4, 8), np.linspace(0.0, 0.3, 8)
    fitted = FinalScores.fit(score_N, strength_N, score_N + 0.2, spread=0.05)
    near, far = fitted.deviation(np.array([0.35, 0.35]), np.array([0.15, 0.9]))
    assert far > 2 * near


def test_none_is_stopped_before_enough_have_ended() -> None:
    strategy = Forecasting(LADDER)
    for number in range(LEAST_ENDED - 1):
        assert train(strategy, f"t{number}", strength=0.5, at_rung=0.4, end=0.6) == "continue"
    assert train(strategy, "worst", strength=0.5, at_rung=0.0) == "continue"
    assert strategy.forecast("worst") is None


def test_a_strong_trial_goes_on_where_the_early_scores_are_upside_down() -> None:
    strategy = Forecasting(LADDER)
    crossing(strategy, trials=15)
    assert train(strategy, "strong", strength=0.95, at_rung=0.5 - 0.3 * 0.95) == "continue"
    assert train(strategy, "weak", strength=0.05, at_rung=0.5 - 0.3 * 0.05) == "stop"
    assert strategy.forecast("weak") == pytest.approx(0.505, abs=0.01)
    assert strategy.forecast("strong") == pytest.approx(0.595, abs=0.01)


def test_controls_that_no_longer_count_teach_but_are_not_compared_with() -> None:
    taught, untaught = Forecasting(LADDER), Forecasting(LADDER)
    for strategy in (taught, untaught):
        crossing(strategy, trials=9)
    control = Candidate("control", 0.5)
    taught.judge(control, epoch=3, score=0.2, counts=False)
    assert not taught.rungs[0].counted[-1]
    before = taught.forecast("t0")
    taught.judge(control, epoch=9, score=0.9, counts=False)
    assert taught.forecast("t0") != before
