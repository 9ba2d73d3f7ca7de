"""Search regularization strength with Ray Tune, Optuna and ASHA.

python -m orchestrator.search cifar100 --data-dir DIR
python -m orchestrator.search digits --num-trials 12
python -m orchestrator.search ./mine.py --dataset folder:photos --backbone resnet18 --set lr=0.05
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import ray
import torch
from ray import tune
from rich.console import Console

from orchestrator import cli
from orchestrator.console import SearchConsole, print_summary
from orchestrator.halving import HALVINGS
from orchestrator.ledger import Ledger
from orchestrator.plan import SearchPlan, check_same_data, provenance, resumed
from orchestrator.proposals import Proposer, make_sampler
from orchestrator.searcher import LedgerScheduler, LedgerSearcher
from results.events import ExperimentResumed, ExperimentStopped
from results.schema import Scalar, UsageError
from results.store import Experiment
from search_spaces.space import load_space
from trainables.backbones import check_backbone
from trainables.config import parse_overrides
from trainables.datasets import SplitImages, load_dataset
from trainables.tune_trial import TuneTrial, worker_environment

RETRIES = 2
DEFAULT_SEED = 0
TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the event log is what is kept; Tune's own files are thrown away
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would end with status 0 and unfinished trials
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "space", metavar="SPACE", help="a name in search_spaces/, or a path to a file that defines SPACE"
    )
    parser.add_argument("--dataset", help="digits, cifar10, cifar100, folder:PATH or parquet:PATH")
    parser.add_argument("--backbone", help="a name in trainables/backbones/")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="set fields of the base TrainConfig",
    )
    parser.add_argument("--name", help="the experiment's name (default: the space's)")
    parser.add_argument("--num-trials", type=cli.count, help="every trial counts, baselines and failed ones too")
    parser.add_argument("--max-epochs", type=cli.count, help="epochs of a trial that is not stopped")
    parser.add_argument(
        "--max-concurrent", type=cli.count, help="trials at a time (default: as many as there is room for)"
    )
    parser.add_argument("--train-fraction", type=cli.fraction, help="share of the training split to train on")
    parser.add_argument("--data-dir", default="data", help="where datasets are, or are downloaded to (default: data)")
    cli.add_results_dir(parser)
    parser.add_argument("--seed", type=cli.count_or_zero, help=f"default: {DEFAULT_SEED}")
    parser.add_argument("--resume", action="store_true", help="go on with an experiment that exists")
    parser.add_argument("--halving", choices=list(HALVINGS), help="early stopping (default: asha)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--cpus-per-trial", type=cli.count, default=1)
    parser.add_argument("--gpus-per-trial", type=cli.positive, help="default: 1 on cuda; fractions share a GPU")
    parser.add_argument("--address", help="a running Ray cluster, such as auto (default: a local one of its own)")
    parser.add_argument(
        "--keep-checkpoints",
        type=cli.count_or_zero,
        default=10,
        help="keep the weights of the best N trials (default: 10)",
    )
    return parser.parse_args(arguments)


def plan_from(args: argparse.Namespace) -> SearchPlan:
    """The plan of a new search."""
    overrides: dict[str, Scalar] = parse_overrides(args.set)
    for field in ("dataset", "backbone", "train_fraction", "max_epochs"):
        if getattr(args, field) is not None:
            overrides[field] = getattr(args, field)
    if args.backbone is not None:
        check_backbone(args.backbone)
    return SearchPlan(
        source=load_space(args.space),
        overrides=overrides,
        num_trials=args.num_trials,
        seed=DEFAULT_SEED if args.seed is None else args.seed,
        halving=args.halving or "asha",
    )


def open_experiment(args: argparse.Namespace) -> tuple[Experiment, SearchPlan, SplitImages]:
    """A new experiment, or an old one to go on with, and the data it is about."""
    plan = plan_from(args)
    name = args.name or plan.source.name
    if args.resume:
        experiment = Experiment.open(args.results_dir, name)
        plan = resumed(plan, experiment.info, seed=args.seed, halving=args.halving)
        data = load_data(plan, args.data_dir)
        check_same_data(experiment.info, data)
        return experiment, plan, data
    Experiment.check_new(args.results_dir, name)
    data = load_data(plan, args.data_dir)
    info = plan.info(name=name, data=data, command=command_line())
    return Experiment.create(args.results_dir, name=name, info=info), plan, data


def load_data(plan: SearchPlan, data_dir: str) -> SplitImages:
    """The data that a plan's base configuration names."""
    base = plan.space.base
    return load_dataset(
        base.dataset,
        data_dir=data_dir,
        image_size=base.image_size,
        train_fraction=base.train_fraction,
        val_fraction=base.val_fraction,
    )


def command_line() -> str:
    """What was typed."""
    return shlex.join(["python", "-m", "orchestrator.search", *sys.argv[1:]])


def make_ledger(experiment: Experiment, plan: SearchPlan, *, keep_checkpoints: int, console: SearchConsole) -> Ledger:
    """The ledger of a search, standing where its event log ends."""
    space, history = plan.space, experiment.history
    baselines_started = sum(t.started.origin == "baseline" for t in history.trials.values())
    sampler = make_sampler(num_trials=space.budget.num_trials, seed=plan.seed, trials_so_far=len(history.trials))
    proposer = Proposer(
        experiment.study_path,
        name=experiment.name,
        metric=space.metric,
        mode=space.mode,
        dimensions=space.dimensions,
        sampler=sampler,
        baselines=space.complete_baselines()[baselines_started:],
    )
    return Ledger(
        experiment,
        space=space,
        proposer=proposer,
        halving=plan.make_halving(),
        seed=plan.seed,
        keep_checkpoints=keep_checkpoints,
        notify=console.changed,
    )


def start_ray(args: argparse.Namespace) -> None:
    """Connect to a cluster, or start a local one whose workers inherit this process's environment."""
    environment = worker_environment(threads=args.cpus_per_trial)
    os.environ.update(TUNE_SETTINGS)
    address = args.address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address:
        ray.init(address=address, runtime_env={"env_vars": environment}, **quiet)
    else:
        os.environ.update(environment)
        ray.init(address="local", include_dashboard=False, **quiet)


def choose_device(wanted: str) -> str:
    """The device of the trials; a cluster's GPUs count, whatever this machine has."""
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    if wanted == "cuda" and not has_gpu:
        raise UsageError("--device cuda, but Ray sees no GPU; give --device cpu, or an --address with GPUs")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps, but torch has no mps here; give --device cpu")
    if wanted != "auto":
        return wanted
    return "cuda" if has_gpu else "mps" if torch.backends.mps.is_available() else "cpu"


def fit(ledger: Ledger, data: SplitImages, args: argparse.Namespace) -> None:
    """Run Tune until the ledger has no more trials. Raises what kept the ledger from recording."""
    device = choose_device(args.device)
    gpus = (args.gpus_per_trial or 1.0) if device == "cuda" else 0.0
    available = ray.cluster_resources()
    room = available.get("GPU", 0) / gpus if gpus else available.get("CPU", 1) / args.cpus_per_trial
    if room < 1 and not args.address:
        raise UsageError(
            f"a trial wants {args.cpus_per_trial} CPUs and {gpus:g} GPUs, more than this machine has; lower them"
        )
    max_concurrent = args.max_concurrent or max(1, int(room))
    # Tune keeps a single trial pending by default, which leaves workers idle when trials are short.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max_concurrent)
    trainable = tune.with_parameters(TuneTrial, data=data, device=device, threads=args.cpus_per_trial)
    scheduler = LedgerScheduler(ledger)
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": args.cpus_per_trial, "gpu": gpus}),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(ledger, max_concurrent=max_concurrent),
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                verbose=0,
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            tuner.fit()
        except Exception as error:
            if scheduler.failure is not None:
                raise scheduler.failure from error
            raise


def drive(
    experiment: Experiment, plan: SearchPlan, data: SplitImages, args: argparse.Namespace, console: Console
) -> Ledger:
    """Run the search as the experiment's one driver. Returns its ledger when every trial has ended."""
    with experiment.driving():
        if args.resume:
            budget = plan.space.budget.num_trials
            changes = {"space": {**experiment.info["space"], **plan.space.describe()}, **provenance(command_line())}
            experiment.record(ExperimentResumed(at=time.time(), changes=changes))
            console.print(f"resuming {experiment.name}: {len(experiment.history.ended)} of {budget} trials have ended")
        shown = SearchConsole(console, num_trials=plan.space.budget.num_trials, metric=plan.space.metric)
        ledger = make_ledger(experiment, plan, keep_checkpoints=args.keep_checkpoints, console=shown)
        if not ledger.finished:
            start_ray(args)
            try:
                with shown.watching(ledger):
                    fit(ledger, data, args)
            finally:
                ray.shutdown()
        if ledger.finished:
            experiment.record(ExperimentStopped(at=time.time(), state="finished"))
        return ledger


def main(arguments: list[str] | None = None) -> int:
    """Run a search. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    console = cli.make_console()
    experiment, plan, data = open_experiment(args)
    sizes = ", ".join(f"{n:,} {split}" for split, n in data.sizes().items())
    console.print(
        f"{experiment.name}: {plan.space.base.backbone} on {plan.space.base.dataset} ({sizes})", highlight=False
    )
    again = resume_command(args)
    try:
        ledger = drive(experiment, plan, data, args, console)
    except cli.Interrupted:
        with experiment.driving():
            experiment.record(ExperimentStopped(at=time.time(), state="interrupted"))
        console.print(f"interrupted; nothing is lost. To go on:\n  {again}", highlight=False, soft_wrap=True)
        return cli.INTERRUPTED
    except OSError as error:
        print(f"error: {error}\nwhat has been recorded is safe. Mend that, then go on:\n  {again}", file=sys.stderr)
        return cli.FAILED
    print_summary(console, ledger)
    if not ledger.finished:
        print(f"error: the search ended before its last trial; to go on:\n  {again}", file=sys.stderr)
        return cli.FAILED
    console.print(f"next:\n  {ensemble_command(ledger, args)}", highlight=False, soft_wrap=True)
    return cli.DONE


def resume_command(args: argparse.Namespace) -> str:
    """The command that goes on with this search."""
    return command_line() if args.resume else f"{command_line()} --resume"


def ensemble_command(ledger: Ledger, args: argparse.Namespace) -> str:
    """The command that makes an ensemble of what has been found."""
    completed = sum(t.ended is not None and t.ended.status == "completed" for t in ledger.experiment.history.ended)
    command = ["python", "-m", "orchestrator.ensemble", "--experiment", ledger.experiment.name]
    command += ["--top-k", str(min(5, completed) if completed > 1 else 2)]
    if completed < 2:
        command += ["--include-stopped"]
    if Path(args.results_dir) != Path("results/runs"):
        command += ["--results-dir", args.results_dir]
    return shlex.join(command)


if __name__ == "__main__":
    cli.run(main)
