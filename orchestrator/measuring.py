"""Measurements of trainings before Ray runs them: in this process where Ray is local, else in a task of the cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.precision_choice import Measures, NotMeasured
from orchestrator.ray_cluster import SECONDS_TO_ANSWER, cluster_room
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.process import prepare_process, prepared_for_a_while, processor
from trainables.step_timing import ROUNDS, Meter, Speed
from trainables.trial import images_on

SECONDS_TO_MEASURE = 180.0


@dataclass(frozen=True)
class Place:
    """Where trials are measured: `meter`, or None and the reason why nothing can be measured."""

    meter: Measures | None
    why_not: str = ""


@contextmanager
def place_of_trials(
    data: SplitImages, *, device: str, address: str | None, threads: int, check: Callable[[], None]
) -> Iterator[Place]:
    """What measures trials on a CPU as they will be trained: with so many threads, on a machine of their cluster."""
    if device != "cpu":
        yield Place(None, "device")
    elif address or os.environ.get("RAY_ADDRESS"):
        yield _place_in_cluster(data, threads=threads)
    else:
        with prepared_for_a_while(threads=threads):
            yield Place(_MeterHere(data, threads, check))


@dataclass(frozen=True)
class _MeterHere:
    """Measures in this process."""

    data: SplitImages
    threads: int
    check: Callable[[], None]

    def _meter(self, config: TrainConfig) -> Meter:
        return Meter(images_on("cpu", self.data, config=config), self.threads, self.check)

    def speed(self, config: TrainConfig) -> Speed:
        """See Measures."""
        return self._meter(config).speed(config)

    def bfloat16_ratios(self, config: TrainConfig, *, least: float = 0.0, rounds: int = ROUNDS) -> list[float]:
        """See Measures."""
        return self._meter(config).bfloat16_ratios(config, least=least, rounds=rounds)


def _place_in_cluster(data: SplitImages, *, threads: int) -> Place:
    """A machine of a cluster whose machines are alike; none where they are not, or where others may be added."""
    if cluster_room().get("CPU", 0) > ray.cluster_resources().get("CPU", 0):
        return Place(None, "unlike machines")
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= threads]
    asked = [_processor.options(scheduling_strategy=_on(node["NodeID"])).remote() for node in nodes]
    try:
        kinds = set(ray.get(asked, timeout=SECONDS_TO_ANSWER))
    except RayError:
        return Place(None, "not measured")
    if len(kinds) != 1:
        return Place(None, "unlike machines")
    return Place(_MeterInCluster(ray.put(data), threads))


@dataclass(frozen=True)
class _MeterInCluster:
    """Measures in a task that has a trial's CPUs. `data`: a reference to SplitImages.

    Raises NotMeasured when the cluster has no room for it within minutes.
    """

    data: Any
    threads: int

    def speed(self, config: TrainConfig) -> Speed:
        """See Measures."""
        measured: Speed = self._run("speed", config)
        return measured

    def bfloat16_ratios(self, config: TrainConfig, *, least: float = 0.0, rounds: int = ROUNDS) -> list[float]:
        """See Measures."""
        ratios: list[float] = self._run("bfloat16_ratios", config, least=least, rounds=rounds)
        return ratios

    def _run(self, method: str, config: TrainConfig, **options: Any) -> Any:
        task = _measured.options(num_cpus=self.threads).remote(
            self.data, config.to_dict(), self.threads, method, options
        )
        try:
            return ray.get(task, timeout=SECONDS_TO_MEASURE)
        except GetTimeoutError as error:
            ray.cancel(task, force=True)
            raise NotMeasured from error


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


@ray.remote(num_cpus=0, max_retries=0)
def _processor() -> str:
    return processor()


@ray.remote(max_retries=0, max_calls=1)
def _measured(data: SplitImages, train: dict[str, Any], threads: int, method: str, options: dict[str, Any]) -> Any:
    prepare_process(threads=threads)
    config = TrainConfig(**train)
    return getattr(Meter(images_on("cpu", data, config=config), threads), method)(config, **options)
