"""Where proposals come from: the journal, the study that is sampled from, warm starts, several objectives."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.trial import TrialState
from rich.console import Console

from orchestrator.console import print_summary
from orchestrator.driver import make_ledger, record_resumption
from orchestrator.pareto import best_first, non_dominated
from orchestrator.plan import SearchPlan, resumed
from orchestrator.proposals import BEST_KEPT, MOST_TOLD, NEWEST_KEPT, Proposer, make_sampler, ranked, sampled_outcome
from orchestrator.warm_start import load_warm_start
from results.events import EpochReported, TrialEnded, TrialStarted
from results.history import TrialHistory
from results.schema import EpochResult, UsageError
from results.store import Experiment
from results.study import JournalFile, StudyJournal, outcome
from search_spaces.conditional import Suggestions
from search_spaces.space import Budget, NamedSpace, SearchSpace
from tests.simulation import LEARNING, MAX_EPOCHS, Assignment, advance, epoch_result, new_experiment, plan, run_search
from trainables.config import TrainConfig
from trainables.datasets import LabelledImages, split

DROPOUT = {"dropout": FloatDistribution(0.0, 0.4)}


def space(**changes: Any) -> SearchSpace:
    """A search over dropout alone."""
    arguments = {"base": TrainConfig(), "dimensions": DROPOUT, "budget": Budget(max_epochs=MAX_EPOCHS), **changes}
    return SearchSpace(**arguments)


def plan_of(searched: SearchSpace, *, num_trials: int = 6, **changes: Any) -> SearchPlan:
    source = NamedSpace("sim", searched, "0" * 16)
    arguments = {"overrides": {}, "seed": 0, "halving": "asha", "num_trials": num_trials, **changes}
    return SearchPlan(source=source, **arguments)


def begun(results_dir: Path, of: SearchPlan, *, name: str = "sim") -> Experiment:
    """A new experiment on ten grey squares."""
    data = split(LabelledImages(np.zeros((20, 1, 4, 4), np.uint8), np.arange(20) % 2, 0, ("a", "b")))
    return Experiment.create(results_dir, name=name, info=of.info(name=name, data=data, command="simulated"))


def searched(results_dir: Path, of: SearchPlan, *, name: str = "sim", **of_ledger: Any) -> Experiment:
    """A search that has come to its end."""
    experiment = begun(results_dir, of, name=name)
    with experiment.driving():
        advance(make_ledger(experiment, of, max_concurrent=2, **of_ledger), SIZED)
    return experiment


def SIZED(assignment: Assignment, epoch: int) -> EpochResult:  # noqa: N802 - a constant curve
    """Better with lower dropout; the net is larger with higher dropout, in steps."""
    dropout = float(assignment.config["dropout"] or 0)
    result = LEARNING(assignment, epoch)
    return replace(result, num_parameters=int(100 - 10 * round(10 * dropout)), multiply_adds=int(1000 * dropout))


def ended_trial(
    number: int, dropout: float, *, status: str = "completed", epochs: int = 3, reason: str = "", of: SearchSpace
) -> TrialHistory:
    """A trial whose accuracy is .9 - dropout in its last epoch."""
    started = TrialStarted(
        at=0.0,
        trial_id=f"t{number:05d}",
        stage="search",
        origin="startup",
        seed=number,
        config=of.base.having({"dropout": dropout, "seed": number}).to_dict(),
        params={"dropout": dropout},
        distributions={"dropout": distribution_to_json(of.dimensions["dropout"])},
    )
    trial = TrialHistory(started)
    for epoch in range(1, epochs + 1):
        result = epoch_result(epoch, 0.9 - dropout - 0.1 * (epochs - epoch))
        trial.epochs.append(EpochReported(at=0.0, trial_id=started.trial_id, node="", result=result))
    if status != "running":
        trial.ended = TrialEnded(
            at=1.0,
            trial_id=started.trial_id,
            status=status,  # type: ignore[arg-type]
            stop_reason=reason,
            has_predictions=False,
            has_checkpoint=False,
        )
    return trial


def proposer(path: Path, of: SearchSpace, *, history: Iterable[TrialHistory] = (), **arguments: Any) -> Proposer:
    """A proposer over a journal that holds the history."""
    past = list(history)
    journal = StudyJournal(path, name="x", objectives=of.objectives)
    journal.add(past)
    extrapolate = arguments.pop("extrapolate", lambda trial: None)
    asking = Proposer(
        path,
        name="x",
        space=of,
        sampler_after=lambda trials_so_far: make_sampler(
            num_trials=30, max_concurrent=2, seed=0, trials_so_far=trials_so_far, conditional=of.define is not None
        ),
        given=arguments.pop("given", ()),
        **arguments,
    )
    asking.recall(past, extrapolate=extrapolate)
    return asking


def loaded(path: Path, name: str = "x") -> optuna.Study:
    """The study as anybody else opens it."""
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


def test_a_trial_is_one_write_at_its_start_and_one_at_its_end_however_many_epochs(tmp_path: Path) -> None:
    path, of = tmp_path / "study.journal", space()
    asking = proposer(path, of)
    for epochs in (3, 200):
        before = path.stat().st_size
        proposal = asking.ask()
        lines = path.read_bytes()[before:].decode().splitlines()
        assert len(lines) == 1
        asking.tell(ended_trial(proposal.number, float(proposal.params["dropout"] or 0), epochs=epochs, of=of))
    trials = loaded(path).trials
    assert [len(trial.intermediate_values) for trial in trials] == [3, 200]
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2


def test_writes_made_together_reach_the_file_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    backend = JournalFile(path)
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    size = path.stat().st_size
    with backend.together():
        for epoch in range(5):
            storage.set_trial_intermediate_value(0, epoch, 0.5)
            assert path.stat().st_size == size
        assert len(study.trials[0].intermediate_values) == 5
    assert path.read_text().count("\n") == 7

    def interrupted() -> None:
        with backend.together():
            storage.set_trial_user_attr(0, "a", 1)
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        interrupted()
    assert path.read_text().count("\n") == 7
    trial.set_user_attr("b", 2)
    assert path.read_text().count("\n") == 8


def test_an_extrapolated_trial_is_complete_for_the_sampler_and_pruned_in_the_journal(tmp_path: Path) -> None:
    of = space()
    asking = proposer(tmp_path / "study.journal", of)
    for extrapolated in (0.83, None):
        number = asking.ask().number
        pruned = ended_trial(number, 0.3, status="pruned", reason="rung 1", of=of)
        asking.tell(pruned, extrapolated=extrapolated)
    sampled = asking._sampling.trials
    assert [(t.state, t.values) for t in sampled] == [
        (TrialState.COMPLETE, [0.83]),
        (TrialState.PRUNED, [pytest.approx(0.6)]),
    ]
    assert sampled[1].intermediate_values.keys() == {1, 2, 3}
    journal = loaded(tmp_path / "study.journal").trials
    assert [t.state for t in journal] == [TrialState.PRUNED] * 2
    assert journal[0].intermediate_values == journal[1].intermediate_values == sampled[1].intermediate_values


def test_an_extrapolation_says_nothing_of_trials_that_ended_otherwise() -> None:
    of = space()
    for status, reason in (("completed", ""), ("failed", "diverged at epoch 2"), ("failed", "error")):
        trial = ended_trial(0, 0.1, status=status, reason=reason, of=of)
        assert sampled_outcome(trial, of.objectives, extrapolated=0.99) == outcome(trial, of.objectives)


def test_a_new_driver_samples_from_what_the_last_one_had_told(tmp_path: Path) -> None:
    of = space()
    history = [
        ended_trial(0, 0.1, of=of),
        ended_trial(1, 0.2, status="pruned", reason="rung 1", of=of),
        ended_trial(2, 0.3, status="failed", reason="diverged at epoch 3", of=of),
        ended_trial(3, 0.35, status="failed", reason="error", of=of),
        ended_trial(4, 0.15, status="running", of=of),
    ]
    asking = proposer(tmp_path / "study.journal", of, history=history, extrapolate=lambda trial: 0.77)
    assert [(t.state.name, t.values) for t in asking._sampling.trials] == [
        ("COMPLETE", [pytest.approx(0.8)]),
        ("COMPLETE", [0.77]),
        ("PRUNED", None),
        ("FAIL", None),
        ("RUNNING", None),
    ]
    assert asking._sampling.trials[4].params == {"dropout": 0.15}
    asking.tell(ended_trial(4, 0.15, of=of))
    assert asking._sampling.trials[4].values == [pytest.approx(0.75)]
    assert asking.ask().number == 5


def test_the_sampling_study_keeps_the_best_and_the_newest_and_what_runs(tmp_path: Path) -> None:
    of = space()
    rng = np.random.default_rng(0)
    dropouts = rng.uniform(0, 0.4, size=MOST_TOLD)
    history = [ended_trial(i, float(x), epochs=1, of=of) for i, x in enumerate(dropouts)]
    running = ended_trial(MOST_TOLD, 0.2, status="running", of=of)
    asking = proposer(tmp_path / "study.journal", of, history=[*history, running])
    assert len(asking._sampling.trials) == MOST_TOLD + 1
    proposal = asking.ask()
    other = asking.ask()
    asking.tell(ended_trial(proposal.number, 0.39, of=of))
    kept = asking._sampling.trials
    assert [t.state for t in kept].count(TrialState.RUNNING) == 2
    told = [t.params["dropout"] for t in kept if t.state is TrialState.COMPLETE]
    assert NEWEST_KEPT <= len(told) <= NEWEST_KEPT + BEST_KEPT
    assert set(np.sort(dropouts)[:BEST_KEPT]) <= set(told)
    assert set(dropouts[-NEWEST_KEPT + 1 :]) <= set(told)
    for ended in (other.number, MOST_TOLD):
        asking.tell(ended_trial(ended, 0.2, of=of))
    assert all(t.state is not TrialState.RUNNING for t in asking._sampling.trials)
    assert asking.ask().origin == "model"
    assert len(loaded(tmp_path / "study.journal").trials) == MOST_TOLD + 4  # the journal forgets nothing


def test_tpe_ranks_trials_as_the_sampling_study_keeps_them() -> None:
    of = space(further_objectives=("num_parameters",))

    def complete(*values: float) -> optuna.trial.FrozenTrial:
        return optuna.trial.create_trial(values=list(values))

    pruned = [
        optuna.trial.create_trial(state=TrialState.PRUNED, intermediate_values=steps)
        for steps in ({}, {1: 0.9}, {1: 0.1, 2: 0.3}, {1: 0.1, 2: 0.4})
    ]
    one = [*pruned, complete(0.5), complete(0.7)]
    assert ranked(one, {"val_accuracy": "max"}, wanted=9) == [5, 4, 3, 2, 1, 0]
    two = [complete(0.5, 10), complete(0.7, 20), complete(0.4, 11), complete(0.6, 20)]
    assert ranked(two, of.objectives, wanted=3) == [1, 0, 3]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.integers(0, 25), st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_the_front_is_what_no_other_point_dominates(objectives: int, num: int, seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    values_NK = rng.integers(0, levels, (num, objectives)).astype(float)
    modes = [str(mode) for mode in rng.choice(["max", "min"], objectives)]

    def at_least_as_good(a: float, b: float, mode: str) -> bool:
        return a >= b if mode == "max" else a <= b

    def dominates(one: int, other: int) -> bool:
        pairs = list(zip(values_NK[one], values_NK[other], modes, strict=True))
        return all(at_least_as_good(*pair) for pair in pairs) and any(a != b for a, b, _ in pairs)

    expected = [i for i in range(num) if not any(dominates(j, i) for j in range(num))]
    assert non_dominated(values_NK, modes) == expected
    order = best_first(values_NK, modes, wanted=num)
    assert sorted(order) == list(range(num))
    assert set(order[: len(expected)]) == set(expected) or objectives == 1
    for place, one in enumerate(order):
        assert not any(dominates(other, one) for other in order[place + 1 :])


def test_a_search_of_two_objectives_tells_both_and_shows_the_front(tmp_path: Path) -> None:
    several = plan_of(space(further_objectives=("num_parameters", "multiply_adds")), num_trials=14)
    experiment = searched(tmp_path, several)
    assert experiment.info["further_objectives"] == {"num_parameters": "min", "multiply_adds": "min"}
    trials = experiment.trials().set_index("trial_id")
    assert {"completed", "pruned"} <= set(trials["status"])
    assert "model" in set(trials["origin"])
    for _ in ("live", "rebuilt"):
        study = loaded(experiment.study_path, "sim")
        assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
        for told in study.trials:
            row = trials.loc[told.user_attrs["trial_id"]]
            if row["status"] == "completed":
                assert told.values == [row["val_accuracy"], row["num_parameters"], row["multiply_adds"]]
            else:
                assert (told.state, told.values) == (TrialState.PRUNED, None)
                assert len(told.intermediate_values) == row["epochs_trained"]
        experiment.rebuild()
    with experiment.driving():
        ledger = make_ledger(experiment, several, max_concurrent=2)  # TPE is told anew
        text = io.StringIO()
        print_summary(Console(file=text, width=200), ledger)
    completed = trials.query("status == 'completed'")
    front = completed.iloc[
        non_dominated(completed[["val_accuracy", "num_parameters", "multiply_adds"]].to_numpy(), ["max", "min", "min"])
    ]
    shown = text.getvalue().split("Pareto front of val_accuracy, num_parameters, multiply_adds: ")[1]
    assert shown.startswith(f"{len(front)} of {len(completed)} completed trials")
    assert [line.split()[0] for line in shown.splitlines() if line.strip().startswith("t0")] == list(
        front.sort_values("val_accuracy", ascending=False).index
    )


def mixing(trial: Suggestions) -> None:
    trial.suggest_float("dropout", 0.0, 0.4)
    if trial.suggest_categorical("mixup_probability", (0.0, 1.0)):
        trial.suggest_float("mixup_alpha", 0.1, 1.0)


def conditional(**changes: Any) -> SearchSpace:
    arguments = {
        "base": TrainConfig(mixup_probability=0.0),
        "define": mixing,
        "baselines": ({"mixup_probability": 1.0, "mixup_alpha": 0.5}, {"dropout": 0.1}),
        "budget": Budget(max_epochs=MAX_EPOCHS),
        **changes,
    }
    return SearchSpace(**arguments)


def test_a_conditional_search_varies_what_is_active_and_models_it(tmp_path: Path) -> None:
    of = plan_of(conditional(), num_trials=24)
    experiment = searched(tmp_path, of)
    trials = experiment.history.trials
    assert [t.started.params for t in trials.values()][:2] == [
        {"dropout": 0.0, "mixup_probability": 1.0, "mixup_alpha": 0.5},
        {"dropout": 0.1, "mixup_probability": 0.0},
    ]
    seen = set()
    for trial in trials.values():
        active = {"dropout", "mixup_probability"} | (
            {"mixup_alpha"} if trial.started.config["mixup_probability"] else set()
        )
        assert set(trial.started.params) == set(trial.started.distributions) == active
        assert trial.started.config["mixup_alpha"] == trial.started.params.get("mixup_alpha", 0.0)
        seen.add((len(active), trial.started.origin))
    assert {(2, "model"), (3, "model")} <= seen
    with experiment.driving():
        ledger = make_ledger(experiment, resumed(of, experiment.info), max_concurrent=2)
        assert len(ledger._proposer._sampling.trials) == 24
        text = io.StringIO()
        print_summary(Console(file=text, width=200), ledger)
    rows = [line.split() for line in text.getvalue().splitlines() if line.strip().startswith("t0")]
    for row in rows:
        assert (row[-1] == "-") == (row[-2] == "0")


def test_groups_are_modelled_together_with_trials_that_still_run(tmp_path: Path) -> None:
    of = conditional(baselines=())
    asking = proposer(tmp_path / "study.journal", of)
    asked = [asking.ask() for _ in range(4)]
    for proposal in asked[:3]:
        asking.tell(ended_trial_at(proposal.number, proposal.params, of))
    for _ in range(20):
        proposal = asking.ask()
        assert of.locate(of.base.having(proposal.params).to_dict()) is not None
        asking.tell(ended_trial_at(proposal.number, proposal.params, of))
    assert proposal.origin == "model"


def ended_trial_at(number: int, params: dict[str, Any], of: SearchSpace) -> TrialHistory:
    trial = ended_trial(number, params["dropout"], of=of)
    config = of.base.having({**params, "seed": number}).to_dict()
    texts = {name: distribution_to_json(of.dimensions[name]) for name in params}
    return replace(trial, started=replace(trial.started, config=config, params=params, distributions=texts))


def test_a_warm_start_learns_from_the_trials_that_lie_in_the_space(tmp_path: Path) -> None:
    searched(tmp_path, plan_of(space(), num_trials=12), name="before")
    narrower = space(dimensions={"dropout": FloatDistribution(0.0, 0.2), "lr": FloatDistribution(1e-2, 1.0, log=True)})
    of = plan_of(narrower, num_trials=3, warm_start=("before",))
    before = Experiment.open(tmp_path, "before")
    inside = [t for t in before.history.ended if t.started.params["dropout"] <= 0.2]
    warm = load_warm_start(tmp_path, of, split_hash=before.info["split_hash"])
    assert warm.lines == [f"warm start: {len(inside)} of 12 trials of before lie in this space"]
    assert 0 < len(inside) < 12
    experiment = searched(tmp_path, of, name="after", warm=warm.trials)
    assert set(experiment.trials()["origin"]) == {"model"}  # none needs to be drawn at random
    assert experiment.info["warm_start"] == ["before"]
    assert [t.number for t in loaded(experiment.study_path, "after").trials] == [0, 1, 2]
    again = resumed(plan_of(narrower), experiment.info)
    assert again.warm_start == ("before",)
    assert resumed(of, experiment.info).warm_start == ("before",)
    with pytest.raises(UsageError, match="--warm-start sim, but experiment 'after' was begun with before"):
        resumed(plan_of(narrower, warm_start=("sim",)), experiment.info)


@pytest.mark.parametrize(
    ("changes", "lie"),
    [
        ({"base": TrainConfig(flip=False)}, 0),
        ({"base": TrainConfig(seed=7)}, 4),
        ({"dimensions": {"lr": FloatDistribution(0.2, 1.0)}}, 0),
        ({"dimensions": {**DROPOUT, "lr": FloatDistribution(0.2, 1.0)}}, 0),
        ({"dimensions": {**DROPOUT, "lr": FloatDistribution(0.1, 1.0)}}, 4),
        ({"dimensions": {"dropout": CategoricalDistribution([0.7])}}, 0),
    ],
)
def test_trials_lie_in_a_space_by_every_field_but_the_seed(tmp_path: Path, changes: dict[str, Any], lie: int) -> None:
    before = searched(tmp_path, plan_of(space(), num_trials=4), name="before")
    warm = load_warm_start(
        tmp_path, plan_of(space(**changes), warm_start=("before",)), split_hash=before.info["split_hash"]
    )
    assert len(warm.trials) == lie


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "val_nll"}, r"its objectives is val_accuracy \(max\), and this search's is val_nll \(min\)"),
        ({"further_objectives": ("num_parameters",)}, r"and this search's is val_accuracy \(max\), num_parameters"),
        ({"budget": Budget(max_epochs=5)}, "its max_epochs is 9, and this search's is 5"),
    ],
)
def test_a_warm_start_from_other_measurements_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before = begun(tmp_path, plan_of(space()), name="before")
    of = plan_of(space(**changes), warm_start=("before",))
    with pytest.raises(UsageError, match=message):
        load_warm_start(tmp_path, of, split_hash=before.info["split_hash"])
    same = plan_of(space(), warm_start=("before",))
    with pytest.raises(UsageError, match=r"its split hash is .*, and this search's is other"):
        load_warm_start(tmp_path, same, split_hash="other")
    with pytest.raises(UsageError, match=r"no experiment 'gone' in .*; there are: before"):
        load_warm_start(tmp_path, plan_of(space(), warm_start=("gone",)), split_hash="")


def test_a_search_goes_on_in_a_narrower_space(tmp_path: Path) -> None:
    wide = {**DROPOUT, "batch_size": CategoricalDistribution([32, 64, 128])}
    narrow = {"dropout": FloatDistribution(0.0, 0.2), "batch_size": CategoricalDistribution([64, 128])}
    kept, outside = {"dropout": 0.1, "batch_size": 128}, {"dropout": 0.3, "batch_size": 32}
    experiment = searched(tmp_path, plan_of(space(dimensions=wide, baselines=(outside, kept)), num_trials=8))
    of = resumed(plan_of(space(dimensions=narrow, baselines=(kept,)), num_trials=16), experiment.info)
    with experiment.driving():
        record_resumption(experiment, of)
        ledger = make_ledger(experiment, of, max_concurrent=2)
        told = ledger._proposer._sampling.trials
        inside = [t for t in list(experiment.history.trials.values()) if of.space.locate(t.started.config)]
        assert [t.params for t in told] == [t.started.params for t in inside]
        assert 0 < len(inside) < 8
        advance(ledger, SIZED)
    later = experiment.trials().iloc[8:]
    assert later["config.dropout"].max() <= 0.2
    assert set(later["config.batch_size"]) <= {64, 128}
    assert "baseline" not in set(later["origin"])
    for _ in ("live", "rebuilt"):
        trials = loaded(experiment.study_path, "sim").trials
        assert {len(t.distributions["batch_size"].choices) for t in trials} == {2, 3}
        assert [t.params["batch_size"] for t in trials] == list(experiment.trials()["config.batch_size"])
        assert loaded(experiment.study_path, "sim").best_trial.params["dropout"] <= 0.2
        experiment.rebuild()
    same = plan_of(space(dimensions=narrow, baselines=(kept,)), num_trials=16)
    assert resumed(same, experiment.info).space.dimensions == narrow
    with pytest.raises(UsageError, match=r"dimensions.dropout was .*high=0.2.* and is .*high=0.4"):
        resumed(plan_of(space(dimensions=wide, baselines=(kept,)), num_trials=16), experiment.info)


def test_baselines_that_have_run_are_not_run_again(tmp_path: Path) -> None:
    of = plan(num_trials=1)
    experiment = new_experiment(tmp_path, num_trials=1)
    run_search(experiment, LEARNING, num_trials=1)
    with experiment.driving():
        advance(make_ledger(experiment, replace(of, num_trials=4), max_concurrent=2), LEARNING)
    assert list(experiment.trials()["config.dropout"][:2]) == [0.0, 0.499]
    assert list(experiment.trials()["origin"]).count("baseline") == 2


def test_a_running_trial_outside_a_narrowed_space_ends_in_the_journal_alone(tmp_path: Path) -> None:
    of = space()
    history = [ended_trial(0, 0.3, status="running", of=of), ended_trial(1, 0.1, of=of)]
    asking = proposer(
        tmp_path / "study.journal", space(dimensions={"dropout": FloatDistribution(0, 0.2)}), history=history
    )
    asking.tell(ended_trial(0, 0.3, of=of))
    assert [t.params for t in asking._sampling.trials] == [{"dropout": 0.1}]
    assert [t.state for t in loaded(tmp_path / "study.journal").trials] == [TrialState.COMPLETE] * 2


def test_a_journal_that_is_not_the_logs_is_refused(tmp_path: Path) -> None:
    of = space()
    asking = proposer(tmp_path / "study.journal", of)
    asking.ask()
    asking = Proposer(
        tmp_path / "study.journal",
        name="x",
        space=of,
        sampler_after=lambda trials_so_far: optuna.samplers.RandomSampler(seed=trials_so_far),
        given=(),
    )
    with pytest.raises(ValueError, match=r"study.journal has 1 trials and the event log 0"):
        asking.recall([])
