"""The event log: append-only, numbered JSON-lines segments, written by one driver and never rewritten.

Every driver that opens an experiment begins a segment of its own, so a line torn by a crash is always the
last of its segment and is dropped when read. JSON has no NaN: non-finite floats are written as the strings
"NaN", "Infinity" and "-Infinity", which `float()` reads back.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from results.schema import EpochResult, Scalar, Stage, Status, UsageError

SEGMENT_GLOB = "*.jsonl"
FLOAT_FIGURES = {f.name for f in fields(EpochResult) if "float" in str(f.type)}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at the unix time `at` (seconds)."""

    kind: ClassVar[str]
    at: float


@dataclass(frozen=True, kw_only=True)
class ExperimentStarted(Event):
    """`info` is what `experiment.json` says of the experiment, its state apart."""

    kind: ClassVar[str] = "experiment_started"
    info: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExperimentResumed(Event):
    """`changes` is what a resume may change of `info`: the number of trials, the command, the versions."""

    kind: ClassVar[str] = "experiment_resumed"
    changes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExperimentStopped(Event):
    """The driver left in an orderly way, with `state` "finished" or "interrupted"."""

    kind: ClassVar[str] = "experiment_stopped"
    state: str


@dataclass(frozen=True, kw_only=True)
class TrialStarted(Event):
    """`params` are the searched values, `distributions` Optuna's JSON of where each was drawn from.

    `control`: never stopped early, to see what early stopping does. `finalist_of`: the trial whose configuration is
    trained again with another seed. `strength`: of the regularization within the space, from 0 to 1.
    """

    kind: ClassVar[str] = "trial_started"
    trial_id: str
    stage: Stage
    origin: str
    seed: int
    config: dict[str, Scalar]
    params: dict[str, Scalar]
    distributions: dict[str, str]
    control: bool = False
    finalist_of: str = ""
    strength: float | None = None


@dataclass(frozen=True, kw_only=True)
class EpochReported(Event):
    """An epoch's figures, in the order in which the driver received them."""

    kind: ClassVar[str] = "epoch"
    trial_id: str
    node: str
    result: EpochResult


@dataclass(frozen=True, kw_only=True)
class Decided(Event):
    """What follows an epoch: "continue", "stop", "pause" (the trial waits at a rung; another decision on the same epoch
    follows) or "spared" (it would have been stopped, but is a control). `rung` is null between rungs."""

    kind: ClassVar[str] = "decision"
    trial_id: str
    epoch: int
    rung: int | None
    decision: str


@dataclass(frozen=True, kw_only=True)
class TrialRetried(Event):
    """A trial's worker died or raised; the trial goes on from its checkpoint."""

    kind: ClassVar[str] = "trial_retried"
    trial_id: str
    error: str


@dataclass(frozen=True, kw_only=True)
class TrialEnded(Event):
    """A trial is over. `has_predictions` and `has_checkpoint`: whether these files had been written by then."""

    kind: ClassVar[str] = "trial_ended"
    trial_id: str
    status: Status
    stop_reason: str
    has_predictions: bool
    has_checkpoint: bool
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class TrialPredicted(Event):
    """An ended trial's predictions were made from its stored weights, because somebody asked for them."""

    kind: ClassVar[str] = "trial_predicted"
    trial_id: str


@dataclass(frozen=True, kw_only=True)
class CheckpointRemoved(Event):
    """A trial's weights were removed because enough better ones are kept."""

    kind: ClassVar[str] = "checkpoint_removed"
    trial_id: str


@dataclass(frozen=True, kw_only=True)
class EnsembleMade(Event):
    """An ensemble was chosen and scored; its folder under `ensembles/` is complete."""

    kind: ClassVar[str] = "ensemble_made"
    ensemble_id: str
    members: list[str] = field(default_factory=list)


KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        ExperimentStarted,
        ExperimentResumed,
        ExperimentStopped,
        TrialStarted,
        EpochReported,
        Decided,
        TrialRetried,
        TrialEnded,
        TrialPredicted,
        CheckpointRemoved,
        EnsembleMade,
    )
}


def _finite(value: Any) -> Any:
    """`value` with non-finite floats replaced by their names."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def encode(event: Event) -> str:
    """One JSON line, newline included."""
    values = {"event": event.kind, **asdict(event)}
    try:
        return json.dumps(values, allow_nan=False) + "\n"
    except ValueError:  # rare, and looking for it takes longer than writing
        return json.dumps(_finite(values), allow_nan=False) + "\n"


def decode(line: str) -> Event:
    """The event behind a line of the log. Raises KeyError or TypeError when it is none of KINDS."""
    values = json.loads(line)
    cls = KINDS[values.pop("event")]
    if cls is EpochReported:
        values["result"] = _epoch_result(values["result"])
    return cls(**values)


def _epoch_result(values: dict[str, Any]) -> EpochResult:
    typed: dict[str, Any] = {
        key: float(value) if key in FLOAT_FIGURES and value is not None else value for key, value in values.items()
    }
    return EpochResult(**typed)


class EventLog:
    """Appends events to a new segment of `folder`; every append is synced to disk before it returns.

    `segment_bytes`: after so many another segment is begun; by default never.
    """

    def __init__(self, folder: Path, *, segment_bytes: float = math.inf) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._torn = False
        self._begin_segment(1 + max((int(path.stem) for path in folder.glob(SEGMENT_GLOB)), default=0))

    def _begin_segment(self, number: int) -> None:
        self.segment = self._folder / f"{number:06d}.jsonl"
        self._file = os.open(self.segment, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._written = 0

    def append(self, *events: Event) -> None:
        """Write events and sync them. After an OSError (a full disk) nothing more can be appended."""
        if self._torn:
            raise OSError(f"{self.segment} could not be written to earlier; resume the experiment")
        data = "".join(encode(event) for event in events).encode()
        if self._written >= self._segment_bytes:
            whole = self._file
            self._begin_segment(int(self.segment.stem) + 1)
            os.close(whole)
        self._written += len(data)
        try:
            if os.write(self._file, data) != len(data):  # how a disk announces that it has just become full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.segment))
            os.fsync(self._file)
        except OSError:
            self._torn = True
            raise

    def close(self) -> None:
        """Close the segment."""
        os.close(self._file)


def read_events(folder: Path) -> Iterator[Event]:
    """All events of a log in order, without the torn last line that a crash may have left in a segment.

    Raises UsageError, naming segment and line, when a line that is not a segment's last cannot be read, and when a
    segment is missing.
    """
    for place, segment in enumerate(sorted(folder.glob(SEGMENT_GLOB)), start=1):
        if int(segment.stem) != place:
            raise UsageError(f"{folder / f'{place:06d}.jsonl'} is missing; restore it from a copy")
        # What follows the last newline is "" or a torn line: either way it is not an event.
        lines = segment.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                yield decode(line)
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{segment}, line {number} is not an event ({error}); restore the file from a copy"
                ) from error
