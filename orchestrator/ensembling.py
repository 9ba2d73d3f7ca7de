"""Choose an ensemble on select, and score it beside its controls. Pure functions of pools of predictions.

Shape suffixes: M members or candidates, N examples, C classes, K columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.calibration import fit_temperature, tempered
from orchestrator.combination import COMBINERS, FITS_WEIGHTS, fit_weights
from orchestrator.metrics import HIGHER_IS_BETTER, METRICS, Scored, score
from orchestrator.pool import POOLS, Candidates, Pool, SelectPool
from orchestrator.selection import SELECTORS, Selection, by_accuracy, random, seeds_of_best, top, uniform
from orchestrator.statistics import interval, resampled_means
from results.schema import FloatArray, ScoreRecord

RANDOM_DRAWS = 20
WITHOUT_INTERVAL = frozenset({"ece"})
"""ECE is a sum of absolute values: resampling biases it upwards, so that its percentile interval misleads."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Members (indices of candidates), their weights, how they are combined, and the pooled temperature."""

    members: tuple[int, ...]
    weights_M: FloatArray
    combiner: str
    temperature: float | None

    @classmethod
    def fit(cls, selection: Selection, combiner: str, select: SelectPool) -> Ensemble:
        """Fit what a combiner fits, then the temperature, on select. None where there are no probabilities."""
        members_MNC = select.log_probs_MNC[list(selection.members)]
        weights_M = selection.weights_M
        if combiner in FITS_WEIGHTS:
            weights_M = fit_weights(members_MNC, select.labels_N)
        log_probs_NC = COMBINERS[combiner](members_MNC, weights_M).log_probs_NC
        temperature = None if log_probs_NC is None else fit_temperature(log_probs_NC, select.labels_N)
        return cls(selection.members, weights_M, combiner, temperature)

    def score(self, pool: Pool) -> Scored:
        """Contributions to every metric on a split."""
        combined = COMBINERS[self.combiner](pool.log_probs_MNC[list(self.members)], self.weights_M)
        if combined.log_probs_NC is None or self.temperature is None:
            return score(combined.scores_NC, pool.labels_N, log_probs_NC=None)
        calibrated_NC = tempered(combined.log_probs_NC, self.temperature)
        return score(calibrated_NC, pool.labels_N, log_probs_NC=calibrated_NC)


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table: one ensemble, or the mean over several draws of one."""

    kind: Literal["ensemble", "control", "single"]
    selection: str
    chosen: bool
    ensembles: tuple[Ensemble, ...]

    @property
    def combiner(self) -> str:
        """How members are combined."""
        return self.ensembles[0].combiner

    @property
    def label(self) -> str:
        """What the table calls it."""
        if self.kind == "single":
            return "best single model"
        name = f"{self.selection}, {self.combiner}"
        return f"{name} (mean of {len(self.ensembles)} draws)" if len(self.ensembles) > 1 else name


def choose(
    select: SelectPool,
    *,
    k: int,
    selection: str,
    combiner: str,
    rng: np.random.Generator,
    configurations: Sequence[str] = (),
) -> list[Row]:
    """The chosen ensemble, its members under every other combiner, and the controls, all fitted on select.

    The first row is the chosen one. Controls: the best single model, top-k and random-k under the mean, and, when there
    are finalists, k seeds of one configuration. `configurations`: of each candidate.
    """
    chosen = SELECTORS[selection](select, k, rng)
    rows = [Row("ensemble", selection, True, (Ensemble.fit(chosen, combiner, select),))]
    rows += [
        Row("ensemble", selection, False, (Ensemble.fit(chosen, other, select),))
        for other in COMBINERS
        if other != combiner
    ]
    best = uniform([int(by_accuracy(select)[0])])
    rows.append(Row("single", "top", False, (Ensemble.fit(best, "mean", select),)))
    rows.append(Row("control", "top", False, (Ensemble.fit(top(select, k, rng), "mean", select),)))
    draws = tuple(Ensemble.fit(random(select, k, rng), "mean", select) for _ in range(RANDOM_DRAWS))
    rows.append(Row("control", "random", False, draws))
    seeds = seeds_of_best(select, k, configurations)
    if seeds is not None:
        rows.append(Row("control", "seeds", False, (Ensemble.fit(seeds, "mean", select),)))
    return rows


def shown_on_test(rows: Sequence[Row]) -> list[Row]:
    """What is scored on test: the chosen ensemble and the controls, no other combiner, lest one is picked there."""
    return [row for row in rows if row.chosen or row.kind != "ensemble"]


def score_rows(
    rows: Sequence[Row], pool: Pool, *, ensemble_id: str, candidates: Candidates, rng: np.random.Generator
) -> list[ScoreRecord]:
    """Every metric of every row on one split, with 95% intervals, and the gain over the best single model.

    A gain is positive when it is an improvement, whatever the metric's direction; its interval is paired.
    """
    figures = _figures(rows, pool, rng)
    single = next(index for index, row in enumerate(rows) if row.kind == "single")
    records = []
    for row, of_row in zip(rows, figures, strict=True):
        costs = [_cost(ensemble, candidates) for ensemble in row.ensembles]
        for metric in METRICS:
            baseline = figures[single][metric]
            records.append(
                ScoreRecord(
                    ensemble_id=ensemble_id,
                    kind=row.kind,
                    selection=row.selection,
                    combiner=row.combiner,
                    k=len(row.ensembles[0].members),
                    chosen=row.chosen,
                    split=POOLS[type(pool)][0],
                    metric=metric,
                    baseline=baseline.value,
                    num_examples=len(pool.labels_N),
                    training_seconds=float(np.mean([seconds for seconds, _ in costs])),
                    multiply_adds=round(float(np.mean([adds for _, adds in costs]))),
                    **_gain(metric, of_row.get(metric), baseline),
                )
            )
    return records


@dataclass(frozen=True, eq=False)
class Figure:
    """A metric's value and its bootstrap replicates."""

    value: float
    replicates_R: FloatArray


def _figures(rows: Sequence[Row], pool: Pool, rng: np.random.Generator) -> list[dict[str, Figure]]:
    """Each row's metrics, averaged over its draws; all are resampled with the same examples."""
    scored = [[ensemble.score(pool) for ensemble in row.ensembles] for row in rows]
    flat = [s for of_row in scored for s in of_row]
    columns_NK = np.concatenate([s.columns_NK for s in flat], axis=1)
    edges = np.cumsum([s.columns_NK.shape[1] for s in flat])[:-1]
    means = iter(np.split(columns_NK.mean(0), edges))
    resampled = iter(np.split(resampled_means(columns_NK, rng), edges, axis=1))
    figures = []
    for of_row in scored:
        values = [s.metrics(next(means)) for s in of_row]
        values_R = [s.metrics(next(resampled)) for s in of_row]
        figures.append(
            {
                metric: Figure(
                    float(np.mean([v[metric] for v in values])), np.mean([v[metric] for v in values_R], axis=0)
                )
                for metric in values[0]
            }
        )
    return figures


def _gain(metric: str, figure: Figure | None, baseline: Figure) -> dict[str, float | None]:
    """Value, gain and intervals; all None where a combiner has no such metric."""
    names = ("value", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high")
    if figure is None:
        return dict.fromkeys(names)
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    gain = sign * (figure.value - baseline.value)
    if metric in WITHOUT_INTERVAL:
        return dict(zip(names, (figure.value, None, None, gain, None, None), strict=True))
    low, high = interval(figure.replicates_R)
    gain_low, gain_high = interval(sign * (figure.replicates_R - baseline.replicates_R))
    return dict(zip(names, (figure.value, low, high, gain, gain_low, gain_high), strict=True))


def _cost(ensemble: Ensemble, candidates: Candidates) -> tuple[float, int]:
    """Seconds of training and multiply-adds of one prediction, over all members."""
    members = [candidates.rows[m] for m in ensemble.members]
    return sum(m.train_seconds for m in members), sum(m.multiply_adds for m in members)
