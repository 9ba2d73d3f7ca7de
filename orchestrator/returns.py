"""What more members bring and cost, and how stable a choice is. Select alone is read.

Shape suffixes: M candidates, N examples, K ensembles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.ensembling import Ensemble, Row
from orchestrator.metrics import Scored
from orchestrator.pareto import non_dominated
from orchestrator.pool import SelectPool, in_threads
from orchestrator.selection import FOLDS, SELECTORS, select_members
from results.schema import IntArray, ScoreRecord

MOST_MEMBERS = 20


def curve(select: SelectPool, *, k: int, selection: str, combiner: str, rng: np.random.Generator) -> list[Row]:
    """Ensembles of 1, 2, ... 20 members (or as many as there are), by the selection that k members were chosen by.

    Where a selector that may take more stops at so many, there is one row of them.
    """
    most = min(MOST_MEMBERS, len(select))
    path = list({len(found.members): found for found in SELECTORS[selection].path(select, k, most, rng)}.values())
    fitted = in_threads(lambda selected: Ensemble.fit(selected, combiner, select), path)
    return [Row("curve", selection, (ensemble,), f"{selection} of {len(ensemble.members)}") for ensemble in fitted]


def front(scores: Sequence[ScoreRecord]) -> list[bool]:
    """Which of some records of accuracy on select are on its Pareto front with the multiply-adds of predicting."""
    points = np.array([(score.value, score.multiply_adds) for score in scores], dtype=np.float64)
    on_front = set(non_dominated(points, ("max", "min")))
    return [place in on_front for place in range(len(scores))]


@dataclass(frozen=True)
class Stability:
    """How a choice does on parts of select that it was not made on.

    Means over five folds: accuracy and NLL where four fifths chose and fitted, and one was scored. `overlap`: the mean
    share of two folds' members that both have, of all that either has (Jaccard). NLL is None without probabilities.
    """

    accuracy: float
    nll: float | None
    overlap: float


def cross_fitted(
    select: SelectPool,
    *,
    k: int,
    selection: str,
    combiner: str,
    rng: np.random.Generator,
    max_cost: float | None = None,
) -> Stability:
    """Choose and fit on four fifths of select and score the fifth, five times."""
    chosen: list[set[int]] = []
    correct: list[np.ndarray] = []
    nll: list[np.ndarray] = []
    folds = list(select.folds(FOLDS, rng))

    def held_out(fold: tuple[tuple[IntArray, IntArray], np.random.Generator]) -> tuple[Ensemble, Scored]:
        (inside, outside), own_rng = fold
        part = select.on(inside)
        fitted = Ensemble.fit(select_members(part, k, selection, own_rng, max_cost=max_cost), combiner, part)
        return fitted, fitted.score(select.on(outside))

    for fitted, scored in in_threads(held_out, zip(folds, rng.spawn(FOLDS), strict=True)):
        chosen.append(set(fitted.members))
        correct.append(scored.correct_N)
        if "nll" in scored.names:
            nll.append(scored.columns_NK[:, scored.names.index("nll")])
    overlaps = [len(a & b) / len(a | b) for i, a in enumerate(chosen) for b in chosen[:i]]
    return Stability(
        accuracy=float(np.concatenate(correct).mean()),
        nll=float(np.concatenate(nll).mean()) if nll else None,
        overlap=float(np.mean(overlaps)),
    )
