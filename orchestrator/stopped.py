"""Which trials that were stopped early have weights alone, and would have to be predicted with to be candidates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import pandas as pd

from orchestrator.candidates import holding, usable
from results.schema import DataWarning
from results.store import Experiment


def stopped_without_predictions(experiments: Iterable[Experiment], *, expression: str = "") -> dict[str, list[str]]:
    """The trials, by experiment, that were stopped early, have weights alone, and may be candidates for which an
    expression holds. A warning says how many have no weights any more."""
    tables = [_lacking(experiment) for experiment in experiments]
    table = pd.concat(tables, ignore_index=True)
    if expression and len(table):
        table = holding(table, expression)
    lacking = table[table["predictions"] == ""]
    return {str(name): list(dict.fromkeys(rows["trial_id"])) for name, rows in lacking.groupby("experiment")}


def _lacking(experiment: Experiment) -> pd.DataFrame:
    """A row for each variant that usable trials have or would have, as far as that is known without their files."""
    trials = experiment.trials()
    removed = (trials["status"] == "pruned") & (trials["predictions"] == "") & (trials["checkpoint"] == "")
    if count := int((removed & trials["val_accuracy"].notna()).sum()):
        warnings.warn(
            f"{count} trials of {experiment.name} that were stopped early are left out: their weights were removed "
            f"(--keep-checkpoints {experiment.info['keep_checkpoints']}); search with a larger one to keep them",
            DataWarning,
            stacklevel=2,
        )
    rows = usable(experiment, include_stopped=True).assign(experiment=experiment.name)
    viewed = rows[rows["config.test_time_augmentation"] != "none"]
    return pd.concat([rows.assign(variant="best"), viewed.assign(variant="tta")], ignore_index=True)
