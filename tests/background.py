"""Searches and trainings in the background, while a test looks on, waits, and kills."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import command_environment

PATIENCE = 300  # seconds until what is waited for has come about
ON_A_BUSY_MACHINE = {"RAY_worker_niceness": "0"}  # by default everything else goes first
WORKERS = ("TuneTrial", "ResourceTrainable", "RayTrainWorker")


@contextmanager
def running(folder: Path, module: str, *arguments: str, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background; killed at the end of the block if it still runs."""
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env={**command_environment(), **ON_A_BUSY_MACHINE},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for what a command brings about. Raises AssertionError when it ends before, or nothing happens."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)


def wait_for_epochs(root: Path, count: int, process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait until the log of the experiment in `root` has so many epochs."""
    wait_until(lambda: epochs_in_log(root) >= count, process, output)


def epochs_in_log(root: Path) -> int:
    """How many epochs have been recorded of the experiment in `root`."""
    if not (root / "events").is_dir():
        return 0
    return sum(segment.read_text().count('"event": "epoch"') for segment in (root / "events").iterdir())


def training_workers(driver: int) -> list[psutil.Process]:
    """The processes below a driver that train."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if any(name in " ".join(process.cmdline()) for name in WORKERS):
                found.append(process)
        except psutil.Error:
            continue
    return found
