"""Wrong usage gets one clear sentence and status 2, no traceback, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import cli, ensemble, rebuild, search
from results.schema import DataWarning, UsageError
from results.store import Experiment
from tests.conftest import CommandLine
from tests.simulation import LEARNING, new_experiment, run_search, run_with_predictions


def status_and_error(main: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """What a command line would exit with and print on standard error."""
    try:
        status = main(arguments)  # type: ignore[operator]
    except UsageError as error:
        return cli.WRONG_USAGE, str(error)
    except SystemExit as error:
        return int(error.code or 0), capsys.readouterr().err
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifra"], "no search space 'cifra'; there are cifar10, cifar100, cifar100_conditional, cifar100_resnet18"),
        (["digits", "--dataset", "mnist"], "no dataset 'mnist'; there are digits, cifar10, cifar100, folder:PATH"),
        (["digits", "--backbone", "vgg"], "no backbone 'vgg'; there are small_cnn, efficient200k, resnet18"),
        (["digits", "--set", "backbone=vgg"], "no backbone 'vgg'"),
        (["digits", "--set", "droput=1"], "no field 'droput'; there are dataset"),
        (["digits", "--set", "dropout=2"], r"dropout=2.0: wanted a number in [0, 1)"),
        (["digits", "--num-trials", "0"], "'0': wanted a whole number, 1 or more"),
        (["digits", "--num-trials", "-3"], "wanted a whole number, 1 or more"),
        (["digits", "--max-epochs", "0"], "wanted a whole number, 1 or more"),
        (["digits", "--train-fraction", "0"], "'0': wanted a fraction in (0, 1]"),
        (["digits", "--train-fraction", "1.5"], "wanted a fraction in (0, 1]"),
        (["digits", "--seed", str(2**63)], "wanted 0 or more, below 2**32"),
        (["digits", "--set", "seed=3"], "give --seed"),
        (["digits", "--name", "x" * 300], "use up to 100 letters"),
        (["digits", "--halving", "half"], "invalid choice: 'half'"),
        (["digits", "--name", "a/b"], "'a/b' is not a name"),
        (["digits", "--resume", "--name", "gone"], "there is no experiment 'gone'"),
        (["digits", "--warm-start", "gone"], "there is no experiment 'gone'"),
        (
            ["digits", "--results-dir", "ftp://host/x"],
            "wanted a local folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
        ),
        (["digits", "--results-dir", str(Path(__file__))], "test_bad_input.py; choose another --results-dir"),
        (["digits", "--dataset", "folder:nowhere"], "is not a folder"),
        (["digits", "--dataset", "parquet:nowhere"], "no parquet files"),
    ],
)
def test_wrong_searches_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, error = status_and_error(search.main, arguments, capsys)
    assert status == 2
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selection", "best"], "invalid choice: 'best' (choose from diverse, greedy, greedy_accuracy,"),
        (["--combiner", "sum"], "invalid choice: 'sum' (choose from mean, weighted, vote"),
        (["--max-cost", "0"], "'0': wanted a number above 0"),
        (["--top-k", "0"], "'0': wanted a whole number, 1 or more"),
        (["--experiment", "gone"], "there is no experiment 'gone'"),
    ],
)
def test_wrong_ensembles_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_search(new_experiment(tmp_path), LEARNING, num_trials=4)
    status, error = status_and_error(ensemble.main, ["--results-dir", str(tmp_path), *arguments], capsys)
    assert status == 2
    said, choose_from, listed = error.partition("(choose from ")
    assert message in said + choose_from + listed.replace("'", "")  # Python 3.12 has no quotes there


def test_an_ensemble_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no experiments in .*; make one with python -m orchestrator.search digits"):
        ensemble.main(["--results-dir", str(tmp_path)])
    run_search(new_experiment(tmp_path), LEARNING, num_trials=4)  # simulated: no predictions
    with pytest.raises(UsageError, match=r"no experiment in .* has two or more completed trials"):
        ensemble.main(["--results-dir", str(tmp_path)])


def test_too_few_completed_trials_offers_the_stopped_ones(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_with_predictions(experiment, num_trials=10)
    trials = experiment.trials()
    completed, stopped = ((trials["status"] == s).sum() for s in ("completed", "pruned"))
    assert completed < 9 <= completed + stopped
    with pytest.raises(
        UsageError,
        match=rf"--top-k 9 but only {completed} completed trials in sim; lower it, search longer, "
        rf"name more experiments, "
        rf"or add --include-stopped for {stopped} more",
    ):
        ensemble.main(["--results-dir", str(tmp_path), "--top-k", "9"])
    assert ensemble.main(["--results-dir", str(tmp_path), "--top-k", "9", "--include-stopped"]) == 0


def test_damaged_predictions_are_named_and_the_others_used(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_with_predictions(experiment, num_trials=10)
    completed = experiment.trials().query("status == 'completed'")["trial_id"].tolist()
    path = experiment.root / "predictions" / f"{completed[0]}.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.warns(DataWarning, match=rf"1 stored predictions of sim are not whole.*{completed[0]}.parquet"):
        assert ensemble.main(["--results-dir", str(tmp_path), "--top-k", "2"]) == 0
    assert f"sim/{completed[0]}" not in Experiment.open(tmp_path, "sim").history.ensembles[0].members


def test_experiments_with_other_splits_are_not_pooled(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_with_predictions(new_experiment(tmp_path, name=name), num_trials=6)
    arguments = ["--results-dir", str(tmp_path), "--top-k", "3", "--experiment", "one", "two"]
    assert ensemble.main(arguments) == 0
    log = next((tmp_path / "two" / "events").iterdir())
    text = log.read_text()
    old = Experiment.open(tmp_path, "two").info["split_hash"]
    log.write_text(text.replace(old, "f" * 16))
    with pytest.raises(UsageError, match=r"different splits and cannot be pooled: one .*, two ffff"):
        ensemble.main(arguments)


def test_an_experiment_that_is_being_searched_cannot_be_ensembled(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_with_predictions(experiment, num_trials=6)
    with experiment.driving(), pytest.raises(UsageError, match="being written to by another process"):
        ensemble.main(["--results-dir", str(tmp_path), "--top-k", "2"])


def test_rebuild_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_search(new_experiment(tmp_path), LEARNING, num_trials=3)
    assert rebuild.main(["sim", "--results-dir", str(tmp_path)]) == 0
    assert "sim: rebuilt 3 rows of trials/" in capsys.readouterr().out


def test_errors_reach_the_user_as_one_line_and_status_2(command: CommandLine) -> None:
    done = command("orchestrator.search", "cifra")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no search space 'cifra'")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
