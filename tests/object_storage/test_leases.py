"""One driver at a time, and copies that follow it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from results import lock, mirror
from results.events import ExperimentStopped
from results.objects import ObjectStore
from results.store import Experiment, ExperimentLocked, Superseded
from tests.background import PATIENCE
from tests.object_storage.driver import killed_driver
from tests.object_storage.places import be_on, eventually, stored
from tests.simulation import LEARNING, new_experiment, run_search, run_with_predictions


def test_a_driver_on_another_host_is_refused_until_the_lease_is_given_back(
    results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = new_experiment(results)
    with experiment.driving():
        eventually(lambda: stored(results).objects("events"))
        be_on("second", tmp_path, monkeypatch)
        other = Experiment.open(results, "sim")
        with pytest.raises(ExperimentLocked, match=r"is being written to from first, last heard of \d+ seconds ago"):
            other.rebuild()
        be_on("first", tmp_path, monkeypatch)
    other.rebuild()
    assert stored(results).info("lease.json") is None


def test_a_lease_is_renewed_and_given_back(results: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.1)
    store = stored(results)
    with new_experiment(results).driving():
        first = store.info(lock.LEASE)
        assert first is not None
        eventually(lambda: store.info(lock.LEASE) != first)
        assert store.info(lock.LEASE) is not None
    assert store.info(lock.LEASE) is None


def test_the_lease_of_a_driver_that_is_gone_lapses(
    results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_driver(results, tmp_path, after=3)
    be_on("second", tmp_path, monkeypatch)
    experiment = Experiment.open(results, "sim")
    monkeypatch.setattr(lock, "LAPSED_SECONDS", 1e9)
    with pytest.raises(ExperimentLocked, match="is being written to from first"):
        experiment.rebuild()
    monkeypatch.setattr(lock, "LAPSED_SECONDS", 1.0)

    def can_be_driven() -> bool:
        with contextlib.suppress(ExperimentLocked):
            experiment.rebuild()
            return True
        return False

    eventually(can_be_driven)


def test_a_superseded_driver_overwrites_nothing_and_is_told(
    results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, store = new_experiment(results), stored(results)
    after: dict[str, bytes] = {}

    def drive() -> None:
        with experiment.driving():
            eventually(lambda: store.info("experiment.json"))
            files = experiment.files("t00000")
            be_on("second", tmp_path, monkeypatch)
            monkeypatch.setattr(lock, "LAPSED_SECONDS", 0.0)
            run_search(Experiment.open(results, "sim"), LEARNING, num_trials=3)
            after.update({name: store.read(name) for name in store.objects()})
            with pytest.raises(Superseded, match="driver 1; driver 2 has taken over"):
                files.replace(files.resume, b"late")
            for _ in range(3):
                experiment.record(ExperimentStopped(at=1.0, state="interrupted"))
                time.sleep(0.3)

    with pytest.raises(ExperimentLocked, match=r"has been taken over by .*; this one writes no more"):
        drive()
    assert {name: store.read(name) for name in store.objects()} == after


@pytest.mark.parametrize("whose", ["driver", "worker"])
def test_what_is_put_long_after_it_was_permitted_overwrites_nothing(
    whose: str, results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a machine that slept, or was cut off from the store and tries again: another driver began meanwhile."""
    put, slept = ObjectStore.put, threading.Event()
    after: dict[str, bytes] = {}

    def put_after_sleep(store: ObjectStore, name: str, content: bytes, **options: Any) -> None:
        if name.startswith("events/" if whose == "driver" else "predictions/") and not slept.is_set():
            slept.set()
            be_on("second", tmp_path, monkeypatch)
            monkeypatch.setattr(lock, "LAPSED_SECONDS", 0.0)
            run_with_predictions(Experiment.open(results, "sim"), num_trials=3)
            after.update({name: stored(results).read(name) for name in stored(results).objects()})
        put(store, name, content, **options)

    def drive() -> None:
        experiment = new_experiment(results)
        with experiment.driving():
            eventually(lambda: stored(results).info("experiment.json"))
            monkeypatch.setattr(ObjectStore, "put", put_after_sleep)
            if whose == "driver":
                experiment.record(ExperimentStopped(at=1.0, state="interrupted"))
                assert slept.wait(timeout=PATIENCE)
                eventually(lambda: after)
            else:
                files = experiment.files("t00000")
                with pytest.raises(Superseded, match="driver 1; driver 2 has taken over"):
                    files.replace(files.predictions, b"late")

    with pytest.raises(ExperimentLocked, match=r"has been taken over by .*; this one writes no more"):
        drive()
    assert {name: stored(results).read(name) for name in stored(results).objects()} == after


def test_of_two_that_claim_at_the_same_time_one_gives_way(results: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(results)
    settle = time.sleep

    def meanwhile(seconds: float) -> None:
        store.put(lock.LEASE, json.dumps({"token": "another", "host": "second"}).encode())
        settle(seconds)

    experiment = new_experiment(results)
    monkeypatch.setattr(lock.time, "sleep", meanwhile)
    with pytest.raises(ExperimentLocked, match="taken over by a driver on second"):
        experiment.rebuild()


def test_a_host_fetches_only_what_has_changed(
    results: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_predictions(new_experiment(results, num_trials=4), num_trials=4)
    be_on("second", tmp_path, monkeypatch)
    monkeypatch.setattr(mirror, "SETTLED_SECONDS", -60.0)
    read: list[str] = []
    reading = ObjectStore.read

    def noted(store: ObjectStore, name: str) -> bytes:
        read.append(name)
        return reading(store, name)

    monkeypatch.setattr(ObjectStore, "read", noted)

    def look() -> list[str]:
        read.clear()
        experiment = Experiment.open(results, "sim")
        experiment.fetch_predictions(experiment.trials()["trial_id"])
        return sorted(read)

    first = look()
    assert {"events/000001.jsonl", "events/000002.jsonl", "predictions/t00000.parquet"} <= set(first)
    assert look() == []
    files = Experiment.open(results, "sim").files("t00000")
    stored(results).put("predictions/t00000.parquet", b"of another size")
    assert look() == ["predictions/t00000.parquet"]
    stored(results).remove("predictions/t00000.parquet")
    assert look() == []
    assert not files.predictions.exists()
    be_on("first", tmp_path, monkeypatch)
    assert [name for name in look() if not name.startswith("predictions/")] == []  # the driver knows what it has sent


def test_an_object_replaced_within_the_second_by_one_of_its_size_is_fetched(
    results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_predictions(new_experiment(results, num_trials=1), num_trials=1)
    be_on("second", tmp_path, monkeypatch)
    name = "predictions/t00000.parquet"
    for content in (b"one", b"two", b"six"):
        stored(results).put(name, content)
        experiment = Experiment.open(results, "sim")
        experiment.fetch_predictions(["t00000"])
        assert (experiment.root / name).read_bytes() == content
