"""The Optuna study as a projection of the event log, in a journal file that optuna-dashboard opens."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from results.history import TrialHistory
from results.schema import Scalar

STATES = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}

Objectives = Mapping[str, str]
"""What is optimized, "max" or "min"; trials are stopped by the first."""


def objectives_of(info: Mapping[str, Any]) -> dict[str, str]:
    """The objectives of an experiment. Experiments of earlier versions have one."""
    return {info["metric"]: info["mode"], **info.get("further_objectives", {})}


def directions(objectives: Objectives) -> list[StudyDirection]:
    """Optuna's directions."""
    return [StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE for mode in objectives.values()]


@dataclass(frozen=True)
class Outcome:
    """What Optuna is told of a trial."""

    state: TrialState
    values: list[float] | None
    intermediate_values: dict[int, float]


def outcome(trial: TrialHistory, objectives: Objectives) -> Outcome:
    """The outcome that DESIGN's table says, with the first objective at each epoch.

    A pruned trial's value is its last one, as Study.tell has it; with several objectives it has none.
    """
    state = trial_state(trial)
    if not state.is_finished():
        return Outcome(state, None, {})
    metric, *further = objectives
    reported = intermediate_values(trial, metric=metric)
    values: list[float] | None = None
    if state is TrialState.COMPLETE:
        values = values_at_best(trial, objectives)
    elif state is TrialState.PRUNED and reported and not further:
        values = [reported[max(reported)]]
    return Outcome(state, values, reported)


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


def values_at_best(trial: TrialHistory, objectives: Iterable[str]) -> list[float] | None:
    """The objectives at a trial's best epoch; None without one."""
    return None if trial.best is None else [float(getattr(trial.best, name)) for name in objectives]


def write_outcome(storage: BaseStorage, trial_key: int, told: Outcome) -> None:
    """Tell a storage the outcome of a trial that it holds as running."""
    for epoch, value in told.intermediate_values.items():
        storage.set_trial_intermediate_value(trial_key, epoch, value)
    storage.set_trial_state_values(trial_key, told.state, told.values)


def frozen_trial(
    told: Outcome,
    *,
    params: Mapping[str, Scalar],
    distributions: Mapping[str, BaseDistribution],
    user_attrs: Mapping[str, str],
) -> FrozenTrial:
    """The Optuna trial of an outcome."""
    return create_trial(
        state=told.state,
        values=told.values,
        params=dict(params),
        distributions=dict(distributions),
        intermediate_values=told.intermediate_values,
        user_attrs=dict(user_attrs),
    )


class JournalFile(BaseJournalBackend):
    """Optuna's journal file; what is written inside `together()` costs one lock and one write, however much it is.

    Unlike Optuna's own backend it does not wait for the disk: each driver begins by writing the file anew from the
    event log, which does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = JournalFileBackend(str(path))
        self._lock = JournalFileSymlinkLock(str(path))
        self._num_read = 0
        self._unwritten: list[dict[str, Any]] | None = None

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """What was written from a place on, and what is about to be."""
        if self._unwritten is not None:
            yield from self._unwritten[log_number_from - self._num_read :]
            return
        for number, log in enumerate(self._file.read_logs(log_number_from), start=log_number_from + 1):
            self._num_read = max(self._num_read, number)
            yield log

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write, or keep for the end of `together()`."""
        if self._unwritten is None:
            self._write(logs)
        else:
            self._unwritten += logs

    def _write(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._lock.acquire()  # optuna-dashboard may write notes
        try:
            with self._path.open("ab") as file:
                file.write(lines.encode())
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Write at the end, and nothing when there was an error."""
        self._unwritten = []
        try:
            yield
            logs = self._unwritten
        finally:
            self._unwritten = None
        if logs:
            self._write(logs)
            for _ in self.read_logs(self._num_read):
                pass  # Optuna's backend learns where the lines begin, and need not look for them from the start


class StudyJournal:
    """The study of an experiment, written as its trials start and end: a write for each start and each end."""

    def __init__(self, path: Path, *, name: str, objectives: Objectives) -> None:
        self._file = JournalFile(path)
        self._storage = JournalStorage(self._file)
        study = optuna.create_study(
            storage=self._storage, study_name=name, directions=directions(objectives), load_if_exists=True
        )
        self._study_key = self._storage.get_study_id_from_name(name)
        self._objectives = objectives
        self.num_trials = len(study.get_trials(deepcopy=False))

    def start(self, *, params: Mapping[str, Scalar], distributions: Mapping[str, BaseDistribution], origin: str) -> int:
        """Write down a running trial. Returns its number."""
        number = self.num_trials
        running = Outcome(TrialState.RUNNING, None, {})
        attrs = {"trial_id": f"t{number:05d}", "origin": origin}
        trial = frozen_trial(running, params=params, distributions=distributions, user_attrs=attrs)
        self._storage.create_new_trial(self._study_key, template_trial=trial)
        self.num_trials += 1
        return number

    def end(self, trial: TrialHistory) -> None:
        """Write down how a trial ended."""
        key = self._storage.get_trial_id_from_study_id_trial_number(self._study_key, int(trial.trial_id[1:]))
        with self._file.together():
            write_outcome(self._storage, key, outcome(trial, self._objectives))

    def add(self, trials: Sequence[TrialHistory]) -> None:
        """Write down trials as they are now; they must come in the order of their numbers."""
        with self._file.together():
            for trial in trials:
                if int(trial.trial_id[1:]) != self.num_trials:
                    raise ValueError(f"trial {trial.trial_id} stands at place {self.num_trials} of the log")
                frozen = frozen_trial(
                    outcome(trial, self._objectives),
                    params=trial.started.params,
                    distributions={k: json_to_distribution(v) for k, v in trial.started.distributions.items()},
                    user_attrs={"trial_id": trial.trial_id, "origin": trial.started.origin},
                )
                self._storage.create_new_trial(self._study_key, template_trial=frozen)
                self.num_trials += 1


def open_study(path: Path, *, name: str, mode: str) -> optuna.Study:
    """The study in a journal file, created with one direction when it is not there."""
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name=name,
        directions=directions({"": mode}),
        load_if_exists=True,
    )


def rebuild_study(path: Path, trials: Iterable[TrialHistory], *, name: str, objectives: Objectives) -> None:
    """Replace the journal file by one made from the trials, which must come in the order of their numbers."""
    fresh = path.with_name(f".{path.name}.tmp")
    for leftover in (fresh, *path.parent.glob(f"{path.name}.*"), *path.parent.glob(f"{fresh.name}.*")):
        with contextlib.suppress(FileNotFoundError):
            leftover.unlink()
    StudyJournal(fresh, name=name, objectives=objectives).add(list(trials))
    os.replace(fresh, path)
