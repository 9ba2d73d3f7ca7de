"""Training an experiment's trials one after the other in this process: what commands without Ray share."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from rich.console import Console

from orchestrator import cli, driver, outlook
from orchestrator.ledger import Assignment, Ledger
from orchestrator.plan import SearchPlan
from orchestrator.training_console import TrainingConsole
from results.events import ExperimentStopped
from results.schema import UsageError
from results.store import Experiment
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.learner import Learner, check_trainable
from trainables.loop import TrainState
from trainables.memory import DoesNotFit
from trainables.process import prepare_process
from trainables.resident import TrainingImages, WatchedImages
from trainables.trial import images_on, run_trial

Teach = Callable[[TrainingImages], TrainingImages]


def choose_device(device: str) -> str:
    """`auto` settled. Raises UsageError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, available in there.items() if available)
    if not there[device]:
        raise UsageError(f"--device {device}, but torch sees none here; give --device cpu")
    return device


def prepare(threads: int | None) -> None:
    """Set this process up for training. Raises UsageError for more threads than there are cores."""
    cores = os.cpu_count() or 1
    if threads and threads > cores:
        raise UsageError(f"--threads {threads}, but this machine has {cores} cores; more only slow each other down")
    prepare_process(threads=threads or torch.get_num_threads())


def drive(
    experiment: Experiment | None,
    plan: SearchPlan,
    data: SplitImages,
    args: argparse.Namespace,
    console: Console,
    *,
    name: str,
    teach: Teach = lambda images: images,
) -> Experiment:
    """Train what a plan has left to train as the experiment's one driver; a new one is made when there is none.

    `teach` makes the images that are trained on from the plain ones.
    """
    device = choose_device(args.device)
    check_trainable(plan.space.base, data, device=device)
    prepare(args.threads)
    with ExitStack() as stack:
        stack.enter_context(cli.INTERRUPTS.deferred())
        images = WatchedImages(teach(images_on(device, data, config=plan.space.base)), cli.INTERRUPTS.check)
        plan = outlook.of_training(
            plan,
            images,
            experiment=experiment,
            threads=torch.get_num_threads(),
            console=console,
            check=cli.INTERRUPTS.check,
        )
        if experiment is None:
            experiment = driver.begin(args, plan, data, name=name)
            stack.enter_context(experiment.driving())
        else:
            stack.enter_context(experiment.driving())
            driver.record_resumption(experiment, plan, data)
        ledger = driver.make_ledger(experiment, plan, max_concurrent=1)
        if not ledger.finished:
            _train_all(ledger, images, console)
        experiment.record(ExperimentStopped(at=time.time(), state="finished"))
    return experiment


def _train_all(ledger: Ledger, images: TrainingImages, console: Console) -> None:
    learner: Learner | None = None
    while (assignment := ledger.next_trial()) is not None:
        config = TrainConfig(**assignment.config)  # type: ignore[arg-type]  # written by to_dict
        if ledger.space.budget.num_trials > 1:
            console.print(f"{assignment.trial_id}: seed {config.seed}", highlight=False)
        learner = _train_one(ledger, assignment, config, images, console, learner=learner)


def _train_one(
    ledger: Ledger,
    assignment: Assignment,
    config: TrainConfig,
    images: TrainingImages,
    console: Console,
    *,
    learner: Learner | None,
) -> Learner:
    """Train one trial, on an earlier one's learner. Raises UsageError, with the trial failed, for a batch too large."""
    experiment, trial_id = ledger.experiment, assignment.trial_id
    with TrainingConsole(console, config, images.split, after_epoch=assignment.epochs_recorded) as shown:

        def on_step() -> None:
            shown.step()
            cli.INTERRUPTS.check()

        try:
            state = TrainState(config, images, learner=learner)
            for result in run_trial(
                config,
                images,
                files=experiment.files(trial_id),
                state=state,
                epochs_recorded=assignment.epochs_recorded,
                on_step=on_step,
            ):
                ledger.report(trial_id, result, node=platform.node())
                shown.epoch(result)
        except DoesNotFit as error:
            ledger.failed(trial_id, str(error))
            experiment.record(ExperimentStopped(at=time.time(), state="finished"))
            raise UsageError(f"{error}; with another --name") from error
    return state.learner
