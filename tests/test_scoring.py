"""Metrics are what others compute too; intervals, tests and tables keep to what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import (
    accuracy_score,
    log_loss,
    matthews_corrcoef,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from orchestrator.candidates import cost_of
from orchestrator.combination import COMBINERS
from orchestrator.diversity import disagreement, diversity, error_correlation, kl, mean_over_pairs, q_statistic
from orchestrator.ensembling import MOST_AT_ONCE, Ensemble, Row, choose, shown_on_test
from orchestrator.metrics import (
    MEANS,
    METRICS,
    auroc,
    calibration_error,
    class_accuracies,
    equal_mass_bins,
    equal_width_bins,
    noise_floor,
    score,
)
from orchestrator.pool import EstimatePool, SelectPool, TestPool
from orchestrator.returns import cross_fitted, curve, front
from orchestrator.scoring import num_comparisons, score_rows
from orchestrator.selection import SELECTORS, uniform
from orchestrator.statistics import mcnemar
from results.schema import ScoreRecord, UsageError
from tests.pools import candidate, candidates, estimate_pool, invented, select_pool
from trainables.validation import ece, log_softmax

SEEDS = st.integers(0, 2**32 - 1)


def chosen(pool: SelectPool | None = None, *, k: int = 3, selection: str = "top", **further: object) -> list[Row]:
    arguments = {"combiner": "mean", "rng": np.random.default_rng(0), **further}
    return choose(pool or select_pool(), k=k, selection=selection, **arguments)  # type: ignore[arg-type]


def scored(rows: list[Row], pool: EstimatePool | TestPool | None = None) -> list[ScoreRecord]:
    members = 1 + max(m for row in rows for e in row.ensembles for m in e.members)
    of = {"ensemble_id": "e", "candidates": candidates(members), "rng": np.random.default_rng(0)}
    return score_rows(rows, pool or estimate_pool(), **of)  # type: ignore[arg-type]


# --- metrics ---


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_metrics_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # No two scores are equal: scikit-learn breaks ties in another way.
    log_probs, labels = log_softmax(rng.normal(size=(200, 7))), np.arange(200) % 7
    of_row = score(log_probs, labels, log_probs_NC=log_probs)
    values = of_row.metrics(of_row.columns_NK.mean(0)) | of_row.others(rng)
    probs = np.exp(log_probs)
    assert set(values) == set(METRICS)
    assert values["accuracy"] == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert values["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, probs, k=5, labels=range(7)))
    assert values["nll"] == pytest.approx(log_loss(labels, probs, labels=range(7)))
    assert values["brier"] == pytest.approx(((probs - np.eye(7)[labels]) ** 2).sum(1).mean())
    assert values["ece"] == pytest.approx(ece(probs, labels))
    assert values["ece"] == pytest.approx(
        calibration_error(probs.max(1), of_row.correct_N, equal_width_bins(probs.max(1)))
    )
    assert values["auroc"] == pytest.approx(roc_auc_score(of_row.correct_N, probs.max(1)))
    recalls = recall_score(labels, probs.argmax(1), average=None)
    assert class_accuracies(of_row.correct_N, labels, 7) == pytest.approx(recalls)


def test_of_equal_scores_the_first_class_wins() -> None:
    of_row = score(np.zeros((6, 6)), np.arange(6), log_probs_NC=None)
    assert of_row.columns_NK[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert of_row.columns_NK[:, 1].tolist() == [1, 1, 1, 1, 1, 0]


def test_without_probabilities_there_are_no_metrics_of_probabilities() -> None:
    log_probs = select_pool().log_probs([0])[0]
    of_row = score(log_probs, select_pool().labels_N, log_probs_NC=None)
    assert set(of_row.metrics(of_row.columns_NK.mean(0))) == {"accuracy", "top5_accuracy"}
    assert of_row.others(np.random.default_rng(0)) == {}


def test_equal_mass_bins_hold_equally_many_and_are_in_order() -> None:
    confidence = np.random.default_rng(0).random(150)
    bins = equal_mass_bins(confidence)
    assert np.bincount(bins).tolist() == [10] * 15
    assert all(confidence[bins == b].max() <= confidence[bins == b + 1].min() for b in range(14))


def test_a_calibration_error_worked_by_hand() -> None:
    """Two bins: right 1 of 2 at 0.9 and 0.8, |1 - 1.7| = 0.7; right 1 of 1 at 0.5, 0.5; together 1.2 of 3."""
    error = calibration_error(np.array([0.9, 0.8, 0.5]), np.array([True, False, True]), np.array([13, 13, 7]))
    assert error == pytest.approx(1.2 / 3)


@pytest.mark.parametrize("bins_of", [equal_width_bins, equal_mass_bins])
def test_a_calibrated_system_is_above_its_noise_floor_one_time_in_twenty(bins_of: object) -> None:
    rng = np.random.default_rng(0)
    above = 0
    for _ in range(400):
        confidence = rng.uniform(0.3, 1, 500)
        bins = bins_of(confidence)  # type: ignore[operator]
        correct = rng.random(500) < confidence
        above += calibration_error(confidence, correct, bins) > noise_floor(confidence, bins, rng)
    assert 0.02 < above / 400 < 0.09  # 0.05, within 3.5 standard errors


def test_an_overconfident_system_is_far_above_its_noise_floor() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.5, 1, 2000)
    correct = rng.random(2000) < confidence - 0.1
    bins = equal_width_bins(confidence)
    assert calibration_error(confidence, correct, bins) > 2 * noise_floor(confidence, bins, rng)


def test_auroc_is_not_defined_when_all_are_right() -> None:
    assert auroc(np.array([0.5, 0.9]), np.array([True, True])) is None
    assert auroc(np.array([0.5, 0.5]), np.array([True, False])) == 0.5


# --- diversity ---


def test_diversity_of_a_case_worked_by_hand() -> None:
    tops = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 0]])
    log_probs = np.log(np.eye(2)[tops] * 0.8 + 0.1)
    assert disagreement(log_probs).tolist() == [[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]]
    assert mean_over_pairs(disagreement(log_probs)) == pytest.approx(1 / 3)
    assert mean_over_pairs(disagreement(log_probs[:1])) is None
    # Where they differ one has 0.9 and the other 0.1: 0.8 log 9 nats, on half of the examples.
    assert kl(log_probs)[0, 1] == pytest.approx(0.5 * 0.8 * np.log(9))
    # Right on 3 and 2 of 4, together on 2: both 2, neither 1, alone 1 and 0: Q = (2 x 1 - 1 x 0) / (2 x 1 + 1 x 0).
    assert q_statistic(np.array([[1, 1, 1, 0], [1, 1, 0, 0]]))[0, 1] == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_diversity_agrees_with_others(seed: int) -> None:
    logits, labels = invented(seed, members=2)
    log_probs = log_softmax(logits)
    wrong = log_probs.argmax(2) != labels
    assert error_correlation(~wrong)[0, 1] == pytest.approx(matthews_corrcoef(*wrong))
    probs = np.exp(log_probs)
    assert kl(log_probs)[0, 1] == pytest.approx(entropy(probs[0], probs[1], axis=1).mean())
    a, b, c, d = (
        float((x & y).sum())
        for x, y in ((~wrong[0], ~wrong[1]), (~wrong[0], wrong[1]), (wrong[0], ~wrong[1]), (wrong[0], wrong[1]))
    )
    assert q_statistic(~wrong)[0, 1] == pytest.approx((a * d - b * c) / (a * d + b * c))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_the_members_mean_nll_less_ambiguity_is_the_nll_of_their_mean(seed: int) -> None:
    logits, labels = invented(seed)
    log_probs, weights = log_softmax(logits), np.arange(1, 7) / 21
    found = diversity(log_probs, labels, weights)
    pooled = COMBINERS["mean"].combine(log_probs, weights).scores_NC
    assert found.mean_member_nll - found.ambiguity == pytest.approx(log_loss(labels, np.exp(pooled), labels=range(7)))
    assert found.ambiguity >= 0
    assert diversity(log_probs[:1], labels, np.ones(1)).ambiguity == pytest.approx(0)


# --- statistics ---


def test_mcnemar_of_a_case_worked_by_hand() -> None:
    """Right where the other is wrong on 1 and on 5 of 6: twice (1 + 6) / 2^6; and never different: 1."""
    one = np.array([True] + [False] * 5 + [True] * 10)
    other = np.array([False] + [True] * 5 + [True] * 10)
    assert mcnemar(one, other) == pytest.approx(2 * 7 / 64)
    assert mcnemar(one, one) == 1


def test_paired_intervals_are_narrower_than_unpaired_ones() -> None:
    records = scored(chosen(select_pool(examples=1000)), estimate_pool(examples=1000))
    record = next(r for r in records if r.chosen and r.metric == "accuracy")
    assert None not in (record.gain_ci_low, record.gain_ci_high, record.ci_low, record.ci_high)
    width = record.gain_ci_high - record.gain_ci_low  # type: ignore[operator]
    assert width < np.sqrt(2) * (record.ci_high - record.ci_low)  # type: ignore[operator]


# --- tables ---


@pytest.mark.parametrize("selection", SELECTORS)
@pytest.mark.parametrize("combiner", COMBINERS)
def test_every_table_has_the_chosen_every_combiner_and_the_controls(selection: str, combiner: str) -> None:
    pool = select_pool(configurations=[0, 0, 1, 2, 3, 4])
    rows = chosen(pool, selection=selection, combiner=combiner)
    assert (rows[0].kind, rows[0].chosen, rows[0].combiner) == ("ensemble", True, combiner)
    assert {row.combiner for row in rows if row.kind == "ensemble"} == set(COMBINERS)
    assert sum(row.chosen for row in rows) == sum(row.baseline for row in rows) == 1
    controls = ["best single model", "top, mean", "random, mean (20 draws)", "seeds, mean"]
    assert [row.label for row in rows if row.kind != "ensemble"] == controls
    assert [row.label for row in shown_on_test(rows)][1:] == controls
    records = scored(shown_on_test(rows), TestPool(*invented(2)))
    assert {r.split for r in records} == {"test"}
    for record in records:
        of_several = record.label.endswith("draws)") and record.metric not in MEANS
        without = record.combiner in ("vote", "rank") and record.metric not in ("accuracy", "top5_accuracy")
        assert (record.value is None) == (of_several or without)
        if record.kind == "single":
            assert record.gain in (0, None)
            assert record.training_seconds in {10.0 * i for i in range(1, 7)}


def test_the_best_of_each_kind_stands_in_the_table_when_there_are_several() -> None:
    pool = select_pool(examples=2000)  # the higher its number, the better a candidate
    kinds = ["model", "tta", "model", "student", "tta", "ema"]
    rows = {row.label: row for row in chosen(pool, kinds=kinds)}
    best = {label: row.ensembles[0].members for label, row in rows.items() if row.kind == "single"}
    expected = {"model": 2, "tta": 4, "student": 3, "ema": 5}
    assert best == {"best single model": (5,), **{f"best {kind}": (m,) for kind, m in expected.items()}}


def test_a_single_model_trained_for_the_whole_budget_is_a_control() -> None:
    pool = select_pool(examples=2000)
    costs = [1.0, 1, 3, 1, 1, 1]
    (row,) = (row for row in chosen(pool, k=3, train_costs=costs) if row.selection == "whole budget")
    assert row.ensembles[0].members == (2,)
    assert not any(row.selection == "whole budget" for row in chosen(pool, k=3, train_costs=[1.0] * 6))


@pytest.mark.parametrize("selection", ["all", "greedy", "diverse"])
def test_controls_have_as_many_trainings_as_the_chosen_ensemble(selection: str) -> None:
    """`all` takes more than k, `greedy` may take fewer, and variants of one training are one."""
    pool = select_pool(3, trials=[0, 0, 0, 1, 2, 3], configurations=[0, 0, 0, 0, 1, 2])
    chosen_row, *others = chosen(pool, k=3, selection=selection)
    trainings = len({int(pool.trials_M[member]) for member in chosen_row.ensembles[0].members})
    sizes = {row.selection: {len(e.members) for e in row.ensembles} for row in others if row.kind == "control"}
    assert sizes == {"top": {trainings}, "random": {trainings}, "seeds": {min(2, trainings)}}


def test_variants_of_one_training_are_paid_for_once() -> None:
    both = [candidate(0, multiply_adds=100), candidate(0, variant="tta", multiply_adds=200, images_per_second=25.0)]
    cost = cost_of([*both, candidate(1)])
    assert cost.train_seconds == 10 + 20
    assert cost.multiply_adds == 100 + 200 + 100
    assert cost.num_parameters == 2000
    assert cost.images_per_second == pytest.approx(1 / (1 / 50 + 1 / 25 + 1 / 50))
    assert cost_of([candidate(0, images_per_second=None), candidate(1)]).images_per_second is None


def test_a_control_of_several_draws_is_the_mean_of_their_metrics() -> None:
    rows, estimate = chosen(k=2), estimate_pool()
    draws = [ensemble.score(estimate) for ensemble in rows[-1].ensembles]
    assert len(draws) == 20
    for metric in MEANS:
        (record,) = (r for r in scored(rows, estimate) if r.selection == "random" and r.metric == metric)
        assert record.value == pytest.approx(np.mean([d.metrics(d.columns_NK.mean(0))[metric] for d in draws]))


def test_gains_are_positive_when_an_ensemble_is_better_whatever_the_metric() -> None:
    # Members alike in skill with errors of their own: averaging five must help.
    rng = np.random.default_rng(0)

    def alike() -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 5, 3000)
        return (1.5 * np.eye(5)[labels] + rng.normal(size=(5, 3000, 5))).astype(np.float16), labels

    records = scored(chosen(SelectPool.of(*alike()), k=5), EstimatePool(*alike()))
    for record in records:
        if record.chosen and record.metric in ("accuracy", "nll", "brier"):
            assert record.gain_ci_low is not None
            assert record.gain_ci_low > 0
            assert record.training_seconds == 10 + 20 + 30 + 40 + 50
            assert record.multiply_adds == 500
        if record.chosen and record.metric == "accuracy":
            assert record.p_value is not None
            assert record.p_value < 1e-6


def test_what_the_chosen_ensemble_gains_over_a_control_is_the_difference_of_their_values() -> None:
    records = scored(chosen())
    for metric, sign in (("accuracy", 1), ("nll", -1), ("auroc", 1)):
        best = next(r.value for r in records if r.chosen and r.metric == metric)
        for record in (r for r in records if r.metric == metric and r.value is not None):
            assert record.chosen_gain == pytest.approx(sign * (best - record.value))  # type: ignore[operator]
            if metric != "auroc":
                assert record.chosen_gain_ci_low <= record.chosen_gain <= record.chosen_gain_ci_high  # type: ignore[operator]


def test_how_many_comparisons_were_made_is_counted() -> None:
    """Seven other combiners, top, random and the chosen one with the single model; the chosen with top and random."""
    rows = chosen()
    without_nll = 2  # vote and rank
    assert num_comparisons(rows) == 2 * (7 + 2 + 1) - without_nll + 2 * 2
    of_votes = [replace(row, chosen=row.combiner == "vote") for row in rows]
    assert num_comparisons(of_votes) == 2 * (7 + 2 + 1) - without_nll + 2


@pytest.mark.parametrize("combiner", ["mean", "weighted"])
def test_an_ensemble_of_very_many_members_is_pooled_one_after_the_other(combiner: str) -> None:
    members = MOST_AT_ONCE + 3
    logits, labels = invented(members=members, examples=60, classes=4)
    pool = SelectPool.of(logits, labels)
    selection = uniform(range(members))
    if combiner == "weighted":
        with pytest.raises(UsageError, match=f"takes at most {MOST_AT_ONCE} members, and {members} are chosen"):
            Ensemble.fit(selection, combiner, pool)
        return
    many = Ensemble.fit(selection, combiner, pool)
    calm = log_softmax(logits / many.combination.temperatures_M[:, None, None])
    at_once = COMBINERS["mean"].combine(calm, selection.weights_M).scores_NC
    expected = many.combination.calibrate(at_once)
    assert many.combine(pool).scores_NC == pytest.approx(expected, abs=1e-5)


def test_very_many_members_may_be_sure_of_the_same_wrong_class() -> None:
    """Where none gives a class any probability that float32 holds, the calibrated NLL is a number all the same."""
    labels = np.arange(20) % 3
    logits = np.repeat((100000.0 * np.eye(3)[(labels + 1) % 3])[None], MOST_AT_ONCE + 1, axis=0)
    pool = SelectPool.of(np.clip(logits, -65504, 65504).astype(np.float16), labels)
    ensemble = Ensemble.fit(uniform(range(len(logits))), "mean", pool)
    assert np.isfinite(ensemble.score(pool).columns_NK).all()


# --- returns ---


def test_the_curve_ends_where_the_candidates_end_and_passes_through_the_choice() -> None:
    pool = select_pool()
    rows = curve(pool, k=3, selection="diverse", combiner="mean", rng=np.random.default_rng(0))
    assert [len(row.ensembles[0].members) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[2].ensembles[0].members == chosen(pool, selection="diverse")[0].ensembles[0].members


def test_the_curve_has_one_row_of_so_many_members() -> None:
    """Of copies `greedy` takes one, however many it may take."""
    logits, labels = invented(members=1)
    pool = SelectPool.of(np.repeat(logits, 4, axis=0), labels)
    rows = curve(pool, k=3, selection="greedy", combiner="mean", rng=np.random.default_rng(0))
    assert [row.label for row in rows] == ["greedy of 1"]


def test_the_front_is_that_of_accuracy_and_cost() -> None:
    record = next(r for r in scored(chosen()) if r.metric == "accuracy")
    points = [(0.5, 100), (0.6, 100), (0.6, 200), (0.7, 300), (0.65, 400)]
    records = [replace(record, value=value, multiply_adds=adds) for value, adds in points]
    assert front(records) == [False, True, False, True, False]


def test_cross_fitting_scores_every_example_by_a_choice_that_did_not_see_it() -> None:
    """Candidates that know nothing but the labels of half of select look perfect there: cross-fitting is not fooled."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 400)
    guesses = rng.integers(0, 10, size=(60, 400))
    logits = 4.0 * np.eye(10)[guesses]
    pool = SelectPool.of(logits.astype(np.float16), labels)
    of = {"k": 3, "selection": "top", "combiner": "mean"}
    found = cross_fitted(pool, **of, rng=np.random.default_rng(0))  # type: ignore[arg-type]
    in_sample = chosen(pool, k=1)[0].ensembles[0].score(pool).correct_N.mean()
    assert in_sample > 0.13
    assert found.accuracy < in_sample - 0.02
    assert 0 <= found.overlap <= 1


def test_a_choice_that_is_plain_is_stable() -> None:
    pool = select_pool(examples=2000)
    found = cross_fitted(pool, k=2, selection="top", combiner="vote", rng=np.random.default_rng(0))
    assert found.overlap == 1
    assert found.nll is None
