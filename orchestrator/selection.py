"""SELECTORS: which candidates become members. They see the select split and nothing else.

Shape suffixes: M candidates, N examples, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import softmax

from orchestrator.greedy import by_accuracy, by_nll, mean_nll
from orchestrator.pool import SelectPool
from orchestrator.quality_diversity import illuminate
from results.schema import DataWarning, FloatArray, IntArray, UsageError
from trainables.validation import Probabilities

BONUSES = (0.0, 0.03, 0.1, 0.3, 1.0)
"""Nats of NLL that a whole unit of mean disagreement may be worth to `diverse`; cross-validated."""
FOLDS = 5
BONUS_FOLDS = 3
MOST_FOR_BONUS = 64
"""Candidates among which bonuses are compared, those with the lowest NLL: others would hardly be chosen."""
MOST_CAPS = 6
BAGS = 20
BAG_ROUNDS = 20
SHARE_OF_CANDIDATES = 0.5
ACCURACY_BYTES = 2**29
"""Memory for the probabilities that selecting by accuracy needs; with more candidates the most accurate are taken."""


@dataclass(frozen=True)
class Selection:
    """Indices of distinct members, in the order chosen, and their weights, which sum to 1."""

    members: tuple[int, ...]
    weights_M: FloatArray

    def first(self, count: int) -> Selection:
        """The first so many members, their weights scaled to sum to 1."""
        weights_M = self.weights_M[:count]
        return Selection(self.members[:count], weights_M / weights_M.sum())

    def renamed(self, candidates: IntArray) -> Selection:
        """The same members, whose indices are places in `candidates`."""
        return replace(self, members=tuple(int(candidates[member]) for member in self.members))


Select = Callable[[SelectPool, int, np.random.Generator], Selection]


@dataclass(frozen=True)
class Selector:
    """How members are chosen; of views of the same weights the one with the lowest NLL stands for all.

    `select(pool, k, rng)` gives at most k members. `nested`: more members are the same ones and further ones. `settle`:
    what, given that k, is done for every other number of members.
    """

    select: Select
    nested: bool = False
    settle: Callable[[SelectPool, int, np.random.Generator], Select] | None = None

    def choose(self, pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
        """At most k members."""
        views = best_views(pool)
        return self.select(pool.among(views), k, rng).renamed(views)

    def path(self, pool: SelectPool, k: int, most: int, rng: np.random.Generator) -> list[Selection]:
        """Selections of 1, 2, ... `most` members, by what `choose` settles on for k."""
        views = best_views(pool)
        pool = pool.among(views)
        select = self.select if self.settle is None else self.settle(pool, k, rng)
        most = min(most, len(pool))
        if self.nested:
            longest = select(pool, most, rng)
            found = [longest.first(count) for count in range(1, min(most, len(longest.members)) + 1)]
        else:
            found = [select(pool, count, rng) for count in range(1, most + 1)]
        return [selection.renamed(views) for selection in found]


def best_views(pool: SelectPool) -> IntArray:
    """For each network the candidate with the lowest NLL: itself, or with test-time augmentation."""
    order_M = nll_of_each(pool).argsort(kind="stable")
    _, first = np.unique(pool.weights_M[order_M], return_index=True)
    return np.sort(order_M[first])


def uniform(members: Sequence[int]) -> Selection:
    """Every member with the same weight."""
    return Selection(tuple(int(m) for m in members), np.full(len(members), 1 / len(members)))


def weighted_by_counts(counts: dict[int, int]) -> Selection:
    """Members by how often they were taken."""
    weights_M = np.array(list(counts.values()), dtype=np.float64)
    return Selection(tuple(counts), weights_M / weights_M.sum())


def nll_of_each(pool: SelectPool) -> FloatArray:
    """Mean NLL of each candidate [M]."""
    return mean_nll(np.ascontiguousarray(pool.label_probs_MN), np.zeros(len(pool.labels_N)), 1)


def by_rank(pool: SelectPool) -> IntArray:
    """Candidates from the most accurate on; the lower NLL decides ties."""
    order: IntArray = np.lexsort((nll_of_each(pool), -pool.correct.mean(1)))
    return order


def one_of_each_trial(pool: SelectPool, order_M: IntArray) -> IntArray:
    """The first candidate of each trial, in the order given: variants of a trial are not trained on their own."""
    _, first = np.unique(pool.trials_M[order_M], return_index=True)
    return np.asarray(order_M[np.sort(first)])


def top(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """The k most accurate, at most one variant of a trial."""
    return uniform(one_of_each_trial(pool, by_rank(pool))[:k].tolist())


def random(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """k trials drawn at random, a variant of each: what any selector must beat."""
    return uniform(one_of_each_trial(pool, rng.permutation(len(pool)))[:k].tolist())


def everyone(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """All candidates, whatever k is, the most accurate first."""
    return uniform(by_rank(pool).tolist())


def repeated_best(pool: SelectPool) -> list[int]:
    """The trainings of the configuration that, of those trained twice or more, is the most accurate on average.

    One variant of each training, the most accurate one; empty when no configuration has been trained twice.
    """
    accuracy_M = pool.correct.mean(1)
    trainings: dict[int, list[int]] = {}
    for candidate in sorted(one_of_each_trial(pool, by_rank(pool)).tolist()):
        trainings.setdefault(int(pool.configurations_M[candidate]), []).append(candidate)
    repeated = [members for members in trainings.values() if len(members) > 1]
    return max(repeated, key=lambda members: float(accuracy_M[members].mean())) if repeated else []


def seeds(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """At most k trainings of the best configuration that has several, in their order: what other seeds alone give."""
    members = repeated_best(pool)
    if not members:
        raise UsageError(
            "--selection seeds, but no configuration among the candidates has been trained twice; "
            "search with --finalists 1 --seeds 4, or choose another selection"
        )
    return uniform(members[:k])


def greedy(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """Forward selection with replacement on the NLL of the mean, at most k distinct members (Caruana et al. 2004).

    Weights are the counts. Of all rounds the one with the lowest NLL is taken, so there may be fewer than k.
    """
    return weighted_by_counts(by_nll(pool.label_probs_MN, k).counts)


def greedy_accuracy(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """The same on accuracy; of equal candidates the one with the lower NLL."""
    return settled_accuracy(pool, k, rng)(pool, k, rng)


def settled_accuracy(pool: SelectPool, k: int, rng: np.random.Generator) -> Select:
    """`greedy_accuracy` for any number of members, the probabilities of all classes read once."""
    num_examples, num_classes = np.shape(pool.logits[0])
    most = max(k, ACCURACY_BYTES // (4 * num_examples * num_classes))
    considered = np.sort(by_rank(pool)[:most])
    if len(considered) < len(pool):
        warnings.warn(
            f"of {len(pool):,} candidates only the {len(considered):,} most accurate on select are considered, "
            f"to save memory",
            DataWarning,
            stacklevel=2,
        )
    probs_MNC = np.empty((len(considered), num_examples, num_classes), np.float32)
    for place, candidate in enumerate(considered.tolist()):
        probs_MNC[place] = softmax(pool.logits[candidate].astype(np.float32), axis=1)

    def select(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
        return weighted_by_counts(by_accuracy(probs_MNC, pool.labels_N, k).counts).renamed(considered)

    return select


def greedy_bagged(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """`greedy` in 20 bags, each with half of the candidates and a resample of the examples, started from the best few.

    Counts are summed over the bags; the k candidates taken most often stay (Caruana et al. 2004, sections 2.2 and 2.3).
    """
    num_candidates, num_examples = pool.label_probs_MN.shape
    in_bag = max(1, min(num_candidates, max(k, round(SHARE_OF_CANDIDATES * num_candidates))))
    total_M = np.zeros(num_candidates)
    for _ in range(BAGS):
        candidates = np.sort(rng.choice(num_candidates, in_bag, replace=False))
        examples = rng.integers(0, num_examples, num_examples)
        probs_MN = pool.label_probs_MN[np.ix_(candidates, examples)]
        bag = by_nll(probs_MN, k, rounds=BAG_ROUNDS, start=sorted_start(probs_MN, k))
        for place, count in bag.counts.items():
            total_M[candidates[place]] += count
    order = np.lexsort((nll_of_each(pool), -total_M))[:k]
    return weighted_by_counts({int(m): int(total_M[m]) for m in order if total_M[m] > 0})


def sorted_start(label_probs_MN: Probabilities, most: int) -> list[int]:
    """The best so many by NLL, at most `most`, whose mean has the lowest NLL (sorted initialization)."""
    nothing_N = np.zeros(label_probs_MN.shape[1])
    order = mean_nll(np.ascontiguousarray(label_probs_MN), nothing_N, 1).argsort(kind="stable")[:most]
    sums_KN = label_probs_MN[order].cumsum(0)
    sizes_K = np.arange(1, len(order) + 1)
    nll_K = -np.log(sums_KN / sizes_K[:, None]).mean(1)
    return order[: int(nll_K.argmin()) + 1].tolist()


def diverse(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """k members, one after another: the lowest NLL of the mean so far, less a bonus for disagreeing with the others.

    What disagreement is worth is cross-validated on select.
    """
    return with_bonus(pool, k, bonus=best_bonus(pool, k, rng))


def with_bonus(pool: SelectPool, k: int, *, bonus: float) -> Selection:
    """`diverse` with what a whole unit of mean disagreement is worth, in nats."""
    probs_MN = np.ascontiguousarray(pool.label_probs_MN)
    sum_N = np.zeros(len(pool.labels_N))
    disagreement_M = np.zeros(len(pool))
    members: list[int] = []
    while len(members) < min(k, len(pool)):
        objective_M = mean_nll(probs_MN, sum_N, len(members) + 1) - bonus * disagreement_M / max(1, len(members))
        objective_M[members] = np.inf
        members.append(int(objective_M.argmin()))
        sum_N += probs_MN[members[-1]]
        disagreement_M += (pool.top_MN != pool.top_MN[members[-1]]).mean(1)
    return uniform(members)


def best_bonus(pool: SelectPool, k: int, rng: np.random.Generator) -> float:
    """The bonus whose k members, chosen on two thirds of select, have the lowest NLL on the third."""
    if len(pool) > MOST_FOR_BONUS:
        pool = pool.among(np.sort(nll_of_each(pool).argsort(kind="stable")[: max(k, MOST_FOR_BONUS)]))
    held_out_B = np.zeros(len(BONUSES))
    for inside, outside in pool.folds(BONUS_FOLDS, rng):
        part = pool.on(inside)
        for place, bonus in enumerate(BONUSES):
            members = list(with_bonus(part, k, bonus=bonus).members)
            mean_N = pool.label_probs_MN[np.ix_(np.array(members), outside)].mean(0)
            held_out_B[place] -= np.log(mean_N).sum()
    return BONUSES[int(held_out_B.argmin())]


def settled_diverse(pool: SelectPool, k: int, rng: np.random.Generator) -> Select:
    """`diverse` for any number of members, with the bonus that is best for k."""
    bonus = best_bonus(pool, k, rng)
    return lambda pool, k, rng: with_bonus(pool, k, bonus=bonus)


def quality_diversity(pool: SelectPool, k: int, rng: np.random.Generator) -> Selection:
    """The lowest NLL found by a population of ensembles kept diverse on purpose, begun with `greedy`'s.

    See `orchestrator/quality_diversity.py`.
    """
    start = by_nll(pool.label_probs_MN, k)
    return weighted_by_counts(illuminate(pool.label_probs_MN, pool.top_MN, start, k=k, rng=rng).counts)


SELECTORS: dict[str, Selector] = {
    "diverse": Selector(diverse, nested=True, settle=settled_diverse),
    "greedy": Selector(greedy),
    "greedy_accuracy": Selector(greedy_accuracy, settle=settled_accuracy),
    "greedy_bagged": Selector(greedy_bagged),
    "quality_diversity": Selector(quality_diversity),
    "top": Selector(top, nested=True),
    "random": Selector(random, nested=True),
    "seeds": Selector(seeds, nested=True),
    "all": Selector(everyone, nested=True),
}


def select_members(
    pool: SelectPool, k: int, selection: str, rng: np.random.Generator, *, max_cost: float | None = None
) -> Selection:
    """At most k members by a selector's name, within a cost of predicting if one is given."""
    if max_cost is None:
        return SELECTORS[selection].choose(pool, k, rng)
    return within_cost(pool, k, max_cost, selection, rng)


def within_cost(select: SelectPool, k: int, max_cost: float, selection: str, rng: np.random.Generator) -> Selection:
    """The selection of at most k members within `max_cost` multiply-adds whose mean has the lowest NLL on select.

    Tried: every number of members, of all candidates and of the cheaper ones alone.
    Raises UsageError when the cheapest candidate costs more.
    """
    cheapest = float(select.costs_M.min())
    if cheapest > max_cost:
        raise UsageError(
            f"--max-cost {max_cost:,.0f} multiply-adds an image, but the cheapest candidate takes {cheapest:,.0f}; "
            f"raise it"
        )
    caps = np.unique(select.costs_M[select.costs_M <= max_cost])
    best: tuple[float, Selection | None] = (np.inf, None)
    for cap in caps[np.unique(np.linspace(0, len(caps) - 1, MOST_CAPS).astype(int))]:
        candidates = np.flatnonzero(select.costs_M <= cap)
        if selection == "seeds" and not repeated_best(select.among(candidates)):
            continue
        for found in SELECTORS[selection].path(select.among(candidates), k, min(k, len(candidates)), rng):
            selected = found.renamed(candidates)
            members = list(selected.members)
            nll = float(-np.log(selected.weights_M @ select.label_probs_MN[members]).mean())
            if select.costs_M[members].sum() <= max_cost and nll < best[0]:
                best = (nll, selected)
    if best[1] is None:
        raise UsageError(
            f"--selection {selection} finds nothing within --max-cost {max_cost:,.0f}; take diverse or greedy"
        )
    return best[1]
