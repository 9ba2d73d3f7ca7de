"""The training loop: the only one in the project. Knows nothing of Ray, searches or ensembles."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from results.schema import EpochResult, SelectPredictions
from trainables.config import TrainConfig
from trainables.draws import DROPOUT, generator
from trainables.evaluation import predict, predictions
from trainables.learner import Learner
from trainables.memory import advice_on_memory
from trainables.model import evenly_spread
from trainables.precision import seeded
from trainables.resident import TrainingImages, batch_size_of
from trainables.schedules import image_size_in, learning_rate, num_frozen_parts
from trainables.validation import accuracy, ece, log_softmax, nll

CLEAN_TRAIN_SAMPLE = 512


@dataclass(frozen=True)
class BegunEpoch:
    """How far the epoch in progress has come: its steps, their seconds, and the sums of its figures."""

    steps: int = 0
    seconds: float = 0.0
    figures: tuple[float, ...] = ()


class TrainState:
    """Everything that changes while one model trains, and can be saved and loaded."""

    def __init__(self, config: TrainConfig, data: TrainingImages, *, learner: Learner | None = None) -> None:
        """`learner`: one that an earlier trial has left, used again if it fits."""
        if data.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if learner is not None and learner.fits(config, data):
            learner.restart(config)
            self.learner = learner
        else:
            self.learner = Learner(config, data)
        self.begun = BegunEpoch()
        self.best_weights: dict[str, Tensor] = {}
        self.best_select: SelectPredictions | None = None
        self.raw_select: SelectPredictions | None = None
        """What the last epoch's raw weights predict; None where an earlier worker trained it."""
        self.results: list[EpochResult] = []
        self.epoch_began, self.steps_taken = 0.0, 0

    @property
    def evaluated(self) -> nn.Module:
        """The model whose figures are reported: the moving average when there is one."""
        return self.learner.evaluated

    def pause(self) -> None:
        """Remember where in an epoch an `on_step` ended the training, to be saved; of all ranks."""
        self.learner.finish_epoch()
        seconds = time.perf_counter() - self.epoch_began
        self.begun = BegunEpoch(self.steps_taken, seconds, tuple(self.learner.figures))

    def best_model(self) -> nn.Module:
        """A copy of the evaluated model with the best epoch's weights."""
        return self.learner.evaluated_copy(self.best_weights)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; readable with `torch.load(weights_only=True)`."""
        return {
            **self.learner.state_dict(),
            **({"begun": asdict(self.begun)} if self.begun.steps else {}),
            "best_weights": self.best_weights,
            "results": [asdict(result) for result in self.results],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of the same configuration."""
        self.learner.load_state_dict(state)
        self.begun = BegunEpoch(**state.get("begun", {}))
        self.best_weights = state["best_weights"]
        self.best_select = self.raw_select = None  # not saved: predicted again where they are needed
        self.results = [EpochResult(**result) for result in state["results"]]


def train(
    config: TrainConfig,
    data: TrainingImages,
    *,
    state: TrainState | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[EpochResult]:
    """Train a model, yielding each epoch's figures. `state` is where training goes on from, and is updated.

    Ends after `max_epochs`, when patience runs out, or after an epoch whose loss is not finite (a result whose
    `diverged` is true). The last partial batch of an epoch is dropped. `on_step` is called after each step has been
    handed to the device; what it raises ends the training in the middle of the epoch.

    Raises DoesNotFit when a batch does not fit in GPU memory, saying which size would.
    """
    state = TrainState(config, data) if state is None else state
    while not finished(config, state):
        yield train_epoch(config, data, state, on_step=on_step)


def finished(config: TrainConfig, state: TrainState) -> bool:
    """Whether `train` has nothing left to do."""
    if not state.results:
        return False
    last = state.results[-1]
    return last.epoch >= config.max_epochs or last.diverged or last.out_of_patience


def train_epoch(
    config: TrainConfig, data: TrainingImages, state: TrainState, *, on_step: Callable[[], None] = lambda: None
) -> EpochResult:
    """Train one more epoch, evaluate, and remember the weights if they are the best so far."""
    state.epoch_began = time.perf_counter() - state.begun.seconds
    try:
        steps = train_steps(config, data, state, epoch=len(state.results) + 1, on_step=on_step)
    except torch.OutOfMemoryError:
        steps = None
    if steps is None:  # outside the handler, whose traceback holds the failed step's activations
        raise advice_on_memory(config, data)
    epoch_seconds = time.perf_counter() - state.epoch_began
    state.begun, state.steps_taken = BegunEpoch(), 0
    select, inference_rate = _timed_select(config, data, state.evaluated)
    state.raw_select = select if state.learner.ema is None else _timed_select(config, data, state.learner.model)[0]
    result = EpochResult(
        epoch=len(state.results) + 1,
        lr=steps.lr,
        train_loss=steps.loss,
        train_accuracy=steps.accuracy,
        attainable_train_accuracy=steps.attainable,
        clean_train_accuracy=_clean_train_accuracy(config, data, state.evaluated),
        **_validation_figures(select, state.raw_select),
        grad_norm=steps.grad_norm,
        epoch_seconds=epoch_seconds,
        images_per_second=steps.num_images / epoch_seconds,
        inference_images_per_second=inference_rate,
        num_parameters=state.learner.num_parameters,
        multiply_adds=state.learner.multiply_adds,
        peak_memory_bytes=peak_memory_bytes(data.device),
        best_epoch=0,
        out_of_patience=False,
    )
    return _remember(config, state, result, select, copies=data.ranks.is_first)


@dataclass(frozen=True)
class StepFigures:
    """What an epoch's training steps amount to: means over them, and the last one's learning rate."""

    loss: float
    accuracy: float
    attainable: float
    lr: float
    grad_norm: float
    num_images: int


def train_steps(
    config: TrainConfig,
    data: TrainingImages,
    state: TrainState,
    *,
    epoch: int,
    on_step: Callable[[], None] = lambda: None,
) -> StepFigures:
    """An epoch's steps without any evaluation. The device is waited for once, at the end."""
    learner, batch_size = state.learner, batch_size_of(config, data.split)
    steps = len(data.split.train) // batch_size
    lr = math.nan
    learner.begin_epoch()
    begun = state.begun
    if begun.steps:
        learner.set_figures(begun.figures)
    # Masks of dropout are drawn on the device, in order: each rank has its own, and so has what follows a pause.
    key = (data.ranks.rank, begun.steps) if data.ranks.rank or begun.steps else ()
    learner.freeze(num_frozen_parts(epoch, num_parts=len(learner.parts), config=config))
    image_size = image_size_in(epoch, full_size=data.split.image_size, config=config)
    with seeded(int(generator(config, epoch=epoch, stream=DROPOUT, key=key).integers(2**62)), data.device):
        for step, (images_BCHW, targets) in enumerate(data.batches(config, epoch=epoch, image_size=image_size)):
            lr = learning_rate((epoch - 1) * steps + step, steps_per_epoch=steps, batch_size=batch_size, config=config)
            if step < begun.steps:
                continue
            learner.step(images_BCHW, targets, lr=lr)
            state.steps_taken = step + 1
            on_step()
    learner.finish_epoch()
    return StepFigures(
        loss=float(learner.loss_sum) / steps,
        accuracy=float(learner.correct) / (steps * batch_size),
        attainable=float(learner.attainable) / (steps * batch_size),
        lr=lr,
        grad_norm=float(learner.norm_sum) / steps,
        num_images=steps * batch_size,
    )


def _timed_select(
    config: TrainConfig, data: TrainingImages, model: nn.Module
) -> tuple[SelectPredictions | None, float | None]:
    """What a model predicts for select and how many images a second it takes; nothing where there is no select."""
    if not len(data.split.select):
        return None, None
    start = time.perf_counter()
    select = predictions(model, data, SelectPredictions, precision=config.precision)
    return select, len(select.labels_N) / (time.perf_counter() - start)


def _clean_train_accuracy(config: TrainConfig, data: TrainingImages, model: nn.Module) -> float:
    train = data.split.train
    sample = train[evenly_spread(len(train), CLEAN_TRAIN_SAMPLE)]
    return accuracy(predict(model, data, sample, precision=config.precision), data.split.labels_N[sample])


def _validation_figures(select: SelectPredictions | None, raw: SelectPredictions | None) -> dict[str, float | None]:
    names = ("val_accuracy", "val_nll", "val_ece", "raw_val_accuracy", "raw_val_nll")
    if select is None or raw is None:
        return dict.fromkeys(names)
    if not (np.isfinite(select.logits_NC).all() and np.isfinite(raw.logits_NC).all()):
        return dict.fromkeys(names, math.nan)
    log_probs_NC = log_softmax(select.logits_NC)
    return {
        "val_accuracy": accuracy(select.logits_NC, select.labels_N),
        "val_nll": nll(log_probs_NC, select.labels_N),
        "val_ece": ece(np.exp(log_probs_NC), select.labels_N),
        "raw_val_accuracy": accuracy(raw.logits_NC, raw.labels_N),
        "raw_val_nll": nll(log_softmax(raw.logits_NC), raw.labels_N),
    }


def _remember(
    config: TrainConfig, state: TrainState, result: EpochResult, select: SelectPredictions | None, *, copies: bool
) -> EpochResult:
    """Append a result; keep the weights when no earlier epoch was better. Without validation the last counts.

    `copies`: whether this rank is the one whose copy of the weights counts.
    """
    best = next((r for r in state.results if r.epoch == state.results[-1].best_epoch), None)
    is_best = best is None or result.val_accuracy is None or _rank(result, config) > _rank(best, config)
    if is_best and not result.diverged:
        if copies:
            weights = state.evaluated.state_dict()
            state.best_weights = {name: t.detach().to("cpu", copy=True) for name, t in weights.items()}
        state.best_select = select
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


def peak_memory_bytes(device: str) -> int:
    """Most memory taken so far: by tensors on a GPU, by the process elsewhere."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
