"""Ray Tune drives, the ledger decides: the two adapters between them."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.ledger import Ledger
from results.schema import EpochResult

RESULT_FIELDS = [f.name for f in fields(EpochResult)]


class DiskFull(OSError):
    """A worker could not write."""


class LedgerSearcher(Searcher):
    """Hands the ledger's trials to Tune, never more than `max_concurrent` at a time.

    Tune would ask for many ahead of need, and TPE would draw them knowing nothing.
    """

    def __init__(self, ledger: Ledger, *, max_concurrent: int) -> None:
        super().__init__()
        self._ledger = ledger
        self._max_concurrent = max_concurrent

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of the next trial, None while enough are running, FINISHED after the last."""
        if len(self._ledger.running) >= self._max_concurrent:
            return None
        assignment = self._ledger.next_trial()
        if assignment is None:
            return Searcher.FINISHED if not self._ledger.running else None
        return {
            "train": assignment.config,
            "files": asdict(self._ledger.experiment.files(assignment.trial_id)),
            "rung_epochs": self._ledger.halving.rung_epochs,
            "epochs_recorded": assignment.epochs_recorded,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the event log is what a search is restored from, not Tune's pickles."""
        return {}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the scheduler has told the ledger."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the event log is what a search is restored from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the event log is what a search is restored from."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the event log is what a search is restored from."""


class LedgerScheduler(FIFOScheduler):
    """Tells the ledger what Tune's trials report, and Tune what the ledger decides.

    Tune wraps what is raised here into texts; `failure` keeps the exception itself.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self.failure: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the event log is what a search is restored from, not Tune's pickles."""
        return {}

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Record an epoch."""
        try:
            if "disk_full" in result:
                raise DiskFull(result["disk_full"])
            epoch = EpochResult(**{name: result[name] for name in RESULT_FIELDS})
            go_on = self._ledger.report(_trial_id(trial), epoch, node=result["worker"])
        except Exception as error:
            self.failure = error
            raise
        return str(TrialScheduler.CONTINUE if go_on else TrialScheduler.STOP)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        """A worker died or raised. Tune has stopped the trial before it tells of a failure it will retry, not else."""
        try:
            text = _error_text(trial)
            if trial.status == Trial.ERROR:
                self._ledger.retried(_trial_id(trial), text)
            else:
                self._ledger.failed(_trial_id(trial), text)
        except Exception as error:
            self.failure = error
            raise


def _trial_id(trial: Trial) -> str:
    return str(trial.config["files"]["trial_id"])


def _error_text(trial: Trial) -> str:
    """The last traceback in the file to which Tune appends them."""
    path = trial.error_file
    text = Path(path).read_text(encoding="utf-8", errors="replace") if path else ""
    return text[text.rfind("Failure #") :].strip()
