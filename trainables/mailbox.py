"""What the workers of one training tell its driver, and whether it wants them to stop."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

from results.schema import EpochResult


@dataclass(frozen=True)
class Formed:
    """A group of workers is there, and has done nothing yet."""

    num_workers: int


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


Message = Formed | Began | Advanced | Trained | Left


class Mailbox:
    """Messages to the driver in the order of their arrival. Lives in a Ray actor that has threads."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._lock = threading.Lock()
        self._stop = False

    def post(self, *messages: Message) -> bool:
        """Leave messages. Returns whether the driver wants everybody to stop."""
        with self._lock:
            self._messages += messages
        return self._stop

    def take(self) -> list[Message]:
        """All messages that have come since the last time."""
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def stop(self) -> None:
        """Tell everybody who posts from now on to stop."""
        self._stop = True
