"""Ray Tune's side of a trial: an actor that trains one configuration after another."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ray import tune

from results.files import DISK_FULL
from results.objects import Refused, Unreachable
from results.schema import EpochResult, UsageError
from results.trial_files import TrialFiles
from trainables.config import TrainConfig
from trainables.course import legs_from
from trainables.datasets import SplitImages
from trainables.learner import Learner
from trainables.loop import TrainState
from trainables.process import die_with_parent, prepare_process
from trainables.progress import ProgressFile
from trainables.resident import batch_size_of
from trainables.trial import images_on, run_trial


class TuneTrial(tune.Trainable):
    """Iterates `run_trial`, a result a step. Reused for the next trial, with data and process kept."""

    def setup(self, config: dict[str, Any], data: SplitImages, device: str, threads: int) -> None:
        """See ray.tune.Trainable; `config` is that of `assignment_config`."""
        die_with_parent()
        prepare_process(threads=threads)
        self._data = images_on(device, data, config=TrainConfig(**config["train"]))
        self._learner: Learner | None = None
        self._results: Iterator[EpochResult] = iter(())
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take on another trial, with what the last one has warmed up."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        train_config = TrainConfig(**config["train"])
        if self._learner is not None and not self._learner.fits(train_config, self._data):
            # Its memory is to be free before the next one is made, and a learner is part of a cycle.
            self._results, self._learner = iter(()), None
            gc.collect()
        files = TrialFiles(**config["files"])
        self._check_files = files.check_current
        state = TrainState(train_config, self._data, learner=self._learner)
        self._learner = state.learner
        self._progress = ProgressFile(
            files.progress,
            epoch=config["epochs_recorded"] + 1,
            steps_an_epoch=len(self._data.split.train) // batch_size_of(train_config, self._data.split),
        )
        self._results = run_trial(
            train_config,
            self._data,
            files=files,
            course=legs_from(config["course"]),
            state=state,
            rung_epochs=config["rung_epochs"],
            epochs_recorded=config["epochs_recorded"],
            on_step=self._progress.step,
        )

    def step(self) -> dict[str, Any]:
        """The next epoch's figures; or `disk_full`, which ends the search and not the trial.

        An object store that does not answer for minutes, or that does not let this machine in, is like a full disk, and
        so is a results folder that this machine does not see.
        """
        try:
            self._check_files()
        except (Unreachable, UsageError) as error:
            return {"disk_full": str(error)}
        try:
            result = next(self._results)
        except (Unreachable, Refused) as error:
            return {"disk_full": str(error)}
        except OSError as error:
            if error.errno in DISK_FULL:
                return {"disk_full": str(error)}
            raise
        self._progress.epoch_ended(result.epoch)
        return {"worker": platform.node(), **asdict(result)}
