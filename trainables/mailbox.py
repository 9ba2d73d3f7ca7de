"""What the workers of one training tell its driver, and whether it wants them to stop."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

from results.schema import EpochResult


@dataclass(frozen=True)
class Began:
    """A group of workers begins to train, or to go on. `device_name`: of a GPU, empty on other devices."""

    num_workers: int
    node: str
    device_name: str


@dataclass(frozen=True)
class Advanced:
    """Steps of the epoch in progress that have been handed to the devices."""

    epoch: int
    steps: int


@dataclass(frozen=True)
class Trained:
    """An epoch has ended, and what going on after it needs is on disk."""

    node: str
    result: EpochResult


@dataclass(frozen=True)
class Left:
    """A worker has stopped before the end: as it was told to, or because something failed.

    `cause`: `paused`; `does_not_fit`, a batch too large for the memory; `usage`, what else the user can mend; `disk`, a
    full one; or `error`.
    """

    rank: int
    cause: Literal["paused", "does_not_fit", "usage", "disk", "error"]
    text: str


Letter = Began | Advanced | Trained | Left


class Mailbox:
    """Letters to the driver in the order of their arrival. Lives in a Ray actor that has threads."""

    def __init__(self) -> None:
        self._letters: list[Letter] = []
        self._lock = threading.Lock()
        self._stop = False

    def post(self, *letters: Letter) -> bool:
        """Leave letters. Returns whether the driver wants everybody to stop."""
        with self._lock:
            self._letters += letters
        return self._stop

    def take(self) -> list[Letter]:
        """All letters that have come since the last time."""
        with self._lock:
            letters, self._letters = self._letters, []
        return letters

    def stop(self) -> None:
        """Tell everybody who posts from now on to stop."""
        self._stop = True
