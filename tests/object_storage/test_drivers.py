"""Drivers of an experiment in an object store: killed, cut off, too late."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path

import pytest

from orchestrator import cli, rebuild
from orchestrator.ledger import Assignment
from results import lock, mirror, objects
from results.events import EpochReported, ExperimentStopped, decode, read_events
from results.objects import Unreachable
from results.schema import DataWarning, EpochResult
from results.store import Experiment
from tests.background import PATIENCE
from tests.object_storage.driver import killed_driver
from tests.object_storage.places import be_on, eventually, lines_in, log_in, stored, through
from tests.object_storage.server import Gate
from tests.simulation import LEARNING, advance, ledger_of, new_experiment, run_search
from tests.test_event_log import snapshot


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
                eventually(lambda: gate.num_refused > 3)  # what was on its way has arrived by then
                experiment.record(ExperimentStopped(at=1.0, state="interrupted"))  # returns while nobody answers
                in_outage.append(log_in(stored(results), experiment.root / ".log"))
                refused = gate.num_refused
                eventually(lambda: gate.num_refused > refused + 3)
                assert log_in(stored(results), experiment.root / ".log") == in_outage[0]
                gate.is_shut = False
            return LEARNING(assignment, epoch)

        run_search(experiment, curve, num_trials=8)
    here = lines_in(experiment.root / "events")
    assert len(in_outage[0]) < len(here)
    assert log_in(stored(results), experiment.root / ".log") == here
    assert len(Experiment.open(results, "sim").trials()) == 8


def test_a_store_that_does_not_answer_for_a_while_is_said_once(
    results: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SECONDS_UNTIL_SAID", 0.2)
    with (
        Gate(port) as gate,
        warnings.catch_warnings(record=True) as said,
        new_experiment(through(gate, results)).driving(),
    ):
        warnings.simplefilter("always")
        gate.is_shut = True
        eventually(lambda: said)
        refused = gate.num_refused
        eventually(lambda: gate.num_refused > refused + 3)
        gate.is_shut = False
    (warning,) = said
    assert warning.category is DataWarning
    assert "does not answer" in str(warning.message)
    assert "going on without it, and trying again" in str(warning.message)


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
            writing.join(timeout=PATIENCE)
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
