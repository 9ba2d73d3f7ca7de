"""Ray Tune's side of a trial: an actor that trains one configuration after another."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from ray import tune

from results.schema import EpochResult
from results.store import TrialFiles
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.loop import ResidentImages
from trainables.trial import run_trial

PR_SET_PDEATHSIG = 1
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def worker_environment(*, threads: int) -> dict[str, str]:
    """Variables that a worker's process must have from its start, before torch and glibc read them.

    glibc otherwise gives activations back to the kernel after every step, and idle OpenMP threads spin.
    """
    return {
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(32 * 2**30),
        "MALLOC_TOP_PAD_": str(256 * 2**20),
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
    }


class TuneTrial(tune.Trainable):
    """Iterates `run_trial`, a result a step. Reused for the next trial, with data and process kept."""

    def setup(self, config: dict[str, Any], data: SplitImages, device: str, threads: int) -> None:
        """See ray.tune.Trainable; `config` is that of `assignment_config`."""
        _die_with_parent()
        torch.set_num_threads(threads)
        self._data = ResidentImages.on(device, data)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take on another trial."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._results: Iterator[EpochResult] = run_trial(
            TrainConfig(**config["train"]),
            self._data,
            files=TrialFiles(**config["files"]),
            rung_epochs=config["rung_epochs"],
            epochs_recorded=config["epochs_recorded"],
        )

    def step(self) -> dict[str, Any]:
        """The next epoch's figures; or `disk_full`, which ends the search and not the trial."""
        try:
            result = next(self._results)
        except OSError as error:
            if error.errno in DISK_FULL:
                return {"disk_full": str(error)}
            raise
        return {"worker": platform.node(), **asdict(result)}


def _die_with_parent() -> None:
    """Have the kernel kill this worker when Ray's daemon, its parent, is killed (Linux)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)
