"""Record types, what each column means, and their arrow schemas.

Units: accuracies are fractions in [0, 1], times are seconds, NLL is in nats, instants are UTC.
Shape suffixes: N examples, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 1

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]
Scalar = bool | int | float | str | None

Stage = Literal["search", "finalist", "large_batch", "distilled", "single"]
Status = Literal["completed", "pruned", "failed"]
Split = Literal["select", "estimate", "test"]


class UsageError(Exception):
    """What was asked for cannot be done. The message says what was given, what was wanted and the fix."""


class DataWarning(UserWarning):
    """Something in a folder of data or results was left out. The message names it."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits of one model for one split. Use the subclass of the split, never this class itself."""

    logits_NC: npt.NDArray[np.float16]
    labels_N: IntArray
    example_ids_N: IntArray

    def __post_init__(self) -> None:
        n = len(self.labels_N)
        if self.logits_NC.ndim != 2 or len(self.logits_NC) != n or len(self.example_ids_N) != n:
            raise ValueError(
                f"predictions disagree in length: logits {self.logits_NC.shape}, labels {self.labels_N.shape}, "
                f"example_ids {self.example_ids_N.shape}; wanted [N, C], [N], [N]"
            )


class SelectPredictions(Predictions):
    """What may be used to choose: early stopping, the search, ensemble selection and calibration read it."""


class EstimatePredictions(Predictions):
    """Read once something has been chosen, to say how good it is."""


class TestPredictions(Predictions):
    """The official test set, scored once for what was chosen. Nothing is ever chosen on it."""

    __test__ = False  # not a pytest class


PREDICTIONS: dict[Split, type[Predictions]] = {
    "select": SelectPredictions,
    "estimate": EstimatePredictions,
    "test": TestPredictions,
}


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """Everything the training loop knows at the end of an epoch. `None`: not measured in this run.

    `val_*` are computed from the stored float16 logits on `select`, of the EMA weights when EMA is on.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    clean_train_accuracy: float
    val_accuracy: float | None
    val_nll: float | None
    val_ece: float | None
    raw_val_accuracy: float | None
    grad_norm: float
    epoch_seconds: float
    images_per_second: float
    num_parameters: int
    multiply_adds: int
    peak_memory_bytes: int
    best_epoch: int
    out_of_patience: bool
    attainable_train_accuracy: float = 1.0
    """The `train_accuracy` of always naming the heaviest label; below 1 where images are mixed."""
    raw_val_nll: float | None = None
    inference_images_per_second: float | None = None
    """Of the evaluated model on `select`, without test-time augmentation; the host waits for the last logits."""

    @property
    def diverged(self) -> bool:
        """Whether the loss or a validation figure is not finite."""
        figures = (self.train_loss, self.val_accuracy, self.val_nll)
        return not all(math.isfinite(x) for x in figures if x is not None)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One row of `epochs/`."""

    trial_id: str
    epoch: int
    reported_at: datetime
    lr: float
    train_loss: float
    train_accuracy: float
    clean_train_accuracy: float
    val_accuracy: float | None
    val_nll: float | None
    raw_val_accuracy: float | None
    raw_val_nll: float | None
    grad_norm: float
    epoch_seconds: float
    images_per_second: float
    rung: int | None
    decision: str | None


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One row of `trials/`: a trial that has ended. The `config.<field>` columns stand beside these."""

    trial_id: str
    stage: Stage
    origin: str
    control: bool
    finalist_of: str
    regularization_strength: float | None
    status: Status
    stop_reason: str
    dataset: str
    backbone: str
    seed: int
    epochs_trained: int
    max_epochs: int
    best_epoch: int | None
    val_accuracy: float | None
    val_nll: float | None
    val_ece: float | None
    raw_val_accuracy: float | None
    train_accuracy: float | None
    clean_train_accuracy: float | None
    regularization_verdict: str | None
    num_parameters: int | None
    multiply_adds: int | None
    train_seconds: float
    images_per_second: float | None
    inference_images_per_second: float | None
    peak_memory_bytes: int | None
    predictions: str
    checkpoint: str
    error: str
    retries: int
    started_at: datetime
    finished_at: datetime
    node: str
    git_commit: str
    split_hash: str
    schema_version: int


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """One row of an ensemble's `scores.parquet`: one metric of one row of the table, on one split."""

    ensemble_id: str
    kind: Literal["ensemble", "control", "single", "curve"]
    label: str
    selection: str
    combiner: str
    k: int
    chosen: bool
    split: Split
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    baseline: float | None
    gain: float | None
    gain_ci_low: float | None
    gain_ci_high: float | None
    p_value: float | None
    chosen_gain: float | None
    chosen_gain_ci_low: float | None
    chosen_gain_ci_high: float | None
    chosen_p_value: float | None
    num_examples: int
    training_seconds: float
    num_parameters: int
    multiply_adds: int
    images_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class ClassAccuracyRecord:
    """One row of an ensemble's `classes.parquet`: a class on one split, accuracies null where it has no examples."""

    ensemble_id: str
    split: Split
    label: int
    class_name: str
    num_examples: int
    accuracy: float | None
    single_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class DistillationRecord:
    """One row of `distillation.parquet`: one metric, on one split, of a student and of the network trained alone.

    Both were trained with the same seed: from the same weights, on the same batches.
    """

    seed: int
    student: str
    alone: str
    split: Split
    metric: str
    student_value: float
    alone_value: float
    difference: float


ARROW_TYPES: dict[str, pa.DataType] = {
    "str": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "datetime": pa.timestamp("us", tz="UTC"),
}


def arrow_type(annotation: str) -> pa.DataType:
    """The arrow type of a field annotated `str`, `int`, `float`, `bool`, `datetime`, or one of these or None."""
    name = annotation.removesuffix(" | None")
    if name in {"Stage", "Status", "Split"} or name.startswith("Literal["):
        name = "str"
    if name not in ARROW_TYPES:
        raise TypeError(f"a column cannot be of type {annotation!r}; wanted one of {', '.join(ARROW_TYPES)}")
    return ARROW_TYPES[name]


def arrow_schema(record: type) -> pa.Schema:
    """The arrow schema of a record type, in the order of its fields."""
    return pa.schema([(f.name, arrow_type(str(f.type))) for f in fields(record)])


def trial_schema(config_fields: dict[str, str]) -> pa.Schema:
    """Schema of `trials/`: TrialRecord's columns, then one `config.<field>` for each (field, annotation)."""
    config = [(f"config.{name}", arrow_type(annotation)) for name, annotation in config_fields.items()]
    return pa.schema([*arrow_schema(TrialRecord), *(pa.field(n, t) for n, t in config)])


def predictions_schema(num_classes: int) -> pa.Schema:
    """Schema of `predictions/<trial_id>.parquet`; `logits` holds the C classes' logits as float16."""
    return pa.schema(
        [
            ("variant", pa.string()),
            ("split", pa.string()),
            ("example_id", pa.int64()),
            ("label", pa.int64()),
            ("logits", pa.list_(pa.float16(), num_classes)),
        ]
    )


def instant(unix_seconds: float) -> datetime:
    """UTC time of a unix time in seconds."""
    return datetime.fromtimestamp(unix_seconds, UTC)
