"""One training divided among processes, "ranks", each with its share of every batch. Knows nothing of Ray.

A batch is the same however many ranks divide it: the order of an epoch and what each image gets are keyed by (seed,
epoch, image), so a rank takes its rows of the whole batch, and the rows before them where images are mixed with those.

Shape suffixes: N examples, C classes, R rows of a rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from results.schema import IntArray, UsageError
from trainables.config import TrainConfig


class Paused(Exception):
    """Training stops between two steps, the same ones on all ranks, to be gone on with from a checkpoint."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train one model together. With several, torch's process group is theirs.

    What is said to be of all ranks has to be called by all of them, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def several(self) -> bool:
        """Whether the training is divided at all."""
        return self.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things: shares differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def rows(self, batch_size: int, *, reach: int) -> IntArray:
        """Rows of a whole batch: the `reach` before this rank's share, counted around, and its share."""
        share = self.share(batch_size)
        return np.arange(share.start - reach, share.stop) % batch_size

    def order(self, order_N: IntArray, *, batch_size: int, reach: int) -> IntArray:
        """Of an epoch's order, the whole batches' `rows` one after the other."""
        steps = len(order_N) // batch_size
        batches = order_N[: steps * batch_size].reshape(steps, batch_size)
        return batches[:, self.rows(batch_size, reach=reach)].reshape(-1)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.several:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gathered(self, part_NC: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """All ranks' rows, one rank's after the other's."""
        if not self.several:
            return part_NC
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part_NC)
        return np.concatenate(parts)

    def check_same(self, what: object) -> None:
        """Raise RuntimeError when not all ranks have the same."""
        if self.several:
            others: list[Any] = [None] * self.size
            dist.all_gather_object(others, what)
            if any(other != what for other in others):
                raise RuntimeError(f"the ranks do not stand at the same place: {others}")


ALONE = Ranks()


def check_divisible(config: TrainConfig, *, batch_size: int, num_workers: int, device: str) -> None:
    """Raise UsageError when a configuration cannot be trained by so many workers."""
    if num_workers == 1:
        return
    parts = num_workers * config.accumulation_steps
    if batch_size < parts:
        raise UsageError(
            f"a batch of {batch_size} images cannot be divided among {num_workers} workers with accumulation_steps="
            f"{config.accumulation_steps}: wanted {parts} or more; use fewer workers, or raise batch_size"
        )
    if batch_size < 2 * parts:
        raise UsageError(
            f"a batch of {batch_size} images leaves parts of a single image to {num_workers} workers with "
            f"accumulation_steps={config.accumulation_steps}; batch normalization needs two: use fewer workers, or "
            f"raise batch_size to {2 * parts}"
        )
    if config.pipeline != "resident":
        raise UsageError(
            f"pipeline={config.pipeline} with several workers: only images in memory are divided; use one worker, or "
            f"--set pipeline=resident"
        )
    if config.snapshot_every:
        raise UsageError(
            f"snapshot_every={config.snapshot_every} with several workers: averages of snapshots need batch statistics "
            f"of whole batches; leave it out, or use one worker"
        )
    if config.cuda_graph:
        raise UsageError(
            "cuda_graph=true with several workers: their gradients are exchanged step by step; leave it out"
        )
    if config.sync_batch_norm and device != "cuda":
        raise UsageError(
            f"sync_batch_norm=true on {device}: torch synchronizes batch norms on GPUs only; leave it out, and every "
            f"worker normalizes its own share"
        )


def synchronizes_norms(config: TrainConfig, device: str, ranks: Ranks) -> bool:
    """Whether batch norms see whole batches although they are divided: on GPUs, unless told otherwise."""
    return ranks.several and device == "cuda" and config.sync_batch_norm is not False


def divided(model: nn.Module, config: TrainConfig, device: str) -> DistributedDataParallel:
    """A model whose gradients are, after each backward pass, the mean over all ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is torch 2.15's
        network = DistributedDataParallel(
            model,
            device_ids=[torch.cuda.current_device()] if device == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    if config.gradient_compression == "bfloat16":
        network.register_comm_hook(None, bf16_compress_hook)
    return network


def agree_on_norms(models: Iterable[nn.Module], ranks: Ranks) -> None:
    """Give every rank's batch norms the means of all ranks' running statistics; of all ranks."""
    statistics: list[Tensor] = []
    for model in models:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                statistics += [module.running_mean, module.running_var]
    if statistics:  # of all norms in one message: a network has a hundred
        means = ranks.summed(torch.cat(statistics)) / ranks.size
        for statistic, mean in zip(statistics, means.split([len(s) for s in statistics]), strict=True):
            statistic.copy_(mean)


class Agreement:
    """Whether any rank wants to stop, told to all of them after the same step.

    Each step asks what the step before it has sent, so that nobody waits: a wish is heard a step late.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sent: tuple[dist.Work, Tensor] | None = None

    def after_step(self, wanted: bool) -> bool:
        """Whether all ranks stop now; of all ranks, after each step."""
        if not self._ranks.several:
            return wanted
        heard = self._heard()
        wishes = torch.tensor([int(wanted)])
        self._sent = (dist.all_reduce(wishes, async_op=True), wishes)
        return heard

    def _heard(self) -> bool:
        if self._sent is None:
            return False
        work, wishes = self._sent
        self._sent = None
        work.wait()
        return bool(wishes.item())

    def close(self) -> None:
        """Wait for what has been sent; of all ranks."""
        self._heard()


def num_bytes(model: nn.Module, config: TrainConfig) -> int:
    """Bytes of gradient that a rank hands to the all-reduce of one step."""
    learned = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return learned // 2 if config.gradient_compression == "bfloat16" else learned
