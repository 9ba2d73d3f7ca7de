"""What a search decides, without Ray: rungs, proposals, retention, and what a resume finds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from orchestrator.driver import make_ledger
from orchestrator.halving import HALVINGS, Asha, Candidate, Halving, Judgement, Ladder
from results.events import EpochReported, read_events
from results.schema import EpochResult
from results.store import Experiment
from results.study import open_study
from search_spaces.space import Budget
from tests.simulation import (
    LEARNING,
    MAX_EPOCHS,
    Assignment,
    advance,
    epoch_result,
    ledger_of,
    new_experiment,
    plan,
    run_search,
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(2, 4), st.integers(1, 30), st.sampled_from(["max", "min"]), st.integers(0, 2**32 - 1)
)
def test_asha_decides_as_ray_tunes_scheduler_does(grace: int, factor: int, epochs: int, mode: str, seed: int) -> None:
    max_epochs = grace + epochs
    ours = Asha(Ladder(grace_epochs=grace, max_epochs=max_epochs, factor=factor))
    rays = AsyncHyperBandScheduler(
        time_attr="epoch", metric="value", mode=mode, grace_period=grace, max_t=max_epochs, reduction_factor=factor
    )
    rng = np.random.default_rng(seed)
    running = {f"t{i}": 0 for i in range(8)}
    for trial_id in running:
        rays.on_trial_add(None, SimpleNamespace(trial_id=trial_id))
    while running:
        trial_id = str(rng.choice(list(running)))
        running[trial_id] += 1
        epoch, value = running[trial_id], float(np.round(rng.random(), 1))
        result = {"epoch": epoch, "value": value}
        theirs = rays.on_trial_result(None, SimpleNamespace(trial_id=trial_id), result)
        if epoch == max_epochs:
            del running[trial_id]
            continue
        score = value if mode == "max" else -value
        go_on = ours.judge(Candidate(trial_id), epoch=epoch, score=score).verdict == "continue"
        assert go_on == (theirs == TrialScheduler.CONTINUE), (trial_id, epoch, value)
        if not go_on:
            del running[trial_id]


@pytest.mark.parametrize("name", HALVINGS)
def test_a_halving_goes_on_as_before_once_told_again_what_it_had_judged(name: str) -> None:
    values = np.random.default_rng(5).random((9, 8))
    told = [(f"t{trial}", epoch + 1, float(values[trial, epoch])) for trial in range(9) for epoch in range(8)]
    first, second, other = (HALVINGS[name](LADDER) for _ in range(3))

    def judged(halving: Halving, reports: list[tuple[str, int, float]]) -> list[Judgement]:
        return [halving.judge(Candidate(t, int(t[1:]) / 8), epoch=e, score=score) for t, e, score in reports]

    decisions = judged(first, told)
    assert judged(second, told[:40]) == judged(other, told[:40])
    assert judged(second, told[40:]) == decisions[40:]
    if name == "asha":
        assert {j.verdict for j in decisions[40:]} == {"continue", "stop"}


LADDER = Ladder(grace_epochs=1, max_epochs=9, factor=3)


def test_rungs_of_a_short_budget_begin_at_a_third_of_it() -> None:
    assert Budget(max_epochs=9).grace == 3
    assert Ladder(grace_epochs=3, max_epochs=9, factor=3).rungs == [3]
    assert Ladder(grace_epochs=1, max_epochs=27, factor=3).rungs == [1, 3, 9]
    assert Ladder(grace_epochs=1, max_epochs=5, factor=1.5).rungs == [1, 2, 3]
    assert Budget(max_epochs=1).grace == 1


def test_every_trial_asked_for_runs_once_baselines_first(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=9)
    trials = experiment.trials()
    assert list(trials["trial_id"]) == [f"t{i:05d}" for i in range(9)]
    assert list(trials["origin"][:2]) == ["baseline", "baseline"]
    assert list(trials["config.dropout"][:2]) == [0.0, 0.499]
    assert (trials["origin"] == "startup").sum() <= 9 / 3
    assert (trials["origin"] == "model").sum() >= 4
    assert trials["seed"].is_unique


def test_a_diverged_trial_is_failed_and_the_search_goes_on(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=6)
    diverged = experiment.trials().set_index("trial_id").loc["t00001"]
    assert (diverged["status"], diverged["stop_reason"]) == ("failed", "diverged at epoch 2")
    assert diverged["val_accuracy"] == pytest.approx(0.9 - 0.499 - 0.3)  # of epoch 1, the last finite one
    assert len(experiment.trials()) == 6


def test_stop_reasons_name_the_rung_and_epochs_record_it(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=12)
    pruned = experiment.trials().query("status == 'pruned'")
    assert len(pruned)
    assert set(pruned["stop_reason"]) == {"rung 1"}
    epochs = experiment.epochs()
    at_rung = epochs[epochs["rung"].notna()]
    assert set(at_rung["epoch"]) == {3}
    assert (at_rung.query("decision == 'stop'")["trial_id"].tolist()) == pruned["trial_id"].tolist()


def test_an_epoch_reported_again_changes_nothing(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=1)
        assignment = ledger.next_trial()
        assert assignment is not None
        for epoch in (1, 2):
            assert ledger.report(assignment.trial_id, LEARNING(assignment, epoch), node="a")
        assert ledger.report(assignment.trial_id, epoch_result(1, 0.123), node="b")
        assert ledger.report(assignment.trial_id, LEARNING(assignment, 3), node="b")
    assert [e.result for e in read_events(experiment.root / "events") if isinstance(e, EpochReported)] == [
        LEARNING(assignment, epoch) for epoch in (1, 2, 3)
    ]


@settings(max_examples=15, deadline=None)
@given(stops=st.lists(st.integers(0, 25), min_size=1, max_size=4))
def test_a_search_stopped_anywhere_and_resumed_is_complete(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    experiment = new_experiment(tmp_path_factory.mktemp("runs"))
    ended: dict[str, object] = {}
    for steps in [*stops, None]:
        with experiment.driving():
            ledger = ledger_of(experiment, num_trials=7)
            assert rung_state(ledger.halving) == rungs_recomputed(experiment)
            advance(ledger, LEARNING, steps=steps)
        rows = {row["trial_id"]: repr(row) for row in experiment.trials().to_dict("records")}
        assert {k: rows[k] for k in ended} == ended
        ended = rows
    assert sorted(ended) == [f"t{i:05d}" for i in range(7)]
    epochs = experiment.epochs()
    assert not epochs.duplicated(["trial_id", "epoch"]).any()
    assert list(experiment.trials()["origin"]).count("baseline") == 2
    assert rung_state(ledger.halving) == rungs_recomputed(experiment)


def rung_state(halving: object) -> list[dict[str, float]]:
    assert isinstance(halving, Asha)
    return halving.rungs


def rungs_recomputed(experiment: Experiment) -> list[dict[str, float]]:
    """The rung of epoch 3, from the figures in the log alone."""
    rung = {}
    for event in read_events(experiment.root / "events"):
        if isinstance(event, EpochReported) and event.result.epoch == MAX_EPOCHS // 3:
            assert event.result.val_accuracy is not None
            rung[event.trial_id] = event.result.val_accuracy
    return [rung]


def test_a_decision_lost_in_a_crash_is_made_at_the_resume(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=1)
        assignment = ledger.next_trial()
        assert assignment is not None
        for epoch in range(1, MAX_EPOCHS):
            ledger.report(assignment.trial_id, LEARNING(assignment, epoch), node="")
        last = LEARNING(assignment, MAX_EPOCHS)
        experiment.record(EpochReported(at=1.0, trial_id=assignment.trial_id, node="", result=last))
    with experiment.driving():
        assert ledger_of(experiment, num_trials=1).finished
    assert experiment.trials()["status"].tolist() == ["completed"]


def test_the_time_of_a_driver_begins_after_what_an_earlier_one_left_undecided(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=1)
        assignment = ledger.next_trial()
        assert assignment is not None
        first = LEARNING(assignment, 1)
        experiment.record(EpochReported(at=1.0, trial_id=assignment.trial_id, node="", result=first))
    with experiment.driving():
        ledger = make_ledger(experiment, plan(num_trials=1), max_concurrent=1, max_seconds=1e-9)
        assert ledger.out_of_time
        assert experiment.history.trials[assignment.trial_id].decisions[1].decision == "continue"


def test_a_resumed_sampler_draws_new_points(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    for num_trials in (1, 2, 3):  # each draws one more point at random, from a sampler made anew
        with experiment.driving():
            advance(ledger_of(experiment, num_trials=num_trials, baselines=()), LEARNING)
    trials = experiment.trials()
    assert set(trials["origin"]) == {"startup", "model"}
    assert trials["config.dropout"].is_unique


@pytest.mark.parametrize(("num_trials", "concurrent"), [(9, 2), (24, 2), (24, 8), (60, 4), (3, 1)])
def test_at_most_a_third_is_drawn_without_the_model(tmp_path: Path, num_trials: int, concurrent: int) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        sampled = plan(num_trials=num_trials, baselines=())
        ledger = make_ledger(experiment, sampled, max_concurrent=concurrent)
        advance(ledger, LEARNING, concurrent=concurrent)
    assert 1 <= (experiment.trials()["origin"] == "startup").sum() <= num_trials / 3


def test_fewer_trials_than_baselines_leave_nothing_waiting(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=1)
    study = open_study(experiment.study_path, name=experiment.name, mode="max")
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE"]


def test_only_the_best_checkpoints_are_kept_and_rows_say_so(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=8, keep_checkpoints=2)

        def curve(assignment: Assignment, epoch: int) -> EpochResult:
            for path in (experiment.files(assignment.trial_id).best, experiment.files(assignment.trial_id).resume):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("weights")
            return LEARNING(assignment, epoch)

        advance(ledger, curve)
    trials = experiment.trials()
    kept = trials[trials["checkpoint"] != ""]
    best = trials.query("status == 'completed'").nlargest(2, "val_accuracy")
    assert set(kept["trial_id"]) == set(best["trial_id"])
    on_disk = {str(p.relative_to(experiment.root)) for p in experiment.root.glob("checkpoints/*/*")}
    assert on_disk == set(kept["checkpoint"])


def test_an_end_lost_in_a_crash_is_written_at_the_resume(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=8)
    rows = experiment.trials().to_dict("records")
    for segment in sorted((experiment.root / "events").iterdir()):
        kept = [line for line in segment.read_text().splitlines() if '"event": "trial_ended"' not in line]
        segment.write_text("".join(f"{line}\n" for line in kept))
    for part in (experiment.root / "trials").iterdir():
        part.unlink()  # a row is written after its end
    with experiment.driving():
        assert len(experiment.history.unfinished) == 8
        assert ledger_of(experiment, num_trials=8).finished
    again = experiment.trials().to_dict("records")
    for row, other in zip(rows, again, strict=True):
        assert (row["status"], row["stop_reason"]) == (other["status"], other["stop_reason"])


def test_a_crashed_trial_has_the_figures_of_what_it_left(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=1)
        assignment = ledger.next_trial()
        assert assignment is not None
        for epoch in range(1, 6):
            ledger.report(assignment.trial_id, LEARNING(assignment, epoch), node="")
        ledger.failed(assignment.trial_id, "boom")
    row = experiment.trials().iloc[0]
    assert (row["epochs_trained"], row["best_epoch"]) == (5, 3)  # weights were last stored at the rung


def test_a_crashed_trial_is_told_as_failed(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=1)
        assignment = ledger.next_trial()
        assert assignment is not None
        ledger.retried(assignment.trial_id, "first")
        ledger.retried(assignment.trial_id, "second")
        ledger.failed(assignment.trial_id, "Traceback: boom")
        assert ledger.finished
    row = experiment.trials().iloc[0]
    assert (row["status"], row["stop_reason"], row["error"], row["retries"]) == (
        "failed",
        "error",
        "Traceback: boom",
        2,
    )
