"""What a search is said to cost: arithmetic on invented speeds, worked out by hand; no clock is read here."""

from __future__ import annotations

import argparse
import io
import itertools
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from rich.console import Console

from orchestrator import search
from orchestrator.cost import Estimate, Left, epoch_seconds, estimate_search, images_predicted_at_the_end, trial_seconds
from orchestrator.cost_lines import budget_line, cheaper_flags, roughly, search_line, training_line
from orchestrator.halving import HALVINGS
from orchestrator.plan import SearchPlan
from orchestrator.rehearsal import TrialSeconds, rehearse
from orchestrator.search_outlook import Outlook
from orchestrator.searcher import Resources
from tests.simulation import LEARNING, advance, ledger_of, new_experiment, plan
from trainables.config import TrainConfig
from trainables.course import whole
from trainables.datasets import LabelledImages, SplitImages, split
from trainables.step_timing import Speed

SPEED = Speed(step_seconds={16: 2.0}, epoch_seconds=0.5, image_seconds=0.01, build_seconds=3.0)
CONFIG = TrainConfig(batch_size=10, max_epochs=4)
EPOCH = 0.5 + 10 * 2.0 + (20 + 100) * 0.01  # 21.7 s
TRIAL = 3.0 + 4 * EPOCH + (30 + 50) * 0.01  # 90.6 s


@pytest.fixture
def images() -> SplitImages:
    """100 training images of 16 pixels, 20 select, 30 estimate, 50 test."""
    data = split(LabelledImages(np.zeros((200, 1, 16, 16), np.uint8), np.arange(200) % 2, 0, ("a", "b")))
    ends = np.cumsum([0, 100, 20, 30, 50])
    parts = (np.arange(start, end) for start, end in itertools.pairwise(ends))
    return replace(data, **dict(zip(("train", "select", "estimate", "test"), parts, strict=True)))


def of(num_trials: int = 4, *, halving: str = "none", **further: object) -> SearchPlan:
    """A search over two fields with CONFIG as its base, of 4 epochs a trial."""
    made = plan(num_trials=num_trials, halving=halving, base=CONFIG, **further)  # type: ignore[arg-type]
    return replace(made, overrides={"max_epochs": 4})


def estimated(of_plan: SearchPlan, images: SplitImages, *, workers: int = 2, **further: object) -> Estimate:
    left = further.pop("left", Left.of(of_plan, None))
    return estimate_search(of_plan, images, {CONFIG: SPEED}, workers=workers, cpus=1, left=left, **further)  # type: ignore[arg-type]


# --- one trial ---


def test_an_epoch_is_its_steps_and_its_evaluation(images: SplitImages) -> None:
    assert epoch_seconds(CONFIG, images, SPEED) == pytest.approx([21.7] * 4)


def test_a_trial_builds_trains_and_predicts_estimate_and_test(images: SplitImages) -> None:
    trial = trial_seconds(CONFIG, whole(4), images, SPEED)
    assert (trial.building, trial.ending) == pytest.approx((3.0, 0.8))
    assert trial.whole == pytest.approx(90.6)


def test_an_averages_epochs_predict_select_twice(images: SplitImages) -> None:
    averaged = replace(CONFIG, ema_decay=0.9)
    assert epoch_seconds(averaged, images, SPEED) == pytest.approx([21.9] * 4)


@pytest.mark.parametrize(
    ("changes", "predicted"),
    [
        ({}, 80),
        ({"test_time_augmentation": "flip"}, 2 * 100),
        ({"ema_decay": 0.9}, 80 + 80),
        ({"ema_decay": 0.9, "test_time_augmentation": "flip_shift"}, 6 * 100 + 80),
        ({"snapshot_every": 4}, 80 + 100),
        ({"snapshot_every": 2}, 80 + 2 * 100 + 2 * 100 + 20 + 2 * 100),  # each, a pass to renew each mean, the means
    ],
)
def test_every_variant_and_view_is_predicted_at_the_end(
    changes: dict[str, object], predicted: int, images: SplitImages
) -> None:
    assert images_predicted_at_the_end(replace(CONFIG, **changes), images) == predicted  # type: ignore[arg-type]


def test_growing_images_take_growing_steps(images: SplitImages) -> None:
    """Sides 8, 8, 12 and 16; a step at 12, with 144 of 64 to 256 pixels, takes 1 + 3 x 80 / 192 = 2.25 s."""
    growing = replace(CONFIG, initial_image_size=8)
    speed = replace(SPEED, step_seconds={8: 1.0, 16: 4.0})
    assert epoch_seconds(growing, images, speed) == pytest.approx([11.7, 11.7, 24.2, 41.7])


# --- a search ---


def test_trials_that_nothing_stops_take_their_turns(images: SplitImages) -> None:
    estimate = estimated(of(num_trials=5), images, start_seconds=7.0)
    assert estimate.work_seconds == pytest.approx(2 * 7 + 5 * TRIAL)
    assert estimate.wall_seconds == pytest.approx(7 + 3 * TRIAL)
    assert estimate.saved_share == pytest.approx(0)
    assert estimate.ended_after == pytest.approx([7 + TRIAL] * 2 + [7 + 2 * TRIAL] * 2 + [7 + 3 * TRIAL])


def test_finalists_are_trained_to_their_end_after_all_others(images: SplitImages) -> None:
    estimate = estimated(of(finalists=1, seeds=3), images)
    assert estimate.work_seconds == pytest.approx(7 * TRIAL)
    assert estimate.wall_seconds == pytest.approx(2 * TRIAL + 2 * TRIAL)


def test_networks_take_turns(images: SplitImages) -> None:
    slow = replace(SPEED, step_seconds={16: 4.0})
    both = {CONFIG: SPEED, replace(CONFIG, backbone="resnet18"): slow}
    searched = of()
    estimate = estimate_search(searched, images, both, workers=1, cpus=1, left=Left.of(searched, None))
    assert estimate.work_seconds == pytest.approx(4 * TRIAL + 2 * 4 * 10 * 2.0)
    assert estimate.trial_seconds == pytest.approx([TRIAL, TRIAL + 80])


def epochs_of(num_epochs: int) -> list[TrialSeconds]:
    return [TrialSeconds(building=0.0, epochs=[1.0] * num_epochs, ending=0.0)]


def test_asha_stops_as_many_in_a_rehearsal_as_theory_has_it() -> None:
    """24 trials of 9 epochs with one rung after 3: 9.5 end (24 x 3 + 9.5 x 6 = 129 epochs), two at a time."""
    searched = plan(num_trials=24, halving="asha", grace_epochs=3)
    rehearsed = rehearse(searched, epochs_of(9), workers=2)
    assert rehearsed.work_seconds == pytest.approx(129, abs=8)
    assert rehearsed.wall_seconds == pytest.approx(rehearsed.work_seconds / 2, rel=0.06)
    assert list(rehearsed.ended_after) == sorted(rehearsed.ended_after)


@pytest.mark.parametrize("halving", list(HALVINGS))
def test_every_strategy_can_be_rehearsed(halving: str) -> None:
    searched = plan(num_trials=12, halving=halving, base=TrainConfig(ema_decay=0.9))
    course = sum(leg.num_epochs for leg in searched.make_halving().course)
    rehearsed = rehearse(searched, epochs_of(course), workers=3)
    assert 12 <= rehearsed.work_seconds <= 12 * course
    assert rehearsed == rehearse(searched, epochs_of(course), workers=3)


def test_controls_are_not_stopped_and_save_nothing() -> None:
    searched = plan(num_trials=24, halving="asha", baselines=(), control_fraction=1.0)
    assert rehearse(searched, epochs_of(9), workers=2).work_seconds == 24 * 9


def test_a_budget_of_epochs_ends_a_rehearsal() -> None:
    searched = plan(num_trials=24, halving="none", max_total_epochs=45)
    assert rehearse(searched, epochs_of(9), workers=1).work_seconds == 45


def test_thousands_of_trials_are_rehearsed_in_part() -> None:
    searched = plan(num_trials=30_000, halving="none")
    assert rehearse(searched, epochs_of(9), workers=2).work_seconds == 30_000 * 9


# --- what is left ---


def test_what_is_left_of_a_search_is_what_has_not_ended(tmp_path: Path, images: SplitImages) -> None:
    searched = of(num_trials=8, finalists=2)
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        advance(ledger_of(experiment, halving="none"), LEARNING, steps=21)
    history = experiment.history
    left = Left.of(searched, history)
    begun = [trial.last_epoch for trial in history.unfinished]
    assert left == Left(new_trials=8 - len(history.trials), finalists=2, begun=begun)
    assert len(begun) == 2
    assert left.num_trials == 8 - len(history.ended) + 2
    halfway = Left(new_trials=4, finalists=0, begun=[2, 4])
    estimate = estimated(searched, images, left=halfway)
    assert estimate.work_seconds == pytest.approx(4 * TRIAL + TRIAL / 2)


# --- what is said ---


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (40.4, "40 s"),
        (89.0, "89 s"),
        (90.0, "2 min"),
        (1500.0, "25 min"),
        (5400.0, "1.5 h"),
        (10_800.0, "3 h"),
        (86_400.0, "24 h"),
        (604_800.0, "7 days"),
    ],
)
def test_durations_are_one_number(seconds: float, said: str) -> None:
    assert roughly(seconds) == said


ESTIMATE = Estimate(
    left=Left(new_trials=24, finalists=0),
    workers=2,
    cpus=1,
    trial_seconds=[1500.0],
    work_seconds=21_600.0,
    wall_seconds=10_800.0,
    saved_share=0.4,
    ended_after=[600.0 * place for place in range(1, 25)],
)


def test_the_line_says_what_a_search_costs_and_why() -> None:
    said = (
        "about 3 h on 2 cores (24 trials of at most 4 epochs, 25 min each on one core; early stopping saves about 40%)"
    )
    assert search_line(of(), ESTIMATE) == said


def test_the_line_of_a_resume_is_about_what_is_left() -> None:
    left = Left(new_trials=7, finalists=1, begun=[3, 1])
    assert "(7 new trials, 2 begun and 1 finalist of at most" in search_line(of(), replace(ESTIMATE, left=left))


def test_the_line_claims_no_saving_where_there_is_none() -> None:
    assert search_line(of(), replace(ESTIMATE, saved_share=0.01)).endswith("25 min each on one core)")


def test_the_line_says_what_it_stands_for() -> None:
    dimensions = {"batch_size": IntDistribution(8, 64), "backbone": CategoricalDistribution(["small_cnn", "resnet18"])}
    searched = of(dimensions=dimensions, baselines=())
    said = search_line(searched, replace(ESTIMATE, trial_seconds=[1500.0, 5400.0]))
    assert "25 min to 1.5 h each on one core, by network" in said
    assert said.endswith("measured with batch_size=10)")


def test_a_time_budget_that_is_too_short_says_how_many_trials_fit() -> None:
    said = budget_line(ESTIMATE, seconds=3600, flag="--time-budget")
    assert said == "--time-budget 3600 (seconds) is less: about 6 of 24 trials will have ended by then"
    assert budget_line(ESTIMATE, seconds=10_800, flag="--time-budget") == ""
    assert budget_line(ESTIMATE, seconds=None, flag="--time-budget") == ""


def test_a_training_says_how_many_epochs_it_has_left() -> None:
    single = replace(of(num_trials=1), num_trials=1)
    assert training_line(single, Left(new_trials=1, finalists=0), 1500, cpus=2) == "about 25 min on 2 cores (4 epochs)"
    resumed = training_line(single, Left(new_trials=0, finalists=0, begun=[3]), 400, cpus=1)
    assert resumed == "about 7 min on one core (1 of 4 epochs)"
    students = training_line(of(num_trials=3), Left(new_trials=3, finalists=0), 400, cpus=1)
    assert students == "about 7 min on one core (3 trials of 4 epochs)"


DAY = 86_400.0


def proportional(days: float) -> Callable[[dict[str, float]], float]:
    """What takes so many days as it is, and time in proportion to images and to 16 epochs."""
    return lambda flags: DAY * days * flags.get("train_fraction", 1.0) * flags.get("max_epochs", 16) / 16


@pytest.mark.parametrize(
    ("days", "fixed", "flags"),
    [
        (7.0, [], {"train_fraction": 0.1}),
        (1.5, [], {"train_fraction": 0.5}),
        (300.0, [], {"train_fraction": 0.01, "max_epochs": 4}),
        (7.0, ["train_fraction"], {}),
        (3.5, ["train_fraction"], {"max_epochs": 4}),
        (7.0, ["train_fraction", "max_epochs"], {}),
        (9000.0, [], {}),
    ],
)
def test_a_cheaper_command_takes_less_than_a_day(days: float, fixed: list[str], flags: dict[str, float]) -> None:
    found = cheaper_flags(train_fraction=1.0, max_epochs=16, wall_seconds=proportional(days), fixed=fixed)
    assert found == flags


def test_the_cheaper_command_is_one_that_can_be_typed(images: SplitImages, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["digits", "--num-trials", "6", "--set", "lr=0.1", "batch_size=2"]
    monkeypatch.setattr("sys.argv", ["/somewhere/orchestrator/search.py", *typed])
    args = search.parse(typed)
    searched = search.plan_from(args)
    slow = replace(SPEED, step_seconds={16: 400.0})
    written = io.StringIO()
    outlook = Outlook(searched, images, Resources("cpu", 1, 0.0, 2), Left.of(searched, None))
    speeds = {searched.space.base: slow}
    outlook.print_cost(speeds, args, Console(file=written, width=400), new=True)
    lines = written.getvalue().splitlines()
    assert "days on 2 cores (6 trials of at most 9 epochs" in lines[0]
    assert lines[-2].endswith("with:")
    module, *arguments = shlex.split(lines[-1])[2:]
    assert module == "orchestrator.search"
    again = search.parse(arguments)
    cheaper = search.plan_from(again)
    assert again.name == "digits-short"
    assert cheaper.space.base.lr == 0.1
    assert cheaper.space.base.train_fraction < 1
    fewer = replace(images, train=images.train[: round(cheaper.space.base.train_fraction * 100)])
    speeds = {cheaper.space.base: slow}
    assert Outlook(cheaper, fewer, outlook.resources, Left.of(cheaper, None)).estimate(speeds).wall_seconds < DAY


def test_a_resume_is_not_told_to_be_another_search(images: SplitImages) -> None:
    searched = of()
    slow = replace(SPEED, step_seconds={16: 40_000.0})
    written = io.StringIO()
    outlook = Outlook(searched, images, Resources("cpu", 1, 0.0, 2), Left.of(searched, None))
    args = argparse.Namespace(time_budget=None, set=[], name=None)
    outlook.print_cost({CONFIG: slow}, args, Console(file=written, width=400), new=False)
    assert len(written.getvalue().splitlines()) == 1


def test_a_searchs_own_bound_on_the_seconds_is_compared_too(images: SplitImages) -> None:
    searched = of()
    bounded = replace(searched.source.space.budget, max_seconds=100.0)
    source = replace(searched.source, space=replace(searched.source.space, budget=bounded))
    written = io.StringIO()
    outlook = Outlook(replace(searched, source=source), images, Resources("cpu", 1, 0.0, 2), Left.of(searched, None))
    args = argparse.Namespace(time_budget=None, set=[], name=None)
    outlook.print_cost({CONFIG: SPEED}, args, Console(file=written, width=400), new=True)
    assert "max_seconds 100 (seconds) is less: about" in written.getvalue()


def test_dimensions_that_decide_no_cost_are_not_named(images: SplitImages) -> None:
    searched = of(dimensions={"dropout": FloatDistribution(0.0, 0.5)}, baselines=())
    assert "measured with" not in search_line(searched, estimated(searched, images))
