"""Processes that train one model together, for tests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from results.store import TrialFiles
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.loop import TrainState
from trainables.parallel import Agreement, Paused, Ranks
from trainables.resident import ResidentImages
from trainables.trial import run_trial

# A process that has imported torch, from which the ranks are forked: to import it takes each five CPU-seconds.
processes.set_forkserver_preload(["tests.ranks"])


@dataclass(frozen=True)
class Trained:
    """What a rank has seen: its part of each step's loss, and the epochs' figures."""

    losses: list[float] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def trained_by(
    size: int, config: TrainConfig, data: SplitImages, folder: Path, *, pause_after: int | None = None
) -> Trained:
    """Train, or go on with, the trial in a folder by so many ranks; losses are the whole batches'.

    `pause_after`: steps after which the last rank wants to stop.
    """
    (folder / "generation").parent.mkdir(parents=True, exist_ok=True)
    (folder / "generation").write_text("1\n")
    of_ranks = in_processes(size, _train, config, data, str(folder), pause_after)
    first = of_ranks[0]
    for other in of_ranks[1:]:
        assert all(torch.equal(tensor, first.weights[name]) for name, tensor in other.weights.items())
        assert [e["train_loss"] for e in other.epochs] == [e["train_loss"] for e in first.epochs]
        assert [e["val_nll"] for e in other.epochs] == [e["val_nll"] for e in first.epochs]
    losses = [sum(of_step) for of_step in zip(*(trained.losses for trained in of_ranks), strict=True)]
    return Trained(losses, first.epochs, first.weights)


def _train(ranks: Ranks, config: TrainConfig, data: SplitImages, folder: str, pause_after: int | None) -> Trained:
    images = ResidentImages.on("cpu", data, ranks=ranks)
    state = TrainState(config, images)
    trained = Trained(weights=state.learner.model.state_dict())
    agreement = Agreement(ranks)
    summed: list[float] = []

    def on_step() -> None:
        loss_sum = float(state.learner.loss_sum)
        if state.steps_taken == state.begun.steps + 1:  # sums of an epoch gone on with begin where it was paused
            summed.append(state.begun.figures[0] if state.begun.steps and ranks.is_first else 0.0)
        trained.losses.append(loss_sum - summed[-1])
        summed.append(loss_sum)
        wanted = pause_after is not None and ranks.rank == ranks.size - 1 and len(trained.losses) >= pause_after
        if agreement.after_step(wanted):
            raise Paused

    with suppress(Paused):
        for result in run_trial(config, images, files=TrialFiles(folder, "t00000", 1), state=state, on_step=on_step):
            trained.epochs.append(vars(result))
    agreement.close()
    return trained


def in_processes(size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `job(ranks, *arguments)` returns in each of so many processes; in this one when it is one."""
    if size == 1:
        return [job(Ranks(), *arguments)]
    with tempfile.TemporaryDirectory() as folder:
        torch.save((job, arguments), f"{folder}/job")
        processes.start_processes(_run, (size, folder), nprocs=size, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(size)]


def _run(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    job, arguments = torch.load(f"{folder}/job", weights_only=False)
    torch.save(job(Ranks(rank, size), *arguments), f"{folder}/{rank}")
    dist.destroy_process_group()
