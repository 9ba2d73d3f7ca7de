"""What precision=auto becomes: decided once by measured steps, recorded, the same for every trial and every resume."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution

from orchestrator.plan import SearchPlan, resumed
from orchestrator.precision_choice import NotMeasured, choose_precision, networks_of, precision_line
from orchestrator.warm_start import load_warm_start
from results.schema import DataWarning, SelectPredictions, UsageError
from results.store import Experiment
from tests.conftest import CommandLine
from tests.simulation import LEARNING, advance, ledger_of, new_experiment, plan
from trainables.config import TrainConfig
from trainables.datasets import LabelledImages, SplitImages, load_dataset, split
from trainables.evaluation import predict
from trainables.learner import Learner
from trainables.loop import TrainState, train
from trainables.precision import PrecisionChoice
from trainables.process import prepared_for_a_while
from trainables.resident import ResidentImages
from trainables.step_timing import Meter, Speed

LONG, SHORT = 601.0, 600.0
SPEED = Speed(step_seconds={8: 1.0}, epoch_seconds=0.0, image_seconds=0.0, build_seconds=0.0)


@dataclass
class InventedMeter:
    """Tells what it was given: the ratios of each network's rounds."""

    ratios: dict[str, list[float]]
    asked: list[str] = field(default_factory=list)

    def speed(self, config: TrainConfig) -> Speed:
        return SPEED

    def bfloat16_ratios(self, config: TrainConfig, *, least: float = 0.0, rounds: int = 5) -> list[float]:
        self.asked.append(config.backbone)
        return self.ratios[config.backbone]


class NoRoom:
    """A cluster without room for a measurement."""

    def speed(self, config: TrainConfig) -> Speed:
        raise NotMeasured

    def bfloat16_ratios(self, config: TrainConfig, *, least: float = 0.0, rounds: int = 5) -> list[float]:
        raise NotMeasured


def taking(seconds: float):  # type: ignore[no-untyped-def]  # a function of the test's
    def expected(networks: Sequence[TrainConfig], speeds: Sequence[Speed]) -> float:
        assert {config.precision for config in networks} == {"float32"}
        assert list(speeds) == [SPEED] * len(networks)
        return seconds

    return expected


def chosen(of: SearchPlan, ratios: list[float], *, seconds: float = LONG, device: str = "cpu") -> PrecisionChoice:
    meter = InventedMeter({"small_cnn": ratios})
    return choose_precision(of, device=device, meter=meter, expected_seconds=taking(seconds))


# --- the decision ---


@pytest.mark.parametrize(
    ("ratios", "resolved"),
    [
        ([1.7, 1.6, 1.15, 1.9, 1.8], "bfloat16"),
        ([1.7, 1.6, 1.14, 1.9, 1.8], "float32"),
        ([0.15], "float32"),
    ],
)
def test_a_long_run_has_bfloat16_where_the_worst_round_gains_enough(ratios: list[float], resolved: str) -> None:
    expected = PrecisionChoice(resolved=resolved, reason="measured", float32_over_bfloat16=min(ratios))
    assert chosen(plan(), ratios) == expected


def test_a_short_run_stays_in_float32_and_its_types_are_not_compared() -> None:
    meter = InventedMeter({})
    choice = choose_precision(plan(), device="cpu", meter=meter, expected_seconds=taking(SHORT))
    assert choice == PrecisionChoice(resolved="float32", reason="short run")
    assert meter.asked == []


def test_all_networks_of_a_space_have_to_gain() -> None:
    dimensions = {"backbone": CategoricalDistribution(["small_cnn", "efficient200k"])}
    space = plan(dimensions=dimensions, baselines=())
    assert [config.backbone for config in networks_of(space.space)] == ["small_cnn", "efficient200k"]
    for slow, resolved in ((1.2, "bfloat16"), (0.6, "float32")):
        meter = InventedMeter({"small_cnn": [1.5, 1.6], "efficient200k": [1.3, slow]})
        choice = choose_precision(space, device="cpu", meter=meter, expected_seconds=taking(LONG))
        assert (choice.resolved, choice.float32_over_bfloat16) == (resolved, slow)


@pytest.mark.parametrize(("device", "resolved"), [("cuda", "bfloat16"), ("mps", "float32")])
def test_other_devices_are_not_measured(device: str, resolved: str) -> None:
    choice = choose_precision(plan(), device=device, meter=None, expected_seconds=taking(LONG), why_not="device")
    assert choice == PrecisionChoice(resolved=resolved, reason="device")


@pytest.mark.parametrize(
    ("meter", "reason"), [(None, "unlike machines"), (None, "not measured"), (NoRoom(), "not measured")]
)
def test_what_cannot_be_measured_keeps_float32(meter: NoRoom | None, reason: str) -> None:
    choice = choose_precision(plan(), device="cpu", meter=meter, expected_seconds=taking(LONG), why_not=reason)
    assert choice == PrecisionChoice(resolved="float32", reason=reason)


def test_a_precision_that_is_given_is_kept_whatever_was_measured() -> None:
    for precision in ("float32", "float64"):
        given = plan(base=TrainConfig(precision=precision))
        assert chosen(given, [9.0]) == PrecisionChoice(resolved=precision, reason="given")


def test_bfloat16_that_was_asked_for_and_is_slower_warns_with_the_measured_ratio() -> None:
    given = plan(base=TrainConfig(precision="bfloat16"))
    slower = r"precision=bfloat16 is slower than float32 here: a training step of small_cnn takes 2.00 times as long"
    with pytest.warns(DataWarning, match=slower):
        choice = chosen(given, [0.4, 0.5, 1.3], seconds=SHORT)
    assert choice == PrecisionChoice(resolved="bfloat16", reason="given")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen(given, [0.9, 1.1, 1.2])
        chosen(given, [0.1, 0.1, 0.1], device="cuda")


def test_a_precision_that_is_searched_stays_a_dimension() -> None:
    dimensions = {"precision": CategoricalDistribution(["float32", "bfloat16"]), "lr": FloatDistribution(0.01, 0.1)}
    searched = plan(dimensions=dimensions, baselines=())
    choice = chosen(searched, [9.0])
    assert choice.reason == "searched"
    assert list(replace(searched, precision=choice).space.dimensions) == ["precision", "lr"]


def test_the_console_says_what_was_measured_and_nothing_else() -> None:
    assert precision_line(PrecisionChoice(resolved="float32", reason="short run")) == ""
    measured = PrecisionChoice(resolved="bfloat16", reason="measured", float32_over_bfloat16=1.723)
    assert precision_line(measured) == "precision: bfloat16, at least 1.72 times as fast as float32 here"
    kept = replace(measured, resolved="float32", float32_over_bfloat16=0.531)
    assert precision_line(kept) == "precision: float32 (bfloat16 is 0.53 times as fast here; 1.15 would be wanted)"


# --- what is recorded ---

BFLOAT16 = PrecisionChoice(resolved="bfloat16", reason="measured", float32_over_bfloat16=1.72)


def begun(folder: Path) -> Experiment:
    """A search of 8 trials in bfloat16 of which some have ended."""
    experiment = new_experiment(folder)
    with experiment.driving():
        experiment.info["precision"] = asdict(BFLOAT16)
        advance(ledger_of(experiment, precision=BFLOAT16), LEARNING, steps=20)
    return experiment


def test_every_trial_says_what_it_was_trained_with(tmp_path: Path) -> None:
    experiment = begun(tmp_path)
    assert len(experiment.history.trials) > 2
    assert {trial.started.config["precision"] for trial in experiment.history.trials.values()} == {"bfloat16"}
    assert set(experiment.trials()["config.precision"]) == {"bfloat16"}


def info_of(of: SearchPlan) -> dict[str, object]:
    data = split(LabelledImages(np.zeros((20, 1, 4, 4), np.uint8), np.arange(20) % 2, 0, ("a", "b")))
    stored: dict[str, object] = json.loads(json.dumps(of.info(name="sim", data=data, command="typed")))
    return stored


def test_a_resume_keeps_what_was_decided_and_measures_nothing() -> None:
    info = info_of(plan(precision=BFLOAT16))
    assert info["precision"] == {"resolved": "bfloat16", "reason": "measured", "float32_over_bfloat16": 1.72}
    again = resumed(plan(), info)
    assert again.precision == BFLOAT16
    assert again.space.base.precision == "bfloat16"


def test_a_resume_may_not_change_what_was_decided() -> None:
    info = info_of(plan(precision=BFLOAT16))
    other = replace(plan(), overrides={"precision": "float32"})
    with pytest.raises(UsageError, match=r"base.precision was bfloat16 and is float32"):
        resumed(other, info)


def test_an_experiment_that_recorded_nothing_is_resumed_as_it_was_begun() -> None:
    info = {name: value for name, value in info_of(plan()).items() if name != "precision"}
    again = resumed(plan(), info)
    assert again.precision is None
    assert again.space.base.precision == "auto"


def test_a_search_learns_from_trials_of_another_number_type(tmp_path: Path) -> None:
    experiment = begun(tmp_path)
    ended = len(experiment.history.ended)
    assert ended
    float32 = replace(BFLOAT16, resolved="float32")
    for precision in (None, float32, BFLOAT16):
        of = plan(precision=precision, warm_start=(experiment.name,))
        found = load_warm_start(tmp_path, of, split_hash=experiment.info["split_hash"])
        assert len(found.trials) == ended


# --- real measurements ---

QUICK = TrainConfig(batch_size=64, crop_padding=1, flip=False, dropout=0.2, ema_decay=0.9)


def test_a_meter_measures_every_part_and_leaves_the_process_as_it_was(resident_digits: ResidentImages) -> None:
    torch.manual_seed(3)
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    with prepared_for_a_while(threads=1):
        speed = Meter(resident_digits, 1).speed(QUICK)
        ratios = Meter(resident_digits, 1).bfloat16_ratios(QUICK, rounds=2)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(speed.step_seconds) == [8]
    assert all(value > 0 for value in (speed.step_seconds[8], speed.image_seconds, speed.build_seconds))
    assert len(ratios) == 2
    assert min(ratios) > 0


def test_a_meter_ends_with_the_first_round_that_gains_too_little(resident_digits: ResidentImages) -> None:
    assert len(Meter(resident_digits, 1).bfloat16_ratios(QUICK, least=1e9)) == 1


def test_a_meter_ends_when_its_check_raises(resident_digits: ResidentImages) -> None:
    class Ended(Exception):
        """A signal has arrived."""

    def check() -> None:
        raise Ended

    with pytest.raises(Ended):
        Meter(resident_digits, 1, check).speed(QUICK)


@pytest.mark.parametrize(
    "changes",
    [{"accumulation_steps": 40}, {"batch_size": 10_000}, {"snapshot_every": 2, "unfreeze_epochs": 2}],
    ids=["parts", "one batch", "stages"],
)
def test_unusual_trainings_are_measured_too(changes: dict[str, int], resident_digits: ResidentImages) -> None:
    speed = Meter(resident_digits, 1).speed(replace(QUICK, batch_size=128).having(changes))
    assert speed.step_seconds[8] > 0


def test_growing_images_are_measured_at_their_smallest_and_largest(noise_images: SplitImages) -> None:
    data = ResidentImages.on("cpu", noise_images)
    speed = Meter(data, 1).speed(TrainConfig(batch_size=8, initial_image_size=8, max_epochs=8))
    assert sorted(speed.step_seconds) == [8, 16]


def test_between_two_sizes_a_step_is_linear_in_the_pixels() -> None:
    """From 10 pixels a side, 2 s, to 20 pixels, 8 s: at 15, 225 of 100 to 400 pixels, 2 + 6 x 125 / 300 = 4.5 s."""
    speed = replace(SPEED, step_seconds={10: 2.0, 20: 8.0})
    assert [speed.step_seconds_at(side) for side in (10, 15, 20)] == pytest.approx([2.0, 4.5, 8.0])


def test_bfloat16_on_a_cpu_learns_and_predicts_as_it_was_trained(resident_digits: ResidentImages) -> None:
    config = replace(QUICK, max_epochs=4, lr=0.05, dropout=0.0, precision="bfloat16")
    state = TrainState(config, resident_digits)
    results = list(train(config, resident_digits, state=state))
    assert results[-1].val_accuracy is not None
    assert results[-1].val_accuracy > 0.8
    assert state.best_select is not None
    select_N = resident_digits.split.select
    stored = predict(state.best_model(), resident_digits, select_N, precision="bfloat16")
    assert np.array_equal(stored, state.best_select.logits_NC)
    assert not np.array_equal(stored, predict(state.best_model(), resident_digits, select_N, precision="float32"))


def test_weights_stay_in_float32_in_bfloat16(resident_digits: ResidentImages) -> None:
    learner = Learner(replace(QUICK, precision="bfloat16"), resident_digits)
    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}


# --- commands ---


def test_a_short_training_records_float32(command: CommandLine, tmp_path: Path) -> None:
    quick = ("speedrun", "--dataset", "digits", "--set", "batch_size=128", "max_epochs=1", "warmup_epochs=0")
    fitting = ("initial_image_size=none", "backbone=small_cnn", "--name", "short")
    done = command("orchestrator.train", *quick, *fitting, "--results-dir", "runs")
    assert done.returncode == 0, done.stderr
    experiment = Experiment.open(tmp_path / "runs", "short")
    assert experiment.info["precision"] == {
        "resolved": "float32",
        "reason": "short run",
        "float32_over_bfloat16": None,
    }
    assert list(experiment.trials()["config.precision"]) == ["float32"]
    data = ResidentImages.on("cpu", load_dataset("digits", data_dir="unused"))
    assert len(experiment.predictions("t00000", SelectPredictions).labels_N) == len(data.split.select)
