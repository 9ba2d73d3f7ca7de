"""The number type of convolutions and products, and what a device can do."""

from __future__ import annotations

import torch

from results.schema import UsageError
from trainables.config import TrainConfig

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def resolved(precision: str, device: str) -> str:
    """`auto` settled: bfloat16 on a GPU, float32 elsewhere."""
    if precision != "auto":
        return precision
    return "bfloat16" if device == "cuda" else "float32"


def autocast(precision: str, device: str) -> torch.autocast:
    """The context in which a model's forward pass runs."""
    name = resolved(precision, device)
    return torch.autocast(device, dtype=LOW.get(name, torch.bfloat16), enabled=name in LOW)


def check_execution(config: TrainConfig, device: str) -> None:
    """Raise UsageError when a device cannot do what a configuration wants."""
    if config.precision == "float16" and device == "cpu":
        raise UsageError(
            "precision=float16 on a CPU: half precision trains on GPUs only; use float32, or --device cuda"
        )
    if config.cuda_graph and device != "cuda":
        raise UsageError(f"cuda_graph=true on {device}: only NVIDIA GPUs have CUDA graphs; leave it out")
    if config.cuda_graph and config.unfreeze_epochs:
        raise UsageError("cuda_graph=true with unfreeze_epochs: the step changes along the way; leave one out")
