"""Optimizer, learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from trainables.config import TrainConfig


def sgd(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with momentum; vectors (biases, normalization) are decayed only with `decay_norm_and_bias`."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_norm_and_bias else 0.0},
    ]
    # Fused kernels exist for the CPU too; Nesterov without momentum is refused by torch.
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


class MovingAverage:
    """An exponential moving average of a model's weights and buffers; `update` after each step.

    The decay starts low and rises to `decay`, as min(decay, (1 + n) / (10 + n)) after n updates, so that short
    trainings are not averages of their initialization; the first update copies. The count stays on the host:
    torch's AveragedModel keeps it on the device, where reading it would stop every step.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights and buffers into account."""
        n = self._updates
        weight = 1 - min(self._decay, (1 + n) / (10 + n)) if n else 1.0
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floating], [new for _, new in floating], weight)
        for average, new in pairs:
            if not average.is_floating_point():
                average.copy_(new)
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"module": self.module.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.module.load_state_dict(state["module"])
        self._updates = state["updates"]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
