"""Measurements in a cluster's task, which decide for machines that this process is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from orchestrator import measuring
from orchestrator.growth import VARIABLE
from orchestrator.measuring import place_of_trials
from orchestrator.precision_choice import NotMeasured
from orchestrator.ray_cluster import ray_cluster
from trainables.config import TrainConfig
from trainables.datasets import SplitImages

pytestmark = pytest.mark.ray
QUICK = TrainConfig(batch_size=64, crop_padding=1, flip=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(None, threads=1):
        yield


def place(data: SplitImages):  # type: ignore[no-untyped-def]  # a context of one place
    return place_of_trials(data, device="cpu", address="auto", threads=1, check=lambda: None)


def test_a_task_with_a_trials_cpus_measures(cluster: None, digits: SplitImages) -> None:
    with place(digits) as found:
        assert found.meter is not None
        speed = found.meter.speed(QUICK)
        ratios = found.meter.bfloat16_ratios(QUICK, rounds=2)
    assert list(speed.step_seconds) == [8]
    assert speed.step_seconds[8] > 0
    assert len(ratios) == 2


def test_a_cluster_that_may_grow_has_machines_nobody_knows(
    cluster: None, digits: SplitImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, '{"CPU": 1000}')
    with place(digits) as found:
        assert (found.meter, found.why_not) == (None, "unlike machines")


def test_a_cluster_without_room_measures_nothing(
    cluster: None, digits: SplitImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    @ray.remote
    class Occupant:
        def is_here(self) -> bool:
            return True

    everything = ray.cluster_resources()["CPU"]
    occupant = Occupant.options(num_cpus=everything).remote()  # type: ignore[attr-defined]  # Ray's decorator adds it
    assert ray.get(occupant.is_here.remote())
    monkeypatch.setattr(measuring, "SECONDS_TO_MEASURE", 0.5)
    with place(digits) as found:
        assert found.meter is not None
        with pytest.raises(NotMeasured):
            found.meter.speed(QUICK)
    ray.kill(occupant)
