"""Tidy tables over all experiments of a results folder, for pandas users; DuckDB and polars read the files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from results.objects import is_remote
from results.store import DEFAULT_RESULTS_DIR, Experiment, names


def leaderboard(results_dir: str | Path = DEFAULT_RESULTS_DIR) -> pd.DataFrame:
    """Completed trials of all experiments by validation accuracy, the best first, a column for the experiment.

    Stopped trials are left out: they were trained for fewer epochs. Compare within a `split_hash` only.
    """
    trials = _together((name, _open(results_dir, name).trials()) for name in names(results_dir))
    if trials.empty:
        return trials
    completed = trials[trials["status"] == "completed"]
    return completed.sort_values(["val_accuracy", "val_nll"], ascending=[False, True], ignore_index=True)


def learning_curves(results_dir: str | Path = DEFAULT_RESULTS_DIR) -> pd.DataFrame:
    """Every epoch of every trial of all experiments, a column for the experiment."""
    return _together((name, _open(results_dir, name).epochs()) for name in names(results_dir))


def ensemble_scores(results_dir: str | Path = DEFAULT_RESULTS_DIR) -> pd.DataFrame:
    """The score tables of all ensembles, a column for the experiment."""
    files = (
        (name, path)
        for name in names(results_dir)
        for path in sorted(_folder(results_dir, name).glob("ensembles/*/scores.parquet"))
    )
    return _together((name, pd.read_parquet(path)) for name, path in files)


def _open(results_dir: str | Path, name: str) -> Experiment:
    return Experiment.open(results_dir, name)


def _folder(results_dir: str | Path, name: str) -> Path:
    return _open(results_dir, name).root if is_remote(results_dir) else Path(results_dir, name)


def _together(tables: Iterable[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """Rows of several experiments below each other; empty tables would only blur the columns' types."""
    filled = [table.assign(experiment=name) for name, table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=["experiment"])
