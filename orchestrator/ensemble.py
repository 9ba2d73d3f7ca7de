"""Choose a diverse ensemble of a search's trials and score it, from stored predictions alone.

python -m orchestrator.ensemble --top-k 5
python -m orchestrator.ensemble --experiment cifar100 --selection greedy --combiner weighted
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from orchestrator import cli
from orchestrator.combination import COMBINERS
from orchestrator.diversity import disagreement, mean_disagreement
from orchestrator.ensembling import Row, choose, score_rows, shown_on_test
from orchestrator.pool import Candidates, EstimatePool, SelectPool, TestPool, find_candidates
from orchestrator.selection import SELECTORS
from results.events import EnsembleMade
from results.schema import FloatArray, ScoreRecord
from results.store import Experiment

SELECTION_STREAM, INTERVAL_STREAM = 0, 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.ensemble",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--experiment", nargs="+", default=[], metavar="NAME", help="default: the newest with two or more candidates"
    )
    parser.add_argument("--top-k", type=cli.count, default=5, help="members at most (default: 5)")
    parser.add_argument("--selection", choices=list(SELECTORS), default="diverse", help="default: diverse")
    parser.add_argument("--combiner", choices=list(COMBINERS), default="mean", help="default: mean")
    parser.add_argument(
        "--include-stopped", action="store_true", help="let trials that were stopped early be members too"
    )
    cli.add_results_dir(parser)
    parser.add_argument("--seed", type=cli.count_or_zero, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make an ensemble. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    console = cli.make_console()
    found = find_candidates(args.results_dir, args.experiment, k=args.top_k, include_stopped=args.include_stopped)
    experiment = next(iter(found.experiments.values()))
    with experiment.driving():
        # Read once more, now that no search can be adding trials.
        names = list(found.experiments)
        candidates = find_candidates(args.results_dir, names, k=args.top_k, include_stopped=args.include_stopped)
        make(experiment, candidates, args, console)
    return cli.DONE


def make(experiment: Experiment, candidates: Candidates, args: argparse.Namespace, console: Console) -> None:
    """Choose an ensemble, score it, store it in the experiment and print it."""
    select = candidates.load(SelectPool)
    rows = choose(
        select,
        k=args.top_k,
        selection=args.selection,
        combiner=args.combiner,
        rng=np.random.default_rng([args.seed, SELECTION_STREAM]),
        configurations=[candidate.configuration for candidate in candidates.rows],
    )
    ensemble_id = experiment.next_ensemble_id()
    scores: list[ScoreRecord] = []
    # The choice has been made: only now estimate is read, and then test.
    for shown, pool in (
        (rows, select),
        (rows, candidates.load(EstimatePool)),
        (shown_on_test(rows), candidates.load(TestPool)),
    ):
        rng = np.random.default_rng([args.seed, INTERVAL_STREAM])
        scores += score_rows(shown, pool, ensemble_id=ensemble_id, candidates=candidates, rng=rng)
    content = describe(rows[0], args, candidates, select)
    experiment.write_ensemble(ensemble_id, content={"ensemble_id": ensemble_id, **content}, scores=scores)
    members = [f"{m['experiment']}/{m['trial_id']}" for m in content["members"]]
    experiment.record(EnsembleMade(at=time.time(), ensemble_id=ensemble_id, members=members))
    show(console, experiment, ensemble_id, rows, scores, candidates, select)


def describe(row: Row, args: argparse.Namespace, candidates: Candidates, select: SelectPool) -> dict[str, Any]:
    """What `ensemble.json` says."""
    (ensemble,) = row.ensembles
    members = [
        {"experiment": c.experiment, "trial_id": c.trial_id, "weight": float(weight)}
        for c, weight in zip((candidates.rows[m] for m in ensemble.members), ensemble.weights_M, strict=True)
    ]
    return {
        "members": members,
        "combiner": ensemble.combiner,
        "temperature": ensemble.temperature,
        "selection": row.selection,
        "top_k": args.top_k,
        "seed": args.seed,
        "include_stopped": args.include_stopped,
        "candidates": len(candidates.rows),
        "chosen_on": {"split": "select", "examples": len(select.labels_N)},
        "mean_disagreement": mean_disagreement(disagreement(select.log_probs_MNC[list(ensemble.members)])),
    }


def show(
    console: Console,
    experiment: Experiment,
    ensemble_id: str,
    rows: Sequence[Row],
    scores: Sequence[ScoreRecord],
    candidates: Candidates,
    select: SelectPool,
) -> None:
    """Print the members, how much they disagree, and the tables of estimate and test."""
    (ensemble,) = rows[0].ensembles
    trials = [candidates.rows[m] for m in ensemble.members]
    disagreement_MM = disagreement(select.log_probs_MNC[list(ensemble.members)])
    temperature = "" if ensemble.temperature is None else f", temperature {ensemble.temperature:.2f}"
    console.print(
        f"{experiment.name}: {len(trials)} of {len(candidates.rows)} candidates, chosen by {rows[0].selection!r} on "
        f"{len(select.labels_N):,} select images{temperature}",
        highlight=False,
    )
    console.print(_members_table([c.trial_id for c in trials], ensemble.weights_M, disagreement_MM))
    for split, title in (
        ("estimate", "estimate: read once, after choosing"),
        ("test", "test: scored once, never chosen on"),
    ):
        shown = shown_on_test(rows) if split == "test" else list(rows)
        console.print(_score_table(title, shown, [s for s in scores if s.split == split]))
    console.print(verdict([s for s in scores if s.split == "estimate" and s.chosen]), highlight=False, soft_wrap=True)
    console.print(f"stored in {experiment.ensemble_folder(ensemble_id)}", highlight=False, soft_wrap=True)


def verdict(chosen: Sequence[ScoreRecord]) -> str:
    """One sentence: what estimate says of the chosen ensemble against the best single model."""
    parts = []
    for name, metric in (("accuracy", "accuracy"), ("NLL", "nll")):
        score = next(s for s in chosen if s.metric == metric)
        if score.gain is None or score.gain_ci_low is None or score.gain_ci_high is None:
            continue
        word = "better" if score.gain_ci_low > 0 else "worse" if score.gain_ci_high < 0 else "no difference shown"
        parts.append(f"{name} {word} (gain {_gain(score)})")
    return f"against the best single model, on {chosen[0].num_examples:,} estimate images: {'; '.join(parts)}"


def _members_table(trial_ids: Sequence[str], weights_M: FloatArray, disagreement_MM: FloatArray) -> Table:
    table = Table(title="members, and how often two of them disagree on select", title_justify="left", box=None)
    table.add_column("trial")
    table.add_column("weight", justify="right")
    for trial_id in trial_ids:
        table.add_column(trial_id, justify="right")
    for index, trial_id in enumerate(trial_ids):
        cells = ["-" if i == index else f"{value:.3f}" for i, value in enumerate(disagreement_MM[index])]
        table.add_row(trial_id, f"{weights_M[index]:.2f}", *cells)
    return table


def _score_table(title: str, rows: Sequence[Row], scores: Sequence[ScoreRecord]) -> Table:
    table = Table(title=f"{title} ({scores[0].num_examples:,} images)", title_justify="left", box=None)
    table.add_column("")
    for heading in ("k", "accuracy", "gain over best single (95%)", "top-5", "NLL", "gain (95%)", "Brier", "ECE"):
        table.add_column(heading, justify="right")
    per_row = len(scores) // len(rows)
    for index, row in enumerate(rows):
        by_metric = {s.metric: s for s in scores[index * per_row : (index + 1) * per_row]}
        is_single = row.kind == "single"
        table.add_row(
            row.label + (" *" if row.chosen else ""),
            str(by_metric["accuracy"].k),
            _figure(by_metric["accuracy"].value),
            "" if is_single else _gain(by_metric["accuracy"]),
            _figure(by_metric["top5_accuracy"].value),
            _figure(by_metric["nll"].value),
            "" if is_single else _gain(by_metric["nll"]),
            _figure(by_metric["brier"].value),
            _figure(by_metric["ece"].value),
        )
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _gain(score: ScoreRecord) -> str:
    if score.gain is None:
        return "-"
    return f"{score.gain:+.4f} [{score.gain_ci_low:+.4f}, {score.gain_ci_high:+.4f}]"


if __name__ == "__main__":
    cli.run(main)
