"""SELECTORS: which candidates become members. They see the select split and nothing else.

Shape suffixes: M candidates, N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.diversity import disagreement
from orchestrator.pool import SelectPool
from results.schema import FloatArray, IntArray
from trainables.validation import Probabilities

GREEDY_ROUNDS = 50
DIVERSITY_BONUS = 0.1
"""Nats of NLL that a whole unit of mean disagreement is worth to `diverse`."""


@dataclass(frozen=True)
class Selection:
    """Indices of distinct members, in the order chosen, and their weights, which sum to 1."""

    members: tuple[int, ...]
    weights_M: FloatArray


Selector = Callable[[SelectPool, int, np.random.Generator], Selection]


def uniform(members: list[int]) -> Selection:
    """Every member with the same weight."""
    return Selection(tuple(members), np.full(len(members), 1 / len(members)))


def label_probabilities(pool: SelectPool) -> Probabilities:
    """The probability each candidate gives to the true class, [M, N]: all that the NLL of a mean needs."""
    probs_MN: Probabilities = np.exp(pool.log_probs_MNC[:, np.arange(len(pool.labels_N)), pool.labels_N])
    return np.maximum(probs_MN, np.finfo(np.float64).tiny)


def by_accuracy(pool: SelectPool) -> IntArray:
    """Candidates from the most accurate on; the lower NLL decides ties."""
    accuracy_M = (pool.log_probs_MNC.argmax(2) == pool.labels_N).mean(1)
    nll_M = -np.log(label_probabilities(pool)).mean(1)
    order: IntArray = np.lexsort((nll_M, -accuracy_M))
    return order


def top(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """The k most accurate."""
    return uniform([int(i) for i in by_accuracy(pool)[:k]])


def random(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """k drawn at random: what any selector must beat."""
    return uniform([int(i) for i in rng.choice(len(pool.log_probs_MNC), size=k, replace=False)])


def seeds_of_best(pool: SelectPool, k: int, configurations: Sequence[str]) -> Selection | None:
    """At most k trainings of one configuration, in their order: what other seeds alone would give.

    `configurations`: of each candidate. Of those trained twice or more the one whose trainings are the most accurate on
    average; None when there is none.
    """
    accuracy_M = (pool.log_probs_MNC.argmax(2) == pool.labels_N).mean(1)
    trainings: dict[str, list[int]] = {}
    for candidate, configuration in enumerate(configurations):
        trainings.setdefault(configuration, []).append(candidate)
    repeated = [members for members in trainings.values() if len(members) > 1]
    if not repeated:
        return None
    return uniform(max(repeated, key=lambda members: float(accuracy_M[members].mean()))[:k])


def greedy(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """Forward selection with replacement on the NLL of the mean (Caruana et al. 2004), at most k distinct members.

    Weights are the counts. Of all rounds the one with the lowest NLL is taken, so there may be fewer than k.
    """
    probs_MN = label_probabilities(pool)
    sum_N = np.zeros(probs_MN.shape[1])
    counts: dict[int, int] = {}
    best: tuple[float, dict[int, int]] = (np.inf, {})
    for size in range(1, GREEDY_ROUNDS + 1):
        allowed = np.arange(len(probs_MN)) if len(counts) < k else np.array(list(counts))
        nll_A = -np.log((sum_N + probs_MN[allowed]) / size).mean(1)
        chosen = int(allowed[nll_A.argmin()])
        sum_N += probs_MN[chosen]
        counts[chosen] = counts.get(chosen, 0) + 1
        if nll_A.min() < best[0]:
            best = (float(nll_A.min()), dict(counts))
    members = tuple(best[1])
    weights = np.array([best[1][m] for m in members], dtype=np.float64)
    return Selection(members, weights / weights.sum())


def diverse(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """k members, one after another: the lowest NLL of the mean so far, less a bonus for disagreeing with the others."""
    probs_MN = label_probabilities(pool)
    disagreement_MM = disagreement(pool.log_probs_MNC)
    members = [int((-np.log(probs_MN).mean(1)).argmin())]
    while len(members) < k:
        nll_M = -np.log((probs_MN[members].sum(0) + probs_MN) / (len(members) + 1)).mean(1)
        objective_M = nll_M - DIVERSITY_BONUS * disagreement_MM[members].mean(0)
        objective_M[members] = np.inf
        members.append(int(objective_M.argmin()))
    return uniform(members)


SELECTORS: dict[str, Selector] = {"diverse": diverse, "greedy": greedy, "top": top, "random": random}
