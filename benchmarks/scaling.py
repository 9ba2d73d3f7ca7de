"""One training divided among 1, 2, ... workers: images/s, and where the time goes; then a projection to more of them.

    python benchmarks/scaling.py --workers 1 2 --output scaling.parquet

A worker is a process, with a CPU thread or a GPU of its own; they are started without Ray, whose part is over when the
training begins. For each number of workers alternatives run in turns in the same processes: the bare DDP step (forward,
backward, optimizer, gradients exchanged) on one fixed share of a batch; the same without the exchange; the input part
alone; and training as it is, with input, figures, and the word between workers whether one wants to stop. Then a
checkpoint is written: what training waits for it, and what it takes in the background. Images are noise of CIFAR-100's
shape. The global batch is the same however many workers divide it.

The projection is arithmetic on what was measured, no measurement: compute by the line through the steps of the shares
measured, which it follows far below the smallest of them; the ring all-reduce's bytes, 2 (W - 1) / W of the gradients',
over the link given, with none or all of it hidden behind the backward pass. Not in it: what synchronized batch norms
exchange, two small messages a layer and step, each of which all devices wait for.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from interleaved import in_turns, machine, synchronize, versions

from results.store import TrialFiles
from trainables.augment import EpochDraws
from trainables.background import BackgroundWriter
from trainables.config import TrainConfig
from trainables.datasets import LabelledImages, SplitImages, split
from trainables.learner import Learner
from trainables.loop import TrainState, train_steps
from trainables.mixing import SoftTargets
from trainables.parallel import Agreement, Ranks, num_bytes
from trainables.process import prepare_process
from trainables.recipes import RECIPES
from trainables.resident import ResidentImages
from trainables.trial import serialized

TARGETS = (8, 64)
LINK_BYTES = {
    "cuda": {"one host, NVLink": 450e9, "between hosts, 400 Gb/s": 50e9},
    "cpu": {"between hosts, 10 Gb/s": 1.25e9},
}
"""A direction's bytes a second: of an H200's links and its usual network card, by their datasheets."""
SHARES_MEASURED = (1, 2, 4)
MOST_OVERHEAD = 0.05


def noise(config: TrainConfig, *, steps: int) -> SplitImages:
    """Images of CIFAR-100's shape for so many steps; of fewer classes where there are not as many images."""
    count = config.batch_size * steps
    classes = min(100, count)
    images = np.random.default_rng(0).integers(0, 256, size=(count + 200, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(count + 200) % classes
    return split(LabelledImages(images, labels, 200, tuple(map(str, range(classes)))), val_fraction=0.0)


def measured(ranks: Ranks, config: TrainConfig, steps: int, rounds: int, device: str) -> dict[str, Any]:
    """Medians over the rounds, in seconds a step, as this rank has them."""
    data = ResidentImages.on(device, noise(config, steps=steps), ranks=ranks)
    state = TrainState(config, data)
    learner, agreement = state.learner, Agreement(ranks)
    images, targets = next(data.batches(config, epoch=1, image_size=32))
    learner.begin_epoch()

    def bare() -> None:
        for _ in range(steps):
            learner.step(images, targets, lr=1e-3)

    def unexchanged() -> None:
        with learner.unexchanged():
            bare()

    def training() -> None:
        train_steps(config, data, state, epoch=1, on_step=lambda: agreement.after_step(False) and None)

    def only_input() -> None:
        for _ in data.batches(config, epoch=1, image_size=32):
            pass

    def draw() -> None:
        num_images, batch_size = len(data.split.train), config.batch_size
        EpochDraws.draw(config, epoch=1, num_images=num_images, image_size=32, device=device, batch_size=batch_size)

    alternatives: dict[str, Callable[[], None]] = {
        "bare": bare,
        "training": training,
        "input": only_input,
        "draw": draw,
    }
    if ranks.several:
        alternatives["unexchanged"] = unexchanged
    together = {name: _together(run, ranks) for name, run in alternatives.items()}
    seconds = in_turns(together, rounds=rounds, device=device)
    agreement.close()
    overheads = [t / b - 1 for t, b in zip(seconds["training"], seconds["bare"], strict=True)]
    per_step = {name: median(of) / steps for name, of in seconds.items()}
    return {
        **per_step,
        "overhead": median(overheads),
        "least_overhead": min(overheads),
        "most_overhead": max(overheads),
        "gradient_bytes": num_bytes(learner.model, config),
        "multiply_adds": learner.multiply_adds,
        **(checkpoint(state) if ranks.is_first else {}),
    }


def _together(run: Callable[[], None], ranks: Ranks) -> Callable[[], None]:
    """Run until the last rank is done, so that the next alternative begins on all of them at once."""

    def all_run() -> None:
        run()
        if ranks.several:
            dist.barrier()

    return all_run


def checkpoint(state: TrainState) -> dict[str, float]:
    """Seconds that training waits for a checkpoint, and that it takes to be on disk."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "generation").write_text("1\n")
        files = TrialFiles(folder, "t00000", 1)
        start = time.perf_counter()
        with BackgroundWriter(lambda c: files.replace(files.resume, serialized(c)), lambda c: None) as writer:
            writer.keep(state.state_dict())
        return {"checkpoint_stall": writer.stall_seconds, "checkpoint_written": time.perf_counter() - start}


def step_seconds(config: TrainConfig, *, share: int, rounds: int, steps: int, device: str) -> float:
    """Of one device alone with a share of the batch."""
    alone = replace(config, batch_size=share)
    data = ResidentImages.on(device, noise(alone, steps=2))
    learner = Learner(alone, data)
    images, targets = next(data.batches(alone, epoch=1, image_size=32))
    learner.begin_epoch()

    def run(images: torch.Tensor = images, targets: SoftTargets = targets) -> None:
        for _ in range(steps):
            learner.step(images, targets, lr=1e-3)

    return median(in_turns({"run": run}, rounds=rounds, device=device)["run"]) / steps


def _shares_measured(config: TrainConfig, rounds: int, steps: int, device: str) -> dict[int, float]:
    shares = [config.batch_size // part for part in SHARES_MEASURED]
    return {s: step_seconds(config, share=s, rounds=rounds, steps=steps, device=device) for s in shares}


def projection(
    config: TrainConfig,
    *,
    step_of: dict[int, float],
    input_of_image: float,
    draw: float,
    gradient_bytes: int,
    device: str,
) -> list[dict]:
    """Images/s of more devices, from a device's steps by share, its input, and the bytes to exchange.

    `draw`: a step's part of drawing an epoch's random numbers, which every worker does for all images.
    """
    per_image, fixed = np.polyfit(list(step_of), list(step_of.values()), 1)
    fixed = max(fixed, 0.0) + draw
    rows = []
    for workers in TARGETS:
        share = config.batch_size / workers
        compute = fixed + per_image * share + input_of_image * share
        for link, speed in LINK_BYTES[device].items():
            exchange = 2 * (workers - 1) / workers * gradient_bytes / speed
            for hidden in (True, False):
                seconds = max(compute, exchange) if hidden else compute + exchange
                rate = config.batch_size / seconds
                alone = config.batch_size / (fixed + (per_image + input_of_image) * config.batch_size)
                rows.append(
                    {
                        "kind": "projection",
                        "workers": workers,
                        "link": link,
                        "exchange_hidden": hidden,
                        "images_per_second": rate,
                        "efficiency": rate / alone / workers,
                        "exchange_seconds": exchange,
                        "compute_seconds": compute,
                    }
                )
    return rows


def _rank(rank: int, size: int, folder: str, job: tuple[Any, ...], device: str) -> None:
    threads, *arguments = job
    prepare_process(threads=threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(measured(Ranks(rank, size), *arguments, device), f"{folder}/{rank}")
    if size > 1:
        dist.destroy_process_group()


def by_workers(size: int, job: tuple[Any, ...], device: str) -> dict[str, Any]:
    """What the first of so many workers measures."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (size, folder, job, device), nprocs=size)
        found: dict[str, Any] = torch.load(f"{folder}/0", weights_only=False)
        return found


def print_measured(row: dict[str, Any]) -> None:
    """What a number of workers reach, and where the time goes."""
    within = "within" if row["overhead"] <= MOST_OVERHEAD else "above"
    print(
        f"{row['workers']} workers: {row['images_per_second']:,.0f} images/s, efficiency {row['efficiency']:.2f}",
        f"  a step {row['training']:.4f} s, the bare DDP step {row['bare']:.4f}, of it exchanging gradients "
        f"{row['exchange_seconds']:.4f} ({row['gradient_bytes'] / 1e6:.1f} MB); input alone {row['input']:.4f}, "
        f"{row['draw']:.4f} of it random numbers",
        f"  input and bookkeeping over the bare step: {row['overhead']:+.1%} ({row['least_overhead']:+.1%} to "
        f"{row['most_overhead']:+.1%}; {within} {MOST_OVERHEAD:.0%})",
        f"  a checkpoint holds training up for {row['checkpoint_stall']:.4f} s, is on disk after "
        f"{row['checkpoint_written']:.3f} s",
        sep="\n",
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", help="default: the recipe's on a GPU, small_cnn on a CPU")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's 2048 on a GPU, 256 on a CPU")
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gradient-compression", default="none", choices=("none", "bfloat16"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and max(args.workers) > torch.cuda.device_count():
        parser.error(f"--workers {max(args.workers)}, but torch sees {torch.cuda.device_count()} GPUs")
    return args


def measure_all(config: TrainConfig, args: argparse.Namespace, *, threads: int) -> list[dict[str, Any]]:
    """A row for each number of workers, printed as it comes."""
    rows: list[dict[str, Any]] = []
    for size in args.workers:
        found = by_workers(size, (threads, config, args.steps, args.rounds), args.device)
        rate = config.batch_size / found["training"]
        exchange = found["bare"] - found.get("unexchanged", found["bare"])
        first = rows[0]["images_per_second"] / rows[0]["workers"] if rows else rate / size
        rows.append({"kind": "measured", "workers": size, "images_per_second": rate, **found})
        rows[-1] |= {"efficiency": rate / size / first, "exchange_seconds": exchange, "compute_seconds": found["bare"]}
        print_measured(rows[-1])
    return rows


def main() -> None:
    """Measure, print and store."""
    args = arguments()
    on_gpu = args.device == "cuda"
    config = replace(
        RECIPES["resnet50_large_batch"].config,
        backbone=args.backbone or ("resnet50" if on_gpu else "small_cnn"),
        batch_size=args.batch_size or (2048 if on_gpu else 256),
        lr_batch_size=None,
        gradient_compression=args.gradient_compression,
        max_epochs=1000,
    )
    threads = (os.cpu_count() or 1) if on_gpu else 1
    print(machine(args.device), versions(), sep="\n")
    print(f"{config.backbone}, global batch {config.batch_size}, {args.rounds} rounds of {args.steps} steps")
    rows = measure_all(config, args, threads=threads)
    prepare_process(threads=threads)
    step_of = _shares_measured(config, args.rounds, args.steps, args.device)
    synchronize(args.device)
    alone = rows[0]
    projected = projection(
        config,
        step_of=step_of,
        input_of_image=(alone["input"] - alone["draw"]) * alone["workers"] / config.batch_size,
        draw=alone["draw"],
        gradient_bytes=int(alone["gradient_bytes"]),
        device=args.device,
    )
    print("projection, not measured, from a device's steps " + ", ".join(f"{s}: {t:.4f} s" for s, t in step_of.items()))
    for row in projected:
        how = "hidden" if row["exchange_hidden"] else "in the open"
        print(
            f"{row['workers']} workers, {row['link']}, exchange {how}: {row['images_per_second']:,.0f} images/s, "
            f"efficiency {row['efficiency']:.2f}"
        )
    if args.output:
        frame = pd.DataFrame([*rows, *projected]).assign(
            backbone=config.backbone, batch_size=config.batch_size, device=machine(args.device), versions=versions()
        )
        frame.to_parquet(args.output)


if __name__ == "__main__":
    main()
