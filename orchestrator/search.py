"""Search regularization strength with Ray Tune, Optuna and ASHA.

python -m orchestrator.search cifar100 --data-dir DIR
python -m orchestrator.search digits --num-trials 12
python -m orchestrator.search ./mine.py --dataset folder:photos --backbone resnet18 --set lr=0.05
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from orchestrator import cli
from orchestrator.console import SearchConsole, print_summary
from orchestrator.halving import HALVINGS
from orchestrator.ledger import Ledger
from orchestrator.plan import SearchPlan, check_same_data, provenance, resumed
from orchestrator.proposals import Proposer, make_sampler
from orchestrator.searcher import choose_resources, fit, ray_cluster
from results.events import ExperimentResumed, ExperimentStopped
from results.schema import Scalar
from results.store import DEFAULT_RESULTS_DIR, Experiment
from search_spaces.space import load_space
from trainables.config import parse_overrides
from trainables.datasets import SplitImages, load_dataset

DEFAULT_SEED = 0
DEFAULT_KEEP_CHECKPOINTS = 10


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
        metavar="N",
        help=f"keep the weights of the best N trials (default: {DEFAULT_KEEP_CHECKPOINTS})",
    )
    return parser.parse_args(arguments)


def plan_from(args: argparse.Namespace) -> SearchPlan:
    """The plan of a new search."""
    overrides: dict[str, Scalar] = parse_overrides(args.set)
    for field in ("dataset", "backbone", "train_fraction", "max_epochs"):
        if getattr(args, field) is not None:
            overrides[field] = getattr(args, field)
    return SearchPlan(
        source=load_space(args.space),
        overrides=overrides,
        num_trials=args.num_trials,
        seed=DEFAULT_SEED if args.seed is None else args.seed,
        halving=args.halving or "asha",
        keep_checkpoints=DEFAULT_KEEP_CHECKPOINTS if args.keep_checkpoints is None else args.keep_checkpoints,
    )


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


def make_ledger(experiment: Experiment, plan: SearchPlan, *, max_concurrent: int, console: SearchConsole) -> Ledger:
    """The ledger of a search, standing where its event log ends."""
    space, history = plan.space, experiment.history
    baselines_started = sum(t.started.origin == "baseline" for t in history.trials.values())
    num_trials = space.budget.num_trials
    sampler = make_sampler(
        num_trials=num_trials,
        max_concurrent=max_concurrent,
        seed=plan.seed,
        trials_so_far=len(history.trials),
    )
    proposer = Proposer(
        experiment.study_path,
        name=experiment.name,
        metric=space.metric,
        mode=space.mode,
        dimensions=space.dimensions,
        sampler=sampler,
        baselines=space.complete_baselines()[baselines_started:num_trials],
    )
    return Ledger(
        experiment,
        space=space,
        proposer=proposer,
        halving=plan.make_halving(),
        seed=plan.seed,
        keep_checkpoints=plan.keep_checkpoints,
        notify=console.changed,
    )


def drive(
    experiment: Experiment | None, plan: SearchPlan, data: SplitImages, args: argparse.Namespace, console: Console
) -> Ledger:
    """Search as the experiment's one driver; a new experiment is made once Ray has what the trials want."""
    with ExitStack() as stack:
        stack.enter_context(cli.INTERRUPTS.deferred())
        if experiment is not None:
            stack.enter_context(experiment.driving())
        stack.enter_context(ray_cluster(args.address, threads=args.cpus_per_trial))
        cli.INTERRUPTS.listen()  # Ray has installed handlers of its own
        cli.INTERRUPTS.check()
        resources = choose_resources(
            args.device,
            cpus_per_trial=args.cpus_per_trial,
            gpus_per_trial=args.gpus_per_trial,
            max_concurrent=args.max_concurrent,
            num_trials=plan.space.budget.num_trials,
        )
        if experiment is None:
            name = experiment_name(args, plan)
            info = plan.info(name=name, data=data, command=command_line())
            experiment = Experiment.create(args.results_dir, name=name, info=info)
            stack.enter_context(experiment.driving())
        else:
            experiment.record(ExperimentResumed(at=time.time(), changes=what_a_resume_changes(experiment, plan)))
            ended = len(experiment.history.ended)
            console.print(f"{ended} of {plan.space.budget.num_trials} trials have ended", highlight=False)
        shown = SearchConsole(console, num_trials=plan.space.budget.num_trials, metric=plan.space.metric)
        ledger = make_ledger(experiment, plan, max_concurrent=resources.max_concurrent, console=shown)
        if not ledger.finished:
            with shown.watching(ledger):
                fit(ledger, data, resources, check_interrupt=cli.INTERRUPTS.check)
        if ledger.finished:
            experiment.record(ExperimentStopped(at=time.time(), state="finished"))
        return ledger


def what_a_resume_changes(experiment: Experiment, plan: SearchPlan) -> dict[str, object]:
    """What `experiment.json` says anew: a search may be made longer, and go on with other versions."""
    return {
        "space": {**experiment.info["space"], **plan.space.describe()},
        "keep_checkpoints": plan.keep_checkpoints,
        **provenance(command_line()),
    }


def experiment_name(args: argparse.Namespace, plan: SearchPlan) -> str:
    """The name given, or the space's."""
    return str(args.name or plan.source.name)


def main(arguments: list[str] | None = None) -> int:
    """Run a search. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    console = cli.make_console()
    plan = plan_from(args)
    name = experiment_name(args, plan)
    experiment = None
    if args.resume:
        experiment = Experiment.open(args.results_dir, name)
        plan = resumed(
            plan,
            experiment.info,
            seed=args.seed,
            halving=args.halving,
            keep_checkpoints=args.keep_checkpoints,
        )
    else:
        Experiment.check_new(args.results_dir, name)
    data = load_data(plan, args.data_dir)
    if experiment is not None:
        check_same_data(experiment.info, data)
    sizes = ", ".join(f"{n:,} {split}" for split, n in data.sizes().items())
    console.print(f"{name}: {plan.space.base.backbone} on {plan.space.base.dataset} ({sizes})", highlight=False)
    again = command_line() if args.resume else f"{command_line()} --resume"
    try:
        ledger = drive(experiment, plan, data, args, console)
    except cli.Interrupted:
        return interrupted(args, name, again, console)
    except OSError as error:
        print(f"error: {error}\nwhat has been recorded is safe. Mend that, then go on:\n  {again}", file=sys.stderr)
        return cli.FAILED
    print_summary(console, ledger)
    return conclude(ledger, args, again, console)


def interrupted(args: argparse.Namespace, name: str, again: str, console: Console) -> int:
    """Write down that the search was interrupted, and say how to go on."""
    if not Path(args.results_dir, name).exists():
        raise cli.Interrupted
    experiment = Experiment.open(args.results_dir, name)
    with experiment.driving():
        experiment.record(ExperimentStopped(at=time.time(), state="interrupted"))
    console.print(f"interrupted; nothing is lost. To go on:\n  {again}", highlight=False, soft_wrap=True)
    return cli.INTERRUPTED


def conclude(ledger: Ledger, args: argparse.Namespace, again: str, console: Console) -> int:
    """The exit status of a search that came to its end, and what to type next."""
    if not ledger.finished:
        print(f"error: the search ended before its last trial; to go on:\n  {again}", file=sys.stderr)
        return cli.FAILED
    ended = [trial.ended for trial in ledger.experiment.history.ended if trial.ended]
    if all(end.status == "failed" for end in ended):
        reason = ended[-1].error.splitlines()[-1] if ended[-1].error else ended[-1].stop_reason
        print(f"error: every trial failed, the last one so: {reason}", file=sys.stderr)
        return cli.FAILED
    if len(ended) > 1:
        console.print(f"next:\n  {ensemble_command(ledger, args)}", highlight=False, soft_wrap=True)
    return cli.DONE


def ensemble_command(ledger: Ledger, args: argparse.Namespace) -> str:
    """The command that makes an ensemble of what has been found."""
    completed = sum(t.ended is not None and t.ended.status == "completed" for t in ledger.experiment.history.ended)
    command = ["python", "-m", "orchestrator.ensemble", "--experiment", ledger.experiment.name]
    command += ["--top-k", str(min(5, completed) if completed > 1 else 2)]
    if completed < 2:
        command += ["--include-stopped"]
    if Path(args.results_dir) != Path(DEFAULT_RESULTS_DIR):
        command += ["--results-dir", args.results_dir]
    return shlex.join(command)


if __name__ == "__main__":
    cli.run(main)
