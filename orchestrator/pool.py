"""Candidates for an ensemble and their stored predictions, a type for each split.

Choosing takes a SelectPool: handing it estimate or test predictions does not type-check.
Shape suffixes: M members, N examples, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pandas as pd

from results.schema import (
    DataWarning,
    EstimatePredictions,
    IntArray,
    Predictions,
    SelectPredictions,
    Split,
    TestPredictions,
    UsageError,
)
from results.store import Experiment, names
from trainables.validation import Probabilities, log_softmax


@dataclass(frozen=True)
class Candidate:
    """A trial that may become a member."""

    experiment: str
    trial_id: str
    configuration: str
    backbone: str
    status: str
    train_seconds: float
    multiply_adds: int


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates' log-probabilities for one split. Use a subclass."""

    log_probs_MNC: Probabilities
    labels_N: IntArray


class SelectPool(Pool):
    """What may be chosen on."""


class EstimatePool(Pool):
    """Scored once something has been chosen."""


class TestPool(Pool):
    """Scored once, for what was chosen."""

    __test__ = False  # not a pytest class


AnyPool = TypeVar("AnyPool", bound=Pool)
POOLS: dict[type[Pool], tuple[Split, type[Predictions]]] = {
    SelectPool: ("select", SelectPredictions),
    EstimatePool: ("estimate", EstimatePredictions),
    TestPool: ("test", TestPredictions),
}


@dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates of one or several experiments with equal splits, and where to read their predictions."""

    rows: tuple[Candidate, ...]
    experiments: dict[str, Experiment] = field(repr=False)

    def load(self, of: type[AnyPool]) -> AnyPool:
        """Every candidate's predictions for one split."""
        parts = [self.experiments[c.experiment].predictions(c.trial_id, POOLS[of][1]) for c in self.rows]
        first = parts[0]
        for candidate, part in zip(self.rows, parts, strict=True):
            if not np.array_equal(part.example_ids_N, first.example_ids_N):
                raise UsageError(
                    f"{candidate.experiment}/{candidate.trial_id} was predicted on other {POOLS[of][0]} examples than "
                    f"{self.rows[0].trial_id}; leave its experiment out"
                )
        return of(np.stack([log_softmax(part.logits_NC) for part in parts]), first.labels_N)


def find_candidates(results_dir: str, wanted: Sequence[str], *, k: int, include_stopped: bool) -> Candidates:
    """The candidates of the named experiments, or of the newest with two or more.

    Raises UsageError when there are fewer than k, or splits differ.
    """
    if wanted:
        experiments = {name: Experiment.open(results_dir, name) for name in wanted}
        hashes = {name: experiment.info["split_hash"] for name, experiment in experiments.items()}
        if len(set(hashes.values())) > 1:
            listed = ", ".join(f"{name} {split_hash}" for name, split_hash in hashes.items())
            raise UsageError(f"these experiments have different splits and cannot be pooled: {listed}; take one")
        return _enough(experiments, k=k, include_stopped=include_stopped)
    there = names(results_dir)
    if not there:
        raise UsageError(
            f"there are no experiments in {results_dir}; make one with python -m orchestrator.search digits"
        )
    for name in reversed(there):
        experiment = Experiment.open(results_dir, name)
        if len(_rows(experiment, include_stopped=include_stopped)) >= 2:
            return _enough({name: experiment}, k=k, include_stopped=include_stopped)
    raise UsageError(
        f"no experiment in {results_dir} has two or more {'' if include_stopped else 'completed '}trials with "
        f"predictions; search longer{'' if include_stopped else ', or add --include-stopped'}"
    )


def _enough(experiments: dict[str, Experiment], *, k: int, include_stopped: bool) -> Candidates:
    rows = tuple(row for e in experiments.values() for row in _rows(e, include_stopped=include_stopped))
    if len(rows) < k:
        hint = ""
        if not include_stopped:
            more = sum(len(_rows(e, include_stopped=True)) for e in experiments.values()) - len(rows)
            hint = f", or add --include-stopped for {more} more that were stopped early" if more else ""
        blind = sum(int(e.trials()["val_accuracy"].isna().sum()) for e in experiments.values())
        if blind:
            hint += f" (without validation, as with val_fraction=0, a trial cannot be chosen: {blind} have none)"
        kind = "trials" if include_stopped else "completed trials"
        raise UsageError(
            f"--top-k {k} but only {len(rows)} {kind} in {', '.join(experiments)}; lower it, search longer, name more "
            f"experiments{hint}"
        )
    return Candidates(rows, experiments)


def _rows(experiment: Experiment, *, include_stopped: bool) -> list[Candidate]:
    trials = experiment.trials()
    statuses = ["completed", "pruned"] if include_stopped else ["completed"]
    usable = trials[trials["status"].isin(statuses) & (trials["predictions"] != "") & trials["val_accuracy"].notna()]
    return [c for _, row in usable.iterrows() if (c := _candidate(experiment, row)) is not None]


def _candidate(experiment: Experiment, row: pd.Series) -> Candidate | None:
    if not experiment.has_readable_predictions(row["trial_id"]):
        warnings.warn(
            f"{experiment.root / row['predictions']} is missing or damaged; {row['trial_id']} is left out",
            DataWarning,
            stacklevel=2,
        )
        return None
    return Candidate(
        experiment=experiment.name,
        trial_id=row["trial_id"],
        configuration=f"{experiment.name}/{row['finalist_of'] or row['trial_id']}",
        backbone=row["backbone"],
        status=row["status"],
        train_seconds=float(row["train_seconds"]),
        multiply_adds=int(row["multiply_adds"]),
    )
