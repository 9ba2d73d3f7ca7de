"""One process drives an experiment at a time, and each driver has a number."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from results.files import replace_file
from results.schema import UsageError


class ExperimentLocked(UsageError):
    """Another process is writing to the experiment."""


@contextlib.contextmanager
def locked(root: Path) -> Iterator[int]:
    """Hold the experiment's lock; the kernel gives it back however the process ends. Yields the generation."""
    try:
        file = (root / "driver.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {root}: {error.strerror}; mend its permissions") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExperimentLocked(
                f"experiment {root.name!r} is being written to by another process; "
                f"wait for it, stop it, or choose another --name"
            ) from error
        generation = read_generation(root) + 1
        replace_file(root / "generation", f"{generation}\n".encode(), sync=True)
        yield generation


def read_generation(root: Path) -> int:
    """The number of drivers that an experiment has had."""
    try:
        return int((root / "generation").read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0
