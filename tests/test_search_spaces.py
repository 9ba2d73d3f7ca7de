"""What is searched: spaces, their checks, and what a resume may not change."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from orchestrator.plan import check_same_data, resumed
from results.schema import UsageError
from search_spaces.space import Budget, NamedSpace, SearchSpace, available, load_space
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
    with pytest.raises(
        UsageError, match="no search space .cifra.; there are cifar10, cifar100, cifar100_cond"
    ):
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
