"""Choose an ensemble and its controls on select. Pure functions of pools of predictions.

Shape suffixes: M members or candidates, N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.combination import COMBINERS, TINY, Combination, Combined
from orchestrator.metrics import Scored, score
from orchestrator.pool import Pool, SelectPool, in_threads
from orchestrator.selection import Selection, by_rank, random, repeated_best, select_members, top, uniform
from results.schema import FloatArray, UsageError
from trainables.validation import Probabilities

RANDOM_DRAWS = 20
MOST_AT_ONCE = 32
"""Members whose predictions are held in memory together."""

RowKind = Literal["ensemble", "control", "single", "curve"]


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Members (indices of candidates) and how their predictions are combined."""

    members: tuple[int, ...]
    weights_M: FloatArray
    """The selector's weights, which a combiner may have replaced."""
    combination: Combination

    @classmethod
    def fit(cls, selection: Selection, combiner: str, select: SelectPool) -> Ensemble:
        """Fit on select: each member's temperature, what the combiner fits, and how the whole is calibrated.

        Raises UsageError for a combiner that cannot take so many members.
        """
        members, weights_M = selection.members, selection.weights_M
        temperatures_M = np.array([select.temperature(member) for member in members])
        if len(members) <= MOST_AT_ONCE:
            log_probs_MNC = select.log_probs(members, temperatures_M)
            combination = Combination.fit(
                combiner, log_probs_MNC, select.labels_N, weights_M=weights_M, temperatures_M=temperatures_M
            )
            return cls(members, weights_M, combination)
        if not takes_any_number(combiner):
            raise UsageError(
                f"--combiner {combiner} takes at most {MOST_AT_ONCE} members, and {len(members)} are chosen; "
                f"take mean, or fewer"
            )
        unfitted = cls(members, weights_M, Combination(combiner, weights_M, temperatures_M, None))
        combination = unfitted.combination.calibrated_on(unfitted._linear_pool(select), select.labels_N)
        return cls(members, weights_M, combination)

    def combine(self, pool: Pool) -> Combined:
        """The members' predictions as one."""
        if len(self.members) <= MOST_AT_ONCE:
            log_probs_MNC = pool.log_probs(self.members, self.combination.temperatures_M)
            return self.combination.combine_tempered(log_probs_MNC)
        log_probs_NC = self.combination.calibrate(self._linear_pool(pool))
        return Combined(log_probs_NC, log_probs_NC)

    def _linear_pool(self, pool: Pool) -> Probabilities:
        """The weighted mean of the members' tempered probabilities, one member after the other."""
        combination = self.combination
        total_NC = np.zeros(np.shape(pool.logits[self.members[0]]))
        for member, weight, temperature in zip(
            self.members, combination.weights, combination.temperatures_M, strict=True
        ):
            total_NC += weight * np.exp(pool.log_probs([member], np.array([temperature]))[0])
        return np.asarray(np.log(np.maximum(total_NC, TINY)))

    def score(self, pool: Pool) -> Scored:
        """Contributions to every metric on a split."""
        combined = self.combine(pool)
        return score(combined.scores_NC, pool.labels_N, log_probs_NC=combined.log_probs_NC)


def takes_any_number(combiner: str) -> bool:
    """Whether a combiner can be computed one member after the other."""
    return combiner == "mean"


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the tables: one ensemble, or the mean over several draws of one.

    `selection`: the selector, or what the single model is best among. `baseline`: whether gains are over this row.
    """

    kind: RowKind
    selection: str
    ensembles: tuple[Ensemble, ...]
    label: str
    chosen: bool = False
    baseline: bool = False

    @property
    def combiner(self) -> str:
        """How members are combined."""
        return self.ensembles[0].combination.combiner


BEST_SINGLE = "best single model"


def choose(
    select: SelectPool,
    *,
    k: int,
    selection: str,
    combiner: str,
    rng: np.random.Generator,
    max_cost: float | None = None,
    kinds: Sequence[str] = (),
    train_costs: Sequence[float] = (),
) -> list[Row]:
    """The chosen ensemble, its members under every other combiner, and the controls, all fitted on select.

    The first row is the chosen one. Controls: the best single model, the best one of each of several `kinds`, the best
    one whose training alone cost what the members' did together (at least nine tenths of it), top-k and random-k under
    the mean, and, when there are finalists, seeds of one configuration. These have as many trainings as the chosen
    ensemble (seeds: at most), which may have fewer than k, all, or several variants of one training. `kinds`,
    `train_costs`: of each candidate. `max_cost`: of predicting with the chosen ensemble, in the pool's units.
    """
    selected = select_members(select, k, selection, rng, max_cost=max_cost)
    rows = [Row("ensemble", selection, (Ensemble.fit(selected, combiner, select),), f"{selection}, {combiner}", True)]
    others = [c for c in COMBINERS if c != combiner and (len(selected.members) <= MOST_AT_ONCE or takes_any_number(c))]
    fitted = in_threads(lambda other: Ensemble.fit(selected, other, select), others)
    rows += [Row("ensemble", selection, (e,), f"{selection}, {e.combination.combiner}") for e in fitted]
    rows += _singles(select, kinds)
    rows += _of_whole_budget(select, train_costs, selected.members)
    trainings = len(np.unique(select.trials_M[list(selected.members)]))
    rows.append(Row("control", "top", (Ensemble.fit(top(select, trainings, rng), "mean", select),), "top, mean"))
    drawn = [random(select, trainings, rng) for _ in range(RANDOM_DRAWS)]
    draws = tuple(in_threads(lambda selected: Ensemble.fit(selected, "mean", select), drawn))
    rows.append(Row("control", "random", draws, f"random, mean ({RANDOM_DRAWS} draws)"))
    repeated = repeated_best(select)[:trainings]
    if repeated:
        rows.append(Row("control", "seeds", (Ensemble.fit(uniform(repeated), "mean", select),), "seeds, mean"))
    return rows


def _single(select: SelectPool, candidate: int, among: str, label: str, *, baseline: bool = False) -> Row:
    fitted = Ensemble.fit(uniform([candidate]), "mean", select)
    return Row("single", among, (fitted,), label, baseline=baseline)


def _singles(select: SelectPool, kinds: Sequence[str]) -> list[Row]:
    """The most accurate candidate, and of each kind the most accurate, where there are several kinds."""
    order = by_rank(select).tolist()
    rows = [_single(select, order[0], "all", BEST_SINGLE, baseline=True)]
    if len(set(kinds)) > 1:
        first_of = {kinds[candidate]: candidate for candidate in reversed(order)}
        rows += [_single(select, first_of[kind], kind, f"best {kind}") for kind in sorted(first_of)]
    return rows


def _of_whole_budget(select: SelectPool, train_costs: Sequence[float], members: Sequence[int]) -> list[Row]:
    """The most accurate candidate whose training cost about what the members' did together, if there is one."""
    if not train_costs or len(members) < 2:
        return []
    trained = {int(select.trials_M[member]): train_costs[member] for member in members}
    as_costly = [c for c in by_rank(select).tolist() if train_costs[c] >= 0.9 * sum(trained.values())]
    return [_single(select, as_costly[0], "whole budget", "best single, whole budget")] if as_costly else []


def shown_on_test(rows: Sequence[Row]) -> list[Row]:
    """What is scored on test: the chosen ensemble and the controls, no other combiner, lest one is picked there."""
    return [row for row in rows if row.chosen or row.kind in {"single", "control"}]
