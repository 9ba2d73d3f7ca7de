"""Score what was chosen on a split: every metric of every row, its interval, and paired comparisons.

Shape suffixes: N examples, K columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orchestrator.candidates import Candidate, Cost, cost_of
from orchestrator.ensembling import Ensemble, Row
from orchestrator.metrics import HIGHER_IS_BETTER, METRICS
from orchestrator.pool import POOLS, Pool, in_threads
from orchestrator.statistics import (
    bounded_loss_interval,
    difference_interval,
    fraction_gain_interval,
    fraction_interval,
    loss_interval,
    mcnemar,
)
from results.schema import FloatArray, ScoreRecord

IntervalOf = Callable[[FloatArray], tuple[float, float]]
INTERVALS: dict[str, tuple[IntervalOf, IntervalOf]] = {
    "accuracy": (fraction_interval, fraction_gain_interval),
    "top5_accuracy": (fraction_interval, fraction_gain_interval),
    "nll": (loss_interval, difference_interval),
    "brier": (bounded_loss_interval, difference_interval),
}
"""Of a metric that is a mean over examples: the interval of its value, and of a paired gain."""


@dataclass(frozen=True, eq=False)
class Figures:
    """A row's metrics on a split; `examples`: [N] contributions to those that are means over examples.

    `correct_N`: None for a mean over draws.
    """

    values: dict[str, float | None]
    examples: dict[str, FloatArray]
    correct_N: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Gain:
    """An improvement, positive whatever the metric's direction, with its paired interval where there is one."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


def score_rows(
    rows: Sequence[Row], pool: Pool, *, ensemble_id: str, candidates: Sequence[Candidate], rng: np.random.Generator
) -> list[ScoreRecord]:
    """Every metric of every row on one split, with 95% intervals, the gain over the best single model, and the chosen
    ensemble's gain over the row. The p-values are of accuracy, by McNemar's exact test.
    """
    figures = figures_of(rows, pool, rng)
    baseline = next(of_row for row, of_row in zip(rows, figures, strict=True) if row.baseline)
    chosen = next((of_row for row, of_row in zip(rows, figures, strict=True) if row.chosen), None)
    records = []
    for row, of_row in zip(rows, figures, strict=True):
        cost = mean_cost(row.ensembles, candidates)
        for metric in METRICS:
            low, high = _interval(metric, of_row)
            over_single = gain(metric, of_row, baseline)
            of_chosen = Gain() if chosen is None else gain(metric, chosen, of_row)
            records.append(
                ScoreRecord(
                    ensemble_id=ensemble_id,
                    kind=row.kind,
                    label=row.label,
                    selection=row.selection,
                    combiner=row.combiner,
                    k=len(row.ensembles[0].members),
                    chosen=row.chosen,
                    split=POOLS[type(pool)][0],
                    metric=metric,
                    value=of_row.values.get(metric),
                    ci_low=low,
                    ci_high=high,
                    baseline=baseline.values.get(metric),
                    gain=over_single.value,
                    gain_ci_low=over_single.low,
                    gain_ci_high=over_single.high,
                    p_value=p_value(of_row, baseline) if metric == "accuracy" else None,
                    chosen_gain=of_chosen.value,
                    chosen_gain_ci_low=of_chosen.low,
                    chosen_gain_ci_high=of_chosen.high,
                    chosen_p_value=p_value(chosen, of_row) if metric == "accuracy" and chosen is not None else None,
                    num_examples=len(pool.labels_N),
                    training_seconds=cost.train_seconds,
                    num_parameters=cost.num_parameters,
                    multiply_adds=cost.multiply_adds,
                    images_per_second=cost.images_per_second,
                )
            )
    return records


def figures_of(rows: Sequence[Row], pool: Pool, rng: np.random.Generator) -> list[Figures]:
    """Each row's metrics, averaged over its draws."""
    flat = in_threads(lambda ensemble: ensemble.score(pool), (e for row in rows for e in row.ensembles))
    figures = []
    for row in rows:
        scored = [next(flat) for _ in row.ensembles]
        values = [s.metrics(s.columns_NK.mean(0)) for s in scored]
        means: dict[str, float | None] = {metric: float(np.mean([v[metric] for v in values])) for metric in values[0]}
        others = scored[0].others(rng) if len(scored) == 1 and row.kind != "curve" else {}
        columns_NK = np.mean([s.columns_NK[:, : len(s.names)] for s in scored], axis=0)
        figures.append(
            Figures(
                values={**means, **others},
                examples=dict(zip(scored[0].names, columns_NK.T, strict=True)),
                correct_N=scored[0].correct_N if len(scored) == 1 else None,
            )
        )
    return figures


def gain(metric: str, figures: Figures, over: Figures) -> Gain:
    """How much better one is than the other; empty where a metric has no direction, or one of them lacks it."""
    value, other = figures.values.get(metric), over.values.get(metric)
    if metric not in HIGHER_IS_BETTER or value is None or other is None:
        return Gain()
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    if metric not in figures.examples:
        return Gain(sign * (value - other))
    _, interval = INTERVALS[metric]
    low, high = interval(sign * (figures.examples[metric] - over.examples[metric]))
    if not math.isfinite(low):
        return Gain(sign * (value - other))
    return Gain(sign * (value - other), low, high)


def _interval(metric: str, figures: Figures) -> tuple[float | None, float | None]:
    if metric not in figures.examples:
        return None, None
    interval, _ = INTERVALS[metric]
    return interval(figures.examples[metric])


def p_value(figures: Figures, other: Figures) -> float | None:
    """Of equal accuracy; None with a mean over draws."""
    if figures.correct_N is None or other.correct_N is None:
        return None
    return mcnemar(figures.correct_N, other.correct_N)


def mean_cost(ensembles: Sequence[Ensemble], candidates: Sequence[Candidate]) -> Cost:
    """What a row's ensembles cost, averaged over its draws."""
    costs = [cost_of([candidates[member] for member in ensemble.members]) for ensemble in ensembles]
    speeds = [cost.images_per_second for cost in costs if cost.images_per_second is not None]
    return Cost(
        train_seconds=float(np.mean([cost.train_seconds for cost in costs])),
        train_cost=float(np.mean([cost.train_cost for cost in costs])),
        num_parameters=round(np.mean([cost.num_parameters for cost in costs])),
        multiply_adds=round(np.mean([cost.multiply_adds for cost in costs])),
        images_per_second=float(np.mean(speeds)) if len(speeds) == len(costs) else None,
    )


def num_comparisons(rows: Sequence[Row]) -> int:
    """How many intervals of gains a split's tables show: accuracy and NLL of every row with the best single model, and
    of the chosen ensemble with every control."""
    chosen = next(row for row in rows if row.chosen)
    with_single = sum(len(_compared(row)) for row in rows if not row.baseline)
    controls = [row for row in rows if row.kind in {"control", "single"} and not row.baseline]
    return with_single + sum(len(_compared(row) & _compared(chosen)) for row in controls)


def _compared(row: Row) -> set[str]:
    """Without probabilities there is no NLL."""
    return {"accuracy"} if row.ensembles[0].combination.temperature is None else {"accuracy", "nll"}
