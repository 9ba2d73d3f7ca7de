"""Figures of a training for TensorBoard, beside what is recorded; an optional extra."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict
from types import TracebackType

from tensorboardX import SummaryWriter

from results.schema import EpochResult
from results.store import Experiment


class Scalars(AbstractContextManager["Scalars"]):
    """Writes a trial's epochs as scalars, as they are recorded; a resumed one adds to them."""

    def __init__(self, experiment: Experiment, trial_id: str) -> None:
        self._writer = SummaryWriter(str(experiment.tensorboard_folder(trial_id)), write_to_disk=True)

    def epoch(self, result: EpochResult) -> None:
        """Add an epoch's figures."""
        for name, value in asdict(result).items():
            if isinstance(value, float):
                self._writer.add_scalar(name, value, result.epoch)
        self._writer.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()
