"""Searches and trainings in the background, while a test looks on, waits, and kills."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.commands import Command

PATIENCE = 900  # seconds until a test gives up: no test depends on how fast the machine is
ON_A_BUSY_MACHINE = {"RAY_worker_niceness": "0"}  # by default everything else goes first
WORKERS = ("TuneTrial", "ResourceTrainable", "RayTrainWorker")
# Epochs of a third of a second: long enough to be hit by a signal.
SLOW_SPACE = """
from optuna.distributions import FloatDistribution
from search_spaces.space import Budget, SearchSpace
from trainables.config import TrainConfig

SPACE = SearchSpace(
    base=TrainConfig(dataset="digits", backbone="efficient200k", batch_size=64, crop_padding=1, flip=False,
                     image_size=12, train_fraction=0.4, ema_decay=0.9),
    dimensions={{"dropout": FloatDistribution(0.0, 0.5), "lr": FloatDistribution(1e-3, 0.3, log=True)}},
    baselines=({{"dropout": 0.1, "lr": 0.05}},),
    budget=Budget(num_trials={num_trials}, max_epochs={max_epochs}),
)
"""


@contextmanager
def running(
    folder: Path, module: str, *arguments: str, output: Path, environment: dict[str, str] | None = None
) -> Iterator[Command]:
    """A command in the background; killed at the end of the block if it still runs."""
    with output.open("ab") as file:
        process = Command(
            module,
            *arguments,
            folder=folder,
            stdout=file.fileno(),
            stderr=file.fileno(),
            environment={**os.environ, **ON_A_BUSY_MACHINE, **(environment or {})},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_until(happened: Callable[[], bool], process: Command, output: Path) -> None:
    """Wait for what a command brings about. Raises AssertionError when it ends before, or nothing happens."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)


def wait_for_epochs(root: Path, count: int, process: Command, output: Path) -> None:
    """Wait until the log of the experiment in `root` has so many epochs."""
    wait_until(lambda: epochs_in_log(root) >= count, process, output)


def wait_for_a_moment(seconds: float, root: Path, *, epochs: int) -> None:
    """Wait so long, or until the log of the experiment in `root` has so many more epochs: it never gets to its end."""
    most, deadline = epochs_in_log(root) + epochs, time.monotonic() + seconds
    while time.monotonic() < deadline and epochs_in_log(root) < most:
        time.sleep(0.01)


def epochs_in_log(root: Path) -> int:
    """How many epochs have been recorded of the experiment in `root`."""
    if not (root / "events").is_dir():
        return 0
    return sum(segment.read_text().count('"event": "epoch"') for segment in (root / "events").iterdir())


def still_there(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of some processes that are being killed that do not end. One that nobody has reaped has ended."""
    deadline = time.monotonic() + PATIENCE
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
