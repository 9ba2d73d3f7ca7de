"""Results in an object store: the same store as on a disk, whatever becomes of drivers, hosts and the network."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from orchestrator import cli, ensemble, rebuild, search, train
from orchestrator.ledger import Assignment
from orchestrator.ray_cluster import check_reachable
from orchestrator.serving import load_ensemble
from results import lock, mirror, objects
from results.analysis import ensemble_scores, leaderboard, learning_curves
from results.events import EpochReported, ExperimentStopped, decode, encode, read_events
from results.objects import ObjectStore, Refused, Unreachable, canonical, within
from results.schema import DataWarning, EpochResult, SelectPredictions, UsageError
from results.store import Experiment, ExperimentLocked, Superseded, names
from tests.conftest import CommandLine, command_environment
from tests.object_store import BUCKET, CREDENTIALS, Gate, s3_server, uri
from tests.simulation import LEARNING, advance, ledger_of, new_experiment, run_search, run_with_predictions
from tests.test_event_log import snapshot


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def results(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of the test's own in the store, this process being on a host of its own."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lock, "SETTLING_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "EVENTS_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "TABLES_SECONDS", 0.2)
    be_on("first", tmp_path, monkeypatch)
    return uri(port, prefix=tmp_path.name)


def be_on(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as another machine would: it has a name and copies of its own."""
    monkeypatch.setenv(mirror.CACHE_VARIABLE, str(tmp_path / host))
    monkeypatch.setattr("platform.node", lambda: host)


def stored(results: str, name: str = "sim") -> ObjectStore:
    return ObjectStore(within(canonical(results), name))


def log_in(store: ObjectStore, folder: Path) -> list[str]:
    """The events of the log as it is in the store, as lines: NaN is not equal to itself."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in store.objects("events"):
        (folder / name.split("/")[1]).write_bytes(store.read(name))
    return lines_in(folder)


def lines_in(folder: Path) -> list[str]:
    return [encode(event) for event in read_events(folder)]


def eventually(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not come about")


# The store's operations


def test_objects_are_put_read_listed_and_removed(results: str) -> None:
    store = ObjectStore(canonical(results))
    for name in ("b/2", "b/1", "a", "c/d/e"):
        store.put(name, name.encode())
    assert list(store.objects()) == ["a", "b/1", "b/2", "c/d/e"]
    assert list(store.objects("b")) == ["b/1", "b/2"]
    assert list(store.objects("nothing")) == []
    assert store.folders() == ["b", "c"]
    assert store.read("c/d/e") == b"c/d/e"
    store.put("a", b"other")
    assert (store.read("a"), getattr(store.info("a"), "size", None)) == (b"other", 5)
    store.remove("b/1")
    store.remove("b/1")
    assert list(store.objects("b")) == ["b/2"]
    assert store.info("b/1") is None
    assert store.info("b") is None
    with pytest.raises(FileNotFoundError):
        store.read("b/1")


def test_large_objects_are_whole(results: str) -> None:
    content = os.urandom(25_000_000)
    ObjectStore(canonical(results)).put("large", content)
    assert ObjectStore(canonical(results)).read("large") == content


def test_an_object_replaced_while_it_is_read_is_read_whole(results: str) -> None:
    store = ObjectStore(canonical(results))

    def put(size: int) -> None:
        store.put("growing", str(size).encode().ljust(size, b"."))

    put(1000)
    done = threading.Event()

    def replace_again_and_again() -> None:
        for size in itertools.takewhile(lambda _: not done.is_set(), itertools.count(1001)):
            put(size)

    writer = threading.Thread(target=replace_again_and_again)
    writer.start()
    try:
        for _ in range(60):  # of such reads pyarrow's own, which take two requests, leave every third one torn
            content = store.read("growing")
            assert len(content) == int(content.rstrip(b"."))
    finally:
        done.set()
        writer.join()


def test_a_uri_says_all_that_another_host_must_know(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert canonical("s3://bucket/a/b/") == "s3://bucket/a/b"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host:9000")
    assert canonical("s3://bucket/a") == "s3://bucket/a?endpoint_override=host:9000&scheme=http"
    given = "s3://bucket/a?endpoint_override=other:1&scheme=http"
    assert canonical(given) == given
    assert canonical(canonical(given)) == given
    assert within(given, "x/y") == "s3://bucket/a/x/y?endpoint_override=other:1&scheme=http"
    assert objects.above(within(given, "x")) == given
    with pytest.raises(UsageError, match="credentials do not belong into a URI"):
        canonical("s3://key:secret@bucket/a")
    with pytest.raises(UsageError, match="no place for results; wanted a local folder, s3://BUCKET"):
        canonical("s3://")


# The same behaviour in both places


@pytest.fixture(params=["disk", "object store"])
def place(request: pytest.FixtureRequest, results: str, tmp_path: Path) -> str:
    return results if request.param == "object store" else str(tmp_path / "disk")


def test_a_search_leaves_the_same_tables(place: str, tmp_path: Path) -> None:
    expected = new_experiment(tmp_path / "expected", num_trials=12)
    run_search(expected, LEARNING, num_trials=12)
    experiment = new_experiment(place, num_trials=12)
    run_search(experiment, LEARNING, num_trials=12)
    times = ["started_at", "finished_at"]
    ours, theirs = experiment.trials().drop(columns=times), expected.trials().drop(columns=times)
    pd.testing.assert_frame_equal(ours, theirs)
    pd.testing.assert_frame_equal(
        pd.read_parquet(f"{place.partition('?')[0]}/sim/trials{'?' if '?' in place else ''}{place.partition('?')[2]}"),
        experiment.trials(),
    )
    assert names(place) == ["sim"]
    assert len(leaderboard(place)) == (experiment.trials()["status"] == "completed").sum()
    assert len(learning_curves(place)) == len(experiment.epochs())
    reopened = Experiment.open(place, "sim")
    before = snapshot(reopened.root)
    reopened.rebuild()
    assert snapshot(Experiment.open(place, "sim").root) == before
    assert reopened.disk_bytes() > 10_000


def test_experiments_exist_once(place: str) -> None:
    experiment = new_experiment(place, name="twice")
    run_search(experiment, LEARNING, num_trials=1)
    with pytest.raises(UsageError, match=r"'twice' exists already .* add --resume .* or choose another --name"):
        Experiment.create(place, name="twice", info=experiment.info)
    with pytest.raises(UsageError, match=r"no experiment 'thrice' in .*; there are: twice"):
        Experiment.open(place, "thrice")


def test_a_trials_files_are_replaced_read_and_removed_by_the_current_driver_alone(place: str) -> None:
    experiment = new_experiment(place)
    with experiment.driving():
        files = pickle.loads(pickle.dumps(experiment.files("t00000")))  # noqa: S301  # as Ray does
        assert not files.exists(files.resume)
        files.replace(files.resume, b"first")
        files.replace(files.resume, b"second")
        assert files.exists(files.resume)
        with files.open(files.resume) as file:
            assert file.read() == b"second"
        files.remove(files.resume)
        files.remove(files.resume)
        assert not files.exists(files.resume)
        files.replace(files.best, b"weights")
    Experiment.open(place, "sim").rebuild()
    with pytest.raises(Superseded, match="driver 1; driver 2 has taken over"):
        files.replace(files.best, b"late")


def test_an_ended_trial_keeps_its_weights_alone_and_none_once_they_are_surplus(place: str) -> None:
    experiment = new_experiment(place)
    kept: list[str] = []
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=4, keep_checkpoints=1)
        while (assignment := ledger.next_trial()) is not None:
            files = experiment.files(assignment.trial_id)
            for path in (files.resume, files.best):
                files.replace(path, b"content")
            for epoch in range(1, 10):
                if not ledger.report(assignment.trial_id, LEARNING(assignment, epoch), node="here"):
                    break
    for trial_id in experiment.history.trials:
        files = experiment.files(trial_id)
        assert not files.exists(files.resume)
        kept += [trial_id] * files.exists(files.best)
    table = experiment.trials()
    assert kept == list(table.loc[table["checkpoint"] != "", "trial_id"])
    assert len(kept) == 1


def test_an_ensemble_has_the_same_scores_and_members(place: str, tmp_path: Path) -> None:
    scores = {}
    for where in (place, str(tmp_path / "expected")):
        experiment = new_experiment(where, num_trials=6)
        run_with_predictions(experiment, num_trials=6)
        assert ensemble.main(["--results-dir", where, "--top-k", "2"]) == cli.DONE
        scores[where] = ensemble_scores(where)
    expected = scores[str(tmp_path / "expected")]
    assert len(expected) > 50
    speed = ["training_seconds"]
    pd.testing.assert_frame_equal(scores[place].drop(columns=speed), expected.drop(columns=speed))


# Drivers


DRIVER = """
import itertools, os, platform, signal, sys, time
from results import lock, mirror
mirror.EVENTS_SECONDS, mirror.TABLES_SECONDS, lock.SETTLING_SECONDS = 0.05, 0.2, 0.05
platform.node = lambda: "first"
from results.objects import ObjectStore
from tests.simulation import LEARNING, new_experiment, run_search
place, num_puts = sys.argv[1], int(sys.argv[2])
experiment = new_experiment(place, num_trials=30)
puts = itertools.count(1)
put = ObjectStore.put
def put_or_die(store, name, content):
    if "/t0" not in name and next(puts) == num_puts:  # what workers put does not count
        os.kill(os.getpid(), signal.SIGKILL)
    put(store, name, content)
ObjectStore.put = put_or_die
print("began", flush=True)
def curve(assignment, epoch):
    time.sleep(0.02)
    files = experiment.files(assignment.trial_id)
    files.replace(files.resume, f"{assignment.config['dropout']} {epoch}".encode())
    return LEARNING(assignment, epoch)
run_search(experiment, curve, num_trials=30)
"""


def start_driver(results: str, tmp_path: Path, *, num_puts: int = 0) -> subprocess.Popen[bytes]:
    """A driver on the first host, another process, which is killed before it puts so many objects."""
    env = {**command_environment(), mirror.CACHE_VARIABLE: str(tmp_path / "first")}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, results, str(num_puts)], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"began\n"
    return process


def killed_driver(results: str, tmp_path: Path, *, after: int = 0, num_puts: int = 0) -> list[str]:
    """Kill a driver once the store has so many events, or before a put of its own; the log in the store then."""
    process = start_driver(results, tmp_path, num_puts=num_puts)
    if not num_puts:
        eventually(lambda: len(log_in(stored(results), tmp_path / "log")) > after)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()
    return log_in(stored(results), tmp_path / "log")


# The second put is the generation's; then turns of the mirror follow: the log and, now and then, tables.
@pytest.mark.slow
@pytest.mark.parametrize("num_puts", [4, 6, 9, 12, 20, 41])
def test_another_host_goes_on_from_a_killed_driver_and_loses_no_event_that_was_sent(
    num_puts: int, results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SEGMENT_BYTES", 4000)
    sent = killed_driver(results, tmp_path, num_puts=num_puts)
    be_on("second", tmp_path, monkeypatch)
    monkeypatch.setattr(lock, "LAPSED_SECONDS", 0.0)
    assert not (tmp_path / "second").exists()
    experiment = Experiment.open(results, "sim")
    asked = []

    def curve(assignment: Assignment, epoch: int) -> EpochResult:
        asked.append((assignment.trial_id, epoch))
        return LEARNING(assignment, epoch)

    run_search(experiment, curve, num_trials=30)
    log = log_in(stored(results), tmp_path / "log")
    assert log[: len(sent)] == sent
    reported = {(e.trial_id, e.result.epoch) for e in map(decode, sent) if isinstance(e, EpochReported)}
    assert reported.isdisjoint(asked)  # nothing that is in the log is trained again
    expected = new_experiment(tmp_path / "expected", num_trials=30)
    run_search(expected, LEARNING, num_trials=30)
    assert len(experiment.trials()) == 30
    assert set(experiment.trials()["trial_id"]) == set(expected.trials()["trial_id"])


def test_the_same_host_goes_on_at_once_and_has_what_could_not_be_sent(results: str, tmp_path: Path) -> None:
    sent = killed_driver(results, tmp_path, after=20)
    copy = mirror.copies_folder(results) / "sim"
    here = lines_in(copy / "events")
    assert here[: len(sent)] == sent
    tail = copy / "events" / "000002.jsonl"
    store = stored(results)
    store.put("events/000002.jsonl", b"".join(tail.read_bytes().splitlines(keepends=True)[:10]))  # an outage before
    shorter = log_in(store, tmp_path / "log")
    assert len(shorter) < len(here)
    experiment = Experiment.open(results, "sim")
    assert lines_in(experiment.root / "events") == here
    experiment.rebuild()
    assert log_in(store, tmp_path / "log") == here


def test_a_host_whose_tail_was_not_sent_follows_the_one_that_went_on(
    results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_driver(results, tmp_path, after=20)
    copy = mirror.copies_folder(results) / "sim"
    store = stored(results)
    lines = (copy / "events" / "000002.jsonl").read_bytes().splitlines(keepends=True)
    store.put("events/000002.jsonl", b"".join(lines[:10]))
    for name in store.objects("trials"):
        store.remove(name)
    be_on("second", tmp_path, monkeypatch)
    monkeypatch.setattr(lock, "LAPSED_SECONDS", 0.0)
    run_search(Experiment.open(results, "sim"), LEARNING, num_trials=30)
    expected = snapshot(mirror.copies_folder(results) / "sim")
    be_on("first", tmp_path, monkeypatch)
    experiment = Experiment.open(results, "sim")
    assert snapshot(experiment.root) == expected
    experiment.rebuild()
    assert len(experiment.trials()) == 30


def test_checkpoints_of_trials_that_the_log_does_not_know_are_not_gone_on_from(
    results: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = new_experiment(results)
    with experiment.driving():
        files = experiment.files("t00005")
        files.replace(files.resume, b"of a trial whose start was not sent")
        files.replace(files.predictions, b"its predictions")
    be_on("second", tmp_path, monkeypatch)
    with Experiment.open(results, "sim").driving():
        assert not files.exists(files.resume)
        assert not files.exists(files.predictions)


def through(gate: Gate, results: str) -> str:
    """The same place, by way of a gate."""
    place, _, query = results.partition("?")
    return f"{place}?{query.replace(str(gate.behind), str(gate.port))}"


def test_what_is_sent_grows_with_the_log_and_not_with_its_square(
    results: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SEGMENT_BYTES", 8000)
    monkeypatch.setattr(mirror, "EVENTS_SECONDS", 1e6)  # the turns are the test's
    with Gate(port) as gate:
        experiment = new_experiment(through(gate, results), num_trials=60)
        with experiment.driving():
            sending, ledger = experiment._mirror, ledger_of(experiment, num_trials=60)
            assert sending is not None
            before = gate.num_bytes_sent
            for _ in range(60):
                advance(ledger, LEARNING, steps=1)
                sending.send(tables=False)
            log_bytes = sum(path.stat().st_size for path in (experiment.root / "events").iterdir())
            sent = gate.num_bytes_sent - before
    # A turn puts at most the last segment again, of 8 kB and a turn's events, and begins another; requests have heads
    # of about a kB each. Whole logs, 85 kB on average, would be 5 MB.
    assert log_bytes > 150_000
    assert sent < 60 * (8_000 + 2 * 3_000 + 8_000)


def test_an_outage_in_mid_search_loses_nothing_and_recording_does_not_wait(results: str, port: int) -> None:
    in_outage = []
    with Gate(port) as gate:
        experiment = new_experiment(through(gate, results), num_trials=8)

        def curve(assignment: Assignment, epoch: int) -> EpochResult:
            number = len(list(read_events(experiment.root / "events")))
            if number > 40 and not in_outage:
                gate.is_shut = True
                experiment.record(ExperimentStopped(at=1.0, state="interrupted"))  # returns while nobody answers
                in_outage.append(log_in(stored(results), experiment.root / ".log"))
                eventually(lambda: gate.num_refused > 3)
                assert log_in(stored(results), experiment.root / ".log") == in_outage[0]
                gate.is_shut = False
            return LEARNING(assignment, epoch)

        run_search(experiment, curve, num_trials=8)
    here = lines_in(experiment.root / "events")
    assert len(in_outage[0]) < len(here)
    assert log_in(stored(results), experiment.root / ".log") == here
    assert len(Experiment.open(results, "sim").trials()) == 8


def test_workers_wait_for_a_store_that_does_not_answer(results: str, port: int) -> None:
    with Gate(port) as gate:
        experiment = new_experiment(through(gate, results))
        with experiment.driving():
            files = experiment.files("t00000")
            gate.is_shut = True
            writing = threading.Thread(target=files.replace, args=(files.resume, b"content"))
            writing.start()
            eventually(lambda: gate.num_refused > 2)
            assert writing.is_alive()
            gate.is_shut = False
            writing.join(timeout=60)
            assert not writing.is_alive()
            with files.open(files.resume) as file:
                assert file.read() == b"content"


def test_what_cannot_be_sent_at_the_end_is_said_and_sent_by_the_command_that_is_named(
    results: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 1.0)
    with Gate(port) as gate:
        place = through(gate, results)
        experiment = new_experiment(place)

        def drive() -> None:
            with experiment.driving():
                experiment.record(ExperimentStopped(at=1.0, state="finished"))
                gate.is_shut = True

        said = r"what was not sent is safe in .*sim. To send it from this machine: .*orchestrator.rebuild sim --results"
        with (
            pytest.warns(DataWarning, match=r"does not answer .* trying again for 1 seconds"),
            pytest.raises(Unreachable, match=said),
        ):
            drive()
        gate.is_shut = False
        assert rebuild.main(["sim", "--results-dir", place]) == cli.DONE
    assert json.loads(stored(results).read("experiment.json"))["state"] == "finished"


# One driver at a time


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


def test_of_two_that_claim_at_the_same_time_one_gives_way(results: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(results)
    settle = time.sleep

    def meanwhile(seconds: float) -> None:
        store.put(lock.LEASE, json.dumps({"token": "another", "host": "second", "copy": "there"}).encode())
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


def test_all_nodes_of_a_cluster_reach_an_object_store() -> None:
    check_reachable("s3://bucket/runs")  # without asking any of them: no Ray runs here


# Wrong usage


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers with an S3 error: to everything, or to what would write."""

    error = (403, "AccessDenied")
    writes_only = False

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, code = self.error
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        if self.writes_only and self.command == "GET":
            status, body = 200, "<?xml version='1.0'?><ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
        elif self.writes_only and self.command == "HEAD":
            status = 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextmanager
def answering(error: tuple[int, str], *, writes_only: bool = False) -> Iterator[int]:
    handler = type("Handler", (Answering,), {"error": error, "writes_only": writes_only})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def silent() -> Iterator[int]:
    """A port where somebody listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def closed() -> Iterator[int]:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (lambda: answering((403, "AccessDenied")), "is denied .* give credentials .AWS_ACCESS_KEY_ID"),
        (lambda: answering((403, "InvalidAccessKeyId")), "is denied .* give credentials"),
        (lambda: answering((403, "AccessDenied"), writes_only=True), "is denied .*PutObject.* give credentials"),
        (lambda: answering((404, "NoSuchBucket")), f"there is no bucket '{BUCKET}' .* create it"),
        (lambda: answering((301, "PermanentRedirect")), "was refused .* mend its endpoint_override, scheme or region"),
        (closed, "does not answer .* mend its endpoint or the network"),
        pytest.param(silent, "does not answer .* mend its endpoint or the network", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("main", [search.main, train.main])
def test_a_store_that_cannot_be_used_is_said_in_one_sentence_within_15_seconds(
    main: Callable[[list[str]], int], server: object, message: str, results: str, tmp_path: Path
) -> None:
    what = ["digits"] if main is search.main else ["speedrun"]
    with server() as port:  # type: ignore[operator]
        began = time.monotonic()
        with pytest.raises(UsageError, match=message) as caught:
            main([*what, "--results-dir", uri(port, tmp_path.name), "--name", "x"])
        assert time.monotonic() - began < 15
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "first").exists()


def test_a_refusal_is_not_tried_again_and_a_failure_is(results: str) -> None:
    with answering((403, "AccessDenied")) as port, pytest.raises(Refused, match="is denied"):
        ObjectStore(uri(port)).read("x")
    with answering((503, "SlowDown")) as port, pytest.raises(Unreachable, match="does not answer"):
        ObjectStore(uri(port), patience=0.5).read("x")


# All of it


FIGURES = ["trial_id", "status", "epochs_trained", "best_epoch", "val_accuracy", "val_nll", "config.dropout"]


@pytest.mark.ray
@pytest.mark.slow
def test_commands_leave_in_a_store_what_they_leave_on_a_disk(
    results: str, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {}
    for place in (results, str(tmp_path / "disk")):
        for module, *arguments in (
            ("search", "digits", "--num-trials", "4", "--max-epochs", "2", "--max-concurrent", "1"),
            ("ensemble", "--top-k", "2", "--include-stopped"),
            ("distill", "--max-epochs", "1", "--without-control", "--name", "student"),
            ("rebuild", "digits"),
        ):
            done = command(f"orchestrator.{module}", *arguments, "--results-dir", place)
            assert done.returncode == 0, done.stderr
        experiment = Experiment.open(place, "digits")
        best = experiment.predictions("t00000", SelectPredictions)
        tables[place] = (experiment.trials()[FIGURES], ensemble_scores(place), best.logits_NC, names(place))
    ours, theirs = tables.values()
    pd.testing.assert_frame_equal(ours[0], theirs[0])
    timed = ["training_seconds", "images_per_second"]
    pd.testing.assert_frame_equal(ours[1].drop(columns=timed), theirs[1].drop(columns=timed))
    assert (ours[2] == theirs[2]).all()
    assert ours[3] == theirs[3] == ["digits", "student"]
    assert not (tmp_path / "s3:").exists()
    be_on("second", tmp_path, monkeypatch)
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
    places = (results, str(tmp_path / "disk"))
    probs = [load_ensemble(within(place, "digits/ensembles/e0001")).predict(images) for place in places]
    assert (probs[0] == probs[1]).all()


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_goes_on_after_an_outage_as_if_there_had_been_none(
    results: str, port: int, command: CommandLine, tmp_path: Path
) -> None:
    arguments = ["digits", "--num-trials", "6", "--max-epochs", "3", "--max-concurrent", "1"]
    done = command("orchestrator.search", *arguments, "--results-dir", str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr
    with Gate(port) as gate:
        search_command = [sys.executable, "-m", "orchestrator.search", *arguments]
        process = subprocess.Popen(
            [*search_command, "--results-dir", through(gate, results)],
            cwd=tmp_path,
            env=command_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        store = stored(results, "digits")
        eventually(lambda: any('"epoch"' in line for line in log_in(store, tmp_path / "log")))
        gate.is_shut = True
        refused = gate.num_refused
        eventually(lambda: gate.num_refused > refused + 10)
        assert process.poll() is None
        gate.is_shut = False
        said = process.communicate()[1]
    assert process.returncode == 0, said
    ours, theirs = (Experiment.open(place, "digits").trials() for place in (results, str(tmp_path / "disk")))
    pd.testing.assert_frame_equal(ours[FIGURES], theirs[FIGURES])
    assert (ours["retries"] == 0).all()
