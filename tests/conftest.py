"""Shared fixtures: real digits, tiny configurations, command lines run as a user would."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.background import PATIENCE
from tests.commands import Command
from trainables.datasets import LabelledImages, SplitImages, load_dataset, split
from trainables.resident import ResidentImages

# Where a token file exists, Ray's first start in a process switches tokens on there, and not for forked commands.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

ROOT = Path(__file__).parent.parent
CLUSTER_CPUS = 2
CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the files with Ray tests go first: they are the longest, and no process is to begin one at the end."""
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in with_ray)


@pytest.fixture(scope="session")
def digits() -> SplitImages:
    return load_dataset("digits", data_dir="unused")


@pytest.fixture(scope="session")
def resident_digits(digits: SplitImages) -> ResidentImages:
    return ResidentImages.on("cpu", digits)


@pytest.fixture
def noise_images() -> SplitImages:
    """80 RGB 16x16 images of noise in 4 classes, with an official test set of 16."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(96, 3, 16, 16), dtype=np.uint8)
    return split(LabelledImages(images, np.arange(96) % 4, 16, ("a", "b", "c", "d")))


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray cluster, for commands that show something else than the start of their own."""
    from tests.clusters import cluster_of  # and Ray, which most tests need not import

    with cluster_of(CLUSTER_CPUS) as cluster:
        yield cluster.address


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    """Run `python -m MODULE ARGUMENTS` from an empty folder, with results in tmp_path/runs."""
    return functools.partial(run_command, tmp_path)


def run_command(
    folder: Path, module: str, *arguments: str, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` in a folder."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Command(module, *arguments, folder=folder, stdout=stdout.fileno(), stderr=stderr.fileno())
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        printed = [file.seek(0) or file.read() for file in (stdout, stderr)]
        return subprocess.CompletedProcess(process.args, status, *printed)


def command_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
