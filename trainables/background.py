"""Checkpoints written while training goes on: copied at once, written to disk by a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

Content = dict[str, Any]


class BackgroundWriter(AbstractContextManager["BackgroundWriter"]):
    """Writes the newest content it is given; what comes while it writes replaces what waits.

    `write` stores a content; `written` is called, in the writer's thread, after it. Both may raise: the next call of
    `keep` or `close` then raises it. Leaving the block waits for the last content, unless it is left by an exception.
    """

    def __init__(self, write: Callable[[Content], None], written: Callable[[Content], None]) -> None:
        self._write, self._written = write, written
        self._changed = threading.Condition()
        self._waiting: Content | None = None
        self._closing = False
        self._failure: BaseException | None = None
        self.stall_seconds = 0.0
        """For which training has waited: copies."""
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def keep(self, content: Content) -> None:
        """Copy a content to the host and have it written."""
        start = time.perf_counter()
        copied = copied_to_host(content)
        with self._changed:
            self._raise_failure()
            self._waiting = copied
            self._changed.notify()
        self.stall_seconds += time.perf_counter() - start

    def close(self) -> None:
        """Wait until the last content is written."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._raise_failure()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (content := self._next()) is not None:
            try:
                self._write(content)
                self._written(content)
            except BaseException as error:  # noqa: BLE001  # handed to whoever trains
                self._failure = error
                return

    def _next(self) -> Content | None:
        with self._changed:
            while self._waiting is None and not self._closing:
                self._changed.wait()
            content, self._waiting = self._waiting, None
            return content


def copied_to_host(content: Content) -> Content:
    """A copy that training does not change any more; tensors come over at once, and the device is waited for once.

    `best_weights` are the host's own already and are never changed in place.
    """
    copied = {name: value if name == "best_weights" else _copied(value) for name, value in content.items()}
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
