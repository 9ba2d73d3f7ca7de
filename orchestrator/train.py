"""Train one recipe, as a trial of stage single in an experiment of its own.

python -m orchestrator.train --list
python -m orchestrator.train resnet44v2 --data-dir DIR
python -m orchestrator.train speedrun --data-dir DIR --set max_epochs=4 warmup_epochs=1
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # torch reads it once, when it is imported: idle threads otherwise spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import hashlib
import platform
import sys
import time
from contextlib import ExitStack

import torch
from rich.console import Console

from orchestrator import cli, driver
from orchestrator.plan import SearchPlan
from orchestrator.training_console import TrainingConsole, print_recipes, print_results
from results.events import ExperimentStopped
from results.schema import UsageError
from results.store import Experiment
from search_spaces.space import Budget, NamedSpace, SearchSpace
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.learner import check_trainable
from trainables.memory import DoesNotFit
from trainables.process import prepare_process
from trainables.recipes import RECIPES, recipe_named
from trainables.resident import WatchedImages
from trainables.trial import images_on, run_trial


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a name that --list shows")
    parser.add_argument("--list", action="store_true", help="show the recipes with their cost and expectation")
    driver.add_driving_arguments(parser)
    parser.add_argument("--name", help="the experiment's name (default: the recipe's)")
    parser.add_argument("--seed", type=cli.count_or_zero, help="default: the recipe's")
    parser.add_argument("--threads", type=cli.count, help="of a CPU (default: as many as there are cores to use)")
    args = parser.parse_args(arguments)
    if not args.list and args.recipe is None:
        parser.error("wanted a RECIPE, or --list to see them")
    return args


def plan_from(args: argparse.Namespace) -> SearchPlan:
    """The plan of one training: a search without dimensions, of a single trial."""
    recipe = recipe_named(args.recipe)
    overrides = driver.overrides_from(args, "dataset", "train_fraction", "max_epochs")
    config = recipe.config
    config.having(overrides)  # checks them
    space = SearchSpace(
        base=config,
        dimensions={},
        baselines=({},),
        budget=Budget(num_trials=1, max_epochs=config.max_epochs),
        metric=str(overrides.get("monitor", config.monitor)),
    )
    source_hash = hashlib.sha256(repr(sorted(config.to_dict().items())).encode()).hexdigest()[:16]
    return SearchPlan(
        source=NamedSpace(args.recipe, space, source_hash),
        overrides=overrides,
        num_trials=None,
        seed=config.seed if args.seed is None else args.seed,
        halving="none",
        stage="single",
    )


def choose_device(device: str) -> str:
    """`auto` settled. Raises UsageError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, available in there.items() if available)
    if not there[device]:
        raise UsageError(f"--device {device}, but torch sees none here; give --device cpu")
    return device


def drive(
    experiment: Experiment | None, plan: SearchPlan, data: SplitImages, args: argparse.Namespace, console: Console
) -> Experiment:
    """Train as the experiment's one driver."""
    device = choose_device(args.device)
    check_trainable(plan.space.base, data, device=device)
    cores = os.cpu_count() or 1
    if args.threads and args.threads > cores:
        raise UsageError(
            f"--threads {args.threads}, but this machine has {cores} cores; more only slow each other down"
        )
    prepare_process(threads=args.threads or torch.get_num_threads())
    with ExitStack() as stack:
        stack.enter_context(cli.INTERRUPTS.deferred())
        if experiment is None:
            experiment = driver.begin(args, plan, data, name=args.name or args.recipe)
            stack.enter_context(experiment.driving())
        else:
            stack.enter_context(experiment.driving())
            driver.record_resumption(experiment, plan)
        ledger = driver.make_ledger(experiment, plan, max_concurrent=1)
        assignment = ledger.next_trial()
        if assignment is not None:
            config = TrainConfig(**assignment.config)  # type: ignore[arg-type]  # written by to_dict
            images = WatchedImages(images_on(device, data, config=config), cli.INTERRUPTS.check)
            shown = stack.enter_context(TrainingConsole(console, config, data, after_epoch=assignment.epochs_recorded))

            def on_step() -> None:
                shown.step()
                cli.INTERRUPTS.check()

            files = experiment.files(assignment.trial_id)
            results = run_trial(
                config, images, files=files, epochs_recorded=assignment.epochs_recorded, on_step=on_step
            )
            try:
                for result in results:
                    ledger.report(assignment.trial_id, result, node=platform.node())
                    shown.epoch(result)
            except DoesNotFit as error:
                ledger.failed(assignment.trial_id, str(error))
                experiment.record(ExperimentStopped(at=time.time(), state="finished"))
                raise UsageError(f"{error}; with another --name") from error
        experiment.record(ExperimentStopped(at=time.time(), state="finished"))
    return experiment


def main(arguments: list[str] | None = None) -> int:
    """Train a recipe. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    console = cli.make_console()
    if args.list:
        print_recipes(console, RECIPES)
        return cli.DONE
    plan = plan_from(args)
    name = str(args.name or args.recipe)
    experiment, plan = driver.open_or_check_new(args, plan, name)
    data = driver.load_and_announce(args, plan, experiment, name=name, console=console)
    try:
        experiment = drive(experiment, plan, data, args, console)
    except cli.Interrupted:
        return driver.interrupted(args, name, console)
    except OSError as error:
        return driver.disk_failed(args, error)
    return print_results(console, experiment)


if __name__ == "__main__":
    cli.run(main)
