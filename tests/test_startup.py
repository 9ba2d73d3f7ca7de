"""What a search imports and starts before its first trial trains: nothing that it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import command_environment
from trainables.backbones import BACKBONES
from trainables.datasets import load_dataset
from trainables.model import multiply_adds
from trainables.optim import never_compiled

SEARCH = "import orchestrator.search"
TRAINING = """
from trainables.config import TrainConfig
from trainables.datasets import load_dataset
from trainables.loop import TrainState, train_epoch
from trainables.resident import ResidentImages
images = ResidentImages.on("cpu", load_dataset("digits", data_dir="unused", train_fraction=0.1))
config = TrainConfig(batch_size=32)
train_epoch(config, images, TrainState(config, images))
"""
CLUSTER = """
import os, psutil, ray
from orchestrator.ray_cluster import ClusterStart
with ClusterStart(None, threads=1) as cluster:
    cluster.finish()
    started = psutil.Process().children(recursive=True)
    print(*(" ".join(p.cmdline()) for p in started), sep="\\n")
    print("NICER", ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
print("LEFT", [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])
"""


def output_of(code: str, folder: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=command_environment(), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def imported_by(code: str, folder: Path) -> set[str]:
    return set(output_of(f"{code}\nimport sys; print(*sys.modules)", folder).split())


def test_a_plan_is_checked_without_torch_and_tune(tmp_path: Path) -> None:
    assert not imported_by(SEARCH, tmp_path) & {"torch", "ray.tune", "torchvision", "scipy.stats", "sklearn"}


def test_a_small_net_is_trained_without_torchvision_and_a_compiler(tmp_path: Path) -> None:
    imported = imported_by(TRAINING, tmp_path)
    assert "torch" in imported
    assert not imported & {"torchvision", "torch._dynamo", "sklearn", "optuna"}


def test_digits_are_those_of_scikit_learn() -> None:
    ours, theirs = load_dataset("digits", data_dir="unused"), load_digits()
    assert np.array_equal(ours.images_NCHW[:, 0], np.rint(theirs.images * (255 / 16)))
    assert np.array_equal(ours.labels_N, theirs.target)


@pytest.mark.parametrize("name", ["small_cnn", "convnext_tiny", "speedrun_cnn", "efficientnet_b0"])
def test_operations_are_counted_as_torch_counts_them(name: str) -> None:
    net = BACKBONES[name](num_classes=10, dropout=0.0, image_size=32, channels=3).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    assert multiply_adds(net, channels=3, image_size=32) == counter.get_total_flops() // 2 > 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_is_never_compiled_takes_the_same_steps(kind: type[torch.optim.Optimizer]) -> None:
    def trained(of: type[torch.optim.Optimizer]) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        optimizer = of(net.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(8, 4)).square().sum().backward()
            with torch.no_grad():
                optimizer.step()
        return net.weight.detach()

    assert torch.equal(trained(never_compiled(kind)), trained(kind))


@pytest.mark.ray
def test_a_local_cluster_has_only_what_is_used_and_leaves_nothing_behind(tmp_path: Path) -> None:
    printed = output_of(CLUSTER, tmp_path)
    assert "raylet" in printed
    for unused in ("monitor.py", "dashboard.py", "ray::IDLE"):
        assert unused not in printed
    assert "NICER 0\n" in printed
    assert "LEFT []" in printed
