"""Ensembles: every selector and combiner keeps its promises, and the figures are what others compute too."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from orchestrator.calibration import fit_temperature, tempered
from orchestrator.combination import COMBINERS, fit_weights
from orchestrator.diversity import disagreement, mean_disagreement
from orchestrator.ensemble import verdict
from orchestrator.ensembling import choose, score_rows, shown_on_test
from orchestrator.metrics import METRICS, score
from orchestrator.pool import Candidate, Candidates, EstimatePool, Pool, SelectPool, TestPool
from orchestrator.selection import SELECTORS
from orchestrator.statistics import interval, resampled_means
from results.schema import FloatArray
from tests.conftest import ROOT
from trainables.validation import ece, log_softmax

SEEDS = st.integers(0, 2**32 - 1)


def pool(
    seed: int = 0,
    *,
    members: int = 6,
    examples: int = 200,
    classes: int = 7,
    of: type[Pool] = SelectPool,
    skill: float = 2,
) -> Pool:
    """Members that know the label to different degrees, with common and own errors."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, examples)
    strength = np.linspace(0.4, 1, members)[:, None, None] * skill
    common = rng.normal(size=(1, examples, classes))
    logits = strength * np.eye(classes)[labels] + common + rng.normal(size=(members, examples, classes))
    return of(log_softmax(logits.astype(np.float16)), labels)


def select_pool(seed: int = 0, **kwargs: int) -> SelectPool:
    made = pool(seed, **kwargs)
    assert isinstance(made, SelectPool)
    return made


def candidates(members: int) -> Candidates:
    ids = [f"t{i:05d}" for i in range(members)]
    rows = tuple(Candidate("x", t, f"x/{t}", "small_cnn", "completed", 10.0 * (i + 1), 100) for i, t in enumerate(ids))
    return Candidates(rows, {})


def some_weights(rng: np.random.Generator, members: int) -> FloatArray:
    weights = rng.random(members) + 0.05
    return np.asarray(weights / weights.sum())


# --- combiners ---


@pytest.mark.parametrize("name", COMBINERS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_a_combiner_of_one_member_is_that_member(name: str, seed: int) -> None:
    log_probs = select_pool(seed).log_probs_MNC[:1]
    combined = COMBINERS[name](log_probs, np.ones(1))
    assert np.array_equal(combined.scores_NC.argmax(1), log_probs[0].argmax(1))
    if combined.log_probs_NC is not None:
        assert combined.log_probs_NC == pytest.approx(log_probs[0], abs=1e-9)


@pytest.mark.parametrize("name", COMBINERS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, members=st.integers(1, 5))
def test_combined_probabilities_sum_to_one(name: str, seed: int, members: int) -> None:
    log_probs = select_pool(seed, members=members).log_probs_MNC
    combined = COMBINERS[name](log_probs, some_weights(np.random.default_rng(seed), members))
    assert combined.scores_NC.shape == log_probs.shape[1:]
    if combined.log_probs_NC is not None:
        assert np.exp(combined.log_probs_NC).sum(1) == pytest.approx(1)


@pytest.mark.parametrize("name", COMBINERS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_members_does_not_matter(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs, weights, order = select_pool(seed).log_probs_MNC, some_weights(rng, 6), rng.permutation(6)
    one, other = COMBINERS[name](log_probs, weights), COMBINERS[name](log_probs[order], weights[order])
    assert one.scores_NC == pytest.approx(other.scores_NC, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in COMBINERS if name != "max_confidence"])
def test_a_member_without_weight_does_not_matter(name: str) -> None:
    log_probs = select_pool().log_probs_MNC
    weights = np.array([0.5, 0.5, 0, 0, 0, 0])
    with_it = COMBINERS[name](log_probs, weights).scores_NC
    assert with_it == pytest.approx(COMBINERS[name](log_probs[:2], weights[:2]).scores_NC, abs=1e-9)


def test_combiners_of_a_case_worked_by_hand() -> None:
    log_probs = np.log(np.array([[[0.7, 0.2, 0.1]], [[0.2, 0.5, 0.3]], [[0.3, 0.4, 0.3]]]))
    thirds = np.full(3, 1 / 3)
    assert np.exp(COMBINERS["mean"](log_probs, thirds).scores_NC[0]) == pytest.approx([1.2 / 3, 1.1 / 3, 0.7 / 3])
    assert COMBINERS["vote"](log_probs, thirds).scores_NC[0] == pytest.approx([1 / 3, 2 / 3, 0], abs=1e-5)
    # Ranks 3 2 1, 1 3 2 and, its tie shared, 1.5 3 1.5.
    assert COMBINERS["rank"](log_probs, thirds).scores_NC[0] == pytest.approx([5.5 / 3, 8 / 3, 4.5 / 3], abs=1e-5)
    assert np.exp(COMBINERS["max_confidence"](log_probs, thirds).scores_NC[0]) == pytest.approx([0.7, 0.2, 0.1])
    products = np.array([0.7 * 0.2 * 0.3, 0.2 * 0.5 * 0.4, 0.1 * 0.3 * 0.3]) ** (1 / 3)
    assert np.exp(COMBINERS["geometric"](log_probs, thirds).scores_NC[0]) == pytest.approx(products / products.sum())


def test_fitted_weights_find_the_only_good_member_and_never_lose_to_equal_ones() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 500)
    good = log_softmax((3 * np.eye(4)[labels] + rng.normal(size=(500, 4))).astype(np.float16))
    bad = [log_softmax(rng.normal(size=(500, 4)).astype(np.float16)) for _ in range(3)]
    log_probs = np.stack([bad[0], good, *bad[1:]])
    weights = fit_weights(log_probs, labels)
    assert weights.sum() == pytest.approx(1)
    assert weights[1] > 0.95

    def nll(weights_M: FloatArray) -> float:
        return log_loss(labels, np.exp(COMBINERS["mean"](log_probs, weights_M).scores_NC))

    assert nll(weights) < nll(np.full(4, 0.25))


# --- selectors ---


@pytest.mark.parametrize("name", SELECTORS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 6))
def test_selectors_choose_at_most_k_distinct_members_with_weights(name: str, seed: int, k: int) -> None:
    selection = SELECTORS[name](select_pool(seed), k, np.random.default_rng(seed))
    assert 1 <= len(selection.members) <= k
    if name != "greedy":
        assert len(selection.members) == k
    assert len(set(selection.members)) == len(selection.members)
    assert set(selection.members) <= set(range(6))
    assert len(selection.weights_M) == len(selection.members)
    assert selection.weights_M.sum() == pytest.approx(1)
    assert (selection.weights_M > 0).all()


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_repeat_themselves_with_the_same_seed(name: str) -> None:
    one, other = (SELECTORS[name](select_pool(), 3, np.random.default_rng(4)) for _ in range(2))
    assert one.members == other.members


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "random"])
def test_selectors_of_one_choose_the_best(name: str) -> None:
    # Member 5 is best by far: both in accuracy and in NLL.
    assert SELECTORS[name](select_pool(examples=2000), 1, np.random.default_rng(0)).members == (5,)


def test_greedy_equals_its_definition_worked_out_naively() -> None:
    select, k = select_pool(7), 3
    probs = np.exp(select.log_probs_MNC)
    bag: list[int] = []
    best: tuple[float, list[int]] = (np.inf, [])
    for _ in range(50):
        allowed = range(6) if len(set(bag)) < k else sorted(set(bag))
        losses = {m: log_loss(select.labels_N, probs[[*bag, m]].mean(0)) for m in allowed}
        bag.append(min(losses, key=lambda m: losses[m]))
        if losses[bag[-1]] < best[0] - 1e-12:
            best = (losses[bag[-1]], list(bag))
    selection = SELECTORS["greedy"](select, k, np.random.default_rng(0))
    counts = {m: best[1].count(m) / len(best[1]) for m in set(best[1])}
    assert dict(zip(selection.members, selection.weights_M.tolist(), strict=True)) == pytest.approx(counts)


def test_diverse_prefers_a_member_that_differs_to_a_copy() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    noise = rng.normal(size=(3, 400, 5))
    best = 2.0 * np.eye(5)[labels] + noise[0]
    copy = best + 0.01 * noise[1]
    other = 1.9 * np.eye(5)[labels] + noise[2]
    select = SelectPool(log_softmax(np.stack([best, copy, other]).astype(np.float16)), labels)
    assert set(SELECTORS["diverse"](select, 2, rng).members) in ({0, 2}, {1, 2})
    assert set(SELECTORS["top"](select, 2, rng).members) == {0, 1}


def test_choosing_on_test_predictions_does_not_type_check(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import numpy as np\n"
        "from orchestrator.pool import EstimatePool, SelectPool, TestPool\n"
        "from orchestrator.selection import greedy\n"
        "def f(s: SelectPool, e: EstimatePool, t: TestPool, rng: np.random.Generator) -> None:\n"
        "    greedy(s, 5, rng)\n"
        "    greedy(e, 5, rng)\n"
        "    greedy(t, 5, rng)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(wrong)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line.split(": error: ")[0].rsplit(":", 1)[-1] for line in done.stdout.splitlines() if "arg-type" in line]
    assert errors == ["6", "7"], done.stdout


# --- metrics ---


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_metrics_agree_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # No two scores are equal: scikit-learn breaks ties in another way.
    log_probs, labels = log_softmax(rng.normal(size=(200, 7))), np.arange(200) % 7
    scored = score(log_probs, labels, log_probs_NC=log_probs)
    values = scored.metrics(scored.columns_NK.mean(0))
    probs = np.exp(log_probs)
    assert set(values) == set(METRICS)
    assert values["accuracy"] == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert values["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, probs, k=5, labels=range(7)))
    assert values["nll"] == pytest.approx(log_loss(labels, probs, labels=range(7)))
    assert values["brier"] == pytest.approx(((probs - np.eye(7)[labels]) ** 2).sum(1).mean())
    assert values["ece"] == pytest.approx(ece(probs, labels))


def test_of_equal_scores_the_first_class_wins() -> None:
    scores = np.zeros((6, 6))
    scored = score(scores, np.arange(6), log_probs_NC=None)
    assert scored.columns_NK[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert scored.columns_NK[:, 1].tolist() == [1, 1, 1, 1, 1, 0]


def test_without_probabilities_there_are_no_metrics_of_probabilities() -> None:
    select = select_pool()
    scored = score(select.log_probs_MNC[0], select.labels_N, log_probs_NC=None)
    assert set(scored.metrics(scored.columns_NK.mean(0))) == {"accuracy", "top5_accuracy"}


def test_seeds_of_one_configuration_are_a_control_where_there_are_some() -> None:
    """Of a (right on 3 and 1 of 4, mean 2), b (2 and 3, mean 2.5) and c (4, once) the trainings of b are taken."""
    right = [3, 1, 2, 3, 4]
    labels = np.zeros(4, dtype=np.int64)
    logits = np.array([[[1.0, 0.0] if n < r else [0.0, 1.0] for n in range(4)] for r in right])
    select = SelectPool(log_softmax(logits), labels)
    arguments = {"k": 3, "selection": "top", "combiner": "mean", "rng": np.random.default_rng(0)}
    with_seeds = choose(select, configurations=["a", "a", "b", "b", "c"], **arguments)  # type: ignore[arg-type]
    (row,) = (row for row in with_seeds if row.selection == "seeds")
    assert row.kind == "control"
    assert row.ensembles[0].members == (2, 3)
    assert row in shown_on_test(with_seeds)
    once = choose(select, configurations=["a", "b", "c", "d", "e"], **arguments)  # type: ignore[arg-type]
    assert not any(row.selection == "seeds" for row in once)


def test_a_control_of_several_draws_is_the_mean_of_their_metrics() -> None:
    rows = choose(select_pool(), k=2, selection="top", combiner="mean", rng=np.random.default_rng(0))
    estimate = pool(1, of=EstimatePool)
    records = score_rows(rows, estimate, ensemble_id="e", candidates=candidates(6), rng=np.random.default_rng(0))
    draws = [ensemble.score(estimate) for ensemble in rows[-1].ensembles]
    for metric in METRICS:
        (record,) = (r for r in records if r.selection == "random" and r.metric == metric)
        assert record.value == pytest.approx(np.mean([d.metrics(d.columns_NK.mean(0))[metric] for d in draws]))


# --- calibration and statistics ---


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, true_temperature=st.floats(0.3, 4))
def test_temperature_scaling_recovers_the_temperature(seed: int, true_temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(20_000, 4))
    probs = np.exp(log_softmax(logits))
    labels = (probs.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    fitted = fit_temperature(log_softmax(logits * true_temperature), labels)
    assert fitted == pytest.approx(true_temperature, rel=0.08)


def test_temperature_stays_sensible_where_nothing_is_wrong() -> None:
    log_probs = log_softmax(np.array([[4.0, 0.0], [0.0, 4.0]] * 50))
    assert 0.2 < fit_temperature(log_probs, np.array([0, 1] * 50)) < 1


def test_temperature_keeps_the_ranking() -> None:
    log_probs = select_pool().log_probs_MNC[0]
    assert np.array_equal(tempered(log_probs, 3.0).argsort(1), log_probs.argsort(1))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = interval(resampled_means((rng.random(300) < 0.8)[:, None].astype(float), rng)[:, 0])
        inside += low <= 0.8 <= high
    assert 0.90 <= inside / 200 <= 0.99


def test_paired_intervals_are_narrower_than_unpaired_ones() -> None:
    rows = choose(select_pool(examples=1000), k=3, selection="top", combiner="mean", rng=np.random.default_rng(0))
    estimate = pool(1, examples=1000, of=EstimatePool)
    records = score_rows(rows, estimate, ensemble_id="e", candidates=candidates(6), rng=np.random.default_rng(0))
    chosen = next(r for r in records if r.chosen and r.metric == "accuracy")
    assert chosen.gain_ci_low is not None
    assert chosen.gain_ci_high is not None
    assert chosen.ci_low is not None
    assert chosen.ci_high is not None
    assert chosen.gain_ci_high - chosen.gain_ci_low < np.sqrt(2) * (chosen.ci_high - chosen.ci_low)


# --- the whole ---


@pytest.mark.parametrize("selection", SELECTORS)
@pytest.mark.parametrize("combiner", COMBINERS)
def test_every_table_has_the_chosen_every_combiner_and_the_controls(selection: str, combiner: str) -> None:
    rows = choose(select_pool(), k=3, selection=selection, combiner=combiner, rng=np.random.default_rng(0))
    assert (rows[0].kind, rows[0].chosen, rows[0].combiner) == ("ensemble", True, combiner)
    assert {row.combiner for row in rows if row.kind == "ensemble"} == set(COMBINERS)
    assert sum(row.chosen for row in rows) == 1
    assert [row.label for row in rows[-3:]] == ["best single model", "top, mean", "random, mean (mean of 20 draws)"]
    assert [row.label for row in shown_on_test(rows)][1:] == [row.label for row in rows[-3:]]
    test = pool(2, of=TestPool)
    records = score_rows(
        shown_on_test(rows), test, ensemble_id="e", candidates=candidates(6), rng=np.random.default_rng(0)
    )
    assert {r.split for r in records} == {"test"}
    for record in records:
        has_value = record.metric in ("accuracy", "top5_accuracy") or record.combiner not in ("vote", "rank")
        assert (record.value is not None) == has_value
        if record.kind == "single":
            assert record.gain == 0
            assert record.training_seconds in {10.0 * i for i in range(1, 7)}


def test_gains_are_positive_when_an_ensemble_is_better_whatever_the_metric() -> None:
    # Members alike in skill with errors of their own: averaging five must help.
    rng = np.random.default_rng(0)

    def alike(of: type[Pool]) -> Pool:
        labels = rng.integers(0, 5, 3000)
        return of(log_softmax((1.5 * np.eye(5)[labels] + rng.normal(size=(5, 3000, 5))).astype(np.float16)), labels)

    select = alike(SelectPool)
    assert isinstance(select, SelectPool)
    rows = choose(select, k=5, selection="top", combiner="mean", rng=rng)
    records = score_rows(rows, alike(EstimatePool), ensemble_id="e", candidates=candidates(5), rng=rng)
    for record in records:
        if record.chosen and record.metric in ("accuracy", "nll", "brier"):
            assert record.gain_ci_low is not None
            assert record.gain_ci_low > 0
            assert record.training_seconds == 10 + 20 + 30 + 40 + 50
            assert record.multiply_adds == 500


def test_disagreement_of_a_case_worked_by_hand() -> None:
    tops = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 0]])
    log_probs = np.log(np.eye(2)[tops] * 0.8 + 0.1)
    assert disagreement(log_probs).tolist() == [[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]]
    assert mean_disagreement(disagreement(log_probs)) == pytest.approx(1 / 3)
    assert mean_disagreement(disagreement(log_probs[:1])) is None


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.01, 0.05, "better"), (-0.05, -0.01, "worse"), (-0.01, 0.05, "no difference shown")]
)
def test_the_verdict_goes_by_the_interval(low: float, high: float, word: str) -> None:
    rows = choose(select_pool(), k=3, selection="top", combiner="mean", rng=np.random.default_rng(0))
    records = score_rows(
        rows, pool(1, of=EstimatePool), ensemble_id="e", candidates=candidates(6), rng=np.random.default_rng(0)
    )
    chosen = [replace(r, gain=0.02, gain_ci_low=low, gain_ci_high=high) for r in records if r.chosen]
    assert f"accuracy {word} (gain +0.0200 [{low:+.4f}, {high:+.4f}]); NLL {word}" in verdict(chosen)
