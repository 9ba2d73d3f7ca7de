"""Early stopping: what strategies decide, survives a kill; what they train, is what they say; what they do, is seen."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import rankdata

from orchestrator.audit import audit, findings
from orchestrator.console import finalist_lines
from orchestrator.driver import make_ledger
from orchestrator.halving import HALVINGS, Candidate, Ladder, Promotion, Stratified
from orchestrator.ledger import Assignment
from orchestrator.strength import strength
from results.events import Decided, read_events
from results.schema import EpochResult, UsageError
from results.store import Experiment, TrialFiles
from tests.simulation import LEARNING, MAX_EPOCHS, advance, epoch_result, new_experiment, plan
from trainables.config import TrainConfig
from trainables.course import Leg, complete_schedules, num_epochs, trunk_and_branches
from trainables.datasets import SplitImages
from trainables.loop import train
from trainables.resident import ResidentImages
from trainables.trial import run_trial

AVERAGED = TrainConfig(ema_decay=0.9)
GIVEN = tuple({"dropout": round(0.02 * i, 2), "weight_decay": 1e-5 * (1 + i)} for i in range(14))


def CROSSING(assignment: Assignment, epoch: int) -> EpochResult:  # noqa: N802 - a constant curve
    """More dropout learns more slowly and ends higher, with a bit of noise that the trial and epoch decide."""
    dropout = float(assignment.config["dropout"] or 0)
    noise = np.random.default_rng([int(assignment.trial_id[1:]), epoch]).normal(0, 0.01)
    return epoch_result(epoch, 0.5 + 0.3 * dropout - (0.1 + dropout) * 3 / (epoch + 2) + noise)


def decisions(experiment: Experiment) -> list[tuple[str, int, int | None, str]]:
    """All decisions, in the order in which they were made."""
    events = [event for event in read_events(experiment.root / "events") if isinstance(event, Decided)]
    return [(event.trial_id, event.epoch, event.rung, event.decision) for event in events]


@settings(max_examples=12, deadline=None)
@given(halving=st.sampled_from(list(HALVINGS)), stops=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_search_killed_and_resumed_stops_and_promotes_as_one_never_killed(
    tmp_path_factory: pytest.TempPathFactory, halving: str, stops: list[int]
) -> None:
    """The same reports in the same order: all configurations are given, and trials report in turns."""
    made = {}
    for name, steps in {"never": [None], "killed": [*stops, None]}.items():
        experiment = new_experiment(tmp_path_factory.mktemp("runs"))
        first: list[str] = []
        for count in steps:
            with experiment.driving():
                search = plan(
                    num_trials=14,
                    halving=halving,
                    baselines=GIVEN,
                    base=AVERAGED,
                    grace_epochs=1,
                    control_fraction=0.25,
                )
                ledger = make_ledger(experiment, search, max_concurrent=3)
                first = advance(ledger, CROSSING, concurrent=3, steps=count, first=first)
        made[name] = decisions(experiment)
        assert ledger.finished
    assert made["never"] == made["killed"]
    kinds = {decision for *_, decision in made["never"]}
    assert kinds >= {"none": {"continue"}, "promote": {"pause", "continue", "stop"}}.get(halving, {"continue", "stop"})


@pytest.mark.parametrize("name", HALVINGS)
def test_every_strategy_trains_at_least_one_trial_to_its_end_and_counts_all_of_its_training(
    tmp_path: Path, name: str
) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        search = plan(num_trials=14, halving=name, baselines=GIVEN, base=AVERAGED, grace_epochs=1)
        ledger = make_ledger(experiment, search, max_concurrent=2)
        advance(ledger, CROSSING)
    completed = experiment.trials().query("status == 'completed'")
    assert len(completed) >= 1
    assert set(completed["epochs_trained"]) == {num_epochs(ledger.halving.course)}
    assert set(completed["config.schedule"]) == {"warmup_stable_decay" if name == "stable" else "cosine"}
    assert ledger.halving.rung_epochs == sorted(ledger.halving.rung_epochs)
    assert all(epoch < num_epochs(ledger.halving.course) for epoch in ledger.halving.rung_epochs)


def test_a_promotion_waits_for_enough_others() -> None:
    """Factor 3: of three at a rung one may go on, the best; of six two."""
    halving = Promotion(Ladder(grace_epochs=1, max_epochs=9, factor=3))
    told = {"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.4, "e": 0.2, "f": 0.6}
    promoted = []
    for trial_id, score in told.items():
        assert halving.judge(Candidate(trial_id), epoch=1, score=score).verdict == "pause"
        chosen = halving.next_promotion()
        if chosen is not None:
            halving.release(chosen)
        promoted.append(chosen)
    assert promoted == [None, None, "b", None, None, "f"]
    assert halving.is_waiting("d")
    assert not halving.is_waiting("b")


def test_strata_compare_like_with_like() -> None:
    """Six weak trials at .6 or above, then strong ones at .3: the strong are measured against the strong."""
    halving = Stratified(Ladder(grace_epochs=1, max_epochs=9, factor=3))
    for i in range(6):
        halving.judge(Candidate(f"weak{i}", 0.1), epoch=1, score=0.6 + 0.01 * i)
    halving.judge(Candidate("strong0", 0.9), epoch=1, score=0.3)
    assert halving.judge(Candidate("strong1", 0.9), epoch=1, score=0.31).verdict == "continue"
    assert halving.judge(Candidate("strong2", 0.9), epoch=1, score=0.2).verdict == "stop"
    assert halving.judge(Candidate("weak6", 0.1), epoch=1, score=0.31).verdict == "stop"


def test_strength_is_the_mean_place_in_the_ranges() -> None:
    """dropout .1 of 0 to .4 is at 1/4; weight_decay 1e-4 of 1e-5 to 1e-3 at 1/2; cutout 8 of {0, 4, 8} at 1: 7/12."""
    dimensions = {
        "dropout": FloatDistribution(0.0, 0.4),
        "weight_decay": FloatDistribution(1e-5, 1e-3, log=True),
        "cutout_size": CategoricalDistribution([0, 4, 8]),
        "lr": FloatDistribution(0.1, 1.0),
        "policy": CategoricalDistribution(["none", "randaugment"]),
    }
    config = {"dropout": 0.1, "weight_decay": 1e-4, "cutout_size": 8, "lr": 0.5, "policy": "none"}
    assert strength(config, dimensions) == pytest.approx(7 / 12)
    assert strength({"lr": 0.5}, {"lr": FloatDistribution(0.1, 1.0)}) is None
    weakest = {"mixup_alpha": FloatDistribution(0.1, 1.0), "weight_decay": FloatDistribution(1e-5, 1e-3, log=True)}
    assert strength({"mixup_alpha": 0.0, "weight_decay": 0.0}, weakest) == 0.0
    assert strength({"cutout_size": 4}, {"cutout_size": IntDistribution(4, 4)}) == 0.5


QUICK = TrainConfig(max_epochs=4, batch_size=64, lr=0.05, ema_decay=0.9, train_fraction=0.4, dropout=0.1)
FIGURES = ("train_loss", "val_nll", "val_accuracy", "raw_val_nll", "lr", "clean_train_accuracy")


def figures(result: EpochResult) -> tuple[float, ...]:
    """What must be the same to the bit."""
    return tuple(asdict(result)[name] for name in FIGURES)


def killed_after_every_epoch(course: tuple[Leg, ...], images: ResidentImages, folder: Path) -> list[EpochResult]:
    """A trial whose worker is another one each epoch."""
    results: list[EpochResult] = []
    folder.mkdir(exist_ok=True)
    files = TrialFiles(str(folder), "t00000", 0)
    while result := next(run_trial(QUICK, images, files=files, course=course, epochs_recorded=len(results)), None):
        results.append(result)
    return results


def test_a_promoted_trial_trains_each_rungs_schedule_from_scratch(digits: SplitImages, tmp_path: Path) -> None:
    images = ResidentImages.on("cpu", digits)
    course = complete_schedules([1, 4])
    results = list(run_trial(QUICK, images, files=TrialFiles(str(tmp_path), "t1", 0), course=course))
    assert [result.epoch for result in results] == [1, 2, 3, 4, 5]
    wanted = [r for budget in (1, 4) for r in train(QUICK.having({"max_epochs": budget}), images)]
    assert [figures(r) for r in results] == [figures(r) for r in wanted]
    assert results[-1].best_epoch == 1 + wanted[-1].best_epoch
    killed = killed_after_every_epoch(course, images, tmp_path)
    assert [figures(r) for r in killed] == [figures(r) for r in results]


def test_a_resume_file_of_a_version_without_legs_is_gone_on_with(digits: SplitImages, tmp_path: Path) -> None:
    images, files = ResidentImages.on("cpu", digits), TrialFiles(str(tmp_path), "t1", 0)
    wanted = list(train(QUICK, images))
    list(itertools.islice(run_trial(QUICK, images, files=files), 2))
    saved = torch.load(files.resume, weights_only=True)
    del saved["progress"]
    torch.save(saved, files.resume)
    rest = list(run_trial(QUICK, images, files=files, epochs_recorded=2))
    assert [r.epoch for r in rest] == [3, 4]
    assert [figures(r) for r in rest] == [figures(r) for r in wanted[2:]]


def test_a_stable_trial_goes_on_from_its_trunk_after_a_branch(digits: SplitImages, tmp_path: Path) -> None:
    images = ResidentImages.on("cpu", digits)
    course = trunk_and_branches([2], max_epochs=4, branch_epochs=[1])
    results = list(run_trial(QUICK, images, files=TrialFiles(str(tmp_path), "t1", 0), course=course))
    assert [result.epoch for result in results] == [1, 2, 3, 4, 5]
    trunk = list(train(QUICK.having({"schedule": "warmup_stable_decay"}), images))
    assert [figures(r) for r in (*results[:2], *results[3:])] == [figures(r) for r in trunk]
    branch = {"schedule": "warmup_stable_decay", "max_epochs": 3, "decay_fraction": 1 / 3}
    # What ends after the third epoch, with the rate falling through it, is the branch.
    assert figures(results[2]) == figures(list(train(QUICK.having(branch), images))[2])
    assert results[2].lr < 0.1 * results[1].lr == pytest.approx(0.1 * QUICK.lr)
    killed = killed_after_every_epoch(course, images, tmp_path)
    assert [figures(r) for r in killed] == [figures(r) for r in results]
    assert [r.best_epoch for r in killed] == [r.best_epoch for r in results]


def searched(tmp_path: Path, *, num_trials: int = 60, halving: str = "asha", **of_plan: object) -> Experiment:
    """A simulated search that has ended."""
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        search = plan(num_trials=num_trials, halving=halving, base=AVERAGED, **of_plan)
        ledger = make_ledger(experiment, search, max_concurrent=2)
        advance(ledger, CROSSING)
        assert ledger.finished
    return experiment


@pytest.mark.parametrize("halving", [name for name in HALVINGS if name != "none"])
def test_a_killed_search_treats_its_controls_as_one_never_killed(tmp_path: Path, halving: str) -> None:
    """All configurations are the same, drawn from a single point, and curves are told apart by their trials."""
    (tmp_path / "never").mkdir()
    (tmp_path / "killed").mkdir()

    def curve(assignment: Assignment, epoch: int) -> EpochResult:
        number = int(assignment.trial_id[1:])
        accuracy = 0.3 + 0.02 * (number * 5 % 14) * (1 if epoch > 4 else -0.5) + 0.02 * epoch
        return epoch_result(epoch, accuracy, nll=1 - accuracy)

    made = {}
    for name, steps in {"never": [None], "killed": [9, 14, 3, None]}.items():
        experiment = new_experiment(tmp_path / name)
        first: list[str] = []
        for count in steps:
            with experiment.driving():
                search = plan(
                    num_trials=14,
                    halving=halving,
                    baselines=(),
                    base=AVERAGED,
                    grace_epochs=1,
                    control_fraction=0.4,
                    dimensions={"dropout": FloatDistribution(0.1, 0.1)},
                    finalists=1,
                )
                ledger = make_ledger(experiment, search, max_concurrent=2)
                first = advance(ledger, curve, steps=count, first=first)
        assert ledger.finished
        made[name] = decisions(experiment)
        rows = experiment.trials()
        assert rows["control"].sum() >= 5
        assert (rows["finalist_of"] != "").sum() == 1
    assert made["never"] == made["killed"]
    assert halving == "promote" or "spared" in {decision for *_, decision in made["never"]}


@pytest.mark.parametrize("halving", [name for name in HALVINGS if name != "none"])
def test_controls_are_never_stopped_and_are_the_share_asked_for(tmp_path: Path, halving: str) -> None:
    trials = searched(tmp_path, halving=halving, control_fraction=0.25).trials()
    controls = trials[trials["control"]]
    assert len(controls) == pytest.approx(15, abs=1)  # of 60, two of which are baselines
    assert set(controls["status"]) == {"completed"}
    assert not controls["origin"].eq("baseline").any()
    assert (trials["status"] == "pruned").any()


def test_without_early_stopping_there_are_no_controls(tmp_path: Path) -> None:
    assert not searched(tmp_path, num_trials=9, halving="none", control_fraction=0.5).trials()["control"].any()


def test_a_spared_control_does_not_lower_the_next_rung(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        search = plan(num_trials=40, grace_epochs=1, control_fraction=0.5)
        ledger = make_ledger(experiment, search, max_concurrent=2)
        advance(ledger, CROSSING)
    spared_at_first = {trial for trial, _, rung, decision in decisions(experiment) if (rung, decision) == (1, "spared")}
    assert spared_at_first
    assert not spared_at_first & set(ledger.halving.rungs[1])  # type: ignore[attr-defined]


def test_the_audit_is_what_pandas_makes_of_the_tables(tmp_path: Path) -> None:
    """Ranks correlated by hand on the controls' rows of epochs/ and trials/, and winners counted."""
    experiment = searched(tmp_path, num_trials=120, control_fraction=0.5)
    trials, epochs = experiment.trials(), experiment.epochs()
    (seen,) = audit(trials, epochs, metric="val_accuracy", mode="max")

    controls = trials.query("control and status == 'completed'")
    table = epochs[(epochs["epoch"] == MAX_EPOCHS // 3) & epochs["trial_id"].isin(controls["trial_id"])]
    table = table.merge(controls, on="trial_id", suffixes=("_rung", "_final"))
    assert seen.num_controls == len(table) == len(controls)

    def correlated(rows: pd.DataFrame) -> float:
        return float(np.corrcoef(rankdata(rows["val_accuracy_rung"]), rankdata(rows["val_accuracy_final"]))[0, 1])

    assert seen.correlation == pytest.approx(correlated(table))
    by_strength = table.sort_values("regularization_strength", kind="stable")
    size = len(table)
    limits = [-(-size * third // 3) for third in range(4)]  # place * 3 // size is the third
    for third, name in enumerate(("weak", "medium", "strong")):
        rows = by_strength.iloc[limits[third] : limits[third + 1]]
        assert seen.by_tercile[name] == pytest.approx(correlated(rows))
    stopped = table[table["decision"] == "spared"]["val_accuracy_final"]
    best = table[table["decision"] == "continue"]["val_accuracy_final"].max()
    assert seen.stopped_wins is not None
    assert (seen.stopped_wins.successes, seen.stopped_wins.of) == (int((stopped > best).sum()), len(stopped))


def tables(pairs: list[tuple[float, float, str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Controls given as value at the rung, final value and decision."""
    ids = [f"t{i:05d}" for i in range(len(pairs))]
    trials = pd.DataFrame(
        {
            "trial_id": ids,
            "control": True,
            "stage": "search",
            "status": "completed",
            "val_accuracy": [final for _, final, _ in pairs],
            "regularization_strength": np.linspace(0, 1, len(pairs)),
        }
    )
    epochs = pd.DataFrame(
        {
            "trial_id": ids,
            "epoch": 3,
            "rung": 1,
            "val_accuracy": [value for value, _, _ in pairs],
            "decision": [decision for *_, decision in pairs],
        }
    )
    return trials, epochs


def test_below_ten_controls_the_audit_says_so() -> None:
    nine = tables([(0.1 * i, 0.1 * i, "continue") for i in range(9)])
    (seen,) = audit(*nine, metric="val_accuracy", mode="max")
    assert seen.correlation is None
    assert "9 controls: not enough data (below 10" in findings([seen])[0]
    ten = tables([(0.1 * i, 0.1 * i, "continue") for i in range(10)])
    (seen,) = audit(*ten, metric="val_accuracy", mode="max")
    assert seen.correlation == pytest.approx(1.0)
    assert set(seen.by_tercile.values()) == {None}
    assert "weak not enough data, medium not enough data, strong not enough data" in findings([seen])[1]


def test_one_of_one_proves_nothing() -> None:
    lucky = [(0.3, 0.9, "spared"), *((0.6, 0.7, "continue") for _ in range(9))]
    (seen,) = audit(*tables(lucky), metric="val_accuracy", mode="max")
    assert seen.stopped_wins is not None
    assert seen.stopped_wins.value == 1.0
    assert not any("hurting" in line for line in findings([seen]))
    (seen,) = audit(*tables([(0.3, 0.1 * i, "spared") for i in range(10)]), metric="val_accuracy", mode="max")
    assert any("all 10 would have been stopped" in line for line in findings([seen]))


def test_trials_that_patience_ended_are_learned_from() -> None:
    halving = HALVINGS["forecast"](Ladder(grace_epochs=3, max_epochs=9, factor=3))
    verdicts = []
    for number in range(12):
        candidate = Candidate(f"t{number}", 0.5)
        verdicts.append(halving.judge(candidate, epoch=3, score=0.5 - 0.02 * number).verdict)
        halving.judge(candidate, epoch=6, score=0.6 - 0.02 * number, last=True)
    assert set(verdicts[-6:]) == {"stop"}


def test_early_stopping_that_hurts_is_called_so() -> None:
    """Twelve that would be stopped end above eight that would not: ranks are inverted."""
    inverted = [(0.3, 0.8 + 0.001 * i, "spared") for i in range(12)] + [(0.6, 0.7, "continue")] * 8
    (seen,) = audit(*tables(inverted), metric="val_accuracy", mode="max")
    assert seen.stopped_wins is not None
    assert seen.stopped_wins.value == 1.0
    assert any("early stopping is hurting: at rung 1" in line for line in findings([seen]))
    right = [(0.3, 0.5 + 0.001 * i, "spared") for i in range(12)] + [(0.6, 0.7, "continue")] * 8
    (seen,) = audit(*tables(right), metric="val_accuracy", mode="max")
    assert not any("hurting" in line for line in findings([seen]))


def test_finalists_are_the_best_configurations_with_other_seeds(tmp_path: Path) -> None:
    trials = searched(tmp_path, num_trials=12, finalists=2, seeds=3).trials()
    finalists = trials[trials["stage"] == "finalist"]
    best = trials.query("stage == 'search' and status == 'completed'").nlargest(2, "val_accuracy")
    assert finalists["finalist_of"].value_counts().to_dict() == dict.fromkeys(best["trial_id"], 3)
    assert set(finalists["status"]) == {"completed"}
    assert set(finalists["epochs_trained"]) == {MAX_EPOCHS}
    assert trials["seed"].is_unique
    for parent, rows in finalists.groupby("finalist_of"):
        original = trials.set_index("trial_id").loc[parent]
        assert set(rows["config.dropout"]) == {original["config.dropout"]}


def test_fewer_finalists_than_asked_for_are_spoken_of(tmp_path: Path) -> None:
    """Of three trials two diverge at epoch 2."""
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        baselines = ({"dropout": 0.1}, {"dropout": 0.46}, {"dropout": 0.47})
        ledger = make_ledger(experiment, plan(num_trials=3, finalists=2, baselines=baselines), max_concurrent=2)
        advance(ledger, LEARNING)
        lines = finalist_lines(ledger)
    assert len(lines) == 2
    assert lines[1] == "only 1 of 2 finalists: no more trials were trained to their end"


def test_a_killed_search_trains_each_finalist_once(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    arguments = {"num_trials": 6, "finalists": 2, "seeds": 2}
    for steps in (30, 7, 7, 7, None):
        with experiment.driving():
            ledger = make_ledger(experiment, plan(**arguments), max_concurrent=2)
            advance(ledger, CROSSING, steps=steps)
    assert ledger.finished
    assert experiment.trials()["finalist_of"].value_counts().drop("").tolist() == [2, 2]


def test_weights_beyond_what_is_kept_are_removed_when_a_search_goes_on(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    for keep in (10, 1):
        with experiment.driving():
            ledger = make_ledger(experiment, plan(num_trials=6, keep_checkpoints=keep), max_concurrent=2)

            def curve(assignment: Assignment, epoch: int) -> EpochResult:
                best = experiment.files(assignment.trial_id).best
                best.parent.mkdir(parents=True, exist_ok=True)
                best.write_text("weights")
                return CROSSING(assignment, epoch)

            advance(ledger, curve)
        assert (experiment.trials()["checkpoint"] != "").sum() == min(keep, 6)
        assert len(list(experiment.root.glob("checkpoints/*/best.safetensors"))) == min(keep, 6)


def test_a_finalist_that_the_time_budget_cut_off_is_made_up_for(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    arguments = {"num_trials": 3, "finalists": 1, "seeds": 2, "halving": "none"}
    with experiment.driving():
        ledger = make_ledger(experiment, plan(**arguments), max_concurrent=1)
        (finalist,) = advance(ledger, CROSSING, concurrent=1, steps=3 * MAX_EPOCHS + 4)
        assert experiment.history.trials[finalist].started.finalist_of
        ledger.rules = replace(ledger.rules, max_seconds=1e-9)
        last_epoch = experiment.history.trials[finalist].last_epoch
        assert not ledger.report(finalist, epoch_result(last_epoch + 1, 0.5), node="")
    with experiment.driving():
        ledger = make_ledger(experiment, plan(**arguments), max_concurrent=1)
        advance(ledger, CROSSING, concurrent=1)
    finalists = experiment.trials().query("stage == 'finalist'")
    assert finalists["status"].value_counts().to_dict() == {"completed": 2, "pruned": 1}


def test_no_trial_begins_once_the_epochs_are_spent(tmp_path: Path) -> None:
    trials = searched(tmp_path, num_trials=60, max_total_epochs=50).trials()
    assert 50 <= trials["epochs_trained"].sum() < 50 + 2 * MAX_EPOCHS
    assert len(trials) < 60


def test_what_trains_when_the_time_is_up_is_stopped_and_a_resume_goes_on(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        ledger = make_ledger(experiment, plan(num_trials=6), max_concurrent=2)
        advance(ledger, CROSSING, steps=5)
        ledger.rules = replace(ledger.rules, max_seconds=1e-9)
        assert ledger.next_trial() is None
        for trial_id in sorted(ledger.running):
            last_epoch = experiment.history.trials[trial_id].last_epoch
            assert not ledger.report(trial_id, epoch_result(last_epoch + 1, 0.5), node="")
        assert ledger.out_of_time
        assert not ledger.finished
    trials = experiment.trials()
    assert set(trials["stop_reason"]) == {"time budget"}
    assert set(trials["status"]) == {"pruned"}
    with experiment.driving():
        ledger = make_ledger(experiment, plan(num_trials=6), max_concurrent=2)
        assert not ledger.finished
        advance(ledger, CROSSING)
    assert len(experiment.trials()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grace_epochs": 12}, "grace_epochs=12 leaves no rung below max_epochs=9; lower it"),
        ({"finalists": 9}, "--finalists 9, but the search has 8 trials; lower it or raise --num-trials"),
        ({"halving": "asha_ema"}, "compares moving averages of the weights, and there are none; add --set ema_decay"),
        ({"halving": "promote", "base": TrainConfig(patience=2)}, "which patience may not end early"),
        (
            {"halving": "stable", "grace_epochs": 8},
            r"falls from epoch 7.2 on; lower decay_fraction=0.2 or raise reduction_factor",
        ),
        ({"halving": "hyperband"}, "wanted one of asha, asha_ema, promote, stable, stratified"),
    ],
)
def test_searches_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**arguments).check()  # type: ignore[arg-type]
