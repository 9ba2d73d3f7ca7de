"""An experiment on disk: its lock, its event log, and the parquet files projected from it.

The only module that knows where things lie in an experiment folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from results.events import Event, EventLog, ExperimentStarted, read_events
from results.files import json_bytes, replace_file, rows_bytes
from results.history import History, TrialHistory
from results.lock import ExperimentLocked as ExperimentLocked
from results.lock import locked, read_generation
from results.parts import Tables, part_paths
from results.predictions import SEEN_FROM_VIEWS, predictions_bytes, read_predictions, stored_counts
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

DEFAULT_RESULTS_DIR = "results/runs"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LATER_COLUMNS = ("inference_images_per_second",)
P = TypeVar("P", bound=Predictions)


class Superseded(RuntimeError):
    """A worker outlived its driver and another one has taken over: it must not write any more."""


@dataclass(frozen=True)
class TrialFiles:
    """Where a worker puts what it makes of one trial, as long as its driver is the current one."""

    root: str
    trial_id: str
    generation: int

    @property
    def resume(self) -> Path:
        """What going on needs; read with `torch.load(weights_only=True)`."""
        return Path(self.root, "checkpoints", self.trial_id, "resume.pt")

    @property
    def best(self) -> Path:
        """The weights behind the "best" predictions."""
        return self.weights("best")

    def weights(self, variant: str) -> Path:
        """The weights behind a variant's predictions."""
        name = SEEN_FROM_VIEWS.get(variant, variant)
        return Path(self.root, "checkpoints", self.trial_id, f"{name}.safetensors")

    @property
    def predictions(self) -> Path:
        """Logits by variant and split."""
        return Path(self.root, "predictions", f"{self.trial_id}.parquet")

    def check_current(self) -> None:
        """Raise Superseded when another driver has taken over the experiment."""
        current = read_generation(Path(self.root))
        if current != self.generation:
            raise Superseded(f"{self.trial_id} belongs to driver {self.generation}; driver {current} has taken over")

    def replace(self, path: Path, content: bytes) -> None:
        """Write a file of the trial, synced, unless the driver has been superseded."""
        replace_file(path, content, sync=True, permitted=self.check_current)

    def remove(self, path: Path) -> None:
        """Remove a file of the trial, if it is there, unless the driver has been superseded."""
        self.check_current()
        path.unlink(missing_ok=True)

    def write_predictions(self, variants: Mapping[str, Sequence[Predictions]]) -> None:
        """Store each variant's predictions for several splits."""
        self.replace(self.predictions, predictions_bytes(variants))


class Experiment:
    """One experiment folder. Opening reads its log; `driving()` is what permits writing."""

    def __init__(self, root: Path) -> None:
        self.root = root
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
        root = Path(results_dir, name)
        if root.exists():
            raise UsageError(
                f"experiment {name!r} exists already in {results_dir}; add --resume to go on with it, "
                f"or choose another --name"
            )
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
        unfinished = root.with_name(f".{name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            for folder in ("events", "trials", "epochs", "predictions", "checkpoints"):
                (unfinished / folder).mkdir(parents=True)
            log = EventLog(unfinished / "events")
            log.append(ExperimentStarted(at=time.time(), info=info))
            log.close()
            Tables(unfinished, _read_history(unfinished)).rebuild()
            unfinished.rename(root)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UsageError(
                f"cannot write to the results folder {results_dir}: {error.strerror or error}; "
                f"choose another --results-dir or mend its permissions"
            ) from error
        experiment = cls(root)
        experiment._write_info()
        return experiment

    @classmethod
    def open(cls, results_dir: str | Path, name: str) -> Experiment:
        """An existing experiment. Raises UsageError, listing those there are, when it is none."""
        root = Path(results_dir, name)
        if not (root / "events").is_dir():
            there = ", ".join(names(results_dir)) or "none"
            raise UsageError(f"there is no experiment {name!r} in {results_dir}; there are: {there}")
        return cls(root)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    @property
    def info(self) -> dict[str, Any]:
        """What `experiment.json` says, its state apart."""
        return self.history.info

    @contextlib.contextmanager
    def driving(self) -> Iterator[None]:
        """Be the one process that writes. Reads the log anew, and rebuilds what is projected from it.

        Raises ExperimentLocked while another process drives.
        """
        with locked(self.root) as generation:
            self.generation = generation
            self.history = _read_history(self.root)
            for leftover in self.root.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            self._tables = Tables(self.root, self.history)
            self._rebuild()
            self._log = EventLog(self.root / "events")
            try:
                yield
            finally:
                self._log.close()
                self._log = None
                self._remove_leftovers()
                self._tables.catch_up(now=True)

    def record(self, *events: Event) -> None:
        """Append events to the log, synced, then bring the files projected from them up to date."""
        if self._log is None:
            raise RuntimeError("an experiment is written to only inside `driving()`")
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
        return TrialFiles(str(self.root.absolute()), trial_id, self.generation)

    def tidy(self, trial: TrialHistory) -> None:
        """Remove what an ended trial does not need: all but its weights, and these once retention has removed them.

        Of a trial that was not trained to its end only the best epoch's have predictions; its snapshots go.
        """
        assert trial.ended is not None
        files = self.files(trial.trial_id)
        keep_weights = trial.ended.has_checkpoint and not trial.checkpoint_removed
        for path in files.best.parent.glob("*"):
            of_variant = path == files.best or (trial.completed and path.suffix == files.best.suffix)
            if not (keep_weights and of_variant):
                path.unlink(missing_ok=True)
        if not keep_weights:
            with contextlib.suppress(OSError):  # not there, or somebody put something into it
                files.best.parent.rmdir()

    def disk_bytes(self) -> int:
        """What the folder takes on disk."""
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
                    tables.append(_conformed(file.read(columns=schema.names), schema))
            except (pa.ArrowException, OSError, KeyError) as error:
                warnings.warn(
                    f"{part} cannot be read and is left out ({str(error).splitlines()[0]}); "
                    f"`python -m orchestrator.rebuild {self.name} --results-dir {self.root.parent}` mends it",
                    DataWarning,
                    stacklevel=3,
                )
        return pa.concat_tables(tables).to_pandas()

    def predictions(self, trial_id: str, of: type[P], *, variant: str = "best") -> P:
        """A trial's stored predictions for the split that `of` stands for.

        Raises UsageError, naming the file, when it is missing or damaged.
        """
        return read_predictions(self._predictions_path(trial_id), of, variant=variant)

    def stored_counts(self, trial_id: str) -> dict[str, dict[Split, int]]:
        """How many examples each stored variant of a trial has predictions for, by split.

        Raises UsageError, naming the file, when it is missing or damaged.
        """
        return stored_counts(self._predictions_path(trial_id))

    def _predictions_path(self, trial_id: str) -> Path:
        return self.root / "predictions" / f"{trial_id}.parquet"

    def ensemble_folder(self, ensemble_id: str) -> Path:
        """Where an ensemble lies."""
        return self.root / "ensembles" / ensemble_id

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


def _conformed(part: pa.Table, schema: pa.Schema) -> pa.Table:
    """A part as the schema has it; a column that versions before it did not write is null. Raises KeyError."""
    for name in LATER_COLUMNS:
        if name in schema.names and name not in part.column_names:
            part = part.append_column(name, pa.nulls(len(part), schema.field(name).type))
    return part.select(schema.names).cast(schema)


def _read_history(root: Path) -> History:
    """The fold of an experiment's log. Raises UsageError when its beginning is gone: nothing is rebuilt from less."""
    history = History.read(read_events(root / "events"))
    if not history.info:
        raise UsageError(f"{root / 'events'} does not hold the beginning of the experiment; restore it from a copy")
    return history


def names(results_dir: str | Path) -> list[str]:
    """The experiments of a results folder, the newest last."""
    started = {}
    for path in Path(results_dir).glob("[!.]*/experiment.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            started[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))["started_at"]
    return sorted(started, key=lambda name: started[name])
