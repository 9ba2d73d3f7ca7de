"""What choosing an ensemble costs: selection against the plain loop, and the whole command with its memory.

    python benchmarks/ensemble_cost.py
    python benchmarks/ensemble_cost.py --models 2000 --no-loop

Models are invented: they differ in skill, share errors, and have logits of 5,000 images and 100 classes for each of
select, estimate and test, stored as a search stores them. The plain loop adds each candidate's float64 probabilities
to the sum, divides, and computes the NLL or the accuracy of all images; it is run for a few of the 50 rounds, in turns
with the whole selection of this project, and scaled. The command is run as a user runs it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from interleaved import in_turns, machine
from invented import SPLITS, Variants, store_models
from scipy.special import softmax

from orchestrator.greedy import LEAST_PROBABILITY, ROUNDS, by_accuracy, by_nll
from results.schema import FloatArray, IntArray, Split

LOOP_ROUNDS = 1
TURNS = 3


def plain_loop(probs_MNC: FloatArray, loss: Callable[[FloatArray], float], *, rounds: int) -> list[int]:
    """Forward selection with replacement, as one would write it down."""
    total_NC = np.zeros(probs_MNC.shape[1:])
    chosen = []
    for size in range(1, rounds + 1):
        losses = [loss((total_NC + probs_NC) / size) for probs_NC in probs_MNC]
        chosen.append(int(np.argmin(losses)))
        total_NC += probs_MNC[chosen[-1]]
    return chosen


def against_the_loop(logits: Callable[[int], FloatArray], labels_N: IntArray, *, models: int) -> None:
    """Time both selections and their plain loops in turns."""
    rows = np.arange(len(labels_N))
    probs_MNC = np.stack([softmax(logits(m).astype(np.float64), axis=1) for m in range(models)])
    narrow_MNC, label_probs_MN = probs_MNC.astype(np.float32), probs_MNC[:, rows, labels_N]

    def nll(mean_NC: FloatArray) -> float:
        return float(-np.log(np.maximum(mean_NC[rows, labels_N], LEAST_PROBABILITY)).mean())

    def error(mean_NC: FloatArray) -> float:
        return float((mean_NC.argmax(1) != labels_N).mean())

    seconds = in_turns(
        {
            "nll": lambda: by_nll(label_probs_MN, models),
            "loop, nll": lambda: plain_loop(probs_MNC, nll, rounds=LOOP_ROUNDS),
            "accuracy": lambda: by_accuracy(narrow_MNC, labels_N, models),
            "loop, accuracy": lambda: plain_loop(probs_MNC, error, rounds=LOOP_ROUNDS),
        },
        rounds=TURNS,
    )
    for name in ("nll", "accuracy"):
        pairs = zip(seconds[f"loop, {name}"], seconds[name], strict=True)
        ratios = [loop * ROUNDS / LOOP_ROUNDS / ours for loop, ours in pairs]
        print(
            f"{ROUNDS} rounds on {name}: {statistics.median(seconds[name]):.3f} s, "
            f"{statistics.median(ratios):.1f} times as fast as the loop ({min(ratios):.1f} to {max(ratios):.1f})"
        )


MEASURED = """
import runpy, sys
try:
    runpy.run_module("orchestrator.ensemble", run_name="__main__", alter_sys=True)
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def whole_command(results_dir: Path, *arguments: str) -> None:
    """Time `orchestrator.ensemble` in a process of its own, and say what memory it took at most (Linux)."""
    command = [sys.executable, "-c", MEASURED, "--results-dir", str(results_dir), *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    kibibytes = int(done.stdout.split()[-2])
    print(f"orchestrator.ensemble {' '.join(arguments)}: {seconds:.1f} s, {kibibytes / 2**20:.2f} GiB")


def main() -> None:
    """Print ratios, seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--examples", type=int, default=5_000)
    parser.add_argument("--held-out", type=int, help="of estimate and test (default: as many)")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--no-loop", action="store_true", help="leave the plain loop out: it needs memory for all")
    parser.add_argument("--selection", nargs="+", default=["diverse", "greedy"])
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    sizes = {split: args.examples if split == "select" else args.held_out or args.examples for split in SPLITS}
    labels: dict[Split, IntArray] = {split: rng.integers(0, args.classes, sizes[split]) for split in SPLITS}
    common = {split: rng.standard_normal((sizes[split], args.classes), dtype=np.float32) for split in SPLITS}

    def logits(model: int, split: Split) -> FloatArray:
        own = np.random.default_rng([model, SPLITS.index(split)])
        logits_NC = 2 * common[split] + 1.5 * own.standard_normal(common[split].shape, dtype=np.float32)
        logits_NC[np.arange(sizes[split]), labels[split]] += np.random.default_rng(model).uniform(2, 4)
        return np.asarray(logits_NC.astype(np.float16))

    def variants(model: int) -> Variants:
        return {"best": {split: logits(model, split) for split in SPLITS}}

    print(f"{args.models} models x {args.examples:,} x {args.classes}; {machine('cpu')}")
    if not args.no_loop:
        against_the_loop(lambda model: logits(model, "select"), labels["select"], models=args.models)
    with tempfile.TemporaryDirectory() as folder:
        store_models(Path(folder), variants, labels, num_models=args.models, num_classes=args.classes)
        for selection in args.selection:
            whole_command(Path(folder), "--selection", selection)


if __name__ == "__main__":
    main()
