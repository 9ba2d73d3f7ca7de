"""Train one recipe, as a trial of stage single in an experiment of its own.

python -m orchestrator.train --list
python -m orchestrator.train resnet44v2 --data-dir DIR
python -m orchestrator.train speedrun --data-dir DIR --set max_epochs=4 warmup_epochs=1
python -m orchestrator.train resnet50_large_batch --data-dir DIR --num-workers 8

With --num-workers or --elastic, Ray Train divides every batch among so many workers, one a GPU or CPU, and the trial is
of stage large_batch. Without, this process trains, and Ray is not needed.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # torch reads it once, when it is imported: idle threads otherwise spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import hashlib
import sys

from orchestrator import cli, driver
from orchestrator.plan import SearchPlan
from orchestrator.tracking import TRACKERS
from orchestrator.training import drive
from orchestrator.training_console import print_recipes, print_results
from results.schema import UsageError
from search_spaces.space import Budget, NamedSpace, SearchSpace
from trainables.recipes import RECIPES, recipe_named


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a name that --list shows")
    parser.add_argument("--list", action="store_true", help="show the recipes with their cost and expectation")
    driver.add_driving_arguments(parser)
    driver.add_no_test(parser)
    parser.add_argument("--name", help="the experiment's name (default: the recipe's)")
    parser.add_argument("--seed", type=cli.count_or_zero, help="default: the recipe's")
    cli.add_threads(parser)
    workers = parser.add_mutually_exclusive_group()
    workers.add_argument("--num-workers", type=cli.count, metavar="N", help="workers that divide every batch")
    workers.add_argument(
        "--elastic",
        type=cli.range_of_counts,
        metavar="MIN:MAX",
        help="as many workers as there is room for, which may change",
    )
    parser.add_argument("--address", help="a running Ray cluster, such as auto (default: a local one of its own)")
    parser.add_argument(
        "--track",
        nargs="+",
        choices=tuple(TRACKERS),
        default=(),
        metavar="TRACKER",
        help=f"with workers: tell of every epoch also {', '.join(TRACKERS)}",
    )
    args = parser.parse_args(arguments)
    if not args.list and args.recipe is None:
        parser.error("wanted a RECIPE, or --list to see them")
    if args.address is not None and not has_workers(args):
        parser.error("--address is for --num-workers or --elastic: give one of them")
    if args.track and not has_workers(args):
        parser.error("--track is for --num-workers or --elastic: give one of them")
    for name in args.track:
        TRACKERS[name].check_installed()
    return args


def has_workers(args: argparse.Namespace) -> bool:
    """Whether Ray Train's workers are to train."""
    return args.num_workers is not None or args.elastic is not None


def plan_from(args: argparse.Namespace) -> SearchPlan:
    """The plan of one training: a search without dimensions, of a single trial."""
    recipe = recipe_named(args.recipe)
    overrides = driver.overrides_from(args, "dataset", "train_fraction", "max_epochs")
    config = recipe.config
    config.having(overrides)  # checks them
    if has_workers(args) and args.dataset not in (None, config.dataset) and ":" not in args.dataset:
        raise UsageError(
            f"--dataset {args.dataset}, but recipe {args.recipe} is for {config.dataset}, as is what was published for "
            f"it; choose another recipe, or say --set dataset={args.dataset} to train it there all the same"
        )
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
        predicts_test=not args.no_test,
        stage="large_batch" if has_workers(args) else "single",
    )


def main(arguments: list[str] | None = None) -> int:
    """Train a recipe. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    console = cli.make_console()
    if args.list:
        print_recipes(console, RECIPES)
        return cli.DONE
    plan = plan_from(args)
    name = str(args.name or args.recipe)
    if has_workers(args):
        from orchestrator.ray_cluster import check_address  # and Ray, which nobody else has to import

        check_address(args.address)
    experiment, plan = driver.open_or_check_new(args, plan, name)
    data = driver.load_and_announce(args, plan, experiment, name=name, console=console)
    try:
        if has_workers(args):
            from orchestrator import workers

            group = workers.Workers(*(args.elastic or (args.num_workers, args.num_workers)))
            experiment = workers.drive(experiment, plan, data, args, console, name=name, workers=group)
        else:
            experiment = drive(experiment, plan, data, args, console, name=name)
    except cli.Interrupted:
        return driver.interrupted(args, name, console)
    except (OSError, driver.WorkersFailed) as error:
        return driver.stopped_by(args, error)
    return print_results(console, experiment)


if __name__ == "__main__":
    cli.run(main)
