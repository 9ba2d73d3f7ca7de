"""The number type of convolutions and products, and what a device can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from results.schema import UsageError
from trainables.config import TrainConfig

LEAST_GAIN = 1.15
"""How many times as fast as in float32 steps in bfloat16 have to be, for bfloat16 to be used on a CPU."""
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Of bfloat16, dense, by the vendor's datasheets; by a part of the device's name, the first that fits."""


def peak_flops(device_name: str) -> float | None:
    """What a device can do in a second at most, in bfloat16; None when it is not known."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in device_name), None)


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """What `precision=auto` was resolved to for all trainings of an experiment, and why.

    `reason`: `given` (it was not auto), `searched` (it is a dimension), `device` (what auto means on a GPU or on mps),
    `short run`, `measured`, `unlike machines` or `not measured`; the last two and a short run have float32.
    `float32_over_bfloat16`: the seconds of a float32 step divided by those of a bfloat16 step, where they were
    measured: the worst of the rounds, and of the networks.
    """

    resolved: str
    reason: str
    float32_over_bfloat16: float | None = None


def resolved(precision: str, device: str) -> str:
    """Return what `auto` means where nobody has measured: bfloat16 on a GPU, float32 elsewhere."""
    if precision != "auto":
        return precision
    return "bfloat16" if device == "cuda" else "float32"


def autocast(precision: str, device: str) -> torch.autocast:
    """The context in which a model's forward pass runs."""
    name = resolved(precision, device)
    return torch.autocast(device, dtype=LOW.get(name, torch.bfloat16), enabled=name in LOW)


def weights_type(precision: str) -> torch.dtype:
    """The number type that weights are kept in."""
    return torch.float64 if precision == "float64" else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """A tensor of float32, or as it is where it is of float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Draw from torch's generators as seeded, the CPU's and the device's; afterwards they are as they were before."""
    cuda, mps = device == "cuda", device == "mps"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        before = torch.mps.get_rng_state() if mps else None
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        if mps:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if before is not None:
                torch.mps.set_rng_state(before)


def check_execution(config: TrainConfig, device: str) -> None:
    """Raise UsageError when a device cannot do what a configuration wants."""
    if config.precision == "float16" and device == "cpu":
        raise UsageError(
            "precision=float16 on a CPU: half precision trains on GPUs only; use float32, or --device cuda"
        )
    if config.precision == "float64" and device == "mps":
        raise UsageError("precision=float64 on mps, which has no such numbers; use float32, or --device cpu")
    if config.cuda_graph and device != "cuda":
        raise UsageError(f"cuda_graph=true on {device}: only NVIDIA GPUs have CUDA graphs; leave it out")
    if config.cuda_graph and (config.unfreeze_epochs or config.stem_epochs):
        name = "unfreeze_epochs" if config.unfreeze_epochs else "stem_epochs"
        raise UsageError(f"cuda_graph=true with {name}: the step changes along the way; leave one out")
