"""Write an experiment's parquet files and Optuna study anew from its event log.

python -m orchestrator.rebuild cifar100
"""

from __future__ import annotations

import argparse
import sys

from orchestrator import cli
from results.objects import within
from results.store import Experiment


def main(arguments: list[str] | None = None) -> int:
    """Rebuild an experiment. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.rebuild", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="the experiment")
    cli.add_results_dir(parser)
    args = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    experiment = Experiment.open(args.results_dir, args.name)
    experiment.rebuild()
    num_rows, log = len(experiment.history.ended), within(experiment.where, "events")
    print(f"{args.name}: rebuilt {num_rows} rows of trials/ and the study from {log}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
