"""A training by several workers: Ray Train runs them, the ledger records what they tell."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from orchestrator import cli, driver, search_outlook
from orchestrator.ledger import Assignment, Ledger
from orchestrator.plan import EXECUTION, SearchPlan
from orchestrator.ray_cluster import check_reachable, cluster_room, ray_cluster
from orchestrator.tracking import Track, Tracked, tracking
from orchestrator.training_console import TrainingConsole
from results.events import ExperimentStopped
from results.schema import UsageError
from results.store import Experiment
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.large_batch import ListeningConfig, Task, train_share
from trainables.learner import check_trainable
from trainables.mailbox import Advanced, Began, Formed, Left, Mailbox, Message, Trained
from trainables.precision import peak_flops
from trainables.trial import check_resumable

RESTARTS_WITHOUT_EPOCH = 2
SECONDS_TO_STOP = 60.0
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_ANSWER = 15.0  # of an actor; where Ray itself is gone, Ray ends this process after a minute
SECONDS_UNTIL_SAID = 20.0
CALLS_AT_A_TIME = 8
"""Of a training's actor: one is Ray Train's."""
TRAIN_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
ELASTIC_SETTINGS = {
    # A host that has died still counts for some seconds: a group that waits for it gives up, and is counted anew.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
}
RESIZE_SECONDS = 30.0


@dataclass(frozen=True)
class Workers:
    """How many workers train: as many as there is room for between two numbers, which may be the same."""

    least: int
    most: int

    @property
    def elastic(self) -> bool:
        """Whether their number may change."""
        return self.least != self.most

    @property
    def flag(self) -> str:
        """What was typed."""
        return f"--elastic {self.least}:{self.most}" if self.elastic else f"--num-workers {self.most}"


def drive(
    experiment: Experiment | None,
    plan: SearchPlan,
    data: SplitImages,
    args: argparse.Namespace,
    console: Console,
    *,
    name: str,
    workers: Workers,
) -> Experiment:
    """Train what a plan has left to train as the experiment's one driver; a new one is made once Ray has the room."""
    threads = args.threads or max(1, (os.cpu_count() or 1) // workers.most)
    with ExitStack() as stack:
        stack.enter_context(cli.INTERRUPTS.deferred())
        if experiment is not None:
            stack.enter_context(experiment.driving())
        stack.enter_context(ray_cluster(args.address, threads=threads))
        cli.INTERRUPTS.listen()  # Ray has installed handlers of its own
        cli.INTERRUPTS.check()
        device = choose_device(args.device, workers)
        check_trainable(plan.space.base, data, device=device, num_workers=workers.most)
        check_reachable(args.results_dir)
        if experiment is None:
            plan = search_outlook.of_workers(plan, data, device, workers.most, args, threads=threads, console=console)
            experiment = driver.begin(args, plan, data, name=name)
            stack.enter_context(experiment.driving())
        else:
            for trial in experiment.history.unfinished:
                check_resumable(plan.space.base, data, experiment.files(trial.trial_id))
            driver.record_resumption(experiment, plan, data)
        ledger = driver.make_ledger(experiment, plan, max_concurrent=1)
        reference = ray.put(data)
        while (assignment := ledger.next_trial()) is not None:
            task = Task(
                train={**assignment.config, **{name: getattr(plan.space.base, name) for name in EXECUTION}},
                course=[asdict(leg) for leg in assignment.course],
                files=experiment.files(assignment.trial_id),
                epochs_recorded=assignment.epochs_recorded,
                device=device,
                threads=args.threads,
                most_workers=workers.most,
                data=reference,
                mailbox=_start_actor(workers),
            )
            try:
                _train(ledger, assignment, task, data, args, console, workers=workers)
            finally:
                ray.kill(task.mailbox)
        experiment.record(ExperimentStopped(at=time.time(), state="finished"))
    return experiment


def choose_device(device: str, workers: Workers) -> str:
    """`auto` settled: GPUs if the cluster has any. Raises UsageError when there are fewer than workers."""
    there = cluster_room()
    if device == "mps":
        raise UsageError("--device mps: Ray Train has no workers for it; give --device cpu, or leave --num-workers out")
    if device == "auto":
        device = "cuda" if there.get("GPU", 0) else "cpu"
    kinds = ("GPU", "CPU") if device == "cuda" else ("CPU",)
    room, kind = min((int(there.get(kind, 0)), kind) for kind in kinds)
    if room < workers.least:
        advice = f"lower it to {room}" if room else "give --device cpu"
        raise UsageError(
            f"{workers.flag}, but Ray sees {room} {kind}{'' if room == 1 else 's'} and each worker takes one; "
            f"{advice}, or give an --address with more"
        )
    return device


def _start_actor(workers: Workers) -> Any:
    """The training's actor, on this host."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    settings = TRAIN_SETTINGS | (ELASTIC_SETTINGS if workers.elastic else {})
    actor = ray.remote(num_cpus=0, max_concurrency=CALLS_AT_A_TIME)(TrainingActor)
    started = actor.options(scheduling_strategy=here, runtime_env={"env_vars": settings}).remote()
    ready = started.__ray_ready__.remote()
    # Its process imports torch first: on a busy machine that takes longer than an answer may.
    while not ray.wait([ready], timeout=SECONDS_BETWEEN_LOOKS)[0]:
        cli.INTERRUPTS.check()
    return started


def _failure(fitted: ray.ObjectRef) -> str:
    """Why Ray Train has come to an end."""
    try:
        ray.get(fitted, timeout=SECONDS_TO_ANSWER)
    except RayError as error:
        return str(error)
    return "the workers stopped before the last epoch"


def _answer(reference: ray.ObjectRef) -> Any:
    """What the mailbox answers. Raises WorkersFailed when it is gone with its host, or Ray with it."""
    try:
        return ray.get(reference, timeout=SECONDS_TO_ANSWER)
    except (GetTimeoutError, RayActorError) as error:
        cli.INTERRUPTS.check()  # who stops this process may have stopped Ray's
        raise driver.WorkersFailed("Ray does not answer any more where this command runs") from error


def _train(
    ledger: Ledger,
    assignment: Assignment,
    task: Task,
    data: SplitImages,
    args: argparse.Namespace,
    console: Console,
    *,
    workers: Workers,
) -> None:
    """Train one trial. Raises Interrupted once the workers have stopped, UsageError for what the user can mend."""
    config = TrainConfig(**assignment.config)  # type: ignore[arg-type]  # written by to_dict
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="train-", ignore_cleanup_errors=True))
        shown = stack.enter_context(TrainingConsole(console, config, data, after_epoch=assignment.epochs_recorded))
        tracked = Tracked(ledger.experiment, assignment.trial_id, assignment.config)
        tell = [shown.epoch, *(stack.enter_context(tracking(name, tracked)) for name in args.track)]
        recorder = Recorder(ledger, assignment.trial_id, shown, tell)
        fitted = task.mailbox.fit.remote(task, workers, scratch)
        asked_at: float | None = None
        while not recorder.failure and not ray.wait([fitted], timeout=SECONDS_BETWEEN_LOOKS)[0]:
            if asked_at is None and cli.INTERRUPTS.arrived:
                _answer(task.mailbox.stop.remote())
                asked_at = time.monotonic()
            if asked_at is not None and time.monotonic() - asked_at > SECONDS_TO_STOP:
                break
            recorder.read(_answer(task.mailbox.take.remote()))
            recorder.say_if_waiting()
        recorder.read(_answer(task.mailbox.take.remote()))
        cli.INTERRUPTS.check()
        if ledger.experiment.history.trials[assignment.trial_id].ended is None:
            raise driver.WorkersFailed(recorder.failure or _failure(fitted))


class TrainingActor(Mailbox):
    """Runs Ray Train and has the messages: an actor, whose end is that of all workers, whatever Ray Train waits for."""

    def fit(self, task: Task, workers: Workers, scratch: str) -> None:
        """Have workers train until they are done; raises what Ray Train gives up for."""
        on_gpu = task.device == "cuda"
        elastic = {"elastic_resize_monitor_interval_s": RESIZE_SECONDS} if workers.elastic else {}
        trainer = TorchTrainer(
            train_share,
            train_loop_config={"task": task},
            torch_config=ListeningConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", mailbox=task.mailbox),
            scaling_config=ScalingConfig(
                num_workers=(workers.least, workers.most) if workers.elastic else workers.most,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if on_gpu else {})},
                **elastic,
            ),
            # How often is too often is the recorder's to say, who sees whether epochs come of it.
            run_config=RunConfig(name="train", storage_path=scratch, failure_config=FailureConfig(max_failures=-1)),
        )
        trainer.fit()


class Recorder:
    """Writes down what workers tell of one trial."""

    def __init__(self, ledger: Ledger, trial_id: str, shown: TrainingConsole, tell: Sequence[Track]) -> None:
        """`tell`: whom to tell of an epoch that has been recorded."""
        self._ledger, self._trial_id, self._shown, self._tell = ledger, trial_id, shown, tell
        self._num_workers = 0
        self._restarts = 0
        self._without_epoch = 0
        self._reason = ""
        self._said_at = time.monotonic()
        self._waiting = True
        self.failure = ""
        """Why no more groups of workers are to be waited for."""

    @property
    def _last_epoch(self) -> int:
        return self._ledger.experiment.history.trials[self._trial_id].last_epoch

    def read(self, messages: list[Message]) -> None:
        """Act on messages. Raises UsageError or OSError, with the trial failed or not, for what the user can mend."""
        for message in messages:
            match message:
                case Formed():
                    self._formed(message)
                case Began():
                    self._began(message)
                case Advanced():
                    self._shown.advanced(message.epoch, message.steps)
                case Trained():
                    self._trained(message)
                case Left():
                    self._left(message)

    def say_if_waiting(self) -> None:
        """Say it, once, when there have been no workers for a while."""
        if self._waiting and time.monotonic() - self._said_at > SECONDS_UNTIL_SAID:
            self._shown.say("waiting for workers: the cluster has no room for them yet, or they are starting")
            self._waiting = False

    def _formed(self, message: Formed) -> None:
        """Another group: the one before is lost, unless one was told to leave or there are more of them now."""
        before, self._num_workers = self._num_workers, message.num_workers
        paused, grown = self._reason == "paused", not self._reason and message.num_workers > before
        self._restarts += before > 0
        if before and not paused and not grown:
            self._without_epoch += 1
            reason = self._reason or "a worker was lost"
            self._ledger.retried(self._trial_id, reason)
            if self._without_epoch > RESTARTS_WITHOUT_EPOCH:
                self._give_up(reason)
        self._reason, self._waiting = "", False

    def _give_up(self, reason: str) -> None:
        """Wait for no more workers. What has been trained is kept, to be gone on with."""
        self.failure = reason
        if not self._last_epoch:
            self._ledger.failed(self._trial_id, reason)

    def _began(self, message: Began) -> None:
        peak = peak_flops(message.device_name)
        self._shown.peak_flops = None if peak is None else peak * message.num_workers
        on = message.device_name or "CPU"
        said = f"{message.num_workers} worker{'' if message.num_workers == 1 else 's'}, {on}"
        self._shown.say(f"going on after epoch {self._last_epoch} with {said}" if self._restarts else said)
        self._shown.begin()

    def _trained(self, message: Trained) -> None:
        if message.result.epoch > self._last_epoch:
            self._without_epoch = 0
            self._ledger.report(self._trial_id, message.result, node=message.node)
            for tell in self._tell:
                tell(message.result)

    def _left(self, message: Left) -> None:
        if message.cause == "usage":
            raise UsageError(message.text)
        if message.cause == "does_not_fit":
            if self._last_epoch:
                raise UsageError(f"{message.text}; with --resume, which goes on after epoch {self._last_epoch}")
            self._ledger.failed(self._trial_id, message.text)
            self._ledger.experiment.record(ExperimentStopped(at=time.time(), state="finished"))
            raise UsageError(f"{message.text}; with another --name")
        if message.cause == "disk":
            raise OSError(message.text)
        # The first to leave knows why; the others miss it.
        self._reason = self._reason or ("paused" if message.cause == "paused" else message.text)
        self._waiting, self._said_at = True, time.monotonic()
