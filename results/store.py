"""An experiment on disk: its lock, its event log, and the parquet files projected from it.

The only module that knows where things lie in an experiment folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from results.events import Event, EventLog, ExperimentStarted, read_events
from results.files import json_bytes, replace_file, rows_bytes
from results.history import History, TrialHistory, check_predicted
from results.lock import ExperimentLocked as ExperimentLocked
from results.lock import locked
from results.mirror import SEGMENT_BYTES, Mirror, fetch, mark_unsent, pull
from results.objects import ObjectStore, above, check_writable
from results.parts import Tables, conformed, part_paths
from results.places import exists as exists
from results.places import names as names
from results.places import place
from results.predictions import read_predictions, stored_counts
from results.schema import (
    SCHEMA_VERSION,
    ClassAccuracyRecord,
    DataWarning,
    DistillationRecord,
    EpochRecord,
    Predictions,
    ScoreRecord,
    Split,
    UsageError,
    arrow_schema,
    trial_schema,
)
from results.study import objectives_of, rebuild_study
from results.trial_files import Superseded as Superseded
from results.trial_files import TrialFiles as TrialFiles

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_RESULTS_DIR = "results/runs"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
P = TypeVar("P", bound=Predictions)


class Experiment:
    """One experiment folder. Opening reads its log; `driving()` is what permits writing.

    `root` is where this process reads and writes; of an experiment in an object store, `remote`, it is the copy.
    """

    def __init__(self, root: Path, remote: ObjectStore | None = None) -> None:
        self.root = root
        self.remote = remote
        self._mirror: Mirror | None = None
        self._fetched: set[str] = set()
        self.history = _read_history(root)
        self.generation = 0
        self._tables = Tables(root, self.history)
        self._log: EventLog | None = None

    @staticmethod
    def check_new(results_dir: str | Path, name: str) -> Path:
        """The folder of an experiment that does not exist.

        Raises UsageError when it does, when the name is not one, and when the results folder cannot be written.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"--name {name!r} is not a name; use up to 100 letters, digits, '.', '_' and '-'")
        if exists(results_dir, name):
            raise UsageError(
                f"experiment {name!r} exists already in {results_dir}; add --resume to go on with it, "
                f"or choose another --name"
            )
        root, remote = place(results_dir, name)
        if remote is not None:
            check_writable(remote)
            return root
        parent = next(folder for folder in root.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {parent}; choose another --results-dir or mend its permissions")
        return root

    @classmethod
    def create(cls, results_dir: str | Path, *, name: str, info: dict[str, Any]) -> Experiment:
        """A new experiment. The folder appears complete or not at all.

        Raises UsageError as `check_new` does.
        """
        root = cls.check_new(results_dir, name)
        remote = place(results_dir, name)[1]
        if remote is not None:
            shutil.rmtree(root, ignore_errors=True)  # the copy of one that the store has no more
        unfinished = root.with_name(f".{name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            for folder in ("events", "trials", "epochs", "predictions", "checkpoints"):
                (unfinished / folder).mkdir(parents=True)
            log = EventLog(unfinished / "events")
            log.append(ExperimentStarted(at=time.time(), info=info))
            log.close()
            Tables(unfinished, _read_history(unfinished)).rebuild()
            if remote is not None:
                mark_unsent(unfinished)
            unfinished.rename(root)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UsageError(
                f"cannot write to the results folder {results_dir}: {error.strerror or error}; "
                f"choose another --results-dir or mend its permissions"
            ) from error
        experiment = cls(root, remote)
        experiment._write_info()
        return experiment

    @classmethod
    def open(cls, results_dir: str | Path, name: str) -> Experiment:
        """An existing experiment. Raises UsageError, listing those there are, when it is none."""
        root, remote = place(results_dir, name)
        if not ((root / "events").is_dir() if remote is None else exists(results_dir, name)):
            there = ", ".join(names(results_dir)) or "none"
            raise UsageError(f"there is no experiment {name!r} in {results_dir}; there are: {there}")
        if remote is not None:
            pull(remote, root)
        return cls(root, remote)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    @property
    def where(self) -> str:
        """What people call its place: the folder, or the URI in an object store."""
        return str(self.root) if self.remote is None else self.remote.uri

    @property
    def results_dir(self) -> str:
        """Where the experiments beside it are."""
        return str(self.root.parent) if self.remote is None else above(self.remote.uri)

    @property
    def info(self) -> dict[str, Any]:
        """What `experiment.json` says, its state apart."""
        return self.history.info

    @contextlib.contextmanager
    def driving(self) -> Iterator[None]:
        """Be the one process that writes. Reads the log anew, and rebuilds what is projected from it.

        Raises ExperimentLocked while another process drives. To an object store everything has been sent at the end.
        """
        with self._held() as generation:
            self.generation = generation
            self.history = _read_history(self.root)
            self._fetched = set()
            if self._mirror is not None:
                self._mirror.remove_unknown(self.history.trials)
            for leftover in self.root.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            self._tables = Tables(self.root, self.history)
            self._rebuild()
            self._log = EventLog(self.root / "events", segment_bytes=SEGMENT_BYTES if self._mirror else math.inf)
            try:
                yield
            finally:
                self._log.close()
                self._log = None
                self._fetched = set()
                self._remove_leftovers()
                self._tables.catch_up(now=True)

    @contextlib.contextmanager
    def _held(self) -> Iterator[int]:
        """Hold the lock and, in an object store, the lease, and send there what changes. Yields the generation."""
        with locked(self.root) as generation:
            if self.remote is None:
                yield generation
                return
            self._mirror = mirror = Mirror(self.root, self.remote, generation=generation)
            try:
                yield mirror.generation
            finally:
                self._mirror = None
                command = f"python -m orchestrator.rebuild {self.name} --results-dir {shlex.quote(self.results_dir)}"
                mirror.close(fix=f"To send it from this machine: {command}")

    def record(self, *events: Event) -> None:
        """Append events to the log, synced, then bring the files projected from them up to date."""
        if self._log is None:
            raise RuntimeError("an experiment is written to only inside `driving()`")
        if self._mirror is not None:
            self._mirror.check()
        for event in events:
            self.history.check(event)
        self._log.append(*events)
        for event in events:
            self.history.apply(event)
        self._tables.follow(events)
        if any(not hasattr(event, "trial_id") for event in events):
            self._write_info()

    def _remove_leftovers(self) -> None:
        """Remove what workers that died while they wrote left of the predictions of trials that have ended."""
        ended = {trial.trial_id for trial in self.history.endings}
        for leftover in (self.root / "predictions").glob(".*.tmp"):
            if leftover.name[1:].partition(".")[0] in ended:
                leftover.unlink(missing_ok=True)

    def catch_up(self) -> None:
        """Write the epochs that `epochs/` lacks, if it is time. To be called now and then while nothing is recorded."""
        self._tables.catch_up()

    def rebuild(self) -> None:
        """Write `trials/`, `epochs/`, the study and `experiment.json` anew from the event log."""
        with self.driving():
            pass

    def _rebuild(self) -> None:
        self._tables.rebuild()
        rebuild_study(
            self.study_path,
            self.history.trials.values(),
            name=self.name,
            objectives=objectives_of(self.info),
        )
        self._write_info()

    def _write_info(self) -> None:
        content = {**self.info, "state": self.history.state, "schema_version": SCHEMA_VERSION}
        replace_file(self.root / "experiment.json", json_bytes(content), sync=False)

    @property
    def study_path(self) -> Path:
        """The journal file that optuna-dashboard opens."""
        return self.root / "study.journal"

    def tensorboard_folder(self, trial_id: str) -> Path:
        """Where TensorBoard finds a trial's figures, if they were asked for."""
        return self.root / "tensorboard" / trial_id

    def files(self, trial_id: str) -> TrialFiles:
        """Where the worker of a trial writes."""
        remote = "" if self.remote is None else self.remote.uri
        return TrialFiles(str(self.root.absolute()), trial_id, self.generation, remote=remote)

    def tidy(self, trial: TrialHistory) -> None:
        """Remove what an ended trial does not need: all but its weights, and these once retention has removed them.

        A trial that was not trained to its end keeps its best epoch's alone; its snapshots go.
        """
        assert trial.ended is not None
        files = self.files(trial.trial_id)
        keep_weights = trial.ended.has_checkpoint and not trial.checkpoint_removed

        def is_superfluous(name: str) -> bool:
            of_variant = name == files.best.name or (trial.completed and name.endswith(files.best.suffix))
            return not (keep_weights and of_variant)

        if self._mirror is not None:
            self._mirror.remove_checkpoints(trial.trial_id, is_superfluous)
            return
        for path in files.best.parent.glob("*"):
            if is_superfluous(path.name):
                path.unlink(missing_ok=True)
        if not keep_weights:
            with contextlib.suppress(OSError):  # not there, or somebody put something into it
                files.best.parent.rmdir()

    def disk_bytes(self) -> int:
        """What the folder takes on disk, or its objects."""
        if self.remote is not None:
            return sum(info.size for info in self.remote.objects().values())
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def trials(self) -> pd.DataFrame:
        """`trials/` as a frame, a row a trial that has ended. Warns of parts that cannot be read."""
        return self._read_parts("trials", trial_schema(self.info["config_fields"]))

    def epochs(self) -> pd.DataFrame:
        """`epochs/` as a frame, a row a trial and epoch. Warns of parts that cannot be read."""
        return self._read_parts("epochs", arrow_schema(EpochRecord))

    def _read_parts(self, folder: str, schema: pa.Schema) -> pd.DataFrame:
        tables = [schema.empty_table()]
        for part in part_paths(self.root / folder):
            try:
                with pq.ParquetFile(part) as file:
                    tables.append(conformed(file.read(columns=schema.names), schema))
            except (pa.ArrowException, OSError, KeyError) as error:
                warnings.warn(
                    f"{part} cannot be read and is left out ({str(error).splitlines()[0]}); "
                    f"`python -m orchestrator.rebuild {self.name} --results-dir {self.results_dir}` mends it",
                    DataWarning,
                    stacklevel=3,
                )
        return pa.concat_tables(tables).to_pandas()

    def fetch_predictions(self, trial_ids: Iterable[str]) -> None:
        """Have trials' predictions in the copy, as the object store has them; done once while nobody drives."""
        if self.remote is not None and (wanted := set(trial_ids) - self._fetched):
            fetch(self.remote, self.root, [f"predictions/{trial_id}.parquet" for trial_id in wanted])
            self._fetched |= wanted

    def weights(self, trial_id: str, variant: str) -> Path:
        """The weights of a trial's variant, where they can be read; nothing is there when they have been removed."""
        path = self.files(trial_id).weights(variant)
        if self.remote is not None:
            fetch(self.remote, self.root, [path.relative_to(self.root.absolute()).as_posix()])
        return path

    def predictions(self, trial_id: str, of: type[P], *, variant: str = "best") -> P:
        """A trial's stored predictions for the split that `of` stands for.

        Raises UsageError when the file is missing or damaged, and when the trial was stopped before it had predictions.
        """
        return read_predictions(self._predictions_path(trial_id), of, variant=variant)

    def stored_counts(self, trial_id: str) -> dict[str, dict[Split, int]]:
        """How many examples each stored variant of a trial has predictions for, by split.

        Raises UsageError, naming the file, when it is missing or damaged.
        """
        return stored_counts(self._predictions_path(trial_id))

    def _predictions_path(self, trial_id: str) -> Path:
        self.fetch_predictions([trial_id])
        path = self.root / "predictions" / f"{trial_id}.parquet"
        if not path.exists() and trial_id in self.history.trials:
            check_predicted(self.history.trials[trial_id], experiment=self.name)
        return path

    def ensemble_folder(self, ensemble_id: str) -> Path:
        """Where an ensemble lies."""
        return self.root / "ensembles" / ensemble_id

    def whole_ensemble(self, ensemble_id: str) -> Path:
        """The folder of an ensemble with all its files, fetched from the object store where there is one."""
        folder = self.ensemble_folder(ensemble_id)
        if self.remote is not None:
            fetch(self.remote, self.root, self.remote.objects(folder.relative_to(self.root).as_posix()))
        return folder

    def ensemble_ids(self) -> list[str]:
        """The ensembles that are complete, the newest last."""
        there = [path.parent.name for path in self.root.glob("ensembles/*/ensemble.json")]
        return sorted(there, key=lambda name: (len(name), name))

    def write_distillation(self, records: Sequence[DistillationRecord]) -> None:
        """Store how the experiment's students compare with the networks trained alone, in `distillation.parquet`."""
        table = rows_bytes([asdict(record) for record in records], arrow_schema(DistillationRecord))
        replace_file(self.root / "distillation.parquet", table, sync=True)

    def next_ensemble_id(self) -> str:
        """`e0001` for the first ensemble."""
        taken = [int(path.name[1:]) for path in self.root.glob("ensembles/e*") if path.name[1:].isdigit()]
        return f"e{max(taken, default=0) + 1:04d}"

    def write_ensemble(
        self,
        ensemble_id: str,
        *,
        content: dict[str, Any],
        scores: Sequence[ScoreRecord],
        classes: Sequence[ClassAccuracyRecord],
    ) -> None:
        """Store an ensemble: its tables, then `ensemble.json`, whose presence says that it is complete."""
        folder = self.ensemble_folder(ensemble_id)
        for name, records, record in (
            ("scores.parquet", scores, ScoreRecord),
            ("classes.parquet", classes, ClassAccuracyRecord),
        ):
            table = rows_bytes([asdict(row) for row in records], arrow_schema(record))
            replace_file(folder / name, table, sync=True)
        replace_file(folder / "ensemble.json", json_bytes(content), sync=True)


def _read_history(root: Path) -> History:
    """The fold of an experiment's log. Raises UsageError when its beginning is gone: nothing is rebuilt from less."""
    history = History.read(read_events(root / "events"))
    if not history.info:
        raise UsageError(f"{root / 'events'} does not hold the beginning of the experiment; restore it from a copy")
    return history
