"""Combiners and temperatures: every combiner keeps its promises, whatever the members predict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from orchestrator.calibration import BOUNDS, Confidence, fit_confidence, fit_temperature, tempered
from orchestrator.combination import COMBINERS, Combination, fit_weights
from results.schema import FloatArray
from tests.pools import invented
from trainables.validation import log_softmax

SEEDS = st.integers(0, 2**32 - 1)
SLOPES, INTERCEPTS = st.floats(0.1, 5), st.floats(-4, 4)


def fitted_on(name: str, log_probs: FloatArray, labels: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """The weights that a combiner fits."""
    members = len(log_probs)
    return COMBINERS[name].fit(log_probs, labels, np.full(members, 1 / members) if weights is None else weights)


def some_weights(rng: np.random.Generator, members: int) -> FloatArray:
    weights = rng.random(members) + 0.05
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("name", COMBINERS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, copies=st.integers(1, 4))
def test_a_combiner_of_one_member_or_of_its_copies_is_that_member(name: str, seed: int, copies: int) -> None:
    logits, labels = invented(seed)
    log_probs = np.repeat(log_softmax(logits)[:1], copies, axis=0)
    combined = COMBINERS[name].combine(log_probs, fitted_on(name, log_probs, labels))
    assert np.array_equal(combined.scores_NC.argmax(1), log_probs[0].argmax(1))
    if combined.log_probs_NC is not None:
        assert combined.log_probs_NC == pytest.approx(log_probs[0], abs=1e-6)


@pytest.mark.parametrize("name", COMBINERS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, members=st.integers(1, 5))
def test_combined_probabilities_sum_to_one(name: str, seed: int, members: int) -> None:
    logits, labels = invented(seed, members=members)
    log_probs = log_softmax(logits)
    weights = some_weights(np.random.default_rng(seed), members)
    combined = COMBINERS[name].combine(log_probs, fitted_on(name, log_probs, labels, weights))
    assert combined.scores_NC.shape == log_probs.shape[1:]
    if combined.log_probs_NC is not None:
        assert np.exp(combined.log_probs_NC).sum(1) == pytest.approx(1)


@pytest.mark.parametrize("name", COMBINERS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_members_does_not_matter(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = invented(seed)
    log_probs, weights, order = log_softmax(logits), some_weights(rng, 6), rng.permutation(6)
    one = COMBINERS[name].combine(log_probs, fitted_on(name, log_probs, labels, weights))
    mixed = log_probs[order]
    other = COMBINERS[name].combine(mixed, fitted_on(name, mixed, labels, weights[order]))
    assert one.scores_NC == pytest.approx(other.scores_NC, abs=2e-3 if name in {"stacking", "per_class"} else 1e-9)


@pytest.mark.parametrize("name", [name for name in COMBINERS if name not in {"max_confidence", "per_class"}])
def test_a_member_without_weight_does_not_matter(name: str) -> None:
    log_probs = log_softmax(invented()[0])
    weights = np.array([0.5, 0.5, 0, 0, 0, 0])
    with_it = COMBINERS[name].combine(log_probs, weights).scores_NC
    assert with_it == pytest.approx(COMBINERS[name].combine(log_probs[:2], weights[:2]).scores_NC, abs=1e-9)


def test_combiners_of_a_case_worked_by_hand() -> None:
    log_probs = np.log(np.array([[[0.7, 0.2, 0.1]], [[0.2, 0.5, 0.3]], [[0.3, 0.4, 0.3]]]))
    thirds = np.full(3, 1 / 3)

    def scores(name: str, weights: FloatArray = thirds) -> FloatArray:
        return COMBINERS[name].combine(log_probs, weights).scores_NC[0]

    assert np.exp(scores("mean")) == pytest.approx([1.2 / 3, 1.1 / 3, 0.7 / 3])
    assert scores("vote") == pytest.approx([1 / 3, 2 / 3, 0], abs=1e-5)
    # Ranks 3 2 1, 1 3 2 and, its tie shared, 1.5 3 1.5.
    assert scores("rank") == pytest.approx([5.5 / 3, 8 / 3, 4.5 / 3], abs=1e-5)
    assert np.exp(scores("max_confidence")) == pytest.approx([0.7, 0.2, 0.1])
    products = np.array([0.7 * 0.2 * 0.3, 0.2 * 0.5 * 0.4, 0.1 * 0.3 * 0.3]) ** (1 / 3)
    assert np.exp(scores("geometric")) == pytest.approx(products / products.sum())
    # Coefficients 2 and -1 of the first two: p^2 / q.
    quotients = np.array([0.7**2 / 0.2, 0.2**2 / 0.5, 0.1**2 / 0.3])
    assert np.exp(scores("stacking", np.array([2.0, -1.0, 0.0]))) == pytest.approx(quotients / quotients.sum())
    # The first class by the first member, the second by the second, the third half by each of the last two.
    by_class = np.array([[1, 0, 0], [0, 1, 0.5], [0, 0, 0.5]])
    assert np.exp(scores("per_class", by_class)) == pytest.approx(np.array([0.7, 0.5, 0.3]) / 1.5)


def test_fitted_weights_find_the_only_good_member_and_never_lose_to_equal_ones() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 500)
    good = 3 * np.eye(4)[labels] + rng.normal(size=(500, 4))
    log_probs = log_softmax(np.stack([rng.normal(size=(500, 4)), good, *rng.normal(size=(2, 500, 4))]))
    weights = fit_weights(log_probs, labels)
    assert weights.sum() == pytest.approx(1)
    assert weights[1] > 0.95
    assert nll_of("mean", log_probs, labels, weights) < nll_of("mean", log_probs, labels, np.full(4, 0.25))


def nll_of(name: str, log_probs: FloatArray, labels: FloatArray, weights: FloatArray) -> float:
    """By scikit-learn."""
    return float(log_loss(labels, np.exp(COMBINERS[name].combine(log_probs, weights).scores_NC)))


@pytest.mark.parametrize("name", ["weighted", "stacking", "per_class"])
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_what_is_fitted_is_not_worse_on_select_than_what_it_starts_from(name: str, seed: int) -> None:
    logits, labels = invented(seed)
    log_probs = log_softmax(logits)
    plain = {"weighted": "mean", "stacking": "geometric", "per_class": "mean"}[name]
    fitted = nll_of(name, log_probs, labels, fitted_on(name, log_probs, labels))
    assert fitted <= nll_of(plain, log_probs, labels, np.full(6, 1 / 6)) + 1e-4


def test_weights_for_each_class_find_the_member_that_knows_it() -> None:
    """The first member knows the first two classes, the second one the others: so it is trusted there."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 4000)
    knows = np.array([[1, 1, 0, 0], [0, 0, 1, 1]])
    logits = 4 * knows[:, None, :] * np.eye(4)[labels] + rng.normal(size=(2, 4000, 4))
    log_probs = log_softmax(logits)
    weights = fitted_on("per_class", log_probs, labels)
    assert weights.sum(0) == pytest.approx(1)
    assert (weights[0, :2] > 0.6).all()
    assert (weights[1, 2:] > 0.6).all()
    shared = fit_weights(log_probs, labels)
    assert nll_of("per_class", log_probs, labels, weights) < nll_of("mean", log_probs, labels, shared)


def test_stacking_recovers_a_product_of_experts() -> None:
    """Labels drawn from p^1.5 / q^0.5: these are the coefficients, whatever the third member says."""
    rng = np.random.default_rng(1)
    log_probs = log_softmax(rng.normal(scale=1.5, size=(3, 30_000, 5)))
    truth = np.exp(log_softmax(1.5 * log_probs[0] - 0.5 * log_probs[1]))
    labels = (truth.cumsum(1) > rng.random((30_000, 1))).argmax(1)
    assert fitted_on("stacking", log_probs, labels) == pytest.approx([1.5, -0.5, 0], abs=0.05)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, true_temperature=st.floats(0.3, 4))
def test_temperature_scaling_recovers_the_temperature(seed: int, true_temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(20_000, 4))
    probs = np.exp(log_softmax(logits))
    labels = (probs.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    fitted = fit_temperature(log_softmax(logits * true_temperature), labels)
    assert fitted == pytest.approx(true_temperature, rel=0.08)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shift=st.floats(-5, 5))
def test_the_temperature_of_logits_is_that_of_their_probabilities(seed: int, shift: float) -> None:
    logits, labels = invented(seed, members=1)
    of_logits = fit_temperature(logits[0].astype(np.float64) + shift, labels)
    assert of_logits == pytest.approx(fit_temperature(log_softmax(logits[0]), labels), rel=5e-3)


def test_temperature_stays_within_its_bounds() -> None:
    labels = np.arange(1000) % 2
    certain_and_wrong = log_softmax(60_000.0 * np.eye(2)[1 - labels])
    assert fit_temperature(certain_and_wrong, labels) == BOUNDS[1]
    assert BOUNDS[0] <= fit_temperature(log_softmax(0.5 * np.eye(2)[labels]), labels) < 0.2


def test_temperature_stays_sensible_where_nothing_is_wrong() -> None:
    log_probs = log_softmax(np.array([[4.0, 0.0], [0.0, 4.0]] * 50))
    assert 0.2 < fit_temperature(log_probs, np.array([0, 1] * 50)) < 1


def test_temperature_keeps_the_ranking() -> None:
    log_probs = log_softmax(invented()[0])[0]
    assert np.array_equal(tempered(log_probs, 3.0).argsort(1), log_probs.argsort(1))


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, slope=SLOPES, intercept=INTERCEPTS, classes=st.integers(2, 8), scale=st.floats(0.01, 2000))
def test_scaling_the_confidence_keeps_the_ranking_and_the_sum(
    seed: int, slope: float, intercept: float, classes: int, scale: float
) -> None:
    log_probs = log_softmax(np.random.default_rng(seed).normal(scale=scale, size=(50, classes)))
    scaled = Confidence(slope, intercept).scale(log_probs)
    assert np.exp(scaled).sum(1) == pytest.approx(1, abs=1e-6)
    assert np.isfinite(scaled).all()
    assert np.array_equal(scaled.argmax(1), log_probs.argmax(1))
    order = np.argsort(-log_probs, axis=1)
    in_order = np.take_along_axis(scaled, order, axis=1)
    assert (np.diff(in_order, axis=1) <= 1e-9).all()


def test_scaling_a_confidence_worked_by_hand() -> None:
    """0.5 has log-odds 0, which ln 3 makes 0.75; what is left, 0.25, is shared 3 to 2. No change changes nothing."""
    log_probs = np.log(np.array([[0.3, 0.5, 0.2]]))
    assert np.exp(Confidence(2.0, np.log(3)).scale(log_probs))[0] == pytest.approx([0.15, 0.75, 0.1])
    assert np.exp(Confidence().scale(log_probs))[0] == pytest.approx([0.3, 0.5, 0.2])


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, slope=st.floats(0.5, 2), intercept=st.floats(-1, 1))
def test_confidence_scaling_recovers_what_confidences_were_distorted_by(
    seed: int, slope: float, intercept: float
) -> None:
    """Right as often as the confidence says; then distorted: undoing it is what is fitted."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.55, 0.97, 40_000)
    odds = np.log(confidence / (1 - confidence))
    distorted = 1 / (1 + np.exp(-(odds - intercept) / slope))
    log_probs = np.log(np.stack([distorted, 1 - distorted], axis=1))
    keeps_top = distorted > 0.5
    labels = (rng.random(40_000) > confidence).astype(int)
    fitted = fit_confidence(log_probs[keeps_top], labels[keeps_top])
    assert fitted.slope == pytest.approx(slope, abs=0.12)
    assert fitted.intercept == pytest.approx(intercept, abs=0.15)


def test_confidence_stays_sensible_where_nothing_is_wrong() -> None:
    log_probs = log_softmax(np.array([[4.0, 0.0], [0.0, 4.0]] * 50))
    fitted = fit_confidence(log_probs, np.array([0, 1] * 50))
    assert 1 <= fitted.slope < 3
    assert 0 <= fitted.intercept < 2


def test_a_combination_tempers_members_then_what_they_give() -> None:
    """Members 0.9 and 0.4 at temperatures 2 and 0.5: odds 3 and 4/9, so 3/4 and 4/13, mean 55/104; then T = 1/2."""
    log_probs = np.log(np.array([[[0.9, 0.1]], [[0.4, 0.6]]]))
    combination = Combination("mean", np.array([0.5, 0.5]), np.array([2.0, 0.5]), 0.5)
    squared = np.array([55.0**2, 49.0**2])
    combined = combination.combine(log_probs).log_probs_NC
    assert combined is not None
    assert np.exp(combined[0]) == pytest.approx(squared / squared.sum())


def test_no_probability_is_so_small_that_its_logarithm_is_lost() -> None:
    log_probs = log_softmax(np.array([[[60_000.0, 0.0]], [[50_000.0, 0.0]]], np.float16))
    for name, combiner in COMBINERS.items():
        weights = np.full((2, 2) if name == "per_class" else 2, 0.5)
        assert np.isfinite(combiner.combine(log_probs, weights).scores_NC).all()
