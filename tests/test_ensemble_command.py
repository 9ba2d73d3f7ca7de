"""`orchestrator.ensemble` on stored experiments: what it takes, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from invented import SPLITS, Variants, store_models
from sklearn.metrics import accuracy_score, log_loss

from orchestrator import ensemble
from orchestrator.candidates import choose_experiments, find_candidates
from orchestrator.description import read_description
from orchestrator.pool import SelectPool
from results.schema import PREDICTIONS, DataWarning, FloatArray, IntArray, Split, UsageError
from results.store import Experiment
from trainables.validation import log_softmax

CLASSES = 5
SIZES: dict[Split, int] = {"select": 90, "estimate": 60, "test": 120}
LABELS: dict[Split, IntArray] = {split: np.arange(size) % CLASSES for split, size in SIZES.items()}


def logits_of(number: int, split: Split, *, skill: float = 2.0) -> FloatArray:
    """A model that knows the label more or less."""
    rng = np.random.default_rng([number, SPLITS.index(split)])
    noise = rng.normal(size=(SIZES[split], CLASSES))
    return np.asarray(skill * np.eye(CLASSES)[LABELS[split]] + noise, dtype=np.float16)


def model(number: int) -> Variants:
    return {"best": {split: logits_of(number, split) for split in SPLITS}}


def stored(
    folder: Path, models: Callable[[int], Variants] = model, *, num_models: int = 6, **further: object
) -> Experiment:
    return store_models(folder, models, LABELS, num_models=num_models, num_classes=CLASSES, **further)  # type: ignore[arg-type]


def made(folder: Path, *arguments: str) -> dict[str, object]:
    """What `ensemble.json` says of the ensemble that the command makes."""
    assert ensemble.main(["--results-dir", str(folder), *arguments]) == 0
    newest = max(folder.glob("*/ensembles/*/ensemble.json"), key=lambda path: path.stat().st_mtime_ns)
    content: dict[str, object] = json.loads(newest.read_text())
    return content


def scores(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(next(folder.glob("*/ensembles/e0001/scores.parquet")))


def refused(folder: Path, message: str, *arguments: str) -> None:
    with pytest.raises(UsageError, match=message):
        ensemble.main(["--results-dir", str(folder), *arguments])


def test_stored_scores_are_what_the_members_predictions_give(tmp_path: Path) -> None:
    """From the parquet of predictions and `ensemble.json` alone, figures by scikit-learn."""
    experiment = stored(tmp_path)
    content = made(tmp_path, "--top-k", "3", "--combiner", "weighted")
    members = content["members"]
    combination = read_description(experiment.ensemble_folder("e0001")).combination
    assert combination.combiner == "weighted"
    table = scores(tmp_path)
    for split in SPLITS:
        stored_logits = [experiment.predictions(m["trial_id"], PREDICTIONS[split]).logits_NC for m in members]  # type: ignore[attr-defined]
        log_probs = combination.combine(log_softmax(np.stack(stored_logits))).log_probs_NC
        assert log_probs is not None
        of_split = table[table["chosen"] & (table["split"] == split)].set_index("metric")["value"]
        assert of_split["accuracy"] == pytest.approx(accuracy_score(LABELS[split], log_probs.argmax(1)))
        assert of_split["nll"] == pytest.approx(log_loss(LABELS[split], np.exp(log_probs)), abs=1e-5)


def test_everything_that_was_made_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path, finalist_of=["", "", "", "", "t00001", "t00001"])
    content = made(tmp_path, "--top-k", "3")
    printed = capsys.readouterr().out
    table = scores(tmp_path)
    assert table.groupby(["kind", "label", "split", "metric"]).size().max() == 1
    assert set(table["kind"]) == {"ensemble", "control", "single", "curve"}
    assert "seeds, mean" in set(table["label"])
    assert "seeds of one configuration, on 60 estimate images: accuracy" in printed
    assert f"{content['comparisons']} gains with 95% intervals" in printed
    estimate, select = (
        table[table["chosen"] & (table["split"] == split)].set_index("metric")["value"]
        for split in ("estimate", "select")
    )
    assert content["optimism"] == pytest.approx(
        {"accuracy": select["accuracy"] - estimate["accuracy"], "nll": estimate["nll"] - select["nll"]}
    )
    classes = pd.read_parquet(next(tmp_path.glob("*/ensembles/e0001/classes.parquet")))
    of_classes = duckdb.sql(
        "select sum(accuracy * num_examples) / sum(num_examples) from classes where split = 'estimate'"
    )
    assert of_classes.fetchall()[0] == pytest.approx((estimate["accuracy"],))
    assert classes["class_name"].tolist() == [f"class {c}" for c in range(CLASSES)] * 2
    curve = table[(table["kind"] == "curve") & (table["split"] == "estimate") & (table["metric"] == "nll")]
    assert curve["k"].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("dropout > 0.25", {3, 4}),
        ("stage == 'finalist'", {4, 5}),
        ("trial_id in ['t00001', 't00002']", {1, 2}),
        ("experiment == 'invented' and status == 'completed'", {0, 1, 2, 3, 4, 5}),
        ("checkpoint == ''", {0, 1, 2, 3, 4, 5}),
    ],
)
def test_candidates_are_those_for_which_an_expression_holds(
    expression: str, expected: set[int], tmp_path: Path
) -> None:
    stored(
        tmp_path,
        finalist_of=["", "", "", "", "t00001", "t00001"],
        changes={number: {"dropout": 0.1 * number} for number in range(5)},
    )
    content = made(tmp_path, "--top-k", "1", "--candidates", expression, "--selection", "all")
    assert {m["trial_id"] for m in content["members"]} == {f"t{n:05d}" for n in expected}  # type: ignore[attr-defined]
    assert content["candidates_where"] == expression


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "drop > 1",
            r"--candidates 'drop > 1' cannot be evaluated \(name 'drop' is not defined\).*over: trial_id, stage",
        ),
        ("dropout", "is not true or false of a trial"),
        ("dropout >", "cannot be evaluated"),
        ("dropout > 2", r"--top-k 5 but only 0 completed trials for which 'dropout > 2' holds in invented"),
    ],
)
def test_wrong_expressions_are_refused(expression: str, message: str, tmp_path: Path) -> None:
    stored(tmp_path)
    refused(tmp_path, message, "--candidates", expression)


@pytest.mark.parametrize(
    "expression",
    [
        "@pd.io.common.os.system('touch {file}') == 0",
        "'\\'' == @pd.io.common.os.system('touch {file}')",
        "trial_id.to_csv('{file}') == 1",
        "'`' == trial_id.to_csv('{file}') or variant == '`'",
        "trial_id.str.__class__ == 1",
    ],
)
def test_expressions_ask_and_do_nothing_else(expression: str, tmp_path: Path) -> None:
    stored(tmp_path)
    file = tmp_path / "made"
    refused(tmp_path, "cannot be evaluated .* is not allowed", "--candidates", expression.format(file=file))
    assert not file.exists()


def test_expressions_may_ask_what_columns_hold(tmp_path: Path) -> None:
    stored(tmp_path)
    expression = "trial_id.str.contains('[135]') and val_accuracy >= val_accuracy.min() and `dropout` < 1"
    content = made(tmp_path, "--top-k", "3", "--candidates", expression)
    assert {m["trial_id"] for m in content["members"]} == {"t00001", "t00003", "t00005"}  # type: ignore[attr-defined]


def test_too_few_select_images_to_cross_fit_are_refused(tmp_path: Path) -> None:
    labels: dict[Split, IntArray] = {split: np.arange(4) for split in SPLITS}
    few = {"best": {split: np.eye(4)[labels[split]] for split in SPLITS}}
    store_models(tmp_path, lambda number: few, labels, num_models=2, num_classes=4)
    refused(tmp_path, "4 select images, but choosing is cross-fitted in 5 parts of them", "--top-k", "2")


def test_no_verdict_is_given_where_the_exact_test_does_not_agree_with_the_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five images more of 60 are right and none wrong that was right: p is 2 / 32, and the interval excludes zero."""

    def five_more(number: int) -> Variants:
        better: dict[Split, FloatArray] = {split: 2.0 * np.eye(CLASSES)[LABELS[split]] for split in SPLITS}
        if number:
            better["estimate"][:5] = np.roll(better["estimate"][:5], 1, axis=1)
            better["select"] = 9.0 * better["select"]
        return {"best": better}

    experiment = stored(tmp_path, five_more, num_models=2)
    made(tmp_path, "--selection", "random", "--top-k", "1")
    table = scores(tmp_path)
    pair = table[(table["split"] == "estimate") & (table["metric"] == "accuracy") & (table["chosen_p_value"] == 0.0625)]
    assert len(pair)
    assert (pair["chosen_gain_ci_low"] > 0).all()
    said = [line for line in capsys.readouterr().out.splitlines() if "p 0.062" in line]
    assert said
    assert all("accuracy no difference shown" in line for line in said)
    assert experiment.ensemble_ids() == ["e0001"]


def test_a_narrow_terminal_folds_figures_and_cuts_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    stored(tmp_path)
    made(tmp_path, "--top-k", "3")
    shown = capsys.readouterr().out
    assert "…" not in shown
    table = scores(tmp_path)
    accuracies = table.loc[(table["metric"] == "accuracy") & (table["split"] != "select"), "value"]
    assert all(f"{value:.4f}" in shown for value in accuracies[table["kind"] != "ensemble"])


def test_variants_of_a_trial_are_candidates_of_their_own(tmp_path: Path) -> None:
    """The averaged views are better than the plain ones; no control takes two variants of a trial."""

    def two_variants(number: int) -> Variants:
        return {"best": model(number)["best"], "tta": {split: logits_of(number, split, skill=3) for split in SPLITS}}

    stored(tmp_path, two_variants, changes={n: {"test_time_augmentation": "flip"} for n in range(6)})
    content = made(tmp_path, "--top-k", "3")
    assert content["candidates"] == 12
    table = scores(tmp_path)
    assert {"best model", "best tta", "best single model"} <= set(table["label"])
    top = table[(table["label"] == "top, mean") & (table["metric"] == "accuracy")]
    assert top["multiply_adds"].tolist() == [3 * 2 * 100] * 3  # two views each
    only_best = made(tmp_path, "--top-k", "3", "--candidates", "variant == 'best'")
    assert {m["variant"] for m in only_best["members"]} == {"best"}  # type: ignore[attr-defined]


def test_an_ensemble_within_a_cost(tmp_path: Path) -> None:
    stored(tmp_path)
    content = made(tmp_path, "--max-cost", "250")
    assert 1 <= len(content["members"]) <= 2  # type: ignore[arg-type]
    refused(
        tmp_path,
        "--max-cost 99 multiply-adds an image, but the cheapest candidate takes 100; raise it",
        "--max-cost",
        "99",
    )


def test_several_experiments_are_pooled_and_the_ensemble_lies_in_the_first(tmp_path: Path) -> None:
    stored(tmp_path, name="one", num_models=2)
    stored(tmp_path, lambda number: model(number + 10), name="two", num_models=2)
    content = made(tmp_path, "--experiment", "one", "two", "--top-k", "4")
    assert {(m["experiment"], m["trial_id"]) for m in content["members"]} == {  # type: ignore[attr-defined]
        (name, trial) for name in ("one", "two") for trial in ("t00000", "t00001")
    }
    assert (tmp_path / "one" / "ensembles" / "e0001" / "ensemble.json").exists()
    assert not (tmp_path / "two" / "ensembles").exists()


# --- bad input ---


def test_experiments_that_differ_in_splits_or_classes_are_not_pooled(tmp_path: Path) -> None:
    stored(tmp_path, name="one")
    stored(tmp_path, name="other_split", split_hash="ffff")
    store_models(tmp_path, model, LABELS, num_models=6, num_classes=CLASSES + 1, name="other_classes")
    refused(
        tmp_path,
        "different splits and cannot be pooled: one invented, other_split ffff; take one",
        "--experiment",
        "one",
        "other_split",
    )
    refused(
        tmp_path,
        "different classes, or an order of classes, and cannot be pooled",
        "--experiment",
        "one",
        "other_classes",
    )


def rewritten(
    experiment: Experiment,
    trial_id: str,
    change: Callable[[Split, FloatArray, IntArray, IntArray], tuple[FloatArray, IntArray, IntArray]],
) -> None:
    """Store other predictions for a trial."""
    parts = []
    for split, of in PREDICTIONS.items():
        old = experiment.predictions(trial_id, of)
        parts.append(of(*change(split, old.logits_NC, old.labels_N, old.example_ids_N)))
    with experiment.driving():
        experiment.files(trial_id).write_predictions({"best": parts})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_named_left_out_and_counted(value: float, tmp_path: Path) -> None:
    def broken(number: int) -> Variants:
        variants = {split: logits_of(number, split) for split in SPLITS}
        if number in (1, 4):
            variants["select"][7, 2] = value
        return {"best": variants}

    stored(tmp_path, broken)
    with pytest.warns(
        DataWarning,
        match="2 of 6 candidates have logits that are not finite, and are left out: invented/t00001, invented/t00004",
    ):
        content = made(tmp_path, "--top-k", "4", "--selection", "all")
    assert {m["trial_id"] for m in content["members"]} == {"t00000", "t00002", "t00003", "t00005"}  # type: ignore[attr-defined]
    with pytest.warns(DataWarning, match="not finite"):
        refused(tmp_path, "--top-k 5 but only 4 trials have sound predictions; lower it", "--top-k", "5")


def test_a_member_with_broken_logits_on_another_split_is_named_and_left_out(tmp_path: Path) -> None:
    def broken(number: int) -> Variants:
        variants = {split: logits_of(number, split) for split in SPLITS}
        if number == 2:
            variants["estimate"][3, 1] = np.nan
        return {"best": variants}

    stored(tmp_path, broken)
    with pytest.warns(DataWarning, match="invented/t00002 has estimate logits that are not finite, and is left out"):
        content = made(tmp_path)
    assert "t00002" not in {m["trial_id"] for m in content["members"]}  # type: ignore[attr-defined]
    assert content["candidates"] == 5


def test_no_candidate_with_finite_logits_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, lambda number: {"best": {split: np.full((SIZES[split], CLASSES), np.nan) for split in SPLITS}})
    refused(tmp_path, "no candidate has finite logits")


def test_a_single_candidate_that_turns_out_not_finite_is_refused(tmp_path: Path) -> None:
    def broken(number: int) -> Variants:
        variants = {split: logits_of(number, split) for split in SPLITS}
        variants["test"][0, 0] = np.nan
        return {"best": variants}

    stored(tmp_path, broken, num_models=1)
    with pytest.warns(DataWarning, match="invented/t00000 has test logits that are not finite, and is left out"):
        refused(tmp_path, "no candidate has finite logits on every split", "--experiment", "invented", "--top-k", "1")


def test_a_file_with_fewer_rows_than_the_split_is_named_and_left_out(tmp_path: Path) -> None:
    experiment = stored(tmp_path)
    rewritten(experiment, "t00003", lambda split, logits, labels, ids: (logits[:-5], labels[:-5], ids[:-5]))
    with pytest.warns(
        DataWarning,
        match="1 stored predictions of invented are not whole and are left out: "
        "t00003/best has 85 of 90 select rows, 55 of 60 estimate rows",
    ):
        content = made(tmp_path, "--top-k", "5")
    assert content["candidates"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda split, logits, labels, ids: (logits[::-1], labels[::-1], ids[::-1]),
            "predicted on other select examples than invented/t00000, or in another order",
        ),
        (
            lambda split, logits, labels, ids: (logits, (labels + 1) % CLASSES, ids),
            "has other labels than invented/t00000 for the same select examples",
        ),
        (
            lambda split, logits, labels, ids: (logits[:, :-1], labels, ids),
            "t00003 knows 4 classes and invented/t00000 5",
        ),
    ],
)
def test_predictions_that_do_not_fit_together_are_refused(
    change: Callable[..., tuple[FloatArray, IntArray, IntArray]], message: str, tmp_path: Path
) -> None:
    rewritten(stored(tmp_path), "t00003", change)
    refused(tmp_path, message)
    assert made(tmp_path, "--candidates", "trial_id != 't00003'")


def test_one_usable_trial_is_an_ensemble_of_one_if_asked_for(tmp_path: Path) -> None:
    stored(tmp_path, num_models=1)
    refused(tmp_path, "no experiment in .* has two or more completed trials")
    refused(tmp_path, "--top-k 5 but only 1 completed trials in invented", "--experiment", "invented")
    content = made(tmp_path, "--experiment", "invented", "--top-k", "1")
    assert [m["trial_id"] for m in content["members"]] == ["t00000"]  # type: ignore[attr-defined]
    table = scores(tmp_path)
    gains = table[table["chosen"] & (table["metric"] == "accuracy")]["gain"]
    assert (gains == 0).all()


def test_a_folder_that_was_moved_is_as_good(tmp_path: Path) -> None:
    stored(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert made(tmp_path / "there")


def test_memory_holds_summaries_of_all_candidates_and_logits_of_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a memory for two candidates' logits everything comes out as with enough for all."""
    stored(tmp_path)
    enough = made(tmp_path)
    monkeypatch.setattr("orchestrator.candidates.KEPT_BYTES", 2 * 2 * SIZES["select"] * CLASSES)
    monkeypatch.setattr("orchestrator.pool.KEPT_BYTES", 2 * 4 * SIZES["select"] * CLASSES)
    little = made(tmp_path)
    assert {**little, "ensemble_id": ""} == {**enough, "ensemble_id": ""}
    tables = [pd.read_parquet(path) for path in sorted(tmp_path.glob("*/ensembles/*/scores.parquet"))]
    pd.testing.assert_frame_equal(tables[0].drop(columns="ensemble_id"), tables[1].drop(columns="ensemble_id"))


def test_what_is_read_to_choose_is_summarized_right(tmp_path: Path) -> None:
    stored(tmp_path)
    experiments = choose_experiments(str(tmp_path), [], include_stopped=False)
    _, pool = find_candidates(experiments, k=2, include_stopped=False).read_select()
    assert isinstance(pool, SelectPool)
    for number in range(6):
        log_probs = log_softmax(logits_of(number, "select"))
        expected = np.exp(log_probs[np.arange(90), LABELS["select"]])
        assert pool.label_probs_MN[number] == pytest.approx(expected, rel=1e-6)
        assert pool.top_MN[number].tolist() == log_probs.argmax(1).tolist()
