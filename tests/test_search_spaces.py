"""What is searched: spaces, their checks, and what a resume may not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from orchestrator.plan import check_same_data, resumed
from orchestrator.proposals import from_optuna
from results.schema import UsageError
from search_spaces.conditional import Suggestions
from search_spaces.space import Budget, NamedSpace, SearchSpace, available, is_within, load_space
from tests.simulation import (
    new_experiment,
    plan,
)
from trainables.config import TrainConfig


@pytest.mark.parametrize("name", available())
def test_spaces_cover_regularization_strength_and_have_baselines(name: str) -> None:
    space = load_space(name).space
    assert {"dropout", "weight_decay", "mixup_alpha", "lr", "label_smoothing"} <= set(space.dimensions)
    for field in ("weight_decay", "lr"):
        distribution = space.dimensions[field]
        assert isinstance(distribution, FloatDistribution)
        assert distribution.log
    assert space.complete_baselines()


@pytest.mark.parametrize("name", available())
def test_what_a_space_draws_is_a_configuration_that_lies_in_it(name: str) -> None:
    space = load_space(name).space
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    for _ in range(20):
        trial = study.ask()
        point = space.point(from_optuna(trial))
        assert point.distributions == {name: space.dimensions[name] for name in point.params}
        assert space.locate(space.base.having({**point.params, "seed": trial.number}).to_dict()) == point
    for params in space.complete_baselines():
        located = space.locate(space.base.having(params).to_dict())
        assert located is not None
        assert located.params == params


def test_a_field_that_is_set_is_no_longer_searched() -> None:
    space = load_space("digits").space.with_overrides({"dropout": 0.3, "max_epochs": 27}, num_trials=5)
    assert "dropout" not in space.dimensions
    assert space.base.dropout == 0.3
    assert (space.budget.num_trials, space.base.max_epochs, space.budget.grace) == (5, 27, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "does not define SPACE; wanted SPACE = SearchSpace"),
        ("SPACE = 3", "defines SPACE as a int"),
        ("\n\n1 / 0", r"mine.py, line 3: ZeroDivisionError: division by zero"),
        ("def f(:", r"mine.py, line 1: SyntaxError"),
        ("import sys; sys.exit(4)", "line 1: SystemExit: 4"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
    ],
)
def test_a_space_file_that_is_none_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_space(str(path))


def test_unknown_spaces_list_the_choices() -> None:
    with pytest.raises(UsageError, match=r"no search space .cifra.; there are cifar10, cifar100, cifar100_cond"):
        load_space("cifra")
    with pytest.raises(UsageError, match="there is no file"):
        load_space("nowhere.py")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": {"droput": FloatDistribution(0, 1)}}, "'droput' is not a field of TrainConfig"),
        ({"dimensions": {"dataset": FloatDistribution(0, 1)}}, "'dataset' cannot vary within a search"),
        ({"baselines": ({"dropout": 0.9},)}, "dropout=0.9 lies outside"),
        ({"baselines": ({"lr": 0.1},)}, "sets lr, which are not dimensions"),
        ({"dimensions": {"dropout": FloatDistribution(0, 3)}}, r"'dropout' reaches dropout=3.0: wanted a number in"),
        (
            {"dimensions": {"patience": FloatDistribution(0, 5)}},
            "reaches patience=0.0: wanted a whole number",
        ),
        (
            {"dimensions": {"backbone": CategoricalDistribution(["vgg"])}},
            "reaches there is no backbone 'vgg'",
        ),
        ({"dimensions": {"dropout": (0, 1)}}, r"wanted one of optuna.distributions"),
        ({"metric": "test_accuracy"}, "wanted one of val_accuracy, val_nll"),
    ],
)
def test_wrong_spaces_say_what_is_wrong(change: dict[str, object], message: str) -> None:
    arguments = {"base": TrainConfig(), "dimensions": {"dropout": FloatDistribution(0, 0.5)}, **change}
    with pytest.raises(UsageError, match=message):
        SearchSpace(**arguments)


def mixing(trial: Suggestions) -> None:
    trial.suggest_float("dropout", 0.0, 0.4)
    if trial.suggest_categorical("mixup_probability", (0.0, 1.0)):
        trial.suggest_float("mixup_alpha", 0.1, 1.0)
        trial.suggest_float("dropout", 0.0, 0.4)  # again: the same value


UNMIXED = TrainConfig(mixup_probability=0.0)


def test_a_conditional_space_knows_all_it_can_suggest_and_no_more() -> None:
    space = SearchSpace(base=UNMIXED, define=mixing, baselines=({"dropout": 0.1},))
    assert dict(space.dimensions) == {
        "dropout": FloatDistribution(0.0, 0.4),
        "mixup_probability": CategoricalDistribution((0.0, 1.0)),
        "mixup_alpha": FloatDistribution(0.1, 1.0),
    }
    assert space.complete_baselines() == [{"dropout": 0.1, "mixup_probability": 0.0}]
    assert space.describe() == SearchSpace(base=UNMIXED, define=mixing, baselines=({"dropout": 0.1},)).describe()
    assert replace(space, metric="val_nll").dimensions == space.dimensions


def test_a_field_that_is_set_is_not_suggested_by_a_conditional_space() -> None:
    space = SearchSpace(
        base=UNMIXED, define=mixing, baselines=({"mixup_probability": 1.0, "mixup_alpha": 0.5, "dropout": 0.2},)
    )
    without = space.with_overrides({"mixup_probability": 0.0, "lr": 0.3}, num_trials=3)
    assert list(without.dimensions) == ["dropout"]
    assert without.complete_baselines() == [{"dropout": 0.2}]
    assert (without.base.lr, without.budget.num_trials) == (0.3, 3)
    mixed = space.with_overrides({"mixup_probability": 1}).with_overrides({"dropout": 0.3})
    assert list(mixed.dimensions) == ["mixup_alpha"]
    assert mixed.complete_baselines() == [{"mixup_alpha": 0.5}]
    assert mixed.base.mixup_probability == 1.0


def suggesting(call: str, *, first: str = "pass") -> object:
    """A function with a line that suggests, in every other branch."""
    text = (
        f"def define(trial):\n    {first}\n    if trial.suggest_categorical('flip', (True, False)):\n        {call}\n"
    )
    namespace: dict[str, object] = {}
    exec(compile(text, "mine.py", "exec"), namespace)
    return namespace["define"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("trial.suggest_float('droput', 0, 1)", "'droput' is not a field of TrainConfig; there are dataset"),
        ("trial.suggest_int('max_epochs', 1, 9)", "'max_epochs' cannot vary within a search"),
        ("trial.suggest_float('dropout', 0, 3)", r"`define` reaches dropout=[123].*: wanted a number in \[0, 1\)"),
        ("trial.suggest_float('patience', 0, 5)", "`define` reaches patience=.*: wanted a whole number"),
        ("trial.suggest_categorical('backbone', ('vgg',))", "`define` reaches there is no backbone 'vgg'"),
        ("trial.suggest_int('accumulation_steps', 1, 8, log=True)", "leaves parts of a single image of batch_size=8"),
        ("1 / 0", "`define`, line 4: ZeroDivisionError: division by zero"),
        ("trial.report(0.5, 1)", "`define`, line 4: AttributeError: .*no attribute 'report'"),
        ("trial.suggest_float('dropout', 1, 0)", "`define`, line 4: ValueError"),
        ("return 0.5", "`define` returned 0.5; wanted nothing"),
        (
            "trial.suggest_float('lr', 0.1, 0.5)\n    else:\n        trial.suggest_float('lr', 0.1, 0.6)",
            r"'lr' is FloatDistribution.*0.[56].* in one branch of `define` and FloatDistribution.*; wanted one",
        ),
    ],
)
def test_wrong_conditional_spaces_say_what_is_wrong(call: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchSpace(base=TrainConfig(batch_size=8), define=suggesting(call))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": {}}, "with both dimensions and define; wanted one of them"),
        ({"define": None}, "with neither dimensions nor define; wanted one of them"),
        ({"baselines": ({"lr": 0.1},)}, "sets lr, which are not dimensions"),
        ({"baselines": ({"mixup_alpha": 0.2},)}, "sets mixup_alpha, which `define` does not suggest beside its other"),
        ({"baselines": ({"mixup_probability": 1.0},)}, "baseline mixup_alpha=0.0 lies outside"),
    ],
)
def test_a_space_is_conditional_or_not_and_its_baselines_fit_a_branch(change: dict[str, object], message: str) -> None:
    arguments = {"base": UNMIXED, "define": mixing, **change}
    with pytest.raises(UsageError, match=message):
        SearchSpace(**arguments)  # type: ignore[arg-type]


def test_what_is_trainable_is_checked_at_the_corners_that_branches_reach() -> None:
    def nets(trial: Suggestions) -> None:
        if trial.suggest_categorical("backbone", ("small_cnn", "resnet18")) == "resnet18":
            trial.suggest_categorical("optimizer", ("sgd", "adamw"))
        trial.suggest_float("warmup_epochs", 0.0, 2.0)

    corners = {
        (c.backbone, c.optimizer, c.warmup_epochs) for c in SearchSpace(base=TrainConfig(), define=nets).corners()
    }
    pairs = [("small_cnn", "sgd"), ("resnet18", "sgd"), ("resnet18", "adamw")]
    assert corners == {(*pair, warmup) for pair in pairs for warmup in (0.0, 2.0)}


@pytest.mark.parametrize(
    ("metric", "further", "message"),
    [
        ("val_nll", ("val_nll",), "an objective is named twice"),
        ("val_nll", ("num_parameters", "num_parameters"), "an objective is named twice"),
        (
            "val_nll",
            ("test_accuracy",),
            "'test_accuracy': wanted one of val_accuracy, val_nll, multiply_adds, num_param",
        ),
        ("val_nll", ("val_accuracy", "num_parameters", "multiply_adds"), "wanted at most 2"),
    ],
)
def test_further_objectives_are_known_different_and_few(metric: str, further: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchSpace(base=TrainConfig(), dimensions={}, metric=metric, further_objectives=further)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_total_epochs": 0}, "max_total_epochs=0: wanted a whole number, 1 or more"),
        ({"max_seconds": 0.0}, "max_seconds=0.0: wanted a finite number of seconds above 0"),
        ({"max_seconds": float("nan")}, "max_seconds=nan: wanted a finite number of seconds above 0"),
    ],
)
def test_budgets_of_epochs_and_seconds_are_above_nothing(budget: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget(**budget)  # type: ignore[arg-type]


def test_a_resume_may_spend_more_and_keeps_what_was_given_before(tmp_path: Path) -> None:
    info = new_experiment(tmp_path).info
    source = plan().source
    budget = replace(source.space.budget, max_seconds=60.0, max_total_epochs=500)
    spending = replace(source, space=replace(source.space, budget=budget))
    longer = resumed(replace(plan(), source=spending), info)
    assert (longer.space.budget.max_seconds, longer.space.budget.max_total_epochs) == (60.0, 500)
    recorded = {**info, "space": {**info["space"], **longer.space.describe()}}
    assert resumed(plan(), recorded).space.budget.max_total_epochs is None
    more = replace(source, space=replace(source.space, budget=replace(source.space.budget, num_trials=40)))
    following = {**info, "num_trials_given": False}
    assert resumed(replace(plan(), source=more, num_trials=None), following).space.budget.num_trials == 40
    assert resumed(replace(plan(), source=more, num_trials=None), info).space.budget.num_trials == 8
    fewer = replace(source, space=replace(source.space, budget=replace(source.space.budget, num_trials=2)))
    assert resumed(replace(plan(), source=fewer, num_trials=None), following).space.budget.num_trials == 8


@pytest.mark.parametrize(
    ("narrow", "wide", "inside"),
    [
        (FloatDistribution(0.1, 0.2), FloatDistribution(0.1, 0.3), True),
        (FloatDistribution(0.1, 0.4), FloatDistribution(0.1, 0.3), False),
        (FloatDistribution(0.1, 0.2, log=True), FloatDistribution(0.1, 0.3), False),
        (FloatDistribution(0.1, 0.2, step=0.1), FloatDistribution(0.1, 0.3), False),
        (IntDistribution(4, 12, step=4), IntDistribution(0, 16, step=4), True),
        (IntDistribution(2, 10, step=4), IntDistribution(0, 16, step=4), False),
        (IntDistribution(0, 1), FloatDistribution(0, 1), False),
        (CategoricalDistribution(["b"]), CategoricalDistribution(["a", "b"]), True),
        (CategoricalDistribution(["b", "c"]), CategoricalDistribution(["a", "b"]), False),
    ],
)
def test_a_narrower_dimension_is_of_the_same_kind(
    narrow: BaseDistribution, wide: BaseDistribution, inside: bool
) -> None:
    assert is_within(narrow, wide) == inside
    assert is_within(wide, wide)


@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_budgets_are_whole_and_positive(value: object) -> None:
    with pytest.raises(UsageError, match=f"num_trials={value!r}: wanted a whole number, 1 or more"):
        Budget(num_trials=value)


def test_a_resume_with_a_changed_space_says_what_changed(tmp_path: Path) -> None:
    info = new_experiment(tmp_path).info
    space = plan().source.space
    wider = SearchSpace(
        base=space.base,
        dimensions={**space.dimensions, "dropout": FloatDistribution(0.0, 0.6)},
        baselines=space.baselines,
        budget=space.budget,
    )
    changed = type(plan())(
        source=NamedSpace("sim", wider, ""), overrides={"lr": 0.2}, num_trials=None, seed=0, halving="asha"
    )
    with pytest.raises(UsageError, match=r"base.lr was 0.1 and is 0.2; dimensions.dropout was .*high=0.5.* is .*0.6"):
        resumed(changed, info)
    assert resumed(plan(keep_checkpoints=3), info).keep_checkpoints == 10
    assert resumed(plan(), info, keep_checkpoints=3).keep_checkpoints == 3
    with pytest.raises(UsageError, match=r"seed was 0 and is 7; halving was asha and is none"):
        resumed(plan(), info, seed=7, halving="none")
    with pytest.raises(UsageError, match=r"--num-trials 3, but experiment 'sim' was to have 8"):
        resumed(plan(num_trials=3), info)
    longer = resumed(plan(num_trials=50), info)
    assert longer.space.budget.num_trials == 50


def test_a_resume_on_other_data_is_refused(tmp_path: Path, digits: object) -> None:
    with pytest.raises(UsageError, match="images or splits of digits are not those"):
        check_same_data(new_experiment(tmp_path).info, digits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        (
            {"batch_size": CategoricalDistribution([8, 64]), "accumulation_steps": IntDistribution(1, 8)},
            "dimensions batch_size, accumulation_steps reach accumulation_steps=8 leaves parts of a single image",
        ),
        (
            {
                "resized_crop_min_area": FloatDistribution(0.1, 0.9),
                "resized_crop_max_area": FloatDistribution(0.5, 1.0),
            },
            "resized_crop_min_area=0.9 is above resized_crop_max_area=0.5",
        ),
        (
            {"precision": CategoricalDistribution(["float16"]), "optimizer": CategoricalDistribution(["sgd", "muon"])},
            "precision=float16 with optimizer=muon",
        ),
    ],
)
def test_dimensions_that_are_wrong_together_are_refused_at_once(dimensions: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SearchSpace(base=TrainConfig(), dimensions=dimensions)


def test_a_search_goes_by_its_spaces_metric_alone() -> None:
    source = NamedSpace("x", load_space("digits").space, "")
    with pytest.raises(UsageError, match="a search goes by its space's metric"):
        type(plan())(source=source, overrides={"monitor": "val_nll"}, num_trials=1, seed=0, halving="asha")


def test_a_search_needs_validation() -> None:
    source = NamedSpace("x", load_space("digits").space, "")
    with pytest.raises(UsageError, match="val_fraction=0 leaves none"):
        type(plan())(source=source, overrides={"val_fraction": 0.0}, num_trials=1, seed=0, halving="asha")
