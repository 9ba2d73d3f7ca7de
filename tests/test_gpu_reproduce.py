"""The script that reproduces the large-batch run, at a size that a CPU trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT, command_environment

SCRIPT = ROOT / "benchmarks" / "gpu_reproduce.sh"
SMALL = "dataset=digits backbone=small_cnn batch_size=64 max_epochs=6 warmup_epochs=1 image_size=16 train_fraction=0.5"
MOST_STEPS = 20


def run(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with everything it makes below a folder, in a process that has no Ray."""
    without_ray = tmp_path / "without_ray"
    without_ray.mkdir(exist_ok=True)
    (without_ray / "ray.py").write_text("raise ImportError('there is no Ray')\n")
    environment = {
        **command_environment(),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(without_ray),
        "RESULTS_DIR": str(tmp_path / "runs"),
        "DATA_DIR": str(tmp_path / "data"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        **variables,
    }
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_steps_are_repeated_until_the_run_is_done_and_collected(tmp_path: Path) -> None:
    statuses = []
    while 0 not in statuses and len(statuses) < MOST_STEPS:
        done = run(tmp_path, "step", "ours", EXTRA=SMALL, STEP_SECONDS="9", SEED="43")
        assert done.returncode in {0, 130}, done.stdout + done.stderr
        statuses.append(done.returncode)
    assert statuses[-1] == 0
    assert {"best", "tta", "raw", "raw_tta"} <= set(done.stdout.split())
    collected = run(tmp_path, "collect", str(tmp_path / "reference"))
    assert collected.returncode == 0, collected.stderr
    folder = tmp_path / "reference" / "large_batch_ours_seed43"
    (trial,) = pd.read_parquet(folder / "trials").to_dict("records")
    assert (trial["status"], trial["epochs_trained"], trial["config.val_fraction"]) == ("completed", 6, 0.0)
    assert trial["seed"] == 43
    assert pd.read_parquet(folder / "epochs")["epoch"].tolist() == [1, 2, 3, 4, 5, 6]


def test_nothing_is_collected_where_nothing_was_trained(tmp_path: Path) -> None:
    assert run(tmp_path, "collect", str(tmp_path / "reference")).returncode == 0
    assert not list((tmp_path / "reference").iterdir())


def test_without_a_gpu_its_speed_is_not_measured(tmp_path: Path) -> None:
    done = run(tmp_path, "step", "speed", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (2, "error: torch sees no GPU here; run this where it does\n")


def test_the_data_set_is_delivered_in_parts(tmp_path: Path) -> None:
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).write_text(name)
        assert run(tmp_path, "deliver", str(tmp_path / name)).returncode == 0
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test.parquet", "train.parquet"]


@pytest.mark.parametrize("arguments", [(), ("step",), ("step", "other"), ("collect",), ("dance", "now")])
def test_wrong_usage_is_told(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")
