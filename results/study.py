"""The Optuna study as a projection of the event log, in a journal file that optuna-dashboard opens."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path

import optuna
from optuna.distributions import json_to_distribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from results.history import TrialHistory

STATES = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


def trial_state(trial: TrialHistory) -> TrialState:
    """The Optuna state of DESIGN's table: a diverged trial is PRUNED (without values), a crashed one FAIL.

    Optuna has no complete trial without a value: one that nothing was held out from is PRUNED without values too.
    """
    if trial.ended is None:
        return TrialState.RUNNING
    no_value = trial.best is not None and trial.best.val_accuracy is None
    if trial.ended.stop_reason.startswith("diverged") or (trial.ended.status == "completed" and no_value):
        return TrialState.PRUNED
    return STATES[trial.ended.status]


def intermediate_values(trial: TrialHistory, *, metric: str) -> dict[int, float]:
    """The metric at each epoch; empty for a diverged trial, which TPE then ranks below every other."""
    if trial.ended is not None and trial.ended.stop_reason.startswith("diverged"):
        return {}
    values = {event.result.epoch: getattr(event.result, metric) for event in trial.epochs}
    return {epoch: value for epoch, value in values.items() if value is not None and math.isfinite(value)}


def final_value(trial: TrialHistory, *, metric: str) -> float | None:
    """The value a completed trial is told with: the metric at its best epoch."""
    if trial_state(trial) is not TrialState.COMPLETE or trial.best is None:
        return None
    return float(getattr(trial.best, metric))


def frozen_trial(trial: TrialHistory, *, metric: str) -> FrozenTrial:
    """The Optuna trial of a trial's history."""
    state = trial_state(trial)
    values = intermediate_values(trial, metric=metric) if state.is_finished() else {}
    value = final_value(trial, metric=metric)
    if state is TrialState.PRUNED and values:
        value = values[max(values)]  # as Study.tell does
    return create_trial(
        state=state,
        value=value,
        params=dict(trial.started.params),
        distributions={name: json_to_distribution(text) for name, text in trial.started.distributions.items()},
        intermediate_values=values,
        user_attrs={"trial_id": trial.trial_id, "origin": trial.started.origin},
    )


def open_study(path: Path, *, name: str, mode: str, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """The study in a journal file, created when it is not there."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.create_study(
        storage=storage,
        study_name=name,
        direction="maximize" if mode == "max" else "minimize",
        sampler=sampler,
        load_if_exists=True,
    )


def rebuild_study(path: Path, trials: Iterable[TrialHistory], *, name: str, metric: str, mode: str) -> None:
    """Replace the journal file by one made from the trials, which must come in the order of their numbers."""
    fresh = path.with_name(f".{path.name}.tmp")
    for leftover in (fresh, *path.parent.glob(f"{path.name}.*"), *path.parent.glob(f"{fresh.name}.*")):
        with contextlib.suppress(FileNotFoundError):
            leftover.unlink()
    study = open_study(fresh, name=name, mode=mode)
    for number, trial in enumerate(trials):
        if int(trial.trial_id[1:]) != number:
            raise ValueError(f"trial {trial.trial_id} stands at place {number} of the log")
        study.add_trial(frozen_trial(trial, metric=metric))
    os.replace(fresh, path)
