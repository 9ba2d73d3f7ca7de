"""What the event log says, folded: the trials of an experiment and the rows projected from them.

The driver applies each event as it appends it; reading a log applies the same events. One fold serves both,
so a live folder and a rebuilt one cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa

from results.diagnosis import is_regularized, regularization_verdict
from results.events import (
    CheckpointRemoved,
    Decided,
    EnsembleMade,
    EpochReported,
    Event,
    ExperimentResumed,
    ExperimentStarted,
    ExperimentStopped,
    TrialEnded,
    TrialPredicted,
    TrialRetried,
    TrialStarted,
)
from results.schema import (
    SCHEMA_VERSION,
    EpochRecord,
    EpochResult,
    Scalar,
    Stage,
    Status,
    TrialRecord,
    UsageError,
    arrow_schema,
    instant,
)

# Accuracies of fewer images, or of a first epoch, say too little of regularization.
FIRST_JUDGED_EPOCH = 2
JUDGED_SPLITS = ("train", "select")
FEWEST_JUDGED = 100
TIME_BUDGET = "time budget"
CUT_SHORT = ("error", TIME_BUDGET)

EPOCH_SCHEMA = arrow_schema(EpochRecord)
EPOCH_FIGURES = [f.name for f in fields(EpochRecord) if f.name in EpochResult.__dataclass_fields__]


@dataclass
class TrialHistory:
    """One trial so far."""

    started: TrialStarted
    epochs: list[EpochReported] = field(default_factory=list)
    decisions: dict[int, Decided] = field(default_factory=dict)
    retries: int = 0
    ended: TrialEnded | None = None
    predicted: bool = False
    """Whether predictions were made after its end, from its weights."""
    checkpoint_removed: bool = False

    @property
    def trial_id(self) -> str:
        """`t00042`, the Optuna number in five digits."""
        return self.started.trial_id

    @property
    def number(self) -> int:
        """The Optuna number."""
        return int(self.trial_id[1:])

    @property
    def last_epoch(self) -> int:
        """The newest epoch in the log, 0 before the first."""
        return self.epochs[-1].result.epoch if self.epochs else 0

    @property
    def completed(self) -> bool:
        """Whether it was trained to its end."""
        return self.ended is not None and self.ended.status == "completed"

    @property
    def has_predictions(self) -> bool:
        """Whether an ended trial has stored predictions."""
        return self.ended is not None and (self.ended.has_predictions or self.predicted)

    @property
    def has_weights(self) -> bool:
        """Whether an ended trial has stored weights, which retention has not removed."""
        return self.ended is not None and self.ended.has_checkpoint and not self.checkpoint_removed

    @property
    def may_be_member(self) -> bool:
        """Whether it may become a member of an ensemble: it has predictions, or weights that they can be made from."""
        has_model = self.has_predictions or self.has_weights
        return has_model and self.ended is not None and self.ended.status != "failed"

    @property
    def best(self) -> EpochResult | None:
        """The epoch behind the trial's weights and predictions; None before the first finite one."""
        finite = [e.result for e in self.epochs if not e.result.diverged]
        if self.ended is not None and self.ended.stop_reason in CUT_SHORT:
            # An end between rungs leaves the weights of the last rung.
            last_rung = max((d.epoch for d in self.decisions.values() if d.rung is not None), default=0)
            finite = [result for result in finite if result.epoch <= last_rung]
        if not finite:
            return None
        best_epoch = finite[-1].best_epoch
        return next(result for result in finite if result.epoch == best_epoch)


@dataclass
class History:
    """An experiment so far."""

    info: dict[str, Any] = field(default_factory=dict)
    state: str = "running"
    trials: dict[str, TrialHistory] = field(default_factory=dict)
    decisions: list[Decided] = field(default_factory=list)
    ensembles: list[EnsembleMade] = field(default_factory=list)
    # Kept while events are applied, so that what is asked after every report costs the same however many trials.
    endings: list[TrialHistory] = field(default_factory=list)
    """Ended trials in the order in which they ended."""
    retries: list[TrialRetried] = field(default_factory=list)
    num_started: Counter[Stage] = field(default_factory=Counter)
    num_ended: Counter[Status] = field(default_factory=Counter)
    num_epochs: int = 0
    num_epochs_of_ended: int = 0
    _unfinished: dict[str, TrialHistory] = field(default_factory=dict)

    @classmethod
    def read(cls, events: Iterable[Event]) -> History:
        """The fold of a whole log."""
        history = cls()
        for event in events:
            history.apply(event)
        return history

    def check(self, event: Event) -> None:
        """Raise UsageError when an event cannot follow what there is: its beginning or an epoch is missing."""
        if not self.info and not isinstance(event, ExperimentStarted):
            raise UsageError("the event log does not hold the beginning of the experiment; restore events/ from a copy")
        trial_id = getattr(event, "trial_id", None)
        if trial_id is None or isinstance(event, TrialStarted):
            return
        if trial_id not in self.trials:
            raise UsageError(f"the event log has {event.kind} of {trial_id}, which never started; restore events/")
        if isinstance(event, TrialEnded) and self.trials[trial_id].ended is not None:
            raise UsageError(f"the event log ends {trial_id} twice; restore events/ from a copy")
        last_epoch = self.trials[trial_id].last_epoch
        if isinstance(event, EpochReported) and event.result.epoch != last_epoch + 1:
            raise UsageError(
                f"the event log has epoch {event.result.epoch} of {trial_id} after epoch {last_epoch}; restore events/"
            )

    def apply(self, event: Event) -> None:
        """Take one more event into account. Raises UsageError as `check` does."""
        self.check(event)
        match event:
            case ExperimentStarted(info=info):
                self.info = dict(info)
            case ExperimentResumed(changes=changes):
                self.info.update(changes)
                self.state = "running"
            case ExperimentStopped(state=state):
                self.state = state
            case TrialStarted(trial_id=trial_id):
                self.trials[trial_id] = self._unfinished[trial_id] = TrialHistory(event)
                self.num_started[event.stage] += 1
            case EnsembleMade():
                self.ensembles.append(event)
            case EpochReported(trial_id=trial_id):
                self.trials[trial_id].epochs.append(event)
                self.num_epochs += 1
            case Decided(trial_id=trial_id, epoch=epoch):
                self.trials[trial_id].decisions[epoch] = event
                self.decisions.append(event)
            case TrialRetried(trial_id=trial_id):
                self.trials[trial_id].retries += 1
                self.retries.append(event)
            case TrialEnded(trial_id=trial_id):
                trial = self.trials[trial_id]
                trial.ended = event
                del self._unfinished[trial_id]
                self.endings.append(trial)
                self.num_ended[event.status] += 1
                self.num_epochs_of_ended += trial.last_epoch
            case TrialPredicted(trial_id=trial_id):
                self.trials[trial_id].predicted = True
            case CheckpointRemoved(trial_id=trial_id):
                self.trials[trial_id].checkpoint_removed = True

    @property
    def unfinished(self) -> list[TrialHistory]:
        """Trials that have started and not ended, in the order of their numbers."""
        return list(self._unfinished.values())

    @property
    def ended(self) -> list[TrialHistory]:
        """Trials that have a row, in the order of their numbers."""
        return sorted(self.endings, key=lambda trial: trial.number)

    def trial_row(self, trial: TrialHistory) -> dict[str, Any]:
        """The row of an ended trial: TrialRecord's fields, then `config.<field>`."""
        record = trial_record(trial, info=self.info)
        row: dict[str, Any] = {f.name: getattr(record, f.name) for f in fields(TrialRecord)}
        config_fields: dict[str, str] = self.info["config_fields"]
        row.update({f"config.{name}": trial.started.config.get(name) for name in config_fields})
        return row


def check_predicted(trial: TrialHistory, *, experiment: str) -> None:
    """Raise UsageError, with the fix, when a trial has ended without predictions."""
    if trial.ended is None or trial.has_predictions:
        return
    cause, fix = f"it ended {trial.ended.status} without any", "take another trial"
    if trial.ended.status == "pruned":
        cause = "it was stopped early, and its weights were removed"
        fix = "take another trial, or search with a larger --keep-checkpoints"
        if trial.has_weights:
            cause = "it was stopped early, and they have not been asked for"
            fix = f"python -m orchestrator.ensemble --experiment {experiment} --include-stopped makes them"
    raise UsageError(f"Cannot read predictions of {experiment}/{trial.trial_id}: {cause}. Fix: {fix}.")


def trial_record(trial: TrialHistory, *, info: dict[str, Any]) -> TrialRecord:
    """The record of an ended trial. Figures of quality are those of its best epoch, None without one."""
    started, ended, best = trial.started, trial.ended, trial.best
    if ended is None:
        raise ValueError(f"{trial.trial_id} has not ended")
    results = [event.result for event in trial.epochs]
    train_seconds = sum(r.epoch_seconds for r in results)
    images = sum(r.images_per_second * r.epoch_seconds for r in results)
    config: dict[str, Scalar] = started.config
    return TrialRecord(
        trial_id=trial.trial_id,
        stage=started.stage,
        origin=started.origin,
        control=started.control,
        finalist_of=started.finalist_of,
        regularization_strength=started.strength,
        status=ended.status,
        stop_reason=ended.stop_reason,
        dataset=str(config["dataset"]),
        backbone=str(config["backbone"]),
        seed=started.seed,
        epochs_trained=trial.last_epoch,
        max_epochs=int(config["max_epochs"] or 0),
        best_epoch=best.epoch if best else None,
        val_accuracy=best.val_accuracy if best else None,
        val_nll=best.val_nll if best else None,
        val_ece=best.val_ece if best else None,
        raw_val_accuracy=best.raw_val_accuracy if best else None,
        train_accuracy=best.train_accuracy if best else None,
        clean_train_accuracy=best.clean_train_accuracy if best else None,
        regularization_verdict=_verdict(trial, info=info),
        num_parameters=results[-1].num_parameters if results else None,
        multiply_adds=results[-1].multiply_adds if results else None,
        train_seconds=train_seconds,
        images_per_second=images / train_seconds if train_seconds else None,
        inference_images_per_second=(best or results[-1]).inference_images_per_second if results else None,
        peak_memory_bytes=max((r.peak_memory_bytes for r in results), default=None),
        predictions=f"predictions/{trial.trial_id}.parquet" if trial.has_predictions else "",
        checkpoint=f"checkpoints/{trial.trial_id}/best.safetensors" if trial.has_weights else "",
        error=ended.error,
        retries=trial.retries,
        started_at=instant(started.at),
        finished_at=instant(ended.at),
        node=trial.epochs[-1].node if trial.epochs else "",
        git_commit=str(info["git_commit"]),
        split_hash=str(info["split_hash"]),
        schema_version=SCHEMA_VERSION,
    )


def _verdict(trial: TrialHistory, *, info: dict[str, Any]) -> str | None:
    """The verdict at a trial's best epoch; None where the figures cannot carry one."""
    best = trial.best
    if (
        best is None
        or best.epoch < FIRST_JUDGED_EPOCH
        or min(info["split_sizes"][s] for s in JUDGED_SPLITS) < FEWEST_JUDGED
    ):
        return None
    attained = {e.result.epoch: e.result.train_accuracy / e.result.attainable_train_accuracy for e in trial.epochs}
    return regularization_verdict(
        train_accuracy=attained[best.epoch],
        clean_train_accuracy=best.clean_train_accuracy,
        val_accuracy=best.val_accuracy,
        progress=attained[best.epoch] - attained.get(best.epoch - 1, 0.0),
        regularized=is_regularized(trial.started.config),
    )


def epoch_rows(trials: Sequence[TrialHistory]) -> pa.Table:
    """The rows of these trials' epochs, each with the decision that followed it."""
    epochs = [(trial, event) for trial in trials for event in trial.epochs]
    decided = [trial.decisions.get(event.result.epoch) for trial, event in epochs]
    columns: dict[str, list[Any]] = {
        name: [getattr(event.result, name) for _, event in epochs] for name in EPOCH_FIGURES
    }
    columns["trial_id"] = [trial.trial_id for trial, _ in epochs]
    columns["reported_at"] = [instant(event.at) for _, event in epochs]
    columns["rung"] = [decision.rung if decision else None for decision in decided]
    columns["decision"] = [decision.decision if decision else None for decision in decided]
    return pa.table({name: columns[name] for name in EPOCH_SCHEMA.names}, schema=EPOCH_SCHEMA)
