"""Selectors choose what they say they choose, from select alone, and fast ways give what plain ones give."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import log_loss

import orchestrator.selection as selection_module
from orchestrator.greedy import by_accuracy, by_nll, mean_nll
from orchestrator.pool import SelectPool
from orchestrator.selection import (
    BONUSES,
    SELECTORS,
    Selection,
    best_bonus,
    sorted_start,
    with_bonus,
    within_cost,
)
from results.schema import DataWarning, FloatArray, IntArray, UsageError
from tests.conftest import ROOT
from tests.pools import invented, select_pool

SEEDS = st.integers(0, 2**32 - 1)
SEEDED = [0, 0, 1, 1, 1, 2]
"""Configurations of six candidates, two of which have been trained several times."""


def chosen_by(name: str, pool: SelectPool, k: int, seed: int = 0) -> Selection:
    return SELECTORS[name].choose(pool, k, np.random.default_rng(seed))


def nll_of(pool: SelectPool, selection: Selection) -> float:
    """Of the weighted mean of all classes' probabilities, by scikit-learn."""
    probs = softmax(np.stack([pool.logits[m] for m in selection.members]).astype(np.float64), axis=2)
    return float(
        log_loss(pool.labels_N, np.tensordot(selection.weights_M, probs, axes=1), labels=range(probs.shape[2]))
    )


@pytest.mark.parametrize("name", SELECTORS)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 6))
def test_selectors_choose_at_most_k_distinct_members_with_weights(name: str, seed: int, k: int) -> None:
    selection = chosen_by(name, select_pool(seed, configurations=SEEDED), k, seed)
    assert 1 <= len(selection.members) <= (6 if name == "all" else k)
    if name in {"diverse", "top", "random"}:
        assert len(selection.members) == k
    assert len(set(selection.members)) == len(selection.members)
    assert set(selection.members) <= set(range(6))
    assert len(selection.weights_M) == len(selection.members)
    assert selection.weights_M.sum() == pytest.approx(1)
    assert (selection.weights_M > 0).all()


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_repeat_themselves_with_the_same_seed(name: str) -> None:
    pool = select_pool(configurations=SEEDED)
    assert chosen_by(name, pool, 3, 4).members == chosen_by(name, pool, 3, 4).members


@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in {"random", "seeds", "all"}])
def test_selectors_of_one_choose_the_best(name: str) -> None:
    # Member 5 is best by far: both in accuracy and in NLL.
    assert chosen_by(name, select_pool(examples=2000), 1).members == (5,)


@pytest.mark.parametrize("name", SELECTORS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_paths_go_through_what_is_chosen(name: str, seed: int) -> None:
    pool, k = select_pool(seed, configurations=SEEDED), 3
    path = SELECTORS[name].path(pool, k, 5, np.random.default_rng(seed))
    assert len(path) <= 5
    assert all(len(selection.members) <= count for count, selection in enumerate(path, 1))
    if name not in {"all", "greedy_bagged", "quality_diversity", "seeds"}:
        there = path[k - 1]
        assert there.members == chosen_by(name, pool, k, seed).members


# --- greedy ---


def plain_greedy(pool: SelectPool, k: int, *, rounds: int, metric: str) -> tuple[list[int], float]:
    """Forward selection with replacement over all classes' probabilities; the first at ties, by NLL after accuracy."""
    probs = softmax(np.stack([pool.logits[m] for m in range(len(pool))]).astype(np.float64), axis=2)
    bag: list[int] = []
    best: tuple[tuple[float, ...], list[int]] = ((np.inf, np.inf), [])
    for _ in range(rounds):
        allowed = range(len(pool)) if len(set(bag)) < k else sorted(set(bag))
        tried = {m: figures(probs[[*bag, m]].mean(0), pool.labels_N, metric) for m in allowed}
        least = min(tried.values())
        bag.append(min(m for m in tried if tried[m] == least))
        if least[0] < best[0][0] - 1e-12 or (least[0] == best[0][0] and least[-1] < best[0][-1] - 1e-11):
            best = (least, list(bag))
    return best[1], best[0][0]


def figures(mean: FloatArray, labels: IntArray, metric: str) -> tuple[float, ...]:
    nll = float(-np.log(mean[np.arange(len(labels)), labels]).mean())
    return (nll,) if metric == "nll" else (float((mean.argmax(1) != labels).mean()), nll)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 6), examples=st.integers(1, 70))
def test_greedy_on_nll_is_what_a_plain_loop_gives(seed: int, k: int, examples: int) -> None:
    pool = select_pool(seed, examples=examples)
    bag, loss = plain_greedy(pool, k, rounds=50, metric="nll")
    found = by_nll(pool.label_probs_MN, k)
    assert found.loss == pytest.approx(loss, abs=1e-7)
    assert {m: bag.count(m) for m in set(bag)} == found.counts


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 6), examples=st.integers(1, 120), classes=st.integers(2, 9))
def test_greedy_on_accuracy_is_what_a_plain_loop_gives(seed: int, k: int, examples: int, classes: int) -> None:
    pool = select_pool(seed, examples=examples, classes=classes)
    probs = softmax(np.stack([pool.logits[m] for m in range(len(pool))]).astype(np.float64), axis=2)
    bag, _ = plain_greedy(pool, k, rounds=20, metric="accuracy")
    found = by_accuracy(probs, pool.labels_N, k, rounds=20)
    assert {m: bag.count(m) for m in set(bag)} == found.counts


def test_greedy_on_accuracy_counts_ties_as_argmax_does() -> None:
    """Of equal sums the first class is the top one: the first member alone is right on both examples of class 0."""
    probs = np.array([[[0.5, 0.5], [0.5, 0.5], [0.6, 0.4]], [[0.4, 0.6], [0.4, 0.6], [0.4, 0.6]]])
    labels = np.array([0, 0, 1])
    found = by_accuracy(probs, labels, 2, rounds=1)
    assert found.counts == {0: 1}
    # With it once, adding it again keeps the ties, adding the other one loses both and wins the third: 0.6 + 0.4 ties.
    again = by_accuracy(probs, labels, 2, rounds=1, start=[0])
    assert again.counts == {0: 2}


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_a_greedy_step_is_the_best_there_is(seed: int) -> None:
    """Against brute force: of all bags that hold the ones so far and one more, none is better."""
    pool = select_pool(seed, members=5, examples=60)
    probs = pool.label_probs_MN
    one = by_nll(probs, 5, rounds=1)
    two = by_nll(probs, 5, rounds=1, start=list(one.counts))
    pairs = {pair: float(-np.log(probs[list(pair)].mean(0)).mean()) for pair in itertools.product(range(5), repeat=2)}
    singles = {m: float(-np.log(probs[m]).mean()) for m in range(5)}
    assert one.loss == pytest.approx(min(singles.values()))
    first = next(iter(one.counts))
    assert two.loss == pytest.approx(min(loss for (a, _), loss in pairs.items() if a == first))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_greedy_of_two_is_the_best_pair_when_it_holds_the_best_member(seed: int) -> None:
    """Brute force over every bag of up to four from four candidates: greedy's is never better, and near."""
    pool = select_pool(seed, members=4, examples=80)
    bags = [bag for size in range(1, 5) for bag in itertools.combinations_with_replacement(range(4), size)]
    best = min(float(-np.log(pool.label_probs_MN[list(bag)].mean(0)).mean()) for bag in bags)
    found = by_nll(pool.label_probs_MN, 4, rounds=4).loss
    assert best - 1e-12 <= found
    assert found <= best + 0.02


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, examples=st.integers(1, 100), size=st.integers(1, 60))
def test_the_mean_nll_by_products_is_the_mean_of_logarithms(seed: int, examples: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    probs = 10.0 ** rng.uniform(-19, 0, size=(3, examples))
    total = rng.uniform(0, size - 1, examples) if size > 1 else np.zeros(examples)
    assert mean_nll(probs, total, size) == pytest.approx(-np.log((total + probs) / size).mean(1), rel=1e-9)


def test_a_sorted_start_is_the_best_prefix_of_the_best() -> None:
    pool = select_pool(3)
    order = np.argsort(-np.log(pool.label_probs_MN).mean(1))
    losses = [float(-np.log(pool.label_probs_MN[order[:n]].mean(0)).mean()) for n in range(1, 5)]
    start = sorted_start(pool.label_probs_MN, 4)
    assert start == order[: int(np.argmin(losses)) + 1].tolist()


# --- the others ---


def test_diverse_prefers_a_member_that_differs_to_a_copy() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    noise = rng.normal(size=(3, 400, 5))
    best = 2.0 * np.eye(5)[labels] + noise[0]
    copy = best + 0.01 * noise[1]
    other = 1.9 * np.eye(5)[labels] + noise[2]
    pool = SelectPool.of(np.stack([best, copy, other]).astype(np.float16), labels)
    assert set(chosen_by("diverse", pool, 2).members) in ({0, 2}, {1, 2})
    assert set(chosen_by("top", pool, 2).members) == {0, 1}


def test_a_bonus_is_worth_what_it_says() -> None:
    """Without one the lowest NLL is taken; with a huge one, after the best, whoever disagrees most."""
    pool = select_pool(5)
    best = int((-np.log(pool.label_probs_MN).mean(1)).argmin())
    disagreement = (pool.top_MN != pool.top_MN[best]).mean(1)
    assert with_bonus(pool, 2, bonus=1e6).members == (best, int(disagreement.argmax()))
    pairs = {m: -np.log(pool.label_probs_MN[[best, m]].mean(0)).mean() for m in range(6) if m != best}
    assert with_bonus(pool, 2, bonus=0.0).members == (best, min(pairs, key=lambda m: pairs[m]))


def test_the_bonus_is_the_one_that_does_best_on_what_it_did_not_see() -> None:
    """Three candidates know the labels and three nothing: a large bonus would take these in, so a small one is best."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 900)
    good = np.stack([3 * np.eye(4)[labels] + rng.normal(size=(900, 4)) for _ in range(3)])
    useless = 3 * rng.normal(size=(3, 900, 4))
    pool = SelectPool.of(np.concatenate([good, useless]).astype(np.float16), labels)
    bonus = best_bonus(pool, 3, np.random.default_rng(0))
    assert set(with_bonus(pool, 3, bonus=bonus).members) == {0, 1, 2}
    assert set(with_bonus(pool, 3, bonus=max(BONUSES) * 10).members) != {0, 1, 2}


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_quality_diversity_is_never_worse_on_select_than_the_greedy_it_begins_with(seed: int) -> None:
    pool = select_pool(seed, members=10)
    assert nll_of(pool, chosen_by("quality_diversity", pool, 3)) <= nll_of(pool, chosen_by("greedy", pool, 3)) + 1e-9


def test_seeds_of_the_best_configuration_are_chosen() -> None:
    """Of a (right on 3 and 1 of 4, mean 2), b (2 and 3, mean 2.5) and c (4, once) the trainings of b are taken."""
    right = [3, 1, 2, 3, 4]
    labels = np.zeros(4, dtype=np.int64)
    logits = np.array([[[1.0, 0.0] if n < r else [0.0, 1.0] for n in range(4)] for r in right])
    pool = SelectPool.of(logits, labels, configurations_M=np.array([0, 0, 1, 1, 2]))
    assert chosen_by("seeds", pool, 3).members == (2, 3)
    alone = SelectPool.of(logits, labels)
    with pytest.raises(UsageError, match="no configuration among the candidates has been trained twice"):
        chosen_by("seeds", alone, 3)


@pytest.mark.parametrize("name", ["top", "random"])
def test_controls_take_one_variant_of_a_trial(name: str) -> None:
    trials = [0, 0, 0, 1, 1, 2]
    for seed in range(20):
        members = chosen_by(name, select_pool(trials=trials), 5, seed).members
        assert sorted(trials[m] for m in members) == [0, 1, 2]


@pytest.mark.parametrize("name", SELECTORS)
def test_of_views_of_the_same_weights_the_better_one_is_chosen(name: str) -> None:
    """Candidates 0 and 1, 2 and 3, 4 and 5 are views of the same weights; in this pool the higher number is better."""
    logits, labels = invented(members=6, examples=2000)
    pool = SelectPool.of(
        logits, labels, weights_M=np.array([0, 0, 1, 1, 2, 2]), configurations_M=np.array([0, 0, 0, 0, 1, 1])
    )
    for seed in range(5):
        assert set(chosen_by(name, pool, 3, seed).members) <= {1, 3, 5}
    assert {m for s in SELECTORS[name].path(pool, 3, 6, np.random.default_rng(0)) for m in s.members} <= {1, 3, 5}


def test_all_takes_everyone_the_best_first() -> None:
    pool = select_pool(examples=2000)
    members = chosen_by("all", pool, 2).members
    assert sorted(members) == list(range(6))
    assert members[0] == 5


def test_with_more_candidates_than_memory_the_most_accurate_are_considered_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = select_pool(members=12, examples=100, classes=5)
    everyone = chosen_by("greedy_accuracy", pool, 2).members
    monkeypatch.setattr(selection_module, "ACCURACY_BYTES", 8 * 4 * 100 * 5)
    with pytest.warns(DataWarning, match="of 12 candidates only the 8 most accurate"):
        fewer = chosen_by("greedy_accuracy", pool, 2).members
    best = np.argsort(-pool.correct.mean(1), kind="stable")[:8]
    assert set(fewer) <= set(best.tolist()) | set(everyone)


def test_the_best_within_a_cost_is_chosen() -> None:
    """Four candidates of cost 1 and two better ones of cost 5: 5 buys one of these or all of those."""
    logits, labels = invented(1, members=6, examples=500)
    pool = SelectPool.of(logits, labels, costs_M=np.array([1.0, 1, 1, 1, 5, 5]))
    rng = np.random.default_rng(0)
    found = within_cost(pool, 5, 5.0, "top", rng)
    options = [Selection((5,), np.ones(1))]
    options += [Selection(m, np.full(len(m), 1 / len(m))) for m in ((3,), (3, 2), (3, 2, 1), (3, 2, 1, 0))]
    assert pool.costs_M[list(found.members)].sum() <= 5
    assert nll_of(pool, found) == pytest.approx(min(nll_of(pool, option) for option in options))
    assert len(within_cost(pool, 5, 100.0, "top", rng).members) >= 1
    with pytest.raises(UsageError, match="the cheapest candidate takes 1; raise it"):
        within_cost(pool, 5, 0.5, "top", rng)


def test_seeds_within_a_cost_are_found_though_the_cheapest_candidate_was_trained_once() -> None:
    logits, labels = invented(1, members=3, examples=100)
    pool = SelectPool.of(logits, labels, costs_M=np.array([1.0, 2, 2]), configurations_M=np.array([0, 1, 1]))
    assert set(within_cost(pool, 2, 4.0, "seeds", np.random.default_rng(0)).members) == {1, 2}


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
