"""Invented pools of predictions."""

from __future__ import annotations

import numpy as np

from orchestrator.candidates import Candidate
from orchestrator.pool import EstimatePool, SelectPool
from results.schema import FloatArray, IntArray


def invented(
    seed: int = 0, *, members: int = 6, examples: int = 200, classes: int = 7, skill: float = 2.0
) -> tuple[FloatArray, IntArray]:
    """Logits [M, N, C] of members that know the label to different degrees, with common and own errors; labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, examples)
    strength = np.linspace(0.4, 1, members)[:, None, None] * skill
    common = rng.normal(size=(1, examples, classes))
    logits = strength * np.eye(classes)[labels] + common + rng.normal(size=(members, examples, classes))
    return logits.astype(np.float16), labels


def select_pool(
    seed: int = 0, *, configurations: list[int] | None = None, trials: list[int] | None = None, **of: int
) -> SelectPool:
    """A pool to choose on."""
    return SelectPool.of(
        *invented(seed, **of),
        configurations_M=None if configurations is None else np.array(configurations),
        trials_M=None if trials is None else np.array(trials),
    )


def estimate_pool(seed: int = 1, **of: int) -> EstimatePool:
    """A pool to score on."""
    return EstimatePool(*invented(seed, **of))


def candidate(number: int, **changes: object) -> Candidate:
    """A trial that took ten seconds more to train than the one before."""
    fields: dict[str, object] = {
        "experiment": "x",
        "trial_id": f"t{number:05d}",
        "variant": "best",
        "configuration": f"x/t{number:05d}",
        "stage": "search",
        "backbone": "small_cnn",
        "status": "completed",
        "averaged": False,
        "train_seconds": 10.0 * (number + 1),
        "train_cost": 900.0,
        "num_parameters": 1000,
        "multiply_adds": 100,
        "images_per_second": 50.0,
    }
    return Candidate(**{**fields, **changes})  # type: ignore[arg-type]


def candidates(count: int) -> list[Candidate]:
    """So many trials."""
    return [candidate(number) for number in range(count)]
