"""Mixing images and their targets: at most one of mixup, CutMix and RICAP for an image.

Partners are neighbours in the batch, which is in random order: image b is mixed with b - 1, and in RICAP also with
b - 2 and b - 3 (counted around). Partners are images as they were before any mixing.

Shape suffixes: N training images, E images that an epoch uses in their order, B batch, S images concerned, C channels
or classes, H height, W width, K labels an image can have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss, pad

from trainables.config import TrainConfig
from trainables.draws import CUTMIX, MIXUP, RICAP, Array, Group, Grouped, generator, places
from trainables.precision import widened


@dataclass(frozen=True)
class SoftTargets:
    """Each image has the labels of its row, by weights that sum to 1; and what a teacher makes of it, if any."""

    labels_BK: Tensor
    weights_BK: Tensor
    teacher_log_probs_BC: Tensor | None = None

    def loss(self, logits_BC: Tensor, label_smoothing: float | Tensor = 0.0) -> Tensor:
        """Mean cross-entropy in nats against the mixed, smoothed targets (Szegedy et al. 2016)."""
        log_probs_BC = log_softmax(widened(logits_BC), -1)
        if self.labels_BK.shape[1] == 1:
            loss = nll_loss(log_probs_BC, self.labels_BK[:, 0])
        else:
            loss = -(log_probs_BC.gather(1, self.labels_BK) * self.weights_BK).sum(1).mean()
        if isinstance(label_smoothing, float) and not label_smoothing:
            return loss
        uniform = -log_probs_BC.sum(1).mean()
        return (1 - label_smoothing) * loss + uniform * (label_smoothing / log_probs_BC.shape[1])

    def correct(self, logits_BC: Tensor) -> Tensor:
        """Number of right predictions, a mixed image counting each label by its weight; a scalar tensor."""
        predicted_B1 = logits_BC.argmax(1, keepdim=True)
        return ((predicted_B1 == self.labels_BK) * self.weights_BK).sum()


@dataclass(frozen=True)
class StepMixing:
    """How the images of one step are mixed; None for what none of them gets."""

    weights_BK: Tensor
    mixup_weight_B: Tensor | None
    cutmix: Group | None
    ricap: Group | None


@dataclass(frozen=True)
class MixingDraws:
    """How the images of an epoch are mixed, on the device; None for what is off."""

    batch_size: int
    weights_EK: Tensor
    mixup_weight_E: Tensor | None
    cutmix: Grouped | None
    ricap: Grouped | None

    @classmethod
    def draw(
        cls,
        config: TrainConfig,
        *,
        epoch: int,
        num_images: int,
        image_size: int,
        device: str | torch.device,
        batch_size: int,
        used_E: Array,
    ) -> MixingDraws:
        """Draw an epoch's mixings; `used_E`: the positions of its batches."""
        mixup_share, cutmix_share, ricap_share = shares(config)
        weights_NK = np.zeros((num_images, num_labels(config)))
        weights_NK[:, 0] = 1
        mixup_weight_E = cutmix = ricap = None
        rng = generator(config, epoch=epoch, stream=MIXUP)
        alpha = config.mixup_alpha
        mixup_weight_N = rng.beta(alpha, alpha, size=num_images).astype(np.float32) if mixup_share else None
        choice_N = rng.random(num_images)
        if mixup_weight_N is not None:
            mixup_weight_N[choice_N >= mixup_share] = 1
            weights_NK[:, 0], weights_NK[:, 1] = mixup_weight_N, 1 - mixup_weight_N
            mixup_weight_E = torch.from_numpy(mixup_weight_N[used_E]).to(device)
        if cutmix_share:
            rng = generator(config, epoch=epoch, stream=CUTMIX)
            cut_N = (choice_N >= mixup_share) & (choice_N < mixup_share + cutmix_share)
            box_N4, partner_N = cutmix_boxes(rng, config.cutmix_alpha, num_images=num_images, image_size=image_size)
            weights_NK[cut_N, :2] = np.stack([1 - partner_N, partner_N], -1)[cut_N]
            cutmix = Grouped.where(cut_N[used_E], box_N4[used_E], batch_size=batch_size, device=device)
        if ricap_share:
            rng = generator(config, epoch=epoch, stream=RICAP)
            patched_N = choice_N >= 1 - ricap_share
            patches_NX, shares_N4 = ricap_patches(rng, config.ricap_beta, num_images=num_images, image_size=image_size)
            weights_NK[patched_N] = shares_N4[patched_N]
            ricap = Grouped.where(patched_N[used_E], patches_NX[used_E], batch_size=batch_size, device=device)
        weights_EK = torch.from_numpy(weights_NK[used_E].astype(np.float32)).to(device)
        return cls(batch_size, weights_EK, mixup_weight_E, cutmix, ricap)

    def step(self, step: int) -> StepMixing:
        """How the images of one step are mixed."""
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        return StepMixing(
            weights_BK=self.weights_EK[part],
            mixup_weight_B=None if self.mixup_weight_E is None else self.mixup_weight_E[part],
            cutmix=None if self.cutmix is None else self.cutmix.of_kind(step),
            ricap=None if self.ricap is None else self.ricap.of_kind(step),
        )


def shares(config: TrainConfig) -> tuple[float, float, float]:
    """Shares of the images that mixup, CutMix and RICAP get; they sum to at most 1."""
    wanted = (
        config.mixup_probability * (config.mixup_alpha > 0),
        config.cutmix_probability * (config.cutmix_alpha > 0),
        config.ricap_probability * (config.ricap_beta > 0),
    )
    total = max(1.0, sum(wanted))
    return wanted[0] / total, wanted[1] / total, wanted[2] / total


def num_labels(config: TrainConfig) -> int:
    """How many labels an image can have."""
    mixup_share, cutmix_share, ricap_share = shares(config)
    return 4 if ricap_share else 2 if mixup_share or cutmix_share else 1


def reach(config: TrainConfig) -> int:
    """How many images before an image in the batch it may be mixed with."""
    return num_labels(config) - 1


def without_first(targets: SoftTargets, count: int) -> SoftTargets:
    """The targets of all images but the first few."""
    teacher = targets.teacher_log_probs_BC
    return SoftTargets(
        targets.labels_BK[count:], targets.weights_BK[count:], None if teacher is None else teacher[count:]
    )


def cutmix_boxes(rng: np.random.Generator, alpha: float, *, num_images: int, image_size: int) -> tuple[Array, Array]:
    """Squares [N, 4] (top, left, bottom, right) around random pixels, cut off at the borders, and their exact shares.

    Before they are cut off, shares of the image are from Beta(alpha, alpha) (Yun et al. 2019).
    """
    side_N1 = (image_size * np.sqrt(rng.beta(alpha, alpha, size=(num_images, 1)))).astype(np.int64)
    start_N2 = rng.integers(0, image_size, size=(num_images, 2)) - side_N1 // 2
    box_N4 = np.concatenate([start_N2, start_N2 + side_N1], -1).clip(0, image_size)
    area_N = (box_N4[:, 2] - box_N4[:, 0]) * (box_N4[:, 3] - box_N4[:, 1])
    return box_N4, area_N / image_size**2


def ricap_patches(rng: np.random.Generator, beta: float, *, num_images: int, image_size: int) -> tuple[Array, Array]:
    """Ten numbers an image, and the exact shares [N, 4] of its patches (Takahashi et al. 2018).

    The numbers: row and column of the point where the patches meet; for each patch how many rows further down it lies
    in the image that it is from, then how many columns further right. The patches are upper left (the image's own),
    upper right, lower left and lower right.
    """
    cut_N2 = np.rint(image_size * rng.beta(beta, beta, size=(num_images, 2))).astype(np.int64)
    row_N, column_N = cut_N2.T
    zero_N = np.zeros_like(row_N)
    heights_N4 = np.stack([row_N, row_N, image_size - row_N, image_size - row_N], -1)
    widths_N4 = np.stack([column_N, image_size - column_N, column_N, image_size - column_N], -1)
    down_N4 = places(rng, heights_N4, image_size=image_size) - np.stack([zero_N, zero_N, row_N, row_N], -1)
    across_N4 = places(rng, widths_N4, image_size=image_size) - np.stack([zero_N, column_N, zero_N, column_N], -1)
    return np.concatenate([cut_N2, down_N4, across_N4], -1), heights_N4 * widths_N4 / image_size**2


def mix(images_BCHW: Tensor, labels_B: Tensor, mixing: StepMixing) -> tuple[Tensor, SoftTargets]:
    """Mix images with their neighbours; K labels an image, however many of them this step's images have."""
    rolled = [labels_B.roll(k) if k else labels_B for k in range(mixing.weights_BK.shape[1])]
    targets = SoftTargets(torch.stack(rolled, 1), mixing.weights_BK)
    if mixing.mixup_weight_B is None and mixing.cutmix is None and mixing.ricap is None:
        return images_BCHW, targets
    images_BHWC = images_BCHW.permute(0, 2, 3, 1)
    weight_B = mixing.mixup_weight_B
    mixed_BHWC = images_BHWC if weight_B is None else mixup(images_BHWC, weight_B)
    for group, patched in ((mixing.cutmix, cutmix), (mixing.ricap, ricap)):
        if group is not None:
            mixed_BHWC = mixed_BHWC.index_copy(0, group.index_S, patched(images_BHWC, group))
    return mixed_BHWC.permute(0, 3, 1, 2), targets


def mixup(images_BHWC: Tensor, weight_B: Tensor) -> Tensor:
    """Each image by its weight and the one before it by the rest (Zhang et al. 2018)."""
    weight_B111 = weight_B[:, None, None, None]
    mixed_BHWC = torch.empty_like(images_BHWC)
    # In two parts, which saves a pass over memory that rolling would take.
    torch.lerp(images_BHWC[:-1], images_BHWC[1:], weight_B111[1:], out=mixed_BHWC[1:])
    torch.lerp(images_BHWC[-1:], images_BHWC[:1], weight_B111[:1], out=mixed_BHWC[:1])
    return mixed_BHWC


def cutmix(images_BHWC: Tensor, group: Group) -> Tensor:
    """The images of a group with boxes of the images before them (Yun et al. 2019)."""
    num_images, height, width, channels = images_BHWC.shape
    top, left, bottom, right = group.values_SX.unbind(1)
    inside = _between(height, top, bottom)[:, :, None] * _between(width, left, right, channels)[:, None, :]
    rows = images_BHWC.reshape(num_images, -1)
    own, partner = (rows.index_select(0, (group.index_S - roll) % num_images).view(inside.shape) for roll in (0, 1))
    return torch.lerp(own, partner, inside).view(-1, height, width, channels)


def ricap(images_BHWC: Tensor, group: Group) -> Tensor:
    """The images of a group as patchworks of them and the three before them (Takahashi et al. 2018)."""
    num_images, height, width, channels = images_BHWC.shape
    cut_row, cut_column, *moves = group.values_SX.long()[:, :, None].unbind(1)
    rows_H = torch.arange(height, device=images_BHWC.device)
    # Number of the pixel of the batch that would be the first of each row, if the row were all of patch k.
    patches_SH = [
        (((group.index_S - k) % num_images)[:, None] * height + moves[k] + rows_H) * width + moves[4 + k]
        for k in range(4)
    ]
    above = rows_H < cut_row
    left_SH, right_SH = (torch.where(above, patches_SH[k], patches_SH[k + 2]) for k in (0, 1))
    # A row begins up to `width` pixels before the first pixel or ends as far after the last: nothing there is used.
    pixels = pad(images_BHWC.reshape(-1), (width * channels, width * channels))
    pieces = pixels.as_strided((num_images * height * width + width + 1, width * channels), (channels, 1))
    left, right = (pieces.index_select(0, row_SH.view(-1) + width) for row_SH in (left_SH, right_SH))
    is_left = _between(width, torch.zeros_like(cut_column[:, 0]), cut_column[:, 0], channels)[:, None, :]
    shape = (len(cut_row), height, width * channels)
    return torch.lerp(right.view(shape), left.view(shape), is_left).view(-1, height, width, channels)


def _between(length: int, start_S: Tensor, end_S: Tensor, repeats: int = 1) -> Tensor:
    """1.0 at places from start to before end, 0.0 elsewhere; [S, length x repeats], each place `repeats` times.

    Weights of `lerp`, which choose exactly when they are 0 or 1 and are faster than `where` on a CPU.
    """
    place = torch.arange(length * repeats, device=start_S.device) // repeats
    return ((place >= start_S[:, None]) & (place < end_S[:, None])).float()
