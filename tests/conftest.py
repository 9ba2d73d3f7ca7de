"""Shared fixtures: real digits, tiny configurations, command lines run as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainables.datasets import LabelledImages, SplitImages, load_dataset, split
from trainables.resident import ResidentImages

ROOT = Path(__file__).parent.parent
CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


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


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    """Run `python -m MODULE ARGUMENTS` from an empty folder, with results in tmp_path/runs."""

    def run(module: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=tmp_path,
            env=command_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def command_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
