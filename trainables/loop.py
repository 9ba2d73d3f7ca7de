"""The training loop: the only one in the project. Knows nothing of Ray, searches or ensembles.

Shape suffixes: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import math
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from results.schema import EpochResult, EstimatePredictions, Predictions, SelectPredictions, TestPredictions
from trainables.augment import DROPOUT, EpochDraws, augment, generator
from trainables.backbones import BACKBONES, check_backbone
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.evaluation import predict
from trainables.mixing import MixedLabels, mixup
from trainables.optim import MovingAverage, learning_rate, set_learning_rate, sgd
from trainables.validation import accuracy, ece, log_softmax, nll

CLEAN_TRAIN_SAMPLE = 512
P = TypeVar("P", bound=Predictions)


class Classifier(nn.Module):
    """A backbone that takes images in 0 to 255 and normalizes them itself, so that weights are self-contained."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, backbone: nn.Module, *, mean_C: Tensor, std_C: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean_C11", mean_C[:, None, None])
        self.register_buffer("std_C11", std_C[:, None, None])

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Float images [N, C, H, W] in 0 to 255 -> logits [N, num_classes]."""
        logits: Tensor = self.backbone((images_NCHW - self.mean_C11) / self.std_C11)
        return logits


@dataclass(frozen=True, eq=False)
class ResidentImages:
    """A dataset on the device where the model trains."""

    split: SplitImages
    images_NCHW: Tensor
    labels_N: Tensor
    train_N: Tensor
    mean_C: Tensor

    @classmethod
    def on(cls, device: str, split: SplitImages) -> ResidentImages:
        """Move a dataset to a device; on a CPU the pixels are shared, not copied."""
        images, labels, train, mean = (
            _shared_tensor(array).to(device) for array in (split.images_NCHW, split.labels_N, split.train, split.mean_C)
        )
        return cls(split, images, labels, train, mean)

    @property
    def device(self) -> str:
        """Where the images are."""
        return self.images_NCHW.device.type


def _shared_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor over the array's memory, which nothing here writes to (Ray hands arrays out read-only)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class TrainState:
    """Everything that changes while one model trains, and can be saved and loaded."""

    def __init__(self, config: TrainConfig, data: ResidentImages) -> None:
        check_backbone(config.backbone)
        split = data.split
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            backbone = BACKBONES[config.backbone](
                num_classes=split.num_classes,
                dropout=config.dropout,
                image_size=split.image_size,
                channels=split.channels,
            )
        mean_C, std_C = torch.from_numpy(split.mean_C.copy()), torch.from_numpy(split.std_C.copy())
        model = Classifier(backbone, mean_C=mean_C, std_C=std_C)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.multiply_adds = multiply_adds(model, channels=split.channels, image_size=split.image_size)
        if data.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.model = model.to(data.device).to(memory_format=torch.channels_last)
        self.ema = MovingAverage(self.model, decay=config.ema_decay) if config.ema_decay else None
        self.optimizer = sgd(self.model, config)
        self.best_weights: dict[str, Tensor] = {}
        self.results: list[EpochResult] = []

    @property
    def evaluated(self) -> nn.Module:
        """The model whose figures are reported: the moving average when there is one."""
        return self.model if self.ema is None else self.ema.module

    def best_model(self) -> nn.Module:
        """A copy of the evaluated model with the best epoch's weights."""
        model = copy.deepcopy(self.evaluated)
        model.load_state_dict(self.best_weights)
        return model

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; readable with `torch.load(weights_only=True)`."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "results": [asdict(result) for result in self.results],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of the same configuration."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_weights = state["best_weights"]
        self.results = [EpochResult(**result) for result in state["results"]]


def multiply_adds(model: nn.Module, *, channels: int, image_size: int) -> int:
    """Multiply-adds of one image's forward pass (convolutions and matrix products)."""
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, channels, image_size, image_size))
    return int(counter.get_total_flops()) // 2


def train(config: TrainConfig, data: ResidentImages, *, state: TrainState | None = None) -> Iterator[EpochResult]:
    """Train a model, yielding each epoch's figures. `state` is where training goes on from, and is updated.

    Ends after `max_epochs`, when patience runs out, or after an epoch whose loss is not finite (a result whose
    `diverged` is true). The last partial batch of an epoch is dropped.
    """
    state = TrainState(config, data) if state is None else state
    while not finished(config, state):
        yield train_epoch(config, data, state)


def finished(config: TrainConfig, state: TrainState) -> bool:
    """Whether `train` has nothing left to do."""
    if not state.results:
        return False
    last = state.results[-1]
    return last.epoch >= config.max_epochs or last.diverged or last.out_of_patience


def train_epoch(config: TrainConfig, data: ResidentImages, state: TrainState) -> EpochResult:
    """Train one more epoch, evaluate, and remember the weights if they are the best so far."""
    start = time.perf_counter()
    steps = _train_steps(config, data, state, epoch=len(state.results) + 1)
    epoch_seconds = time.perf_counter() - start
    result = EpochResult(
        epoch=len(state.results) + 1,
        lr=steps.lr,
        train_loss=steps.loss,
        train_accuracy=steps.accuracy,
        clean_train_accuracy=_clean_train_accuracy(data, state.evaluated),
        **_validation_figures(data, state),
        grad_norm=steps.grad_norm,
        epoch_seconds=epoch_seconds,
        images_per_second=steps.num_images / epoch_seconds,
        num_parameters=state.num_parameters,
        multiply_adds=state.multiply_adds,
        peak_memory_bytes=peak_memory_bytes(data.device),
        best_epoch=0,
        out_of_patience=False,
    )
    return _remember(config, state, result)


@dataclass(frozen=True)
class StepFigures:
    """What an epoch's training steps amount to: means over them, and the last one's learning rate and gradient."""

    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    num_images: int


def _train_steps(config: TrainConfig, data: ResidentImages, state: TrainState, *, epoch: int) -> StepFigures:
    num_images = len(data.train_N)
    batch_size = min(config.batch_size, num_images)
    steps = num_images // batch_size
    image_size = data.split.image_size
    draws = EpochDraws.draw(config, epoch=epoch, num_images=num_images, image_size=image_size, device=data.device)
    on_gpu = data.device == "cuda"
    loss_sum, correct = torch.zeros(2, device=data.device)
    lr = math.nan
    state.model.train()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
        torch.manual_seed(int(generator(config, epoch=epoch, stream=DROPOUT).integers(2**62)))
        for step in range(steps):
            lr = learning_rate((epoch - 1) * steps + step, steps_per_epoch=steps, config=config)
            set_learning_rate(state.optimizer, lr)
            images_BCHW, labels = _batch(config, data, draws, draws.order_N[step * batch_size :][:batch_size])
            with torch.autocast(data.device, dtype=torch.bfloat16, enabled=on_gpu):
                logits_BC = state.model(images_BCHW)
                loss = labels.loss(logits_BC, label_smoothing=config.label_smoothing)
            state.optimizer.zero_grad()
            loss.backward()
            state.optimizer.step()
            if state.ema is not None:
                state.ema.update(state.model)
            # Summed on the device: reading a figure would stop the device until it has caught up.
            loss_sum += loss.detach()
            correct += labels.correct(logits_BC.detach())
    grads = [p.grad for p in state.model.parameters() if p.grad is not None]
    return StepFigures(
        loss=float(loss_sum) / steps,
        accuracy=float(correct) / (steps * batch_size),
        lr=lr,
        grad_norm=float(torch.nn.utils.get_total_norm(grads)),
        num_images=steps * batch_size,
    )


def _batch(
    config: TrainConfig, data: ResidentImages, draws: EpochDraws, positions_B: Tensor
) -> tuple[Tensor, MixedLabels]:
    indices_B = data.train_N[positions_B]
    images_BCHW = augment(data.images_NCHW[indices_B], positions_B, draws, config=config, fill_C=data.mean_C)
    labels = MixedLabels(data.labels_N[indices_B])
    if draws.mixup_weight_N is not None:
        images_BCHW, labels = mixup(images_BCHW, labels.labels_B, draws.mixup_weight_N[positions_B])
    return images_BCHW.contiguous(memory_format=torch.channels_last), labels


def _clean_train_accuracy(data: ResidentImages, model: nn.Module) -> float:
    num_images = len(data.train_N)
    # Evenly spread: images of a class often lie together.
    spread = np.linspace(0, num_images - 1, min(num_images, CLEAN_TRAIN_SAMPLE)).astype(np.int64)
    sample = data.train_N[torch.from_numpy(spread).to(data.train_N.device)]
    return accuracy(predict(model, data.images_NCHW, sample), data.labels_N[sample].cpu().numpy())


def _validation_figures(data: ResidentImages, state: TrainState) -> dict[str, float | None]:
    names = ("val_accuracy", "val_nll", "val_ece", "raw_val_accuracy")
    if not len(data.split.select):
        return dict.fromkeys(names)
    select = predictions(state.evaluated, data, SelectPredictions)
    raw = select if state.ema is None else predictions(state.model, data, SelectPredictions)
    if not (np.isfinite(select.logits_NC).all() and np.isfinite(raw.logits_NC).all()):
        return dict.fromkeys(names, math.nan)
    log_probs_NC = log_softmax(select.logits_NC)
    return {
        "val_accuracy": accuracy(select.logits_NC, select.labels_N),
        "val_nll": nll(log_probs_NC, select.labels_N),
        "val_ece": ece(np.exp(log_probs_NC), select.labels_N),
        "raw_val_accuracy": accuracy(raw.logits_NC, raw.labels_N),
    }


def _remember(config: TrainConfig, state: TrainState, result: EpochResult) -> EpochResult:
    """Append a result; keep the weights when no earlier epoch was better. Without validation the last counts."""
    best = next((r for r in state.results if r.epoch == state.results[-1].best_epoch), None)
    is_best = best is None or result.val_accuracy is None or _rank(result, config) > _rank(best, config)
    if is_best and not result.diverged:
        state.best_weights = {name: t.detach().cpu().clone() for name, t in state.evaluated.state_dict().items()}
        best = result
    best_epoch = best.epoch if best is not None else result.epoch
    waited = result.epoch - best_epoch
    result = replace(result, best_epoch=best_epoch, out_of_patience=0 < config.patience <= waited)
    state.results.append(result)
    return result


def _rank(result: EpochResult, config: TrainConfig) -> tuple[float, float]:
    """Higher is better: by the figure that is monitored, then by the other."""
    accuracy_and_nll = (result.val_accuracy or 0.0, -(result.val_nll or 0.0))
    return accuracy_and_nll if config.monitor == "val_accuracy" else accuracy_and_nll[::-1]


def predictions(model: nn.Module, data: ResidentImages, of: type[P]) -> P:
    """A model's predictions for the split that `of` stands for."""
    indices = {
        SelectPredictions: data.split.select,
        EstimatePredictions: data.split.estimate,
        TestPredictions: data.split.test,
    }[of]
    on_device = torch.from_numpy(indices.copy()).to(data.device)
    return of(
        logits_NC=predict(model, data.images_NCHW, on_device),
        labels_N=data.split.labels_N[indices],
        example_ids_N=indices,
    )


def peak_memory_bytes(device: str) -> int:
    """Most memory taken so far: by tensors on a GPU, by the process elsewhere."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
