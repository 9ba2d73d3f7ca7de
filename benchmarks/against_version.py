"""Trials per hour of a search with this code against another commit's, on the same space: the ratio.

    python benchmarks/against_version.py COMMIT --data-dir DIR

The other version is checked out into a temporary folder. Both run the same command in turns: cifar100's space with
small_cnn on a tenth of the training split, nothing stopped early, so that both train the same epochs. A search is timed
from the start of its first trial to the end of its last, as its parquet says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent.parent


@contextmanager
def other_version(commit: str) -> Iterator[Path]:
    """A temporary folder with another commit's code."""
    with tempfile.TemporaryDirectory() as temporary:
        code = Path(temporary) / "other"
        subprocess.run(["git", "worktree", "add", "--detach", code, commit], cwd=HERE, check=True)
        try:
            yield code
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", code], cwd=HERE, check=True)


def trials_per_hour(code: Path, folder: Path, *, name: str, arguments: list[str]) -> float:
    """Run a search with one version's code."""
    command = [sys.executable, "-m", "orchestrator.search", "cifar100", "--results-dir", str(folder), "--name", name]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    trials = pd.read_parquet(folder / name / "trials")
    if not (trials.status == "completed").all():
        raise RuntimeError(f"{name}: not all trials were completed")
    seconds = (trials.finished_at.max() - trials.started_at.min()).total_seconds()
    return 3600 * len(trials) / seconds


def main() -> None:
    """Print both rates in each round, and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--backbone", default="small_cnn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-trials", type=int, default=8)
    args = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as temporary, other_version(args.commit) as other:
        folder = Path(temporary)
        for number in range(args.rounds):
            rates = {
                version: trials_per_hour(
                    code,
                    folder,
                    name=f"{version}-{number}",
                    arguments=[
                        *("--data-dir", str(Path(args.data_dir).absolute()), "--backbone", args.backbone),
                        *("--train-fraction", "0.1", "--max-epochs", "3", "--halving", "none"),
                        *("--num-trials", str(args.num_trials), "--device", "cpu"),
                    ],
                )
                for version, code in (("other", other), ("this", HERE))
            }
            ratios.append(rates["this"] / rates["other"])
            print(f"this {rates['this']:.0f}, {args.commit} {rates['other']:.0f} trials per hour", flush=True)
    print(f"ratio: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
