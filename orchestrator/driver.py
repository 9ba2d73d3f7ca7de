"""What the commands that drive an experiment share: beginning one, going on with one, leaving one in order."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from optuna.distributions import json_to_distribution
from rich.console import Console

from orchestrator import cli
from orchestrator.ledger import Ledger
from orchestrator.plan import SearchPlan, check_same_data, provenance, resumed
from orchestrator.proposals import Proposer, make_sampler
from orchestrator.strength import strength
from results.events import ExperimentResumed, ExperimentStopped
from results.history import History, TrialHistory
from results.schema import Scalar, UsageError
from results.store import Experiment, exists
from trainables.config import TrainConfig, parse_overrides
from trainables.datasets import SplitImages, load_dataset


def add_driving_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every driving command takes: data, results, name, seed, device and single fields."""
    parser.add_argument("--dataset", help="digits, cifar10, cifar100, folder:PATH or parquet:PATH")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="set fields of the TrainConfig",
    )
    parser.add_argument("--train-fraction", type=cli.fraction, help="share of the training split to train on")
    parser.add_argument("--max-epochs", type=cli.count, help="epochs of a training that nothing stops")
    parser.add_argument(
        "--data-dir",
        default=cli.DEFAULT_DATA_DIR,
        help="where datasets are, or are downloaded to (default: %(default)s)",
    )
    cli.add_results_dir(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an experiment that exists")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")


def add_no_test(parser: argparse.ArgumentParser) -> None:
    """Add the flag that keeps the test split out of sight."""
    parser.add_argument(
        "--no-test",
        action="store_true",
        help="predict nothing for the test split: for networks and recipes that are still being developed",
    )


def overrides_from(args: argparse.Namespace, *fields: str) -> dict[str, Scalar]:
    """What `--set` and the flags of single fields set. Raises UsageError for a field set in both ways."""
    overrides = parse_overrides(args.set)
    for field in fields:
        value = getattr(args, field)
        if value is not None and overrides.get(field, value) != value:
            flag = f"--{field.replace('_', '-')} {value}"
            raise UsageError(f"{flag} and --set {field}={overrides[field]} disagree; give one of them")
        if value is not None:
            overrides[field] = value
    return overrides


def command_line() -> str:
    """What was typed."""
    return shlex.join(["python", "-m", f"orchestrator.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def command_to_resume(args: argparse.Namespace) -> str:
    """What to type to go on."""
    return command_line() if args.resume else f"{command_line()} --resume"


def load_data(plan: SearchPlan, data_dir: str) -> SplitImages:
    """Return the data that a plan's base configuration names; without its test split where the plan leaves it alone."""
    data = load_images(plan.space.base, data_dir)
    return data if plan.predicts_test else data.without_test()


def load_images(base: TrainConfig, data_dir: str) -> SplitImages:
    """Return the data that the base configuration of an experiment names, as all its trials see it."""
    return load_dataset(
        base.dataset,
        data_dir=data_dir,
        image_size=base.image_size,
        train_fraction=base.train_fraction,
        val_fraction=base.val_fraction,
        resident=base.pipeline == "resident",
    )


def open_or_check_new(args: argparse.Namespace, plan: SearchPlan, name: str) -> tuple[Experiment | None, SearchPlan]:
    """The experiment to go on with and its plan, or none and the plan of a new one.

    Raises UsageError when there is none to resume, or one already, or it would not be the same search.
    """
    if not args.resume:
        Experiment.check_new(args.results_dir, name)
        plan.check()
        return None, plan
    experiment = Experiment.open(args.results_dir, name)
    keys = ("seed", "halving", "keep_checkpoints", "control_fraction", "finalists", "seeds")
    given = {key: getattr(args, key, None) for key in keys}
    plan = resumed(plan, experiment.info, **given)
    plan.check()
    if plan.finalists > experiment.info.get("finalists", 0):
        _check_finalists(plan, experiment)
    return experiment, plan


def _check_finalists(plan: SearchPlan, experiment: Experiment) -> None:
    """Raise UsageError when a search cannot come to have as many completed trials as finalists are asked for."""
    ended = [trial for trial in experiment.history.ended if trial.started.stage == "search"]
    completed = sum(trial.completed for trial in ended)
    to_come = max(0, plan.space.budget.num_trials - len(ended))
    if plan.finalists > completed + to_come:
        raise UsageError(
            f"--finalists {plan.finalists}, but experiment {experiment.name!r} has {completed} completed trials and "
            f"{to_come} to come; lower it, or raise --num-trials"
        )


def load_and_announce(
    args: argparse.Namespace, plan: SearchPlan, experiment: Experiment | None, *, name: str, console: Console
) -> SplitImages:
    """The data, and a line that says what is going to be trained on what."""
    data = load_data(plan, args.data_dir)
    announce(plan, experiment, data, name=name, console=console)
    return data


def announce(
    plan: SearchPlan, experiment: Experiment | None, data: SplitImages, *, name: str, console: Console
) -> None:
    """A line that says what is going to be trained on what. Raises UsageError when the data is another one now."""
    if experiment is not None:
        check_same_data(experiment.info, data)
    sizes = ", ".join(f"{n:,} {split}" for split, n in data.sizes().items())
    base = plan.space.base
    console.print(f"{name}: {base.backbone} on {base.dataset} ({sizes})", highlight=False, soft_wrap=True)


def begin(args: argparse.Namespace, plan: SearchPlan, data: SplitImages, *, name: str) -> Experiment:
    """A new experiment."""
    return Experiment.create(args.results_dir, name=name, info=plan.info(name=name, data=data, command=command_line()))


def record_resumption(experiment: Experiment, plan: SearchPlan, data: SplitImages | None = None) -> None:
    """Write down what `experiment.json` says anew: a search may be made longer, and go on with other versions.

    `data` gives what earlier versions did not record.
    """
    changes = {
        **({} if data is None else {"image_size": data.image_size, "channels": data.channels}),
        "num_trials_given": plan.num_trials_given,
        "space": {
            **experiment.info["space"],
            **plan.space.describe(),
            "source_hash": plan.source.source_hash,
        },
        "keep_checkpoints": plan.keep_checkpoints,
        "finalists": plan.finalists,
        "seeds": plan.seeds,
        **provenance(command_line()),
    }
    experiment.record(ExperimentResumed(at=time.time(), changes=changes))


def make_ledger(
    experiment: Experiment,
    plan: SearchPlan,
    *,
    max_concurrent: int,
    max_seconds: float | None = None,
    warm: Sequence[TrialHistory] = (),
    notify: Callable[[], None] = lambda: None,
) -> Ledger:
    """The ledger of an experiment, standing where its event log ends. `warm`: trials of others to learn from."""
    space, history = plan.space, experiment.history
    num_trials = space.budget.num_trials
    proposer = Proposer(
        experiment.study_path,
        name=experiment.name,
        space=space,
        sampler_after=lambda trials_so_far: make_sampler(
            num_trials=num_trials,
            max_concurrent=max_concurrent,
            seed=plan.seed,
            trials_so_far=trials_so_far,
            conditional=space.define is not None,
        ),
        given=_given(plan, history),
        given_origin="baseline" if plan.stage == "search" else "recipe",
    )
    proposer.learn(warm)
    # A narrowed space does not make the same configuration stronger.
    dimensions = experiment.info.get("strengths_within", experiment.info["space"]["dimensions"])
    within = {name: json_to_distribution(text) for name, text in dimensions.items()}
    return Ledger(
        experiment,
        space=space,
        stage=plan.stage,
        proposer=proposer,
        halving=plan.make_halving(),
        rules=plan.rules(max_seconds=max_seconds),
        strength_of=lambda config: strength(config, within),
        notify=notify,
    )


def _given(plan: SearchPlan, history: History) -> list[dict[str, Scalar]]:
    """The configurations to begin with that have not been started. What is not a search trains one with many seeds."""
    space, trials = plan.space, history.trials.values()
    if plan.stage != "search":
        return space.complete_baselines() * (space.budget.num_trials - len(trials))
    started = [trial.started.params for trial in trials if trial.started.origin == "baseline"]
    return [params for params in space.complete_baselines()[: space.budget.num_trials] if params not in started]


def interrupted(args: argparse.Namespace, name: str, console: Console) -> int:
    """Write down that the driver was interrupted, and say how to go on."""
    if not exists(args.results_dir, name):
        raise cli.Interrupted
    experiment = Experiment.open(args.results_dir, name)
    with experiment.driving():
        experiment.record(ExperimentStopped(at=time.time(), state="interrupted"))
    console.print(
        f"interrupted; nothing is lost. To go on:\n  {command_to_resume(args)}", highlight=False, soft_wrap=True
    )
    return cli.INTERRUPTED


class WorkersFailed(RuntimeError):
    """A group of workers came to an end before the training did."""


def stopped_by(args: argparse.Namespace, error: OSError | WorkersFailed) -> int:
    """Say that the disk did not take what was written, or that workers failed, and how to go on."""
    last_line = str(error).strip().splitlines()[-1]
    print(
        f"error: {last_line}\nwhat has been recorded is safe. Mend that, then go on:\n  {command_to_resume(args)}",
        file=sys.stderr,
    )
    return cli.FAILED
