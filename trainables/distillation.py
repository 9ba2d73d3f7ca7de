"""Learning from a teacher: its probabilities for the very images that the student sees (Hinton et al. 2015).

The teacher looks at each batch as it was augmented and mixed for the student, as Beyer et al. (2022) found to matter.

Shape suffixes: B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from results.schema import IntArray
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.mixing import SoftTargets
from trainables.parallel import Ranks
from trainables.resident import TrainingImages, at_size

Teacher = Callable[[Tensor], Tensor]
"""Float images [B, C, H, W] in 0 to 255 at the dataset's size -> log-probabilities [B, C] on the same device."""


def softened_divergence(logits_BC: Tensor, teacher_log_probs_BC: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 KL(teacher_T || student_T) in nats, the mean over the batch; both softened by the temperature T.

    T^2 keeps the size of the gradient, which softening makes 1 / T^2 as large (Hinton et al. 2015).
    """
    teacher_BC = log_softmax(teacher_log_probs_BC / temperature, -1)
    student_BC = log_softmax(logits_BC.float() / temperature, -1)
    return temperature**2 * kl_div(student_BC, teacher_BC, log_target=True, reduction="batchmean")


def distilled_loss(
    hard_loss: Tensor,
    logits_BC: Tensor,
    teacher_log_probs_BC: Tensor,
    *,
    weight: float | Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """The loss on the labels and the divergence from the teacher, the latter by its weight in [0, 1]."""
    return (1 - weight) * hard_loss + weight * softened_divergence(logits_BC, teacher_log_probs_BC, temperature)


@dataclass(frozen=True, eq=False)
class DistilledImages:
    """Images whose training batches come with what a teacher makes of them, where the configuration wants it.

    `teacher_bytes`: what the teacher takes of the device's memory.
    """

    images: TrainingImages
    teacher: Teacher
    teacher_bytes: int = 0

    @property
    def split(self) -> SplitImages:
        """See TrainingImages."""
        return self.images.split

    @property
    def device(self) -> str:
        """See TrainingImages."""
        return self.images.device

    @property
    def device_bytes(self) -> int:
        """See TrainingImages; the teacher's included."""
        return self.images.device_bytes + self.teacher_bytes

    @property
    def ranks(self) -> Ranks:
        """See TrainingImages."""
        return self.images.ranks

    def batches(self, config: TrainConfig, *, epoch: int, image_size: int) -> Iterator[tuple[Tensor, SoftTargets]]:
        """See TrainingImages. Smaller images than the dataset's are shown to the teacher at the size that it knows."""
        for images_BCHW, targets in self.images.batches(config, epoch=epoch, image_size=image_size):
            yield images_BCHW, self._taught(images_BCHW, targets) if config.distill_weight else targets

    @torch.no_grad()
    def _taught(self, images_BCHW: Tensor, targets: SoftTargets) -> SoftTargets:
        shown_BCHW = at_size(images_BCHW, self.split.image_size)
        return replace(targets, teacher_log_probs_BC=self.teacher(shown_BCHW))

    def evaluation_batches(self, indices_N: IntArray) -> Iterator[Tensor]:
        """See TrainingImages."""
        return self.images.evaluation_batches(indices_N)
