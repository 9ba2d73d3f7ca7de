"""Optimizer, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from trainables.config import TrainConfig


def sgd(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with momentum; vectors (biases, normalization) are decayed only with `decay_norm_and_bias`."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_norm_and_bias else 0.0},
    ]
    # Fused kernels are 5% faster on a CPU too; Nesterov without momentum is refused by torch.
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0, fused=True
    )


def learning_rate(step: int, *, steps_per_epoch: int, config: TrainConfig) -> float:
    """Linear warmup, then half a cosine (Loshchilov & Hutter 2017). `step` counts from 0.

    Warmup takes at most half of the training, so that a short run still decays.
    """
    total = config.max_epochs * steps_per_epoch
    warmup = min(config.warmup_epochs * steps_per_epoch, total / 2)
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / (total - warmup)
    floor = config.final_lr_fraction
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def ema_of(model: nn.Module, *, decay: float) -> AveragedModel:
    """A moving average of weights and buffers; `update_parameters` after each step.

    The decay starts low and rises to `decay`, as min(decay, (1 + n) / (10 + n)) after n updates, so that short
    trainings are not averages of their initialization.
    """

    def average(averaged: Sequence[Tensor], current: Iterable[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for average_tensor, tensor in zip(averaged, current, strict=True):
            if average_tensor.is_floating_point():
                average_tensor.lerp_(tensor, weight)
            else:
                average_tensor.copy_(tensor)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
