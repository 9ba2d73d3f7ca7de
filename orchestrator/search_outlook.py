"""What is found out and printed before the first trial of a search or of a training by workers: its number type, and
what it will cost."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from orchestrator import cli, driver
from orchestrator.cost import Estimate, Left, estimate_search
from orchestrator.cost_lines import (
    LONG_SECONDS,
    Flags,
    budget_line,
    cheaper_flags,
    cheaper_line,
    search_line,
    training_line,
)
from orchestrator.measuring import place_of_trials
from orchestrator.outlook import Remembering, Speeds, measured, print_line
from orchestrator.plan import SearchPlan
from orchestrator.precision_choice import Measures, choose_precision, networks_of, precision_line
from orchestrator.searcher import Resources
from results.schema import UsageError
from results.store import Experiment
from trainables.config import TrainConfig, parse_overrides
from trainables.datasets import SplitImages
from trainables.step_timing import Speed


def of_search(
    plan: SearchPlan,
    data: SplitImages,
    resources: Resources,
    args: argparse.Namespace,
    *,
    experiment: Experiment | None,
    console: Console,
) -> SearchPlan:
    """Print what a search, or the rest of one, will cost. Returns its plan with the precision decided.

    Nothing is printed of what could not be measured: GPUs, clusters of unlike machines, spaces of many networks.
    """
    left = Left.of(plan, None if experiment is None else experiment.history)
    if not left.num_trials:
        return plan
    outlook = Outlook(plan, data, resources, left, start_seconds=time.process_time())
    with place_of_trials(
        data, device=resources.device, address=args.address, threads=resources.cpus, check=cli.INTERRUPTS.check
    ) as place:
        meter = None if place.meter is None else Remembering(place.meter)
        if experiment is None:
            plan = outlook.with_precision(meter, why_not=place.why_not)
        speeds = measured(plan, meter)
    if experiment is None and plan.precision is not None:
        print_line(console, precision_line(plan.precision))
    if speeds:
        outlook.replaced(plan).print_cost(speeds, args, console, new=experiment is None)
    return plan


@dataclass(frozen=True)
class Outlook:
    """A search that is about to train what is left.

    `start_seconds`: what this process took to come here, about as long as a worker needs until it trains.
    """

    plan: SearchPlan
    data: SplitImages
    resources: Resources
    left: Left
    start_seconds: float = 0.0

    def replaced(self, plan: SearchPlan) -> Outlook:
        """The same with another plan."""
        return replace(self, plan=plan)

    def with_precision(self, meter: Measures | None, *, why_not: str) -> SearchPlan:
        """The plan with its precision decided."""

        def expected(networks: Sequence[TrainConfig], speeds: Sequence[Speed]) -> float:
            return self.estimate(dict(zip(networks, speeds, strict=True))).wall_seconds

        choice = choose_precision(
            self.plan, device=self.resources.device, meter=meter, expected_seconds=expected, why_not=why_not
        )
        return replace(self.plan, precision=choice)

    def estimate(self, speeds: Speeds) -> Estimate:
        """Estimate what is left, from the speed of each network."""
        return estimate_search(
            self.plan,
            self.data,
            speeds,
            workers=self.resources.max_concurrent,
            cpus=self.resources.cpus,
            left=self.left,
            start_seconds=self.start_seconds,
        )

    def print_cost(self, speeds: Speeds, args: argparse.Namespace, console: Console, *, new: bool) -> None:
        """Print what the search costs, how much of it a time budget has room for, and how it would cost less."""
        estimate = self.estimate(speeds)
        print_line(console, search_line(self.plan, estimate))
        flag, seconds = "--time-budget", args.time_budget
        if seconds is None:
            flag, seconds = "max_seconds", self.plan.space.budget.max_seconds
        print_line(console, budget_line(estimate, seconds=seconds, flag=flag))
        if new and estimate.wall_seconds > LONG_SECONDS:
            print_line(console, self._cheaper(speeds, args))

    def _cheaper(self, speeds: Speeds, args: argparse.Namespace) -> str:
        """Find a command for the same search that takes less than a day; empty where there is none."""
        base, name = self.plan.space.base, str(args.name or self.plan.source.name)

        def wall_seconds(flags: Flags) -> float:
            return self._wall_seconds_with(flags, speeds)

        flags = cheaper_flags(
            train_fraction=base.train_fraction,
            max_epochs=self.plan.space.budget.max_epochs,
            wall_seconds=wall_seconds,
            fixed=parse_overrides(args.set),
        )
        if not flags:
            return ""
        return cheaper_line(driver.command_line(), flags, name=name, wall_seconds=wall_seconds(flags))

    def _wall_seconds_with(self, flags: Flags, speeds: Speeds) -> float:
        """Estimate the search with other flags; infinity where they make no sense in its space."""
        try:
            plan = replace(self.plan, overrides={**self.plan.overrides, **flags})
            plan.check()
            share = plan.space.base.train_fraction / self.plan.space.base.train_fraction
            data = replace(self.data, train=self.data.train[: max(1, round(share * len(self.data.train)))])
            known = {config.backbone: speed for config, speed in speeds.items()}
            renamed = {config: known[config.backbone] for config in networks_of(plan.space)}
        except UsageError:
            return math.inf
        return replace(self, plan=plan, data=data).estimate(renamed).wall_seconds


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
    """Print what a new training by workers will cost. Returns its plan with the precision decided.

    Both come from steps on a worker's share of a batch.
    """
    share = max(2, plan.space.base.batch_size // num_workers)
    of_one = replace(plan, overrides={**plan.overrides, "batch_size": share, "accumulation_steps": 1})
    left, resources = Left.of(plan, None), Resources(device, threads, 0.0, 1)
    expected = _seconds_with_shares(Outlook(plan, data, resources, left, start_seconds=time.process_time()))
    with place_of_trials(
        data, device=device, address=args.address, threads=threads, check=cli.INTERRUPTS.check
    ) as place:
        meter = None if place.meter is None else Remembering(place.meter)
        choice = choose_precision(of_one, device=device, meter=meter, expected_seconds=expected, why_not=place.why_not)
        speeds = measured(replace(of_one, precision=choice), meter)
    print_line(console, precision_line(choice))
    if speeds:
        seconds = expected(list(speeds), list(speeds.values()))
        print_line(console, training_line(plan, left, seconds, cpus=threads * num_workers))
    return replace(plan, precision=choice)


def _seconds_with_shares(outlook: Outlook) -> Callable[[Sequence[TrainConfig], Sequence[Speed]], float]:
    """Return the estimate of a training whose workers share every step; their exchange of gradients is not counted."""

    def expected(networks: Sequence[TrainConfig], speeds: Sequence[Speed]) -> float:
        return outlook.estimate({outlook.plan.space.base: speeds[0]}).wall_seconds

    return expected
