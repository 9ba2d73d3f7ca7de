"""What is found out before the first trial of a search or of a training by workers: its number type."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from orchestrator import cli
from orchestrator.cost import training_seconds
from orchestrator.measuring import place_of_trials
from orchestrator.plan import SearchPlan
from orchestrator.precision_choice import choose_precision, precision_line
from orchestrator.searcher import Resources
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.step_timing import Speed


def of_search(
    plan: SearchPlan, data: SplitImages, resources: Resources, *, address: str | None, console: Console
) -> SearchPlan:
    """The plan of a new search with its precision decided, which is printed where it was measured."""

    def expected(networks: Sequence[TrainConfig], speeds: Sequence[Speed]) -> float:
        course = plan.make_halving().course
        seconds = [training_seconds(c, course, data, speed) for c, speed in zip(networks, speeds, strict=True)]
        return plan.num_trials_in_all * sum(seconds) / len(seconds) / resources.max_concurrent

    with place_of_trials(
        data, device=resources.device, address=address, threads=resources.cpus, check=cli.INTERRUPTS.check
    ) as place:
        choice = choose_precision(
            plan, device=resources.device, meter=place.meter, expected_seconds=expected, why_not=place.why_not
        )
    if line := precision_line(choice):
        console.print(line, highlight=False, soft_wrap=True)
    return replace(plan, precision=choice)


def of_workers(
    plan: SearchPlan,
    data: SplitImages,
    device: str,
    num_workers: int,
    args: argparse.Namespace,
    *,
    threads: int,
    console: Console,
) -> SearchPlan:
    """The plan of a new training by workers with its precision decided, by steps on a worker's share of a batch."""
    share = max(2, plan.space.base.batch_size // num_workers)
    of_one = replace(plan, overrides={**plan.overrides, "batch_size": share, "accumulation_steps": 1})

    def expected(networks: Sequence[TrainConfig], speeds: Sequence[Speed]) -> float:
        return training_seconds(plan.space.base, plan.make_halving().course, data, speeds[0])

    with place_of_trials(
        data, device=device, address=args.address, threads=threads, check=cli.INTERRUPTS.check
    ) as place:
        choice = choose_precision(
            of_one, device=device, meter=place.meter, expected_seconds=expected, why_not=place.why_not
        )
    if line := precision_line(choice):
        console.print(line, highlight=False, soft_wrap=True)
    return replace(plan, precision=choice)
