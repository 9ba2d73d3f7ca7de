"""What is found out and printed before a training begins in this process: its number type and how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console

from orchestrator.cost import Left, estimate_search
from orchestrator.cost_lines import training_line
from orchestrator.plan import SearchPlan
from orchestrator.precision_choice import (
    MOST_NETWORKS,
    Measures,
    NotMeasured,
    choose_precision,
    networks_of,
    precision_line,
)
from results.store import Experiment
from trainables.config import TrainConfig
from trainables.resident import TrainingImages
from trainables.step_timing import ROUNDS, Meter, Speed

Speeds = dict[TrainConfig, Speed]


@dataclass(frozen=True)
class Remembering:
    """Measures no speed twice. Raises NotMeasured for a network whose training fails."""

    meter: Measures
    known: Speeds = field(default_factory=dict)

    def speed(self, config: TrainConfig) -> Speed:
        """See Measures."""
        if config not in self.known:
            try:
                self.known[config] = self.meter.speed(config)
            except RuntimeError as error:  # the training itself records why it fails
                raise NotMeasured from error
        return self.known[config]

    def bfloat16_ratios(self, config: TrainConfig, *, least: float = 0.0, rounds: int = ROUNDS) -> list[float]:
        """See Measures."""
        return self.meter.bfloat16_ratios(config, least=least, rounds=rounds)


def measured(plan: SearchPlan, meter: Measures | None) -> Speeds:
    """Return the speed of each network that a plan may train; nothing where it cannot be measured."""
    networks = networks_of(plan.space)
    if meter is None or len(networks) > MOST_NETWORKS:
        return {}
    try:
        return {config: meter.speed(config) for config in networks}
    except NotMeasured:
        return {}


def of_training(
    plan: SearchPlan,
    images: TrainingImages,
    *,
    experiment: Experiment | None,
    threads: int,
    console: Console,
    check: Callable[[], None],
) -> SearchPlan:
    """Print how long the trainings of a plan, or the rest of them, will take one after the other on a CPU.

    Returns the plan; that of a new experiment with its precision decided, unless another experiment has decided it.
    `check` ends the measurement with what it raises.
    """
    left = Left.of(plan, None if experiment is None else experiment.history)
    if not left.num_trials:
        return plan
    meter = Remembering(Meter(images, threads, check)) if images.device == "cpu" else None

    def seconds(networks: Sequence[TrainConfig], speeds: Sequence[Speed]) -> float:
        known = dict(zip(networks, speeds, strict=True))
        return estimate_search(plan, images.split, known, workers=1, cpus=threads, left=left).wall_seconds

    if experiment is None and plan.precision is None:
        choice = choose_precision(plan, device=images.device, meter=meter, expected_seconds=seconds)
        print_line(console, precision_line(choice))
        plan = replace(plan, precision=choice)
    speeds = measured(plan, meter)
    if speeds:
        print_line(console, training_line(plan, left, seconds(list(speeds), list(speeds.values())), cpus=threads))
    return plan


def print_line(console: Console, line: str) -> None:
    """Print a line, if there is one."""
    if line:
        console.print(line, highlight=False, soft_wrap=True)
