"""Which number type an experiment's trainings compute in: decided once, by measurement where the run is long."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from orchestrator.plan import SearchPlan
from results.schema import DataWarning
from search_spaces.space import SearchSpace
from trainables.config import TrainConfig
from trainables.precision import LEAST_GAIN, PrecisionChoice, resolved
from trainables.step_timing import ROUNDS, Speed

SHORT_RUN_SECONDS = 600.0
ROUNDS_OF_A_CHECK = 3
MOST_NETWORKS = 6


class Measures(Protocol):
    """What measures trainings where trials will be trained."""

    def speed(self, config: TrainConfig) -> Speed:
        """See trainables.step_timing.Meter."""

    def bfloat16_ratios(self, config: TrainConfig, *, least: float = 0.0, rounds: int = ROUNDS) -> list[float]:
        """See trainables.step_timing.Meter."""


class NotMeasured(Exception):
    """A cluster had no room for a measurement, or the measured training failed."""


ExpectedSeconds = Callable[[Sequence[TrainConfig], Sequence[Speed]], float]
"""What a whole run takes, from the speed of each of its networks."""


def networks_of(space: SearchSpace) -> list[TrainConfig]:
    """A configuration of each network that a space may train: the first baseline's values, then the base's."""
    first = next(iter(space.complete_baselines()), {})
    backbones = dict.fromkeys(config.backbone for config in space.corners())
    return [space.base.having({**first, "backbone": backbone}) for backbone in backbones]


def choose_precision(
    plan: SearchPlan, *, device: str, meter: Measures | None, expected_seconds: ExpectedSeconds, why_not: str = ""
) -> PrecisionChoice:
    """Decide what `precision=auto` means for all trainings of a plan.

    `meter`: None where nothing can be measured, for the reason `why_not`. Warns when bfloat16 was asked for and is
    slower than float32.
    """
    base = plan.space.base
    if "precision" in plan.space.dimensions:
        return PrecisionChoice(resolved="auto", reason="searched")
    if base.precision != "auto":
        if base.precision == "bfloat16" and device == "cpu" and meter is not None:
            with suppress(NotMeasured):
                warn_if_slower(networks_of(plan.space), meter)
        return PrecisionChoice(resolved=base.precision, reason="given")
    if device != "cpu":
        return PrecisionChoice(resolved=resolved("auto", device), reason="device")
    if meter is None:
        return PrecisionChoice(resolved="float32", reason=why_not)
    try:
        return _measured(networks_of(plan.space), meter, expected_seconds)
    except NotMeasured:
        return PrecisionChoice(resolved="float32", reason="not measured")


def _measured(networks: Sequence[TrainConfig], meter: Measures, expected_seconds: ExpectedSeconds) -> PrecisionChoice:
    if len(networks) > MOST_NETWORKS:
        return PrecisionChoice(resolved="float32", reason="not measured")
    in_float32 = [replace(config, precision="float32") for config in networks]
    if expected_seconds(in_float32, [meter.speed(config) for config in in_float32]) <= SHORT_RUN_SECONDS:
        return PrecisionChoice(resolved="float32", reason="short run")
    worst = min(min(meter.bfloat16_ratios(config, least=LEAST_GAIN)) for config in in_float32)
    faster = "bfloat16" if worst >= LEAST_GAIN else "float32"
    return PrecisionChoice(resolved=faster, reason="measured", float32_over_bfloat16=round(worst, 3))


def warn_if_slower(networks: Sequence[TrainConfig], meter: Measures) -> None:
    """Warn of each network whose steps take longer in bfloat16 than in float32 here."""
    for config in networks[:MOST_NETWORKS]:
        ratio = statistics.median(meter.bfloat16_ratios(config, rounds=ROUNDS_OF_A_CHECK))
        if ratio < 1:
            warnings.warn(
                f"precision=bfloat16 is slower than float32 here: a training step of {config.backbone} takes "
                f"{1 / ratio:.2f} times as long; leave it out, or give precision=float32",
                DataWarning,
                stacklevel=2,
            )


def precision_line(choice: PrecisionChoice) -> str:
    """Say what was decided; nothing where nothing was measured."""
    ratio = choice.float32_over_bfloat16
    if ratio is None:
        return ""
    if choice.resolved == "bfloat16":
        return f"precision: bfloat16, at least {ratio:.2f} times as fast as float32 here"
    return f"precision: float32 (bfloat16 is {ratio:.2f} times as fast here; {LEAST_GAIN} would be wanted)"
