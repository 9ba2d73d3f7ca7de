"""The script that reproduces the large-batch run, at a size that a CPU trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.background import PATIENCE, wait_for_epochs
from tests.conftest import ROOT, command_environment

SCRIPT = ROOT / "benchmarks" / "gpu_reproduce.sh"
EPOCHS = 60
SMALL = (
    f"dataset=digits backbone=small_cnn batch_size=64 max_epochs={EPOCHS} warmup_epochs=1 image_size=16 "
    "train_fraction=0.5"
)


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """All that the script makes lies below a folder, and its processes have no Ray."""
    without_ray = tmp_path / "without_ray"
    without_ray.mkdir(exist_ok=True)
    (without_ray / "ray.py").write_text("raise ImportError('there is no Ray')\n")
    return {
        **command_environment(),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(without_ray),
        "RESULTS_DIR": str(tmp_path / "runs"),
        "DATA_DIR": str(tmp_path / "data"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        **variables,
    }


def run(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script to its end."""
    variables = environment(tmp_path, **variables)
    return subprocess.run([str(SCRIPT), *arguments], env=variables, capture_output=True, text=True, check=False)


def stopped_after_two_epochs(tmp_path: Path, **variables: str) -> int:
    """The exit status of a step that is told to stop as the script does it when the time is up."""
    output = tmp_path / "output"
    with output.open("wb") as file:
        step = subprocess.Popen(
            [str(SCRIPT), "step", "ours"], env=environment(tmp_path, **variables), stdout=file, stderr=file
        )
    wait_for_epochs(tmp_path / "runs" / "large_batch_ours_seed43", 2, step, output)
    (training,) = (p for p in psutil.Process(step.pid).children(recursive=True) if p.name().startswith("python"))
    training.terminate()
    return step.wait(timeout=PATIENCE)


@pytest.mark.slow
def test_a_step_that_was_stopped_is_run_again_and_collected(tmp_path: Path) -> None:
    assert stopped_after_two_epochs(tmp_path, EXTRA=SMALL, SEED="43") == 130
    done = run(tmp_path, "step", "ours", EXTRA=SMALL, SEED="43")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"best", "tta", "raw"} <= set(done.stdout.split())
    collected = run(tmp_path, "collect", str(tmp_path / "reference"))
    assert collected.returncode == 0, collected.stderr
    folder = tmp_path / "reference" / "large_batch_ours_seed43"
    (trial,) = pd.read_parquet(folder / "trials").to_dict("records")
    assert (trial["status"], trial["epochs_trained"], trial["config.val_fraction"]) == ("completed", EPOCHS, 0.0)
    assert trial["seed"] == 43
    assert pd.read_parquet(folder / "epochs")["epoch"].tolist() == list(range(1, EPOCHS + 1))


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
