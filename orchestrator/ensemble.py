"""Choose an ensemble of stored models, score it beside its controls and keep it, from stored predictions.

Images are needed for what has not been predicted yet: trials that were stopped early (--include-stopped), and the test
split after a search with --no-test.

python -m orchestrator.ensemble --top-k 5
python -m orchestrator.ensemble --experiment cifar100 --selection greedy --combiner weighted
python -m orchestrator.ensemble --candidates "variant == 'best' and stage == 'finalist'" --max-cost 2e8
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # torch reads it once, when it is imported: idle threads otherwise spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
import time
import warnings
from collections.abc import Set
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from orchestrator import cli
from orchestrator.candidates import Candidate, Candidates, NotFinite, choose_experiments, find_candidates
from orchestrator.combination import COMBINERS
from orchestrator.description import Description
from orchestrator.diversity import Diversity, diversity
from orchestrator.ensemble_console import Report, show
from orchestrator.ensembling import MOST_AT_ONCE, Row, choose, shown_on_test
from orchestrator.keeping import Chosen, keep
from orchestrator.metrics import class_accuracies
from orchestrator.pool import POOLS, EstimatePool, Pool, SelectPool, TestPool
from orchestrator.returns import cross_fitted, curve, front
from orchestrator.scoring import num_comparisons, score_rows
from orchestrator.selection import FOLDS, SELECTORS
from orchestrator.stopped import stopped_without_predictions
from results.events import EnsembleMade
from results.schema import ClassAccuracyRecord, DataWarning, UsageError
from results.store import Experiment

SELECTION_STREAM, INTERVAL_STREAM, CURVE_STREAM, STABILITY_STREAM = range(4)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.ensemble",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--experiment",
        nargs="+",
        default=[],
        metavar="NAME",
        help="several are pooled and the ensemble lies in the first (default: the newest with two or more candidates)",
    )
    parser.add_argument("--top-k", type=cli.count, default=5, help="members at most (default: 5)")
    parser.add_argument("--selection", choices=list(SELECTORS), default="diverse", help="default: diverse")
    parser.add_argument("--combiner", choices=list(COMBINERS), default="mean", help="default: mean")
    parser.add_argument(
        "--include-stopped",
        action="store_true",
        help="let trials that were stopped early be members too; predicts with those that have no predictions yet",
    )
    parser.add_argument(
        "--data-dir",
        default=cli.DEFAULT_DATA_DIR,
        help="where datasets are, if something has to be predicted first (default: %(default)s)",
    )
    parser.add_argument("--dataset", help="where the images are now, if no longer where they were")
    parser.add_argument(
        "--no-test",
        action="store_true",
        help="leave the test split alone: score on estimate only. Without it, trials of a search with --no-test "
        "predict test now",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="to predict on")
    parser.add_argument(
        "--candidates",
        default="",
        metavar="EXPR",
        help="take those only for which this holds, as in pandas.DataFrame.query over the columns of trials/, "
        "`experiment` and `variant`",
    )
    parser.add_argument(
        "--max-cost",
        type=cli.positive,
        metavar="MULTIPLY_ADDS",
        help="most multiply-adds of predicting an image with the chosen ensemble",
    )
    cli.add_results_dir(parser)
    parser.add_argument("--seed", type=cli.count_or_zero, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make an ensemble. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    console = cli.make_console()
    experiments = choose_experiments(args.results_dir, args.experiment, include_stopped=args.include_stopped)
    experiment = next(iter(experiments.values()))
    if args.include_stopped:
        predict_those_lacking(experiments, args, console)
    if not args.no_test:
        predict_test_left_out(experiments, args, console)
    with experiment.driving():  # no search adds trials from here on
        unsound: set[Candidate] = set()
        while True:
            candidates, select = find(experiments, args, without=unsound)
            try:
                report = make(experiment, candidates, select, args)
                break
            except NotFinite as error:  # seen only now: of the other splits those alone are read that are needed
                warnings.warn(f"{error}, and is left out of the choice", DataWarning, stacklevel=1)
                unsound.add(error.candidate)
        show(console, report)
    return cli.DONE


def predict_those_lacking(experiments: dict[str, Experiment], args: argparse.Namespace, console: Console) -> None:
    """Predict with the trials that were stopped early, may become candidates and have no predictions yet."""
    lacking = stopped_without_predictions(experiments.values(), expression=args.candidates)
    if not lacking:
        return
    from orchestrator.predicting import Source, predict_stopped  # and torch, which an ensemble needs for nothing else

    source = Source(data_dir=args.data_dir, dataset=args.dataset, device=args.device)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    for name, trial_ids in lacking.items():
        predict_stopped(experiments[name], trial_ids, source, say=say)


def predict_test_left_out(experiments: dict[str, Experiment], args: argparse.Namespace, console: Console) -> None:
    """Predict the test split with candidates of experiments that have left it out so far."""
    left_out = [name for name, experiment in experiments.items() if not experiment.info.get("predicts_test", True)]
    if not left_out:
        return
    from orchestrator.predicting import Source, predict_test  # and torch, which an ensemble needs for nothing else

    found = find_candidates(experiments, k=args.top_k, include_stopped=args.include_stopped, expression=args.candidates)
    for name in left_out:
        trial_ids = dict.fromkeys(row.trial_id for row in found.rows if row.experiment == name)
        source = Source(data_dir=args.data_dir, dataset=args.dataset, device=args.device)
        predict_test(
            experiments[name],
            trial_ids,
            source,
            say=lambda line: console.print(line, highlight=False, soft_wrap=True),
        )


def find(
    experiments: dict[str, Experiment], args: argparse.Namespace, *, without: Set[Candidate]
) -> tuple[Candidates, SelectPool]:
    """The candidates with sound predictions, and their pool. Raises UsageError when they are fewer trials than k."""
    found = find_candidates(experiments, k=args.top_k, include_stopped=args.include_stopped, expression=args.candidates)
    rows = tuple(row for row in found.rows if row not in without)
    if not rows:
        raise UsageError("no candidate has finite logits on every split; search again with a lower learning rate")
    candidates, select = replace(found, rows=rows).read_select()
    if len(select.labels_N) < FOLDS:
        raise UsageError(
            f"{len(select.labels_N)} select images, but choosing is cross-fitted in {FOLDS} parts of them; wanted "
            f"{FOLDS} or more: take a larger dataset"
        )
    sound = len(np.unique(select.trials_M))
    if sound < args.top_k:
        raise UsageError(f"--top-k {args.top_k} but only {sound} trials have sound predictions; lower it")
    return candidates, select


def make(experiment: Experiment, candidates: Candidates, select: SelectPool, args: argparse.Namespace) -> Report:
    """Choose an ensemble, score it, and store it in the experiment."""

    def rng(stream: int) -> np.random.Generator:
        return np.random.default_rng([args.seed, stream])

    how = {"k": args.top_k, "selection": args.selection, "combiner": args.combiner}
    rows = choose(
        select,
        **how,
        rng=rng(SELECTION_STREAM),
        max_cost=args.max_cost,
        kinds=[c.kind for c in candidates.rows],
        train_costs=[c.train_cost for c in candidates.rows],
    )
    # The bonus of `diverse` is drawn with the same numbers as the chosen ensemble's: without --max-cost the curve goes
    # through it.
    curve_rows = curve(select, **how, rng=rng(SELECTION_STREAM))
    stability = cross_fitted(select, **how, max_cost=args.max_cost, rng=rng(STABILITY_STREAM))
    ensemble_id = experiment.next_ensemble_id()
    # The choice has been made: only now estimate is read, and then test.
    estimate = candidates.load(EstimatePool)
    tests = [] if args.no_test else [candidates.load(TestPool)]
    scores = [
        record
        for shown, pool in (
            ([*rows, *curve_rows], select),
            ([*rows, *curve_rows], estimate),
            *((shown_on_test(rows), test) for test in tests),
        )
        for record in score_rows(
            shown, pool, ensemble_id=ensemble_id, candidates=candidates.rows, rng=rng(INTERVAL_STREAM)
        )
    ]
    searched = [e.trials() for e in candidates.experiments.values()]
    report = Report(
        experiment=experiment,
        ensemble_id=ensemble_id,
        candidates=candidates,
        select=select,
        rows=rows,
        curve=curve_rows,
        on_front=front([s for s in scores if (s.kind, s.split, s.metric) == ("curve", "select", "accuracy")]),
        scores=scores,
        stability=stability,
        diversity=_diversity(rows[0], select),
        comparisons=num_comparisons([*rows, *curve_rows]),
        num_trials=sum(len(trials) for trials in searched),
        search_seconds=float(sum(trials["train_seconds"].sum() for trials in searched)),
    )
    description = describe(report, args)
    report.lacking.extend(member.name for member in description.members if not member.weights_file)
    experiment.write_ensemble(
        ensemble_id,
        content=description.to_json(),
        scores=scores,
        classes=[record for pool in (estimate, *tests) for record in classes(report, pool)],
    )
    members = [f"{c.experiment}/{c.trial_id}" for c in report.members]
    experiment.record(EnsembleMade(at=time.time(), ensemble_id=ensemble_id, members=members))
    return report


def _diversity(row: Row, select: SelectPool) -> Diversity | None:
    """How the chosen members differ on select; None of more than can be held in memory together."""
    (ensemble,) = row.ensembles
    if len(ensemble.members) > MOST_AT_ONCE:
        return None
    log_probs_MNC = select.log_probs(ensemble.members, ensemble.combination.temperatures_M)
    return diversity(log_probs_MNC, select.labels_N, ensemble.weights_M)


def describe(report: Report, args: argparse.Namespace) -> Description:
    """Keep the members' weights; what `ensemble.json` says."""
    (ensemble,) = report.rows[0].ensembles
    experiments = report.candidates.experiments
    chosen = [
        Chosen(experiments[candidate.experiment], candidate.trial_id, candidate.variant, float(weight))
        for candidate, weight in zip(report.members, ensemble.weights_M, strict=True)
    ]
    how: dict[str, Any] = {
        "selection": report.rows[0].selection,
        "top_k": args.top_k,
        "max_cost": args.max_cost,
        "seed": args.seed,
        "include_stopped": args.include_stopped,
        "candidates_where": args.candidates,
        "candidates": len(report.candidates.rows),
        "chosen_on": {"split": "select", "examples": len(report.select.labels_N)},
        "diversity": None if report.diversity is None else asdict(report.diversity),
        "stability": asdict(report.stability),
        "optimism": {metric: report.optimism(metric) for metric in ("accuracy", "nll")},
        "comparisons": report.comparisons,
    }
    folder = report.experiment.ensemble_folder(report.ensemble_id)
    return keep(folder, chosen, ensemble.combination, ensemble_id=report.ensemble_id, further=how)


def classes(report: Report, pool: Pool) -> list[ClassAccuracyRecord]:
    """The accuracy of the chosen ensemble and of the best single model on each class of a split."""
    names = report.experiment.info["class_names"]
    single = next(row for row in report.rows if row.baseline)
    chosen_C, single_C = (
        class_accuracies(row.ensembles[0].score(pool).correct_N, pool.labels_N, len(names))
        for row in (report.rows[0], single)
    )
    counts_C = np.bincount(pool.labels_N, minlength=len(names))
    return [
        ClassAccuracyRecord(
            ensemble_id=report.ensemble_id,
            split=POOLS[type(pool)][0],
            label=label,
            class_name=str(names[label]),
            num_examples=int(counts_C[label]),
            accuracy=None if pd.isna(chosen_C[label]) else float(chosen_C[label]),
            single_accuracy=None if pd.isna(single_C[label]) else float(single_C[label]),
        )
        for label in range(len(names))
    ]


if __name__ == "__main__":
    cli.run(main)
