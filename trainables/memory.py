"""What to do when a batch does not fit in a GPU's memory."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from results.schema import UsageError
from trainables.config import TrainConfig
from trainables.learner import Learner
from trainables.mixing import SoftTargets
from trainables.resident import TrainingImages, alone, memory_format

PROBES = (8, 24)
SPARE_SHARE = 0.08  # of the memory, for fragmentation and what a compiled step's first run takes


class DoesNotFit(UsageError):
    """A batch does not fit in a GPU's memory. The message says which would."""


def advice_on_memory(config: TrainConfig, data: TrainingImages) -> DoesNotFit:
    """The error that says which batch size would fit, from the memory that two small batches take."""
    gc.collect()
    ranks, data = data.ranks, alone(data)  # the others wait for gradients
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    available = free + torch.cuda.memory_reserved() - data.device_bytes - int(SPARE_SHARE * total)
    small, large = (_peak_bytes(config, data, batch_size=size) for size in PROBES)
    fits = largest_batch(small, large, available=available)
    share = -(-config.batch_size // ranks.size)
    of_each = f", {share} images for each of {ranks.size} workers," if ranks.several else ""
    message = f"batch_size={config.batch_size}{of_each} does not fit in {total / 2**30:.0f} GiB of GPU memory"
    if fits < 2:
        return DoesNotFit(f"{message}, nor does any other; choose a smaller backbone or image_size")
    parts = -(-share // fits)
    if ranks.several:
        return DoesNotFit(f"{message}; {fits} would: --set accumulation_steps={parts}, or use more workers")
    return DoesNotFit(
        f"{message}; {fits} would: --set batch_size={fits}, or --set accumulation_steps={parts} for updates from as "
        f"many images"
    )


def largest_batch(small_bytes: int, large_bytes: int, *, available: int) -> int:
    """The batch that fills `available` bytes, by the line through the two of PROBES; a multiple of 8 from 8 on."""
    per_image = max(1.0, (large_bytes - small_bytes) / (PROBES[1] - PROBES[0]))
    fits = int((available - (small_bytes - PROBES[0] * per_image)) / per_image)
    return fits // 8 * 8 if fits >= 8 else max(0, fits)


def _peak_bytes(config: TrainConfig, data: TrainingImages, *, batch_size: int) -> int:
    """The most memory that an eager step takes at a batch size, network and optimizer included."""
    split = data.split
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learner = Learner(replace(config, compile=False, cuda_graph=False, accumulation_steps=1), data)
    images = torch.zeros(batch_size, split.channels, split.image_size, split.image_size, device=data.device)
    targets = SoftTargets(
        torch.zeros(batch_size, 1, dtype=torch.int64, device=data.device),
        torch.ones(batch_size, 1, device=data.device),
        torch.zeros(batch_size, split.num_classes, device=data.device) if config.distill_weight else None,
    )
    learner.begin_epoch()
    learner.step(images.contiguous(memory_format=memory_format(config)), targets, lr=0.0)
    return torch.cuda.max_memory_allocated() - before
