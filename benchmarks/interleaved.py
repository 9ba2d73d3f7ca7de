"""Timing of alternatives in turns, so that a busy machine slows all of them alike; and where it was done."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

Seconds = dict[str, list[float]]


def in_turns(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds of each alternative in each round, after one round that does not count.

    `clock`: `time.process_time` for CPU-seconds, which other processes do not lengthen.
    """
    seconds: Seconds = {name: [] for name in alternatives}
    for round_number in range(rounds + 1):
        for name, run in alternatives.items():
            synchronize(device)
            start = clock()
            run()
            synchronize(device)
            if round_number:
                seconds[name].append(clock() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(seconds: Seconds, of: str, to: str) -> float:
    """Median over the rounds of one alternative's seconds divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def spread(seconds: Seconds, of: str, to: str) -> str:
    """Smallest and largest of the rounds' ratios."""
    ratios = [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]
    return f"{min(ratios):.3f} to {max(ratios):.3f}"


def rate(seconds: Seconds, name: str, *, images: int) -> float:
    """Images a second in the median round."""
    return images / statistics.median(seconds[name])


def machine(device: str) -> str:
    """The processor or GPU that was measured."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} thread(s)"


def versions() -> str:
    """What the figures depend on."""
    return f"Python {platform.python_version()}, torch {version('torch')}, torchvision {version('torchvision')}"
