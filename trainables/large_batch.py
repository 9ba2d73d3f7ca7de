"""Ray Train's side of a training: what each of its workers does, and how workers stop in order.

All workers hold the images and take their share of every batch. The first one writes: after every epoch a checkpoint,
in the background, and at the end what is predicted. The driver learns of an epoch when its checkpoint is on disk.
"""

from __future__ import annotations

import math
import os
import platform
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from results.files import DISK_FULL
from results.objects import Unreachable
from results.schema import EpochResult, UsageError
from results.trial_files import TrialFiles
from trainables.background import BackgroundWriter
from trainables.config import TrainConfig
from trainables.course import legs_from
from trainables.loop import TrainState
from trainables.mailbox import Advanced, Began, Formed, Left, Message, Trained
from trainables.memory import DoesNotFit
from trainables.parallel import Agreement, Paused, Ranks
from trainables.process import die_with_parent, prepare_process
from trainables.trial import images_on, run_trial, serialized

SECONDS_BETWEEN_MESSAGES = 0.5
STOP = threading.Event()
"""Set when this worker's process is to stop: it got a SIGTERM, as on preempted machines, or the driver wants it."""


@dataclass(frozen=True)
class Task:
    """A trial for workers to train, or to go on with.

    `threads`: of each worker's arithmetic; None: a host's workers share its cores. `most_workers`: there will ever be.
    `data`: a reference to its SplitImages; `mailbox`: an actor.
    """

    train: dict[str, Any]
    course: list[dict[str, Any]]
    files: TrialFiles
    epochs_recorded: int
    device: str
    threads: int | None
    most_workers: int
    data: Any
    mailbox: Any

    def post(self, *messages: Message) -> bool:
        """Have messages delivered. Returns whether the driver wants everybody to stop."""
        return bool(ray.get(self.mailbox.post.remote(*messages)))


class Preempted(RuntimeError):
    """Some worker's machine is going to be taken away; the others go on from the checkpoint just written."""


class ListeningBackend(_TorchBackend):
    """Torch's process group, and workers that hear a SIGTERM."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """See ray.train.backend.Backend; what is executed here runs in the main threads of the workers."""
        assert isinstance(backend_config, ListeningConfig)
        ray.get(backend_config.mailbox.post.remote(Formed(len(worker_group))))
        super().on_start(worker_group, backend_config)
        worker_group.execute(_listen)


@dataclass
class ListeningConfig(TorchConfig):
    """The process group of a training by workers that listen; `mailbox`, an actor, is told of every group."""

    mailbox: Any = None

    @property
    def backend_cls(self) -> type[ListeningBackend]:
        """See ray.train.backend.BackendConfig."""
        return ListeningBackend


def _listen() -> None:
    die_with_parent()

    def note(number: int, frame: FrameType | None) -> None:
        STOP.set()

    signal.signal(signal.SIGTERM, note)


def train_share(settings: dict[str, Any]) -> None:
    """Train this worker's share of `settings["task"]`. Raises what ended it early, for Ray to begin again."""
    task: Task = settings["task"]
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    try:
        _train(task, ranks)
    except Paused as paused:
        if task.post(Left(ranks.rank, "paused", "")):
            return
        raise Preempted("a worker was told to stop") from paused
    except UsageError as error:
        task.post(Left(ranks.rank, "does_not_fit" if isinstance(error, DoesNotFit) else "usage", str(error)))
        raise
    except Exception as error:
        full = isinstance(error, Unreachable) or (isinstance(error, OSError) and error.errno in DISK_FULL)
        text = str(error) if full else traceback.format_exc()
        task.post(Left(ranks.rank, "disk" if full else "error", text))
        raise


def _train(task: Task, ranks: Ranks) -> None:
    task.files.check_current()
    here = ray.train.get_context().get_local_world_size()
    prepare_process(threads=task.threads or max(1, (os.cpu_count() or 1) // here))
    config = TrainConfig(**task.train)
    # The parts of a batch keep their size, which fits, when fewer workers have larger shares.
    config = replace(config, accumulation_steps=math.ceil(config.accumulation_steps * task.most_workers / ranks.size))
    images = images_on(task.device, ray.get(task.data), config=config, ranks=ranks)
    state = TrainState(config, images)
    agreement = Agreement(ranks)

    def on_step() -> None:
        if agreement.after_step(STOP.is_set()):
            raise Paused

    with _reporting(task, ranks, state) as reporter:
        for result in run_trial(
            config,
            images,
            files=task.files,
            course=legs_from(task.course),
            state=state,
            epochs_recorded=task.epochs_recorded,
            on_step=on_step,
            keep=reporter.writer.keep,
        ):
            reporter.results.append(result)
    agreement.close()


class Reporter:
    """The first worker's word to the driver."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._posted = task.epochs_recorded
        self.results: list[EpochResult] = []
        self.writer = BackgroundWriter(self._write, self._written)

    def _write(self, content: dict[str, Any]) -> None:
        self._task.files.replace(self._task.files.resume, serialized(content))

    def _written(self, content: dict[str, Any]) -> None:
        self.post([EpochResult(**values) for values in content["progress"]["results"]])

    def post(self, results: list[EpochResult]) -> None:
        """Tell of epochs that are on disk and that the driver does not know."""
        new = [result for result in results if result.epoch > self._posted]
        if new:
            self._task.post(*(Trained(platform.node(), result) for result in new))
            self._posted = new[-1].epoch


@contextmanager
def _reporting(task: Task, ranks: Ranks, state: TrainState) -> Iterator[Reporter]:
    """While the first worker trains: tell the driver how far it is, and hear whether it is to stop.

    At the end, also of a training that has paused, everything is on disk and told.
    """
    reporter = Reporter(task)
    if not ranks.is_first:
        yield reporter
        reporter.writer.close()
        return
    name = torch.cuda.get_device_name() if task.device == "cuda" else ""
    task.post(Began(ranks.size, platform.node(), name))
    ended = threading.Event()

    def converse() -> None:
        while not ended.wait(SECONDS_BETWEEN_MESSAGES):
            if task.post(Advanced(len(state.results) + 1, state.steps_taken)):
                STOP.set()

    threading.Thread(target=converse, name="messages", daemon=True).start()
    try:
        yield reporter
    except Paused:
        reporter.writer.close()
        raise
    else:
        reporter.writer.close()
        reporter.post(reporter.results)
    finally:
        ended.set()
