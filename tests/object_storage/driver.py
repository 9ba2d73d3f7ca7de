"""A driver in a process of its own, on a host of its own, which is killed."""

from __future__ import annotations

import signal
from pathlib import Path

from results import mirror
from tests.background import PATIENCE, running, wait_until
from tests.object_storage.places import log_in, stored


def killed_driver(results: str, tmp_path: Path, *, after: int = 0, num_puts: int = 0) -> list[str]:
    """Kill a driver once the store has so many events, or before a put of its own; the log in the store then."""
    output, environment = tmp_path / "driver", {mirror.CACHE_VARIABLE: str(tmp_path / "first")}
    arguments = ("tests.object_storage.killed", results, str(num_puts))
    with running(tmp_path, *arguments, output=output, environment=environment) as process:
        if not num_puts:
            wait_until(lambda: len(log_in(stored(results), tmp_path / "log")) > after, process, output)
            process.kill()
        assert process.wait(timeout=PATIENCE) == -signal.SIGKILL, output.read_text()
    return log_in(stored(results), tmp_path / "log")
