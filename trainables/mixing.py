"""Mixing images and their targets. Shape suffixes: B batch, C channels or classes, H height, W width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class MixedLabels:
    """Each image has its label with `weight_B` and its partner's with the rest."""

    labels_B: Tensor
    partner_labels_B: Tensor | None = None
    weight_B: Tensor | None = None

    def loss(self, logits_BC: Tensor, *, label_smoothing: float) -> Tensor:
        """Mean cross-entropy in nats against the mixed, smoothed targets (Szegedy et al. 2016)."""
        if self.partner_labels_B is None or self.weight_B is None:
            return cross_entropy(logits_BC, self.labels_B, label_smoothing=label_smoothing)
        own_B, partner_B = (
            cross_entropy(logits_BC, labels, reduction="none", label_smoothing=label_smoothing)
            for labels in (self.labels_B, self.partner_labels_B)
        )
        return (self.weight_B * own_B + (1 - self.weight_B) * partner_B).mean()

    def correct(self, logits_BC: Tensor) -> Tensor:
        """Number of right predictions, a mixed image counting each label by its weight; a scalar tensor."""
        predicted_B = logits_BC.argmax(1)
        own_B = (predicted_B == self.labels_B).float()
        if self.partner_labels_B is None or self.weight_B is None:
            return own_B.sum()
        partner_B = (predicted_B == self.partner_labels_B).float()
        return (self.weight_B * own_B + (1 - self.weight_B) * partner_B).sum()


def mixup(images_BCHW: Tensor, labels_B: Tensor, weight_B: Tensor) -> tuple[Tensor, MixedLabels]:
    """Mix each image with the one before it in the batch, which is in random order (Zhang et al. 2018)."""
    weight_B111 = weight_B[:, None, None, None]
    mixed_BCHW = torch.lerp(images_BCHW.roll(1, 0), images_BCHW, weight_B111)
    return mixed_BCHW, MixedLabels(labels_B, labels_B.roll(1), weight_B)
