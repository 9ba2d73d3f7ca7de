"""Layers that several families share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose probability is a tensor.

    A Python number would be a constant of a compiled or captured step, and a trial with another one would compile
    again; a tensor is read when the step runs, so that `set_dropout` changes it in place.
    """

    probability: Tensor

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.register_buffer("probability", torch.tensor(float(probability)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """In training, each value is 0 with the probability and else scaled to keep the mean."""
        if not self.training:
            return x
        kept = torch.rand_like(x) >= self.probability
        return x * kept / (1 - self.probability)


def set_dropout(net: nn.Module, probability: float) -> None:
    """Give every `Dropout` of a network another probability, in place."""
    for module in net.modules():
        if isinstance(module, Dropout):
            module.probability.fill_(probability)
