"""Ray Tune drives, the ledger decides: the adapters between them, and what each trial gets of a cluster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from orchestrator.ledger import Ledger
from orchestrator.ray_cluster import cluster_room
from results.schema import EpochResult, UsageError
from trainables.datasets import SplitImages
from trainables.tune_trial import TuneTrial

RESULT_FIELDS = [f.name for f in fields(EpochResult)]
RETRIES = 2


class DiskFull(OSError):
    """A worker could not write."""


class LedgerSearcher(Searcher):
    """Hands the ledger's trials to Tune, never more than `max_concurrent` at a time.

    Tune would ask for many ahead of need, and TPE would draw them knowing nothing. `failure` keeps what is raised here.
    """

    def __init__(self, ledger: Ledger, *, max_concurrent: int) -> None:
        super().__init__()
        self._ledger = ledger
        self._max_concurrent = max_concurrent
        self.failure: Exception | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of the next trial, None while enough are running, FINISHED after the last."""
        if len(self._ledger.running) >= self._max_concurrent:
            return None
        try:
            assignment = self._ledger.next_trial()
        except Exception as error:
            self.failure = error
            raise
        if assignment is None:
            return Searcher.FINISHED if not self._ledger.running else None
        return {
            "train": assignment.config,
            "files": asdict(self._ledger.experiment.files(assignment.trial_id)),
            "course": [asdict(leg) for leg in assignment.course],
            "rung_epochs": assignment.rung_epochs,
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


@dataclass(frozen=True)
class Resources:
    """What a trial gets, and how many trials run at a time."""

    device: str
    cpus: int
    gpus: float
    max_concurrent: int


def choose_resources(
    device: str, *, cpus_per_trial: int, gpus_per_trial: float | None, max_concurrent: int | None, num_trials: int
) -> Resources:
    """Settle `device` ("auto": a GPU if the cluster has or can get one, else mps or cpu) and how many trials run.

    By default as many as there is room for, but at most a third of all: those that run before any has ended are
    drawn without a model.

    Raises UsageError when the cluster has not what a trial wants.
    """
    cluster = cluster_room()
    if device == "auto":
        device = "cuda" if cluster.get("GPU", 0) else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not cluster.get("GPU", 0):
        raise UsageError("--device cuda, but Ray sees no GPU; give --device cpu, or an --address with GPUs")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps, but torch has no mps here; give --device cpu")
    gpus = (gpus_per_trial or 1.0) if device == "cuda" else 0.0
    room = cluster.get("CPU", 0) / cpus_per_trial
    if gpus:
        room = min(room, cluster["GPU"] / gpus)
    if room < 1:
        raise UsageError(
            f"a trial wants {cpus_per_trial} CPUs and {gpus:g} GPUs, and there are {cluster.get('CPU', 0):g} and "
            f"{cluster.get('GPU', 0):g}; lower --cpus-per-trial or --gpus-per-trial"
        )
    return Resources(device, cpus_per_trial, gpus, max_concurrent or min(int(room), max(1, num_trials // 3)))


def must_grow(resources: Resources) -> bool:
    """Whether the cluster has no room for a single trial yet."""
    there = ray.cluster_resources()
    return there.get("CPU", 0) < resources.cpus or there.get("GPU", 0) < resources.gpus


class CheckingStopper(Stopper):
    """Never stops anything; calls `check` in every turn of Tune's loop, which ends with what it raises."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the event log is what a search is restored from, not Tune's pickles."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never."""
        return False

    def stop_all(self) -> bool:
        """Never, but what `check` raises ends the loop."""
        self._check()
        return False


def fit(
    ledger: Ledger,
    data: SplitImages,
    resources: Resources,
    *,
    check_interrupt: Callable[[], None] = lambda: None,
    reuse_actors: bool = True,
) -> None:
    """Run Tune until the ledger has no more trials. Raises what kept the ledger from recording.

    `check_interrupt` is called several times a second; what it raises ends the run.
    `reuse_actors=False` is for the benchmark of what reuse is worth.
    """
    # Tune keeps a single trial pending by default, which leaves workers idle when trials are short.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(resources.max_concurrent)
    trainable = tune.with_parameters(TuneTrial, data=data, device=resources.device, threads=resources.cpus)
    scheduler = LedgerScheduler(ledger)
    searcher = LedgerSearcher(ledger, max_concurrent=resources.max_concurrent)

    def check() -> None:
        check_interrupt()
        ledger.experiment.catch_up()

    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": resources.cpus, "gpu": resources.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=reuse_actors,
            ),
            run_config=tune.RunConfig(
                verbose=0,
                stop=CheckingStopper(check),
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            tuner.fit()
        except Exception as error:
            failure = scheduler.failure or searcher.failure
            if failure is not None:
                raise failure from error
            raise
