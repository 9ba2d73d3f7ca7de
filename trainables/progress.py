"""How far a trial's epoch is: a small file beside its resume file, for the driver's console to read.

A bucket has no such file. Nothing depends on it: where it cannot be written, nothing is shown.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

SECONDS_UNTIL_TOLD = 5.0
SECONDS_BETWEEN = 1.0


@dataclass(frozen=True)
class EpochProgress:
    """Steps of the epoch in progress that have been taken, and how many it has."""

    epoch: int
    steps: int
    of: int


class ProgressFile:
    """Counts the steps of an epoch and, once it is a long one, writes them down about once a second."""

    def __init__(self, path: Path | None, *, epoch: int, steps_an_epoch: int) -> None:
        """`path`: None where there is no file. `epoch`: the one that comes first."""
        self._path = path
        self._epoch, self._of = epoch, steps_an_epoch
        self._steps = 0
        self._next = time.monotonic() + SECONDS_UNTIL_TOLD

    def step(self) -> None:
        """Count one more step."""
        self._steps += 1
        now = time.monotonic()
        if self._path is not None and now >= self._next:
            self._next = now + SECONDS_BETWEEN
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(exist_ok=True)
                self._path.write_text(f"{self._epoch} {self._steps} {self._of}", encoding="ascii")

    def epoch_ended(self, epoch: int) -> None:
        """Count the next epoch's steps."""
        self._epoch, self._steps = epoch + 1, 0
        self._next = time.monotonic() + SECONDS_UNTIL_TOLD


def read_progress(path: Path) -> EpochProgress | None:
    """Return what a progress file says; None when there is none, or it is just being written."""
    try:
        epoch, steps, of = map(int, path.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return None
    return EpochProgress(epoch, steps, of)
