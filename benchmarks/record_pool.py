"""Learning curves of random regularization strengths on CIFAR-100, for simulations of early stopping to replay.

    python benchmarks/record_pool.py --data-dir DIR --output FOLDER

Per configuration (a quarter of them with two training seeds) these runs of real training, with E = --max-epochs and the
rungs r = E/9 and E/3:

    full      cosine over E epochs
    short_r   a complete cosine of its own over r epochs
    stable    the trunk: a constant rate that falls linearly in the last 20% of E epochs
    branch_r  the trunk's state after r epochs, its rate falling linearly to 0 within a quarter of r

FOLDER/parts has a file a (configuration, seed), written once all its runs are done: the command goes on where it was
ended. FOLDER/pool.parquet has a row per (config_id, seed, run, epoch), FOLDER/pool.json says how they were made.
`val_*` and `test_*` are the EMA weights' figures, `raw_val_accuracy` the raw ones'; NLL is in nats. Test is scored
after the last epoch of a run and is null before: regret can be measured on images that no strategy has chosen on.
`epoch_seconds` is the wall time of an epoch's steps, without evaluation, with all the processes at work.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import platform
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from interleaved import machine

from orchestrator.plan import provenance
from results.files import json_bytes, parquet_bytes, replace_file, rows_bytes
from results.schema import EpochResult, TestPredictions, UsageError
from trainables.config import TrainConfig
from trainables.datasets import SplitImages, load_dataset
from trainables.evaluation import predictions
from trainables.learner import Learner
from trainables.loop import TrainState, train
from trainables.process import prepare_process
from trainables.resident import ResidentImages, batch_size_of
from trainables.validation import accuracy, log_softmax, nll

BASE = TrainConfig(
    dataset="cifar100", backbone="small_cnn", image_size=16, batch_size=64, crop_padding=2, precision="bfloat16"
)
DIMENSIONS = {
    "dropout": "uniform 0 to 0.5",
    "weight_decay": "log-uniform 1e-5 to 1e-2",
    "mixup_alpha": "uniform 0 to 1",
    "label_smoothing": "uniform 0 to 0.2",
    "cutout_size": "0, 2, 4, 6 or 8",
    "lr": "log-uniform 0.02 to 0.5",
}
EMA_HORIZON_EPOCHS = 1.5
DECAY_FRACTION = 0.2
BRANCH_SHARE = 0.25
EVERY_WITH_SECOND_SEED = 4
SECOND_SEED_OFFSET = 1_000

FIGURES = (
    "val_accuracy",
    "val_nll",
    "raw_val_accuracy",
    "train_loss",
    "train_accuracy",
    "clean_train_accuracy",
    "epoch_seconds",
)
SCHEMA = pa.schema(
    [
        ("config_id", pa.int32()),
        ("seed", pa.int32()),
        ("training_seed", pa.int32()),
        ("run", pa.string()),
        ("rung", pa.int32()),
        ("epoch", pa.int32()),
        *((name, pa.int32() if name == "cutout_size" else pa.float32()) for name in DIMENSIONS),
        *((name, pa.float32()) for name in FIGURES),
        ("test_accuracy", pa.float32()),
        ("test_nll", pa.float32()),
    ]
)

SavedState = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A configuration with one training seed; `seed` counts a configuration's trainings from 0."""

    config_id: int
    seed: int
    config: TrainConfig
    part: Path


@dataclass(frozen=True)
class Curve:
    """One run's epochs, and the test figures after the last one (None where it diverged)."""

    run: str
    rung: int | None
    results: list[EpochResult]
    test_accuracy: float | None
    test_nll: float | None


def rungs_of(max_epochs: int) -> tuple[int, int]:
    """Epochs after which halving by 3 looks at a trial. Raises UsageError unless 9 divides `max_epochs`."""
    if max_epochs % 9:
        raise UsageError(f"--max-epochs {max_epochs}: wanted a multiple of 9, so that both rungs are whole epochs")
    return max_epochs // 9, max_epochs // 3


def branch_epochs(rung: int) -> int:
    """Length of the decay branched off at a rung."""
    return max(1, round(BRANCH_SHARE * rung))


def sampled(base: TrainConfig, *, config_id: int, seed: int) -> TrainConfig:
    """A random point of DIMENSIONS, the same however many others there are; its training seed is its own too."""
    rng = np.random.default_rng([seed, config_id])
    return base.having(
        {
            "dropout": rng.uniform(0, 0.5),
            "weight_decay": 10 ** rng.uniform(-5, -2),
            "mixup_alpha": rng.uniform(0, 1),
            "label_smoothing": rng.uniform(0, 0.2),
            "cutout_size": int(rng.choice([0, 2, 4, 6, 8])),
            "lr": float(np.exp(rng.uniform(np.log(0.02), np.log(0.5)))),
            "seed": seed + config_id,
        }
    )


def base_config(data: SplitImages, *, max_epochs: int, train_fraction: float) -> TrainConfig:
    """BASE for a dataset of a size, with a moving average over EMA_HORIZON_EPOCHS."""
    base = replace(BASE, max_epochs=max_epochs, train_fraction=train_fraction)
    steps = len(data.train) // batch_size_of(base, data)
    return replace(base, ema_decay=1 - 1 / (EMA_HORIZON_EPOCHS * steps))


def stable(config: TrainConfig) -> TrainConfig:
    """The trunk: the same training at a constant rate, with a linear decay at its end."""
    return replace(config, schedule="warmup_stable_decay", decay_fraction=DECAY_FRACTION)


def branch(trunk: TrainConfig, *, rung: int) -> TrainConfig:
    """The trunk's training ended early: its rates up to epoch `rung`, then a linear fall to 0.

    The trunk must not decay yet at the rung, and its warmup must be over.
    """
    decay = branch_epochs(rung)
    return replace(trunk, max_epochs=rung + decay, decay_fraction=decay / (rung + decay))


def curves(config: TrainConfig, data: ResidentImages) -> Iterator[Curve]:
    """All runs of one configuration. There is no branch at a rung that a diverging trunk does not reach."""
    rungs = rungs_of(config.max_epochs)
    learner = Learner(config, data)
    yield trained("full", config, data, learner)
    for rung in rungs:
        yield trained(f"short_{rung}", replace(config, max_epochs=rung), data, learner, rung=rung)
    trunk, states = stable(config), dict[int, SavedState]()
    yield trained("stable", trunk, data, learner, keep_at=rungs, states=states)
    for rung, state in states.items():
        yield trained(f"branch_{rung}", branch(trunk, rung=rung), data, learner, rung=rung, start=state)


def trained(
    run: str,
    config: TrainConfig,
    data: ResidentImages,
    learner: Learner,
    *,
    rung: int | None = None,
    start: SavedState | None = None,
    keep_at: Collection[int] = (),
    states: dict[int, SavedState] | None = None,
) -> Curve:
    """Train to the end, from `start` or from the first step; the epochs before `start` are not in the curve.

    The states after the epochs of `keep_at` are copied to `states`.
    """
    state = TrainState(config, data, learner=learner)
    if start is not None:
        state.load_state_dict(start)
    results = []
    for result in train(config, data, state=state):
        results.append(result)
        if states is not None and result.epoch in keep_at:
            states[result.epoch] = copy.deepcopy(state.state_dict())
    if results[-1].diverged:
        return Curve(run, rung, results, None, None)
    test = predictions(state.evaluated, data, TestPredictions, precision=config.precision)
    return Curve(
        run, rung, results, accuracy(test.logits_NC, test.labels_N), nll(log_softmax(test.logits_NC), test.labels_N)
    )


def rows_of(task: Task, curve: Curve) -> Iterator[dict[str, Any]]:
    """The curve's epochs as rows of SCHEMA."""
    for result in curve.results:
        is_last = result is curve.results[-1]
        yield {
            "config_id": task.config_id,
            "seed": task.seed,
            "training_seed": task.config.seed,
            "run": curve.run,
            "rung": curve.rung,
            "epoch": result.epoch,
            **{name: getattr(task.config, name) for name in DIMENSIONS},
            **{name: getattr(result, name) for name in FIGURES},
            "test_accuracy": curve.test_accuracy if is_last else None,
            "test_nll": curve.test_nll if is_last else None,
        }


def record(task: Task, split: SplitImages) -> float:
    """Train all runs of a task and write its part. Returns the seconds that took."""
    start = time.monotonic()
    data = ResidentImages.on("cpu", split)
    rows = [row for curve in curves(task.config, data) for row in rows_of(task, curve)]
    replace_file(task.part, rows_bytes(rows, SCHEMA), sync=False)
    return time.monotonic() - start


def tasks_of(base: TrainConfig, *, num_configs: int, seed: int, folder: Path) -> list[Task]:
    """Every configuration once, then every fourth with its second training seed."""
    configs = {config_id: sampled(base, config_id=config_id, seed=seed) for config_id in range(num_configs)}
    first = [Task(i, 0, config, folder / f"config_{i:03d}_seed_0.parquet") for i, config in configs.items()]
    return first + [
        Task(
            task.config_id,
            1,
            replace(task.config, seed=task.config.seed + SECOND_SEED_OFFSET),
            folder / f"config_{task.config_id:03d}_seed_1.parquet",
        )
        for task in first[::EVERY_WITH_SECOND_SEED]
    ]


def record_all(tasks: list[Task], split: SplitImages, *, processes: int) -> None:
    """Record the tasks that have no part yet, each process on one thread."""
    missing = [task for task in tasks if not task.part.exists()]
    start = time.monotonic()
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=partial(prepare_process, threads=1)
    ) as pool:
        futures = {pool.submit(record, task, split): task for task in missing}
        for done, future in enumerate(as_completed(futures), 1):
            task, minutes = futures[future], (time.monotonic() - start) / 60
            print(
                f"{task.part.stem}: {future.result():.0f} s  [{done}/{len(missing)} in {minutes:.1f} min]", flush=True
            )


def description(args: argparse.Namespace, base: TrainConfig, split: SplitImages) -> dict[str, Any]:
    """What pool.json says, but for the number of configurations recorded."""
    rungs = rungs_of(base.max_epochs)
    made = provenance(
        f"python benchmarks/record_pool.py --data-dir DIR --output FOLDER --num-configs {args.num_configs} "
        f"--max-epochs {args.max_epochs} --train-fraction {args.train_fraction} --processes {args.processes} "
        f"--seed {args.seed}"
    )
    return {
        "max_epochs": base.max_epochs,
        "rungs": list(rungs),
        "branch_epochs": {str(rung): branch_epochs(rung) for rung in rungs},
        "stable_decay_fraction": DECAY_FRACTION,
        "ema_horizon_epochs": EMA_HORIZON_EPOCHS,
        "dimensions": DIMENSIONS,
        "seed": args.seed,
        "second_seed_every": EVERY_WITH_SECOND_SEED,
        "base": base.to_dict(),
        "split_hash": split.split_hash,
        "split_sizes": split.sizes(),
        "machine": f"{machine('cpu')} a process, {args.processes} processes",
        **made,
        "versions": {"python": platform.python_version(), **made["versions"]},
    }


def check_same_pool(path: Path, wanted: dict[str, Any]) -> None:
    """Raise UsageError if the folder holds a pool of another description: its parts would not belong together."""
    if not path.exists():
        return
    found = json.loads(path.read_text())
    differing = [key for key in ("max_epochs", "seed", "base", "split_hash") if found[key] != wanted[key]]
    if differing:
        raise UsageError(f"{path} is of another pool, which differs in {', '.join(differing)}; give another --output")


def compact(output: Path) -> None:
    """Put all parts that there are into pool.parquet, and their number, by seed, into pool.json."""
    parts = sorted((output / "parts").glob("config_*.parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in parts])
    about = json.loads((output / "pool.json").read_text())
    recorded = {f"seed_{seed}": sum(part.stem.endswith(f"_seed_{seed}") for part in parts) for seed in (0, 1)}
    replace_file(output / "pool.json", json_bytes({**about, "configurations_recorded": recorded}), sync=False)
    replace_file(output / "pool.parquet", parquet_bytes(table), sync=False)
    print(f"{len(parts)} parts, {table.num_rows} rows in {output / 'pool.parquet'}")


def main() -> None:
    """Record what is missing, and put the parts together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-configs", type=int, default=40)
    parser.add_argument("--max-epochs", type=int, default=63)
    parser.add_argument("--train-fraction", type=float, default=0.04)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compact", action="store_true", help="only put together the parts that there are")
    args = parser.parse_args()
    if not args.compact:
        if args.data_dir is None:
            parser.error("--data-dir DIR is needed to record")
        split = load_dataset(
            BASE.dataset, data_dir=args.data_dir, image_size=BASE.image_size, train_fraction=args.train_fraction
        )
        base = base_config(split, max_epochs=args.max_epochs, train_fraction=args.train_fraction)
        about = description(args, base, split)
        check_same_pool(args.output / "pool.json", about)
        replace_file(args.output / "pool.json", json_bytes(about), sync=False)
        tasks = tasks_of(base, num_configs=args.num_configs, seed=args.seed, folder=args.output / "parts")
        record_all(tasks, split, processes=args.processes)
    compact(args.output)


if __name__ == "__main__":
    main()
