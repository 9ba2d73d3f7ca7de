"""What training reaches on a GPU: against the bare loop, and of the GPU's peak. One call, under nine minutes.

    python benchmarks/gpu.py --output gpu.parquet

Needs torch, torchvision, pandas and pyarrow with this repository on PYTHONPATH; neither Ray nor Optuna. Every row of
the parquet is one alternative of one comparison, timed in turns with the others of its comparison. MFU counts the
network's multiply-adds alone, twice for a forward and four times for a backward pass, against the peak given.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from interleaved import in_turns, machine, rate, ratio, versions
from training_speed import POLICY, USUAL, bare_loop, noise, training

from trainables.config import TrainConfig
from trainables.evaluation import predict
from trainables.learner import Learner
from trainables.loop import TrainState
from trainables.process import prepare_process
from trainables.recipes import RECIPES
from trainables.resident import ResidentImages

H200_BF16_FLOPS = 989e12  # the vendor's datasheet, dense
LARGE_BATCH = replace(RECIPES["resnet50_large_batch"].config, dataset="noise")
EXECUTIONS: dict[str, dict[str, bool]] = {
    "eager": {"compile": False, "cuda_graph": False},
    "compiled": {"compile": True, "cuda_graph": False},
    "captured": {"compile": False, "cuda_graph": True},
    "compiled and captured": {"compile": True, "cuda_graph": True},
}
SMALLER = (
    ("speedrun_cnn", 1024, USUAL),
    ("small_cnn", 1024, USUAL),
    ("efficient200k", 512, USUAL),
    ("efficient200k", 512, POLICY),
    ("resnet18", 512, POLICY),
)


def comparison(
    what: str, config: TrainConfig, data: ResidentImages, *, rounds: int, peak_flops: float
) -> list[dict[str, object]]:
    """Rows for training under each execution and the bare loop beside it, timed in turns.

    What has been captured keeps its memory: captured steps are measured alone, with the bare loop.
    """
    rows: list[dict[str, object]] = []
    for together in (("eager", "compiled"), ("captured",), ("compiled and captured",)):
        rows += _in_one_run(what, config, data, together, rounds=rounds, peak_flops=peak_flops)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _in_one_run(
    what: str,
    config: TrainConfig,
    data: ResidentImages,
    executions: tuple[str, ...],
    *,
    rounds: int,
    peak_flops: float,
) -> list[dict[str, object]]:
    steps = len(data.split.train) // config.batch_size
    alternatives: dict[str, Callable[[], object]] = {"bare loop": bare_loop(config, data, steps=steps)}
    if "compiled" in executions:
        alternatives["bare loop, compiled"] = bare_loop(config, data, steps=steps, compiled=True)
    for name in executions:
        alternatives[name] = training(replace(config, **EXECUTIONS[name]), data)  # type: ignore[arg-type]
    seconds = in_turns(alternatives, rounds=rounds, device=data.device)
    plain = replace(config, compile=False, cuda_graph=False)
    flops = 6 * Learner(plain, data).multiply_adds
    rows = []
    for name in alternatives:
        per_second = rate(seconds, name, images=steps * config.batch_size)
        row = {
            "what": what,
            "backbone": config.backbone,
            "batch_size": config.batch_size,
            "execution": name,
            "images_per_second": per_second,
            "mfu": per_second * flops / peak_flops,
            "of_bare_loop": ratio(seconds, "bare loop", name),
            "rounds": rounds,
        }
        print(
            f"  {config.backbone:16} {name:24} {per_second:10,.0f} images/s  MFU {row['mfu']:.3f}  "
            f"{row['of_bare_loop']:.3f} of the bare loop beside it",
            flush=True,
        )
        rows.append(row)
    return rows


def input_part(data: ResidentImages, config: TrainConfig, what: str) -> dict[str, object]:
    """A row for the batches alone."""
    epoch = 0

    def run() -> None:
        nonlocal epoch
        epoch += 1
        for _ in data.batches(config, epoch=epoch, image_size=32):
            pass

    seconds = in_turns({"input": run}, rounds=3, device=data.device)
    images = len(data.split.train) // config.batch_size * config.batch_size
    per_second = rate(seconds, "input", images=images)
    print(f"  input alone, {what}: {per_second:,.0f} images/s", flush=True)
    return {"what": f"input: {what}", "batch_size": config.batch_size, "images_per_second": per_second, "rounds": 3}


def evaluation(data: ResidentImages, config: TrainConfig) -> dict[str, object]:
    """A row for plain predictions."""
    model = TrainState(replace(config, compile=False, cuda_graph=False), data).evaluated
    test = data.split.test
    seconds = in_turns({"evaluation": lambda: predict(model, data, test)}, rounds=3, device=data.device)
    per_second = rate(seconds, "evaluation", images=len(test))
    print(f"  evaluation, {config.backbone}: {per_second:,.0f} images/s", flush=True)
    return {"what": "evaluation", "backbone": config.backbone, "images_per_second": per_second, "rounds": 3}


def main() -> int:
    """Measure, print and store. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=20_480, help="training images of an epoch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=400, help="begin no comparison after this (default: 400)")
    parser.add_argument("--peak-flops", type=float, default=H200_BF16_FLOPS, help="default: an H200's bf16, dense")
    parser.add_argument("--commit", default="", help="the code's commit, where there is no git")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no GPU here; run this where it does", file=sys.stderr)
        return 2
    prepare_process(threads=torch.get_num_threads())
    start = time.monotonic()
    data = ResidentImages.on("cuda", noise(args.images))
    rows: list[dict[str, object]] = []
    planned = [("large batch", "resnet50", 2048, LARGE_BATCH), *(("usual", *smaller) for smaller in SMALLER)]
    for what, backbone, batch_size, config in planned:
        if time.monotonic() - start > args.seconds:
            print(f"no time left for {backbone}", flush=True)
            continue
        what = f"{what}, AutoAugment" if config.policy != "none" else what
        print(f"{what} ({time.monotonic() - start:.0f} s)", flush=True)
        config = replace(config, backbone=backbone, batch_size=batch_size, lr_batch_size=None, lr=0.01)
        rows += comparison(what, config, data, rounds=3, peak_flops=args.peak_flops)
        gc.collect()
        torch.cuda.empty_cache()
        pd.DataFrame(rows).to_parquet(args.output)
    rows += [input_part(data, replace(USUAL, batch_size=2048), "crop, flip, cutout, mixup")]
    rows += [input_part(data, LARGE_BATCH, "large-batch recipe")]
    rows += [evaluation(data, LARGE_BATCH)]
    about = {
        "machine": machine("cuda"),
        "versions": versions(),
        "git_commit": args.commit,
        "measured_at": datetime.now(UTC),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }
    pd.DataFrame([{**row, **about} for row in rows]).to_parquet(args.output)
    print(f"{machine('cuda')}; {versions()}; {len(rows)} rows in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
