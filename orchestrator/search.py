"""Search regularization strength with Ray Tune, Optuna and early stopping that forecasts.

python -m orchestrator.search cifar100 --data-dir DIR
python -m orchestrator.search digits --num-trials 12
python -m orchestrator.search ./mine.py --dataset folder:photos --backbone resnet18 --set lr=0.05
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from orchestrator import cli, driver
from orchestrator.console import SearchConsole, print_audit, print_summary
from orchestrator.halving import HALVINGS
from orchestrator.ledger import Ledger
from orchestrator.plan import SearchPlan
from orchestrator.ray_cluster import ClusterStart, check_address, check_reachable
from orchestrator.warm_start import load_warm_start
from results.events import ExperimentStopped
from results.history import TrialHistory
from results.store import DEFAULT_RESULTS_DIR, Experiment
from search_spaces.space import load_space
from trainables.datasets import SplitImages

DEFAULT_SEED = 0
DEFAULT_KEEP_CHECKPOINTS = 50
DEFAULT_HALVING = "forecast"
DEFAULT_CONTROLS = 0.1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "space", metavar="SPACE", help="a name in search_spaces/, or a path to a file that defines SPACE"
    )
    parser.add_argument("--backbone", help="a name in trainables/backbones/")
    driver.add_driving_arguments(parser)
    driver.add_no_test(parser)
    parser.add_argument("--name", help="the experiment's name (default: the space's)")
    parser.add_argument("--num-trials", type=cli.count, help="every trial counts, baselines and failed ones too")
    parser.add_argument(
        "--max-concurrent", type=cli.count, help="trials at a time (default: as many as there is room for)"
    )
    parser.add_argument("--seed", type=cli.count_or_zero, help=f"default: {DEFAULT_SEED}")
    parser.add_argument("--halving", choices=list(HALVINGS), help=f"early stopping (default: {DEFAULT_HALVING})")
    parser.add_argument(
        "--control-fraction",
        type=cli.fraction_or_zero,
        metavar="F",
        help=f"share of the trials that is never stopped, to see what stopping does (default: {DEFAULT_CONTROLS})",
    )
    parser.add_argument(
        "--time-budget", type=cli.positive, metavar="SECONDS", help="of this run; what trains then is stopped"
    )
    parser.add_argument(
        "--finalists",
        type=cli.count_or_zero,
        metavar="K",
        help="train the best K configurations again at the end, to full length (default: 0)",
    )
    parser.add_argument(
        "--seeds", type=cli.count, metavar="S", help="with --finalists: each with S other seeds (default: 1)"
    )
    parser.add_argument("--cpus-per-trial", type=cli.count, default=1)
    parser.add_argument("--gpus-per-trial", type=cli.positive, help="default: 1 on cuda; fractions share a GPU")
    parser.add_argument("--address", help="a running Ray cluster, such as auto (default: a local one of its own)")
    parser.add_argument(
        "--keep-checkpoints",
        type=cli.count_or_zero,
        metavar="N",
        help=f"keep the weights of the best N trials (default: {DEFAULT_KEEP_CHECKPOINTS})",
    )
    parser.add_argument(
        "--warm-start",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="learn from the trials of earlier searches in the same --results-dir",
    )
    args = parser.parse_args(arguments)
    if args.seeds is not None and not args.finalists and not args.resume:
        parser.error("--seeds is for --finalists: give both")
    return args


def plan_from(args: argparse.Namespace) -> SearchPlan:
    """The plan of a new search."""
    overrides = driver.overrides_from(args, "dataset", "backbone", "train_fraction", "max_epochs")
    return SearchPlan(
        source=load_space(args.space),
        overrides=overrides,
        num_trials=args.num_trials,
        num_trials_given=args.num_trials is not None,
        seed=DEFAULT_SEED if args.seed is None else args.seed,
        halving=args.halving or DEFAULT_HALVING,
        control_fraction=DEFAULT_CONTROLS if args.control_fraction is None else args.control_fraction,
        finalists=args.finalists or 0,
        seeds=args.seeds or 1,
        keep_checkpoints=DEFAULT_KEEP_CHECKPOINTS if args.keep_checkpoints is None else args.keep_checkpoints,
        warm_start=tuple(args.warm_start),
        predicts_test=not args.no_test,
    )


def drive(
    experiment: Experiment | None,
    plan: SearchPlan,
    data: SplitImages,
    args: argparse.Namespace,
    console: Console,
    *,
    cluster: ClusterStart,
    warm: Sequence[TrialHistory] = (),
) -> Ledger:
    """Search as the experiment's one driver; a new experiment is made once Ray has what the trials want."""
    # These import torch and Ray Tune, which takes seconds in which Ray starts.
    from orchestrator import search_outlook
    from orchestrator.searcher import choose_resources, fit, must_grow
    from trainables.learner import check_trainable

    with ExitStack() as stack:
        stack.enter_context(cli.INTERRUPTS.deferred())
        if experiment is not None:
            stack.enter_context(experiment.driving())
        cluster.finish()
        cli.INTERRUPTS.listen()  # Ray has installed handlers of its own
        cli.INTERRUPTS.check()
        resources = choose_resources(
            args.device,
            cpus_per_trial=args.cpus_per_trial,
            gpus_per_trial=args.gpus_per_trial,
            max_concurrent=args.max_concurrent,
            num_trials=plan.space.budget.num_trials,
        )
        check_reachable(args.results_dir)
        for config in plan.space.corners():
            check_trainable(config, data, device=resources.device)
        plan = search_outlook.of_search(plan, data, resources, args, experiment=experiment, console=console)
        if experiment is None:
            experiment = driver.begin(args, plan, data, name=experiment_name(args, plan))
            stack.enter_context(experiment.driving())
        else:
            driver.record_resumption(experiment, plan, data)
            ended = sum(trial.started.stage == "search" for trial in experiment.history.ended)
            console.print(f"{ended} of {plan.space.budget.num_trials} trials have ended", highlight=False)
        shown = SearchConsole(console, num_trials=plan.num_trials_in_all, metric=plan.space.metric)
        ledger = driver.make_ledger(
            experiment,
            plan,
            max_concurrent=resources.max_concurrent,
            max_seconds=args.time_budget or plan.space.budget.max_seconds,
            warm=warm,
            notify=shown.changed,
        )
        if not ledger.finished:
            if must_grow(resources):
                console.print("waiting for the cluster to grow; ray status says how that goes", highlight=False)

            def check() -> None:
                cli.INTERRUPTS.check()
                shown.look()

            with shown.watching(ledger):
                fit(ledger, data, resources, check_interrupt=check)
        if ledger.finished or ledger.out_of_time:
            state = "finished" if ledger.finished else "interrupted"
            experiment.record(ExperimentStopped(at=time.time(), state=state))
        return ledger


def experiment_name(args: argparse.Namespace, plan: SearchPlan) -> str:
    """The name given, or the space's."""
    return str(args.name or plan.source.name)


def main(arguments: list[str] | None = None) -> int:
    """Run a search. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    console = cli.make_console()
    plan = plan_from(args)
    name = experiment_name(args, plan)
    check_address(args.address)
    experiment, plan = driver.open_or_check_new(args, plan, name)
    with ClusterStart(args.address, threads=args.cpus_per_trial) as cluster:
        data = driver.load_and_announce(args, plan, experiment, name=name, console=console)
        warm = load_warm_start(args.results_dir, plan, split_hash=data.split_hash, resuming=args.resume)
        for line in warm.lines:
            console.print(line, highlight=False, soft_wrap=True)
        try:
            ledger = drive(experiment, plan, data, args, console, cluster=cluster, warm=warm.trials)
        except cli.Interrupted:
            return driver.interrupted(args, name, console)
        except OSError as error:
            return driver.stopped_by(args, error)
    print_summary(console, ledger)
    print_audit(console, ledger)
    return conclude(ledger, args, console)


def conclude(ledger: Ledger, args: argparse.Namespace, console: Console) -> int:
    """The exit status of a search that came to its end, and what to type next."""
    if not ledger.finished and ledger.out_of_time:
        ended = f"the time is up after {len(ledger.experiment.history.endings)} trials"
        console.print(f"{ended}; to go on:\n  {driver.command_to_resume(args)}", highlight=False, soft_wrap=True)
        return cli.DONE
    if not ledger.finished:
        print(
            f"error: the search ended before its last trial; to go on:\n  {driver.command_to_resume(args)}",
            file=sys.stderr,
        )
        return cli.FAILED
    ends = [trial.ended for trial in ledger.experiment.history.ended if trial.ended]
    if all(end.status == "failed" for end in ends):
        reason = ends[-1].error.splitlines()[-1] if ends[-1].error else ends[-1].stop_reason
        print(f"error: every trial failed, the last one so: {reason}", file=sys.stderr)
        return cli.FAILED
    if sum(trial.may_be_member for trial in ledger.experiment.history.ended) > 1:
        console.print(f"next:\n  {ensemble_command(ledger, args)}", highlight=False, soft_wrap=True)
    return cli.DONE


def ensemble_command(ledger: Ledger, args: argparse.Namespace) -> str:
    """The command that makes an ensemble of what has been found."""
    completed = sum(t.ended is not None and t.ended.status == "completed" for t in ledger.experiment.history.ended)
    command = ["python", "-m", "orchestrator.ensemble", "--experiment", ledger.experiment.name]
    command += ["--top-k", str(min(5, completed) if completed > 1 else 2)]
    if completed < 2:
        command += ["--include-stopped"]
    predicts = completed < 2 or not ledger.experiment.info.get("predicts_test", True)
    if predicts and args.data_dir != cli.DEFAULT_DATA_DIR:
        command += ["--data-dir", args.data_dir]
    if Path(args.results_dir) != Path(DEFAULT_RESULTS_DIR):
        command += ["--results-dir", args.results_dir]
    return shlex.join(command)


if __name__ == "__main__":
    cli.run(main)
