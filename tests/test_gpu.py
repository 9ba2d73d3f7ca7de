"""On a GPU: captured steps equal eager ones, nothing waits inside an epoch, half precision, memory that runs out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from results.schema import SelectPredictions, UsageError
from tests.conftest import ROOT, command_environment
from trainables.config import TrainConfig
from trainables.datasets import LabelledImages, SplitImages, split
from trainables.distillation import DistilledImages
from trainables.evaluation import predictions
from trainables.loop import TrainState, train
from trainables.resident import ResidentImages, TrainingImages

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

SMALL = TrainConfig(
    max_epochs=2, batch_size=64, lr=0.05, crop_padding=1, mixup_alpha=0.5, label_smoothing=0.1, precision="float32"
)
PLAIN = {"compile": False, "cuda_graph": False}


@pytest.fixture(scope="module")
def on_gpu(digits: SplitImages) -> ResidentImages:
    return ResidentImages.on("cuda", digits)


def logits_of(config: TrainConfig, data: TrainingImages, state: TrainState | None = None) -> np.ndarray:
    state = TrainState(config, data) if state is None else state
    for _ in train(config, data, state=state):
        pass
    return predictions(state.best_model(), data, SelectPredictions, precision="float32").logits_NC.astype(float)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_without_a_gpu_the_benchmark_says_so(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.py"
    without_ray = "import sys, runpy; sys.modules.update(ray=None, optuna=None); sys.path.insert(0, sys.argv[2])"
    run = f"{without_ray}; sys.argv = [sys.argv[1], *sys.argv[3:]]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", run, str(script), str(script.parent), "--output", str(tmp_path / "gpu.parquet")],
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: torch sees no GPU here; run this where it does"


@on_a_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_captured_step_trains_as_an_eager_one(optimizer: str, on_gpu: ResidentImages) -> None:
    config = replace(SMALL, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 1e-3)
    eager = logits_of(replace(config, **PLAIN), on_gpu)  # type: ignore[arg-type]
    captured = logits_of(replace(config, compile=False, cuda_graph=True), on_gpu)
    assert np.abs(captured - eager).max() < 0.1


@on_a_gpu
def test_a_captured_student_trains_as_an_eager_one(on_gpu: ResidentImages) -> None:
    def teacher(images_BCHW: Tensor) -> Tensor:
        tilt_C = torch.linspace(-0.1, 0.1, 10, device=images_BCHW.device)
        return (images_BCHW.mean((1, 2, 3))[:, None] * tilt_C).log_softmax(-1)

    config, taught = replace(SMALL, distill_weight=0.7, accumulation_steps=2), DistilledImages(on_gpu, teacher)
    eager = logits_of(replace(config, **PLAIN), taught)  # type: ignore[arg-type]
    for changes in ({"compile": False, "cuda_graph": True}, {"compile": True, "cuda_graph": True}):
        assert np.abs(logits_of(replace(config, **changes), taught) - eager).max() < 0.1


@on_a_gpu
def test_training_on_a_gpu_and_on_a_cpu_agree(on_gpu: ResidentImages, digits: SplitImages) -> None:
    config = replace(SMALL, max_epochs=1, **PLAIN)  # type: ignore[arg-type]
    assert np.abs(logits_of(config, on_gpu) - logits_of(config, ResidentImages.on("cpu", digits))).max() < 0.1


@on_a_gpu
def test_a_second_trial_compiles_and_captures_nothing(on_gpu: ResidentImages) -> None:
    torch._dynamo.reset()
    counters.clear()
    first = replace(SMALL, compile=True, cuda_graph=True, dropout=0.3, weight_decay=1e-2)
    state = TrainState(first, on_gpu)
    logits_of(first, on_gpu, state)
    compiled, graphs = counters["stats"]["unique_graphs"], dict(state.learner._graphs or {})
    second = replace(first, dropout=0.0, weight_decay=1e-4, mixup_alpha=0.0, label_smoothing=0.0, lr=0.01, seed=4)
    reused = TrainState(second, on_gpu, learner=state.learner)
    logits = logits_of(second, on_gpu, reused)
    assert reused.learner is state.learner
    assert counters["stats"]["unique_graphs"] == compiled == 1
    assert dict(state.learner._graphs or {}) == graphs
    assert np.abs(logits - logits_of(replace(second, **PLAIN), on_gpu)).max() < 0.1  # type: ignore[arg-type]


@on_a_gpu
def test_a_resumed_captured_run_equals_one_never_stopped(on_gpu: ResidentImages) -> None:
    config = replace(SMALL, max_epochs=3, compile=False, cuda_graph=True, ema_decay=0.9)
    whole = logits_of(config, on_gpu)
    begun = TrainState(config, on_gpu)
    next(train(config, on_gpu, state=begun))
    resumed = TrainState(config, on_gpu)
    resumed.load_state_dict(begun.state_dict())
    assert np.abs(logits_of(config, on_gpu, resumed) - whole).max() < 0.1


@on_a_gpu
@pytest.mark.parametrize("policy", ["none", "autoaugment_cifar10", "trivialaugment"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu_inside_an_epoch(policy: str, on_gpu: ResidentImages) -> None:
    config = replace(SMALL, policy=policy, cutout_size=2, cutmix_alpha=1.0, ema_decay=0.9, gradient_clip=1.0, **PLAIN)  # type: ignore[arg-type]
    learner = TrainState(config, on_gpu).learner
    learner.begin_epoch()
    batches = on_gpu.batches(config, epoch=1, image_size=on_gpu.split.image_size)
    learner.step(*next(batches), lr=0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, targets in batches:
            learner.step(images, targets, lr=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_half_precision_learns(precision: str, cuda_graph: bool, on_gpu: ResidentImages) -> None:
    config = replace(SMALL, max_epochs=6, precision=precision, compile=False, cuda_graph=cuda_graph, mixup_alpha=0.0)
    results = list(train(config, on_gpu))
    assert results[-1].clean_train_accuracy > 0.7
    assert results[-1].train_loss < results[0].train_loss


@on_a_gpu
def test_a_batch_that_does_not_fit_says_which_would(digits: SplitImages) -> None:
    free, _ = torch.cuda.mem_get_info()
    per_image = 32 * 64 * 64 * 4  # bytes of the first convolution's output alone, at half the side in both directions
    count = int(3 * free / per_image) // 8 * 8
    labels = np.arange(count) % 10
    large = LabelledImages(np.zeros((count, 1, 128, 128), np.uint8), labels, 0, digits.class_names)
    data = ResidentImages.on("cuda", split(large, val_fraction=0.0))
    config = replace(SMALL, batch_size=count, max_epochs=1, crop_padding=0, mixup_alpha=0.0, flip=False, **PLAIN)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"batch_size={count} does not fit in \d+ GiB of GPU memory; \d+ would"):
        list(train(config, data))
